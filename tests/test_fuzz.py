"""Damaged files. A reader gives what is right or raises one clear line: no traceback, no hang, no
partial file, no row lost in silence.

Every input is drawn from its kind and its number alone, and a failure names both.
"""
import contextlib
import dataclasses
import faulthandler
import hashlib
import importlib.util
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece as spm
import torch
from safetensors.torch import load_file, save_file

import data
import train
from model import T5, T5Config, load_t5, load_tokenizer, save_t5
from run.files import write_tensors
from run.report import exit_cleanly
from run.folder import Run, load_trained, read_config, trainable
from vision.features import Features, read_image
from vision.tasks import TASKS as PICTURES

SECONDS = 5  # for one input
ROWS = 150
WIDTHS = dict(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4,
              relative_attention_num_buckets=8)
ODD = ("", "\n", "two\nlines", "\0", "\ud800", "../x", "/etc/passwd", "a" * 300, "é" * 10_000,
       "\r\x1b[31m", "x" * 10**5)  # names and texts
ABSURD = (*map(json.dumps, (  # values as JSON has them, or nearly
    None, True, False, -1, 0, 1, 2, 3, 7, 16, 101, 2**20, 10**9, 10**12, 2**63, -2**64, 16.0, 0.5,
    -0.0, 1e308, "16", [], {}, [16], {"a": [None]}, *ODD)),
    "NaN", "Infinity", "-Infinity", "1e999", "1" * 5000, "-" + "9" * 4000, "[" * 50 + "]" * 50,
    "[" * 900 + "]" * 900, "[" * 10**5, '{"a":' * 10**4, "01", "0x10", "'16'", "", "//",
    '"\\ud800"', '"\\u0000"')


# --------------------------------------------------------------------------------------- damage

def strike(draw, whole, head=0):
    """Cut, flip, take out, put in, overwrite; half of the blows fall on the first `head` bytes."""
    hit = bytearray(whole)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        most = min(head, len(hit)) if head and draw.random() < 0.5 else len(hit)
        at, size = draw.randrange(most), draw.choice((1, 2, 8, 100, 5000))
        blow = draw.choice(("cut", "flip", "flip", "flip", "out", "in", "zero", "noise", "twice"))
        part = hit[at:at + size]
        if blow == "flip":
            hit[at] ^= 1 << draw.randrange(8)
        elif blow in ("in", "twice"):
            hit[at:at] = part if blow == "twice" else draw.randbytes(size)
        else:
            hit[at:None if blow == "cut" else at + size] = {
                "zero": bytes(len(part)), "noise": draw.randbytes(len(part))}.get(blow, b"")
        if not hit:
            break
    return bytes(hit)


def absurd_json(draw, content):
    """The dict as JSON, with a few values, keys or both that nobody would write."""
    items = [(json.dumps(key), json.dumps(value)) for key, value in content.items()]
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(items))
        key, was = items[at]
        like = {"true": "1", "false": "0"}.get(was, f"{was}.0" if was.isdigit() else f"[{was}]")
        value = draw.choice((like, draw.choice(ABSURD), draw.choice(ABSURD)))
        key = draw.choice((key, key, key, json.dumps(draw.choice(ODD))))
        change = draw.choice(("replace", "replace", "replace", "add", "drop"))
        drop = change == "drop" and len(items) > 1
        items[at:at + (change != "add")] = [] if drop else [(key, value)]
    text = "{" + ", ".join(f"{key}: {value}" for key, value in items) + "}"
    return draw.choice(ABSURD) if draw.random() < 0.05 else text


def spoiled_json(draw, whole):
    if draw.random() < 0.3:
        return strike(draw, whole)
    return absurd_json(draw, json.loads(whole)).encode("utf-8", "surrogatepass")


def misfitting(draw, whole):
    """A safetensors file whose header says something else than it should."""
    end = 8 + int.from_bytes(whole[:8], "little")
    header, tensors = json.loads(whole[8:end]), whole[end:]
    name = draw.choice([key for key in header if key != "__metadata__"])
    entry, (start, end) = header[name], header[name]["data_offsets"]
    change = draw.choice(("dtype", "shape", "offsets", "drop", "add", "rename", "json", "length",
                          "metadata"))
    if change == "length":
        size = draw.choice((0, 1, 2, 2**31, 2**63, 2**64 - 1, len(whole), 100 * 2**20))
        return size.to_bytes(8, "little") + whole[8:]
    if change == "dtype":
        entry["dtype"] = draw.choice(("I32", "U32", "F33", "f32", "F16", "F64", "BOOL", "F4"))
    elif change == "shape":
        entry["shape"] = draw.choice(([], [0], entry["shape"][::-1], [1, *entry["shape"]],
                                      [10**9] * 3, [-1], [2**64], [1.5], "16", None))
    elif change == "offsets":
        entry["data_offsets"] = draw.choice((
            [0, end - start], [end, start], [start - 4, end - 4], [start, end + 4],
            [start, 2**63], [-4, 0], [0], [], None, "0"))
    elif change == "drop":
        del header[name]
    elif change == "add":
        place = [len(tensors), len(tensors) + 16]
        header[draw.choice(("more", *ODD))] = {"dtype": "F32", "shape": [4], "data_offsets": place}
        tensors += bytes(16)
    elif change == "rename":
        header[draw.choice(("other", *ODD))] = header.pop(name)
    elif change == "metadata":
        header["__metadata__"] = draw.choice((None, [], 5, {"format": None}, {"format": 5},
                                              {"": ""}, {"format": "tf"}, {"x": "y" * 10**5}))
    text = absurd_json(draw, header) if change == "json" else json.dumps(header)
    content = text.encode("utf-8", "surrogatepass")
    return len(content).to_bytes(8, "little") + content + tensors


# ----------------------------------------------------------------------------------- whole files

def table(task, file):
    """Header, or none, and rows that all differ, of a file of the task."""
    if file == "mrpc_dev_ids.tsv":
        return [], [f"{i}\t{i + 7}" for i in range(0, ROWS, 4)]
    columns = task.header or ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
    if task.name not in ("cola", "mrpc"):
        columns = [*task.fields.values(), task.label]
    rows, words = [], task.words if "entailment" in task.words else [*map(str, range(2))]
    for i in range(ROWS):
        cells = {task.label: words[i % len(words)] if task.words else str(i % 50 / 10),
                 "#1 ID": str(i), "#2 ID": str(i + 7)}
        text = f'“{i}” {file} it\'s "quoted" – ☃ '
        rows.append("\t".join(cells.get(column, text + column) for column in columns))
    return ([] if task.header else ["\t".join(columns)]), rows


def write_tables(folder, task, files):
    (folder / data.TASKS[task].title).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / data.TASKS[task].title / name).write_bytes(content)


def lines_of(lines):
    return "".join(line + "\n" for line in lines).encode()


class Shop:
    """The whole files, a folder for damaged ones, and what reading the whole ones gives."""

    def __init__(self, folder):
        self.here, self.made = folder / "here", folder / "made"
        self.backbone, self.run = self.made / "backbone", self.made / "run"
        self.here.mkdir()
        self.backbone.mkdir(parents=True)
        words = [word for task in data.TASKS.values() for word in task.words]
        text = [*words, "sst2 sentence: a good film", "the dull plot of a story", *"0123456789."]
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(text * 3), model_prefix=str(self.backbone / "spiece"),
            vocab_size=80, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
            num_threads=1, minloglevel=2)
        torch.manual_seed(0)
        vocabulary = load_tokenizer(self.backbone).vocab_size + 3
        save_t5(T5(T5Config(vocab_size=vocabulary, **WIDTHS)), self.backbone)
        self.weights = (self.backbone / "model.safetensors").read_bytes()
        self.config = (self.backbone / "config.json").read_bytes()
        self.state = dict(load_t5(self.backbone).state_dict())
        self.tables, self.examples = {}, {}  # task: {file: header, rows}, {line: its example}
        for task in data.TASKS.values():
            self.add(task)
        command = ["--model", self.backbone, "--data", self.made / "glue", "--out", self.run,
                   *"--task sst2 --r 4 --init random --max-steps 1 --max-train-rows 8 "
                   "--batch-size 64 --device cpu".split()]
        train.main([*map(str, command)])
        self.ladder, _ = train.load(self.run)
        self.learned = load_file(self.run / "trained.safetensors")
        self.optimizer = torch.optim.AdamW(trainable(self.ladder).values())
        sum(p.sum() for p in trainable(self.ladder).values()).backward()
        self.stopped = self.made / "stopped"  # a run in the middle
        self.stopped.mkdir()
        run = Run(self.stopped, RUN, {}, resume=False)
        run.begin()
        run.log({"step": 1, "loss": 0.5})
        run.step = 3
        run.end_epoch(self.ladder, self.optimizer, {"score": 50.0})

    def add(self, task):
        tables = self.tables[task.name] = {name: table(task, name) for name in task.files}
        write_tables(self.made / "glue", task.name, {
            name: lines_of(header + rows) for name, (header, rows) in tables.items()})
        dataset = task.load(str(self.made / "glue"))
        found = {marker(example.source): example
                 for example in [*dataset.train, *dataset.val, *dataset.test]}
        rows = [row for _, rows in tables.values() for row in rows if "“" in row]
        self.examples[task.name] = {row.encode(): found[marker(row)] for row in rows}
        assert dataset.skipped == 0 and len(found) == len(rows) >= ROWS


RUN = {"task": "sst2", "lr": 0.1, "keep": None}


def marker(text):
    return re.findall("“.*?it's", text)[0]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Shop(tmp_path_factory.mktemp("fuzz"))


# ----------------------------------------------------------------------------------------- kinds
# Each makes damaged input number `draw` below `here`, reads it, and checks what it got.

def load_backbone(shop, config=None, model=None, damaged_values=False):
    """The T5 of these bytes: with the names and shapes of the whole one, and its values."""
    (shop.here / "config.json").write_bytes(shop.config if config is None else config)
    if model is not None or not list(shop.here.glob("*.index.json")):
        (shop.here / "model.safetensors").write_bytes(shop.weights if model is None else model)
    loaded = load_t5(shop.here)
    found = loaded.state_dict()
    assert found.keys() == shop.state.keys() and type(loaded.config.num_heads) is int
    assert 0 <= loaded.config.dropout_rate < 1 and 0 <= loaded.config.layer_norm_epsilon <= 1
    for name, tensor in shop.state.items():
        assert found[name].dtype == torch.float32 and found[name].shape == tensor.shape
        assert damaged_values or torch.equal(found[name], tensor), "other weights"


def configs(draw, shop):
    load_backbone(shop, config=spoiled_json(draw, shop.config))


def safetensors(draw, shop):
    """A blow at the numbers only cannot be noticed: a folder's files have no checksum."""
    size = 8 + int.from_bytes(shop.weights[:8], "little")
    if draw.random() < 0.5:
        hit = strike(draw, shop.weights, head=size)
        load_backbone(shop, model=hit, damaged_values=hit[size:] != shop.weights[size:])
        assert len(hit) == len(shop.weights)
    else:
        load_backbone(shop, model=misfitting(draw, shop.weights), damaged_values=True)


def shard_index(draw, shop):
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    state = load_file(shop.backbone / "model.safetensors")
    where = {key: names[i % 2] for i, key in enumerate(sorted(state))}
    for name in names:
        if draw.random() < 0.9:
            save_file({key: state[key] for key in state if where[key] == name}, shop.here / name)
    odd = draw.choice((*ODD, "..", ".", "x.safetensors", "../model.safetensors", "a/../x",
                       "a\0.safetensors", "\ud800.safetensors", "x" * 5000 + ".safetensors"))
    text = draw.choice((
        lambda: absurd_json(draw, {"metadata": {}, "weight_map": where}),
        lambda: '{"weight_map": ' + absurd_json(draw, where) + "}",
        lambda: json.dumps({"weight_map": where | {draw.choice(sorted(where)): odd}}),
        lambda: json.dumps({"weight_map": dict.fromkeys(where, odd)})))()
    content = text.encode("utf-8", "surrogatepass")
    content = strike(draw, content) if draw.random() < 0.2 else content
    (shop.here / "model.safetensors.index.json").write_bytes(content)
    load_backbone(shop)


def spoil(draw, line):
    """What becomes of one row: other lines, as bytes."""
    cells, row = line.split("\t"), line.encode()
    odd = draw.choice(("7", "", " 1", "1.0", "nan", "inf", "1e9", "5.0001", "-0.1", "entailment ",
                       "ENTAILMENT", "１", "0\0", "-"))
    return draw.choice((
        ["\t".join(cells[:-1]).encode()], [row + b"\tmore"], [row + b"\t" * 100_000],
        [b"", b" ", b"\r"][:draw.randint(1, 3)], ["\t".join([*cells[:-1], odd]).encode()],
        [row[:row.find("☃".encode()) + 1] or b"\xff"], [row, row], [],
        [line.replace("“", "x" * 300_000 + "\u2028“").encode()],
        [line.replace("“", '"“').encode(), b'"'], [line.replace("“", "\r“").encode()],
        [line.replace("“", "\x0b\x0c\x1c\x85\u2029\0“").encode()]))


def tables(draw, shop):
    """Rows that are spoiled, or bytes. Every row is there or counted, and none has changed."""
    task = draw.choice(list(shop.tables))
    files = {name: ([row.encode() for row in header], [row.encode() for row in rows])
             for name, (header, rows) in shop.tables[task].items()}
    for _ in range(draw.choice((0, 1, 1, 1, 2, 5))):
        rows = draw.choice(list(files.values()))[1]
        if rows:
            at = draw.randrange(len(rows))
            rows[at:at + 1] = spoil(draw, rows[at].decode("utf-8", "replace"))
    for name, (header, rows) in files.items():
        end = draw.choice((b"\n", b"\n", b"\r\n"))
        content = draw.choice((b"", b"\xef\xbb\xbf")) + b"".join(x + end for x in header + rows)
        files[name] = content + end * (draw.random() < 0.05)
    if draw.random() < 0.4:
        name = draw.choice(list(files))
        whole = lines_of(sum(shop.tables[task][name], []))
        files[name] = draw.choice((lambda: strike(draw, whole, head=100), lambda: whole[:200],
                                   lambda: whole.decode().encode("utf-16"),
                                   lambda: strike(draw, whole)))()
    write_tables(shop.here, task, files)
    dataset = data.TASKS[task].load(str(shop.here))
    read, lines = [*dataset.train, *dataset.val, *dataset.test], []
    known = shop.examples[task]
    ids = {tuple(row.split(b"\t")) for row in files.pop("mrpc_dev_ids.tsv", b"").split()}
    for content in files.values():
        content = content.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n")
        lines += content.split(b"\n")[0 if data.TASKS[task].header else 1:]
    lines = [line.removesuffix(b"\r") for line in lines]
    assert len(read) + dataset.skipped == len(lines), "a row was lost"
    assert Counter(known[line] for line in lines if line in known) <= Counter(read), "a change"
    unlabelled = sum(line.endswith(b"\t-") for line in lines)
    assert dataset.skipped - unlabelled <= 0.01 * len(lines), "more than 1 % were skipped"
    dev = Counter(known[line] for line in lines
                  if line in known and tuple(line.split(b"\t")[1:3]) in ids)
    assert dev <= Counter([*dataset.val, *dataset.test]), "validation rows are trained on"


def zips(draw, shop):
    """A published zip has a known hash: a damaged one leaves nothing, whatever it is."""
    files = shop.made / "glue" / "RTE"
    archive = Path(shutil.make_archive(str(shop.here / "RTE"), "zip", files.parent, "RTE"))
    whole, home = archive.read_bytes(), shop.here / "home"
    hit = strike(draw, whole, head=100) if draw.random() < 0.7 else whole
    archive.write_bytes(hit)
    task = dataclasses.replace(data.TASKS["rte"], downloads={
        "RTE.zip": hashlib.sha256(whole).hexdigest()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CACHE", str(home))
        patch.setenv("GLUE_BASE_URL", shop.here.as_uri())
        try:
            task.load()
        finally:
            there = {path.name: path.read_bytes() for path in home.rglob("*") if path.is_file()}
            assert there == ({name: (files / name).read_bytes() for name in task.files}
                             if hit == whole else {}), "a file that is not whole"


def pictures(draw, shop):
    from PIL import Image
    kind = draw.choice(("PNG", "JPEG", "GIF", "BMP", "WEBP"))
    mode = draw.choice(("RGB", "L", "P", "RGBA", "I;16")) if kind == "PNG" else "RGB"
    size, file = (draw.randint(1, 30), draw.randint(1, 30)), io.BytesIO()
    Image.effect_noise(size, 50).convert(mode).save(file, kind)
    path = shop.here / f"x.{kind.lower()}"
    path.write_bytes(strike(draw, file.getvalue(), head=50))
    image = read_image(path)
    assert image.dtype == torch.uint8 and image.dim() == 3 and image.size(2) == 3


def shards_of_features(draw, shop):
    path, values = shop.here / "shard-1.safetensors", torch.randn(3, 4, 5).half()
    write_tensors(path, {"features": values}, {"keys": '["a", "b", "c"]'})
    whole = path.read_bytes()
    path.write_bytes(draw.choice((strike, misfitting))(draw, whole))
    features = Features()
    features.add(path)
    assert torch.equal(features.lookup([("b",), ("a",)])[:, 0], values[[1, 0]].float())


def questions(draw, shop):
    """easy-VQA's rows: each that is as it was is there, each other one there or counted."""
    rows = [json.dumps([f"question {i}?", f"answer {i % 9}", i // 2]) for i in range(ROWS)]
    whole = Counter(rows)
    for _ in range(draw.choice((0, 1, 1, 2))):
        at = draw.randrange(ROWS)
        rows[at] = draw.choice((lambda: draw.choice(ABSURD), lambda: json.dumps([0, *ODD[:2]]),
                                lambda: rows[at].replace('"', draw.choice(ABSURD), 1),
                                lambda: f"[{rows[at]}]", lambda: rows[at][:-1] + ", 1]"))()
    content = f"[{', '.join(rows)}]".encode("utf-8", "surrogatepass")
    content = strike(draw, content, head=20) if draw.random() < 0.3 else content
    (shop.here / "questions.json").write_bytes(content)
    dataset = PICTURES["easy-vqa"].load(str(shop.here))
    read, given = [*dataset.train, *dataset.val, *dataset.test], json.loads(content)
    assert len(read) + dataset.skipped == len(given) and dataset.skipped <= 0.01 * len(given)
    known = Counter(json.dumps([example.source.removeprefix("vqa: "), *example.answers,
                                int(example.images[0])]) for example in read)
    assert known >= whole & Counter(map(json.dumps, given)), "a row was lost or has changed"


def stopped_runs(draw, shop):
    """State, log, config or weights of a run that shall go on: it does so exactly, or not."""
    shutil.copytree(shop.stopped, shop.here, dirs_exist_ok=True)
    path = draw.choice(sorted(shop.here.iterdir()))
    how = {"config.json": spoiled_json, "metrics.jsonl": strike}.get(
        path.name, draw.choice((strike, misfitting)))
    if draw.random() < 0.15:
        path.unlink()
    else:
        path.write_bytes(how(draw, path.read_bytes()))
    run = Run(shop.here, RUN, {}, resume=True)
    if not run.load(shop.ladder, shop.optimizer):
        assert path.name == "state.safetensors" and not path.exists(), "it begins anew"
        return
    assert (run.step, run.epochs, run.best["epoch"]) == (3, 1, 1)
    for _ in ("the state", "what was trained"):
        own = trainable(shop.ladder)
        assert all(torch.equal(own[name], tensor) for name, tensor in shop.learned.items())
        load_trained(shop.here, shop.ladder)
    assert read_config(shop.here) == RUN


KINDS = {configs: 1000, safetensors: 1000, shard_index: 400, tables: 1200, zips: 200,
         shards_of_features: 200, questions: 500, stopped_runs: 500}
if importlib.util.find_spec("PIL"):
    KINDS[pictures] = 400


# ----------------------------------------------------------------------------------------- tests

def outcome(kind, number, shop):
    """Read one input as the command line would: "read", or "refused" in one line."""
    for path in shop.here.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    signal.alarm(SECONDS)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            exit_cleanly(lambda: kind(random.Random(f"{kind.__name__} {number}"), shop))
        return "read"
    except SystemExit as stop:
        line = said.getvalue().removesuffix("\n")
        if stop.code in (130, 143):
            raise KeyboardInterrupt from None
        assert stop.code == 2 and line.startswith("error: ") and line.isprintable(), line[:700]
        assert len(line) <= 600, f"not one clear line: {line[:700]}"
        assert str(shop.here) in line or "T5 config: " in line, f"names no file: {line}"
        return "refused"
    finally:
        signal.alarm(0)
        assert not list(shop.here.rglob("*.partial")), "a partial file is left"


@pytest.fixture
def alarm():
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"longer than {SECONDS} s"))
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("share", [20, pytest.param(1, marks=pytest.mark.slow)])
def test_thousands_of_damaged_files_are_read_rightly_or_refused_in_one_line(
        shop, alarm, capfd, share):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wrong, report, kinds = [], Counter(), {kind: KINDS[kind] // share for kind in KINDS}
    for kind, count in kinds.items():
        for number in range(count):
            try:
                report[kind, outcome(kind, number, shop)] += 1
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a panic in Rust and pytest.fail are no Exception
                error = f"{type(error).__name__}: {str(error)[:400]}"
                wrong.append(f"{kind.__name__} {number}: {error}")
    said = capfd.readouterr()
    with capfd.disabled():
        print(f"\n{sum(kinds.values())} damaged inputs, {len(wrong)} wrong", *(
            f"\n  {kind.__name__:<20}{count:>5} inputs {report[kind, 'read']:>5} read "
            f"{report[kind, 'refused']:>5} refused" for kind, count in kinds.items()))
    assert not wrong, "\n".join(wrong[:20])
    assert sum(report.values()) == sum(kinds.values()) >= 5000 / share
    for kind in kinds:  # each proves something; a checksum refuses all
        assert report[kind, "refused"] and (report[kind, "read"] or kind is shards_of_features)
    assert said == ("", ""), f"something was printed: {said}"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown * (1 if sys.platform == "darwin" else 1024) < 500e6, "for files of some kB"


OUTCOMES = {"read": 0, "refused": 1, "SentencePiece ended the process": -signal.SIGSEGV}


@pytest.mark.slow
def test_damaged_tokenizers(shop, alarm, capfd):
    """SentencePiece checks little: a flipped byte can end the process. So each runs in a child, and
    such ends are counted; public tokenizers and those of runs are checked by sha256."""
    texts = ("sst2 sentence: a good film", "", "Ａ ﬁ ½ \u3000 株式会社 \U0001f600 é",
             "<extra_id_3> " + "".join(map(chr, range(32, 0x3000, 5))))

    def tokenizers(draw, shop):
        whole = (shop.backbone / "spiece.model").read_bytes()
        (shop.here / "spiece.model").write_bytes(strike(draw, whole, head=3000))
        tokenizer = load_tokenizer(shop.here)
        for text in texts:
            ids = tokenizer.encode(text)
            assert all(0 <= i < tokenizer.vocab_size for i in ids)
            assert type(tokenizer.decode(ids)) is str

    report = Counter()
    for number in range(250):
        if not (child := os.fork()):
            faulthandler.disable()
            said = 3
            with contextlib.suppress(BaseException):
                said = ("read", "refused").index(outcome(tokenizers, number, shop))
            os._exit(said)
        report[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])] += 1
    with capfd.disabled():
        print("\ntokenizers:", {name: report[code] for name, code in OUTCOMES.items()})
    assert report.keys() <= set(OUTCOMES.values()) and report[0] and report[1]
    assert report[-signal.SIGSEGV] < 0.05 * report.total()


# ------------------------------------------------------------------------------ the command line

def hit(name, change):
    def damage(folder):
        path = next(folder.rglob(name))
        path.write_bytes(change(path.read_bytes()))
    return damage


def set_config(**values):
    return hit("config.json", lambda whole: json.dumps(json.loads(whole) | values).encode())


def flip(place):
    """One bit, at this part of the file."""
    def change(whole):
        at = int(place * len(whole))
        return whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:]
    return change


def shards_elsewhere(folder):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = '{"weight_map": {"shared.weight": "../model.safetensors"}}'
    (folder / "model.safetensors.index.json").write_text(index)


COMMANDS = {  # (which folder is damaged, how, what is said by a run that can still be right)
    "model cut": ("backbone", hit("model.safetensors", lambda whole: whole[:-100]), None),
    "its header flipped": ("backbone", hit("model.safetensors", flip(0.02)), None),
    "its header is 2^63 bytes": ("backbone", hit(
        "model.safetensors", lambda whole: (2**63).to_bytes(8, "little") + whole[8:]), None),
    "a value flipped": ("backbone", hit("model.safetensors", flip(0.9)), ""),
    "shards elsewhere": ("backbone", shards_elsewhere, None),
    "10^12 layers": ("backbone", set_config(num_layers=10**12), None),
    "a vocabulary of a million": ("backbone", set_config(vocab_size=2**20), None),
    "config with more": ("backbone", set_config(more=[1, {}]), ""),
    "tokenizer cut": ("backbone", hit("spiece.model", lambda all: all[:len(all) // 2]), None),
    "BOM, CRLF, quotes": ("data", hit("train.tsv", lambda whole: (
        b"\xef\xbb\xbf" + whole.replace(b"\n", b"\r\n").replace(b"it", b'"it'))), ""),
    "a short row": ("data", hit("train.tsv", lambda whole: whole + b"short\n"), "1 skipped"),
    "three rows": ("data", hit("train.tsv", lambda whole: whole + b"a\nb\t1\tc\n\n"), None),
    "empty lines": ("data", hit("dev.tsv", lambda all: all.replace(b"\n", b"\n\n")), None),
    "no UTF-8": ("data", hit("train.tsv", lambda whole: whole + b"caf\xe9\t1\n"), None),
    "UTF-16": ("data", hit("dev.tsv", lambda whole: whole.decode().encode("utf-16")), None),
    "a giant": ("data", hit("train.tsv", lambda whole: whole + b"giant " * 10**5 + b"\t1\n"), ""),
    "a tab": ("data", hit("dev.tsv", lambda whole: whole[:-2] + b"\r1\n"), "1 skipped"),
    "weights cut": ("run", hit("trained.safetensors", lambda whole: whole[:-1]), None),
    "weights flipped": ("run", hit("trained.safetensors", flip(0.9)), None),
    "zip cut": ("zip", hit("RTE.zip", lambda whole: whole[:-100]), None),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_says_one_line(shop, tmp_path, monkeypatch, capfd, name):
    what, damage, right = COMMANDS[name]
    folders = {"backbone": shop.backbone, "data": shop.made / "glue", "run": shop.run}
    if what == "zip":
        shutil.make_archive(tmp_path / "zip" / "RTE", "zip", shop.made / "glue", "RTE")
    else:
        folders[what] = shutil.copytree(folders[what], tmp_path / what,
                                        ignore=lambda *_: {"RTE", "MNLI", "QQP", "QNLI"})
    damage(tmp_path / what / "SST-2" if what == "data" else tmp_path / what)
    monkeypatch.setattr(data, "CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GLUE_BASE_URL", (tmp_path / "zip").as_uri())
    out = folders["run"] if what == "run" else tmp_path / "out"
    command = ["--out", out, *(["--predict", "a good film"] if what == "run" else [
        "--task", "rte" if what == "zip" else "sst2", "--model", folders["backbone"],
        *(["--data", folders["data"]] if what != "zip" else []), "--device", "cpu",
        *"--init magnitude --r 4 --max-steps 1 --batch-size 64".split()])]

    def files():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = files()
    with contextlib.suppress(SystemExit) if right is None else contextlib.nullcontext():
        assert train.main([*map(str, command)]) and right is not None
    said = capfd.readouterr()
    if right is None:
        line = said.err.removesuffix("\n")
        assert line.startswith("error: ") and line.isprintable() and len(line) < 700, line
        assert files() == before, "something was written"
    else:
        assert not said.err and right in said.out and ("skipped" in said.out) == bool(right)
        assert (out / "results.json").is_file()

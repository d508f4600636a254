"""Damaged files. A reader gives what is right or raises one clear line: no traceback, no hang, no
partial file, no row lost in silence. Every input is drawn from its kind and its number only, and a
failure names both. (Damaged pictures: vision/test_features.py; downloads: run/test_hub.py.)"""
import contextlib
import io
import json
import random
import re
import resource
import shutil
import signal
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import data
import train
from model import load_t5
from run.folder import Run, load_trained, read_config, trainable
from run.report import exit_cleanly
from vision.tasks import TASKS as PICTURES
from workshop import contents

SECONDS = 5  # for one input
ROWS = 150
MARKER = re.compile("“.*?it's")  # no two rows have the same
RUN = {"task": "sst2", "lr": 0.1, "keep": None}
ODD = ("", "\n", "two\nlines", "\0", "\ud800", "../x", "/etc/passwd", "é" * 10_000, "\r\x1b[31m",
       "x" * 10**5)  # names and texts
ABSURD = (*map(json.dumps, (  # values as JSON has them, or nearly
    None, True, False, -1, 0, 1, 3, 16, 101, 2**20, 10**9, 10**12, 2**63, -2**64, 16.0, 0.5, 1e308,
    "16", [], {}, [16], {"a": [None]}, *ODD)), "NaN", "-Infinity", "1e999", "1" * 5000,
    "[" * 900 + "]" * 900, "[" * 10**5, '{"a":' * 10**4, "01", "0x10", "'16'", "", '"\\ud800"')


# --------------------------------------------------------------------------------------- damage

def strike(draw, whole, head=0):
    """Cut, flip, take out, put in, overwrite; half of the blows fall on the first `head` bytes."""
    hit = bytearray(whole)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        most = min(head, len(hit)) if head and draw.random() < 0.5 else len(hit)
        at, size = draw.randrange(most), draw.choice((1, 2, 8, 100, 5000))
        blow = draw.choice(("cut", "flip", "flip", "flip", "out", "in", "zero", "noise", "twice"))
        part, noise = hit[at:at + size], draw.randbytes(size)
        if blow == "flip":
            hit[at] ^= 1 << draw.randrange(8)
        elif blow in ("in", "twice"):
            hit[at:at] = part if blow == "twice" else noise
        else:
            hit[at:None if blow == "cut" else at + size] = {
                "zero": bytes(len(part)), "noise": noise[:len(part)]}.get(blow, b"")
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
    size = 8 + int.from_bytes(whole[:8], "little")
    header, tensors = json.loads(whole[8:size]), whole[size:]
    name = draw.choice([key for key in header if key != "__metadata__"])
    entry, (start, end) = header[name], header[name]["data_offsets"]
    change = draw.choice(("dtype", "shape", "data_offsets", "rename", "drop", "json", "length"))
    if change == "length":
        size = draw.choice((0, 1, 2, 2**31, 2**63, 2**64 - 1, len(whole), 100 * 2**20))
        return size.to_bytes(8, "little") + whole[8:]
    if change in ("rename", "drop"):
        del header[name]
    if change == "rename":
        header[draw.choice(("other", *ODD))] = entry
    if change in entry:
        entry[change] = draw.choice({
            "dtype": ("I32", "U32", "F33", "f32", "F16", "F64", "BOOL", "F4"),
            "shape": ([], [0], entry["shape"][::-1], [1, *entry["shape"]], [10**9] * 3, [-1],
                      [2**64], [1.5], "16", None),
            "data_offsets": ([0, end - start], [end, start], [start - 4, end - 4], [start, end + 4],
                             [start, 2**63], [-4, 0], [0], [], None, "0")}[change])
    text = absurd_json(draw, header) if change == "json" else json.dumps(header)
    content = text.encode("utf-8", "surrogatepass")
    return len(content).to_bytes(8, "little") + content + tensors


# ----------------------------------------------------------------------------------- whole files

def files_of(task):
    """{name: (header, rows)}: no header if the task's files have none, and rows that all differ."""
    columns, files = task.header or [*task.fields.values(), task.label], {}
    for name in ("train.tsv", "dev.tsv") if task.name == "mrpc" else task.files:
        rows = []
        for i in range(ROWS):
            text = f'“{i}” {name} it\'s "quoted" – ☃ '
            label = task.words[i % 2] if "entailment" in task.words else str(i % 2)
            rows.append("\t".join(label if column == task.label else text + column
                                  for column in columns).encode())
        files[name] = ([] if task.header else ["\t".join(columns).encode()]), rows
    return files


def write_tables(folder, task, files):
    (folder / task.title).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / task.title / name).write_bytes(content)


@pytest.fixture(scope="module")
def shop(tmp_path_factory, backbone, learned):
    """The whole files, a folder for damaged ones, and what reading the whole ones gives."""
    folder, shop = tmp_path_factory.mktemp("fuzz"), SimpleNamespace()
    shop.here, shop.stopped = folder / "here", folder / "stopped"
    shop.here.mkdir()
    shop.weights = (backbone / "model.safetensors").read_bytes()
    shop.config = (backbone / "config.json").read_bytes()
    shop.state = dict(load_t5(backbone).state_dict())
    shop.examples = {}  # task: {row: its example}
    for task in data.TASKS.values():
        files = files_of(task)
        write_tables(folder / "glue", task, {
            name: b"\n".join(header + rows) for name, (header, rows) in files.items()})
        dataset = task.load(str(folder / "glue"))
        found = {MARKER.search(example.source)[0]: example
                 for example in [*dataset.train, *dataset.val, *dataset.test]}
        shop.examples[task.name] = {row: found[MARKER.search(row.decode())[0]]
                                    for _, rows in files.values() for row in rows}
    shop.ladder, _ = train.load(learned[0])
    shop.optimizer = torch.optim.AdamW(trainable(shop.ladder).values())
    sum(p.sum() for p in trainable(shop.ladder).values()).backward()
    shop.optimizer.step()
    shop.learned = {name: p.detach().clone() for name, p in trainable(shop.ladder).items()}
    shop.stopped.mkdir()  # a run in the middle
    stopped = Run(shop.stopped, RUN, {}, resume=False)
    stopped.begin()
    stopped.log({"step": 1, "loss": 0.5})
    stopped.step = 3
    stopped.end_epoch(shop.ladder, shop.optimizer, {"score": 50.0})
    return shop


# ----------------------------------------------------------------------------------------- kinds
# Each makes damaged input number `draw` below `here`, reads it, and checks what it got.

def load_backbone(shop, config, model, damaged_values=False):
    """The T5 of these bytes: with the names and shapes of the whole one, and its values."""
    (shop.here / "config.json").write_bytes(config)
    (shop.here / "model.safetensors").write_bytes(model)
    loaded = load_t5(shop.here)
    found = loaded.state_dict()
    assert found.keys() == shop.state.keys() and type(loaded.config.num_heads) is int
    assert 0 <= loaded.config.dropout_rate < 1 and 0 <= loaded.config.layer_norm_epsilon <= 1
    for name, tensor in shop.state.items():
        assert found[name].dtype == torch.float32 and found[name].shape == tensor.shape
        assert damaged_values or torch.equal(found[name], tensor), "other weights"


def configs(draw, shop):
    load_backbone(shop, spoiled_json(draw, shop.config), shop.weights)


def safetensors(draw, shop):
    """A blow at the numbers only cannot be noticed: a folder's files have no checksum."""
    if draw.random() < 0.5:
        return load_backbone(shop, shop.config, misfitting(draw, shop.weights), True)
    size = 8 + int.from_bytes(shop.weights[:8], "little")
    hit = strike(draw, shop.weights, head=size)
    load_backbone(shop, shop.config, hit, damaged_values=hit[size:] != shop.weights[size:])
    assert len(hit) == len(shop.weights)


def spoil(draw, row):
    """What becomes of one row: other lines."""
    cells, quote = row.split(b"\t"), "“".encode()
    odd = draw.choice((b"7", b"", b" 1", b"1.0", b"nan", b"inf", b"1e9", b"5.0001", b"-0.1", b"-",
                       b"entailment ", b"ENTAILMENT", "１".encode(), b"0\0"))
    return draw.choice((
        [b"\t".join(cells[:-1])], [row + b"\tmore"], [row + b"\t" * 100_000], [row, row], [],
        [b"", b" ", b"\r"][:draw.randint(1, 3)], [b"\t".join([*cells[:-1], odd])], [row[:-1], odd],
        [row.replace(quote, b"x" * 300_000 + "\u2028“".encode())],
        [row.replace(quote, b'"' + quote), b'"'], [row.replace(quote, b"\r" + quote)],
        [row[:row.find("☃".encode()) + 1] or b"\xff"],
        [row.replace(quote, "\x0b\x0c\x1c\x85\u2029\0“".encode())]))


def tables(draw, shop):
    """Rows that are spoiled, or bytes. Every row is there or counted, and none has changed."""
    task = data.TASKS[draw.choice(list(data.TASKS))]
    files, known = files_of(task), shop.examples[task.name]
    for _ in range(draw.choice((0, 1, 1, 1, 2, 5))):
        rows = draw.choice(list(files.values()))[1]
        at = draw.randrange(ROWS - 10)
        rows[at:at + 1] = spoil(draw, rows[at])
    for name, (header, rows) in files.items():
        end = draw.choice((b"\n", b"\n", b"\r\n"))
        content = draw.choice((b"", b"\xef\xbb\xbf")) + b"".join(x + end for x in header + rows)
        files[name] = content + end * (draw.random() < 0.05)
    if draw.random() < 0.3:
        name = draw.choice(list(files))
        files[name] = draw.choice((strike(draw, files[name], head=100), files[name][:200],
                                   files[name].decode("utf-8", "replace").encode("utf-16")))
    write_tables(shop.here, task, files)
    dataset, lines = task.load(str(shop.here)), []
    for content in files.values():
        content = content.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").removesuffix(b"\n")
        lines += content.split(b"\n")[0 if task.header else 1:]
    read = [*dataset.train, *dataset.val, *dataset.test]
    assert len(read) + dataset.skipped == len(lines), "a row was lost"
    assert Counter(known[line] for line in lines if line in known) <= Counter(read), "a change"
    unlabelled = sum(b"-" in line.split(b"\t") for line in lines)
    assert dataset.skipped - unlabelled <= 0.01 * len(lines), "more than 1 % were skipped"


def questions(draw, shop):
    """easy-VQA's rows: each that is as it was is there, each other one there or counted."""
    rows = [json.dumps([f"question {i}?", f"answer {i % 9}", i // 2]) for i in range(ROWS)]
    whole = Counter(rows)
    for _ in range(draw.choice((0, 1, 1, 2))):
        at = draw.randrange(ROWS)
        rows[at] = draw.choice((draw.choice(ABSURD), json.dumps([0, *ODD[:2]]), f"[{rows[at]}]",
                                rows[at].replace('"', draw.choice(ABSURD), 1)))
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


KINDS = {configs: 1300, safetensors: 1200, tables: 1500, questions: 500, stopped_runs: 500}


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
        assert len(line) <= 600 and (str(shop.here) in line or "T5 config: " in line), line[:700]
        return "refused"
    finally:
        signal.alarm(0)
        assert not list(shop.here.rglob("*.partial")), "a partial file is left"


@pytest.mark.parametrize("share", [50, pytest.param(1, marks=pytest.mark.slow)])
def test_thousands_of_damaged_files_are_read_rightly_or_refused_in_one_line(shop, capfd, share):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"longer than {SECONDS} s"))
    wrong, report = [], Counter()
    for kind, count in KINDS.items():
        for number in range(count // share):
            try:
                report[kind.__name__, outcome(kind, number, shop)] += 1
            except (Exception, pytest.fail.Exception) as error:
                error = f"{type(error).__name__}: {str(error)[:400]}"
                wrong.append(f"{kind.__name__} {number}: {error}")
    signal.signal(signal.SIGALRM, before)
    said = capfd.readouterr()
    with capfd.disabled():
        print(f"\n{report.total()} damaged inputs:", *report.items(), f"{len(wrong)} wrong")
    assert not wrong, "\n".join(wrong[:20])
    assert report.total() >= 5000 / share and len(report) == 2 * len(KINDS), "each proves something"
    assert said == ("", ""), f"something was printed: {said}"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown * (1 if sys.platform == "darwin" else 1024) < 500e6, "for files of some kB"


# ------------------------------------------------------------------------------ the command line

def set_config(**values):
    return lambda whole: json.dumps(json.loads(whole) | values).encode()


def flip(whole, place=0.9):
    """One bit, at this part of the file."""
    at = int(place * len(whole))
    return whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:]


MODEL, CONFIG, RESULT = "model.safetensors", "config.json", "trained.safetensors"
TRAIN, DEV = "SST-2/train.tsv", "SST-2/dev.tsv"
COMMANDS = {  # (which file is damaged, how, what is said by a run that can still be right)
    "model cut": (MODEL, lambda whole: whole[:-100], None),
    "its header flipped": (MODEL, lambda whole: flip(whole, 0.01), None),
    "2^63 bytes": (MODEL, lambda whole: (2**63).to_bytes(8, "little") + whole[8:], None),
    "a value flipped": (MODEL, flip, ""),
    "10^12 layers": (CONFIG, set_config(num_layers=10**12), None),
    "a vocabulary of a million": (CONFIG, set_config(vocab_size=2**20), None),
    "config with more": (CONFIG, set_config(more=[1, {}]), ""),
    "tokenizer cut": ("spiece.model", lambda whole: whole[:len(whole) // 2], None),
    "BOM, CRLF, quotes": (TRAIN, lambda whole: (
        b"\xef\xbb\xbf" + whole.replace(b"\n", b"\r\n").replace(b"a ", b'"a ')), ""),
    "a short row": (TRAIN, lambda whole: whole + whole[15:] + b"short\n", "1 skipped"),
    "three rows": (TRAIN, lambda whole: whole + b"a\nb\t1\tc\n\n", None),
    "empty lines": (DEV, lambda whole: whole.replace(b"\n", b"\n\n"), None),
    "no UTF-8": (TRAIN, lambda whole: whole + b"caf\xe9\t1\n", None),
    "UTF-16": (DEV, lambda whole: whole.decode().encode("utf-16"), None),
    "a giant": (TRAIN, lambda whole: whole + b"giant " * 10**4 + b"\t1\n", ""),
    "weights cut": (RESULT, lambda whole: whole[:-1], None),
    "weights flipped": (RESULT, flip, None),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_says_one_line(learned, backbone, glue, argv, tmp_path, capfd, name):
    file, damage, right = COMMANDS[name]
    whole = {TRAIN: glue, DEV: glue, RESULT: learned[0]}.get(file, backbone)
    copy = shutil.copytree(whole, tmp_path / "copy")
    (copy / file).write_bytes(damage((copy / file).read_bytes()))
    command = argv("--data" if whole is glue else "--model", copy, "--max-steps", 1)
    if file == RESULT:
        command = ["--out", str(copy), "--predict", "a good film"]
    before = contents(tmp_path)
    with contextlib.suppress(SystemExit) if right is None else contextlib.nullcontext():
        assert train.main(command) and right is not None
    said = capfd.readouterr()
    if right is None:
        line = said.err.removesuffix("\n")
        assert line.startswith("error: ") and line.isprintable() and len(line) < 700, line
        assert contents(tmp_path) == before, "something was written"
    else:
        assert not said.err and right in said.out and ("skipped" in said.out) == bool(right)
        assert (tmp_path / "run" / "results.json").is_file()

"""Damaged files.  A reader gives what is right or raises one clear line: no traceback, no hang, no partial file, no row lost in silence.

Every input is drawn from its kind and its number alone, and a failure names both.
"""
import contextlib
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece as spm
import torch
from safetensors.torch import load_file, save_file

import data
import train
from checkpoint import load_trained, read_config
from model import T5, T5Config, load_t5, load_tokenizer, save_t5

ROOT = Path(train.__file__).parent
SECONDS = 5  # for one input
ROWS = 150
WIDTHS = dict(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, relative_attention_num_buckets=8)
SIZES = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "relative_attention_num_buckets",
         "relative_attention_max_distance")
ODD = ("", "\n", "two\nlines", "\0", "\ud800", "../x", "/etc/passwd", "a" * 300, "é" * 10_000, "\r\x1b[31m", "x" * 10**5)  # names and texts
ABSURD = (*map(json.dumps, (None, True, False, -1, 0, 1, 2, 3, 7, 16, 101, 2**20, 10**9, 10**12, 2**63, -2**64, 16.0, 0.5, -0.0, 1e308, "16", [], {}, [16],
                            {"a": [None]}, *ODD)),
          "NaN", "Infinity", "-Infinity", "1e999", "1" * 5000, "-" + "9" * 4000, "[" * 50 + "]" * 50, "[" * 900 + "]" * 900, "[" * 10**5, '{"a":' * 10**4,
          "01", "0x10", "'16'", "", "//", '"\\ud800"', '"\\u0000"')  # values as JSON has them, or nearly


class Hang(BaseException):
    """No Exception, which a reader might take for its own."""


def hang(*_):
    raise Hang(f"longer than {SECONDS} seconds")


# ---------------------------------------------------------------------------------------------------------------- damage

def strike(draw: random.Random, whole: bytes, head: int = 0) -> bytes:
    """Cut, flip, take out, put in, overwrite; half of the blows fall on the first `head` bytes."""
    hit = bytearray(whole)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        at = draw.randrange(min(head, len(hit)) if head and draw.random() < 0.5 else len(hit))
        blow = draw.choice(("cut", "flip", "flip", "flip", "out", "in", "zero", "noise", "twice"))
        size = draw.choice((1, 2, 8, 100, 5000))
        if blow == "cut":
            del hit[at:]
        elif blow == "flip":
            hit[at] ^= 1 << draw.randrange(8)
        elif blow == "out":
            del hit[at : at + size]
        elif blow == "in":
            hit[at:at] = draw.randbytes(size)
        elif blow == "twice":
            hit[at:at] = hit[at : at + size]
        else:
            size = len(hit[at : at + size])
            hit[at : at + size] = bytes(size) if blow == "zero" else draw.randbytes(size)
        if not hit:
            break
    return bytes(hit)


def absurd_json(draw: random.Random, content: dict) -> str:
    """The dict as JSON, with a few values, keys or both that nobody would write."""
    items = [(json.dumps(key), json.dumps(value)) for key, value in content.items()]
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(items))
        was = items[at][1]
        like = {"true": "1", "false": "0"}.get(was, f"{was}.0" if was.isdigit() else f"[{was}]")  # what only looks the same
        value = draw.choice((like, draw.choice(ABSURD), draw.choice(ABSURD)))
        key = draw.choice((items[at][0], items[at][0], items[at][0], json.dumps(draw.choice(ODD))))
        change = draw.choice(("replace", "replace", "replace", "add", "drop"))
        items[at : at + (change != "add")] = [] if change == "drop" and len(items) > 1 else [(key, value)]
    text = "{" + ", ".join(f"{key}: {value}" for key, value in items) + "}"
    return draw.choice(ABSURD) if draw.random() < 0.05 else text


# ------------------------------------------------------------------------------------------------------------- workshop

def table(task: data.Task, file: str, form: str) -> tuple[list[str], list[str]]:
    """A header, or none, and rows that all differ."""
    columns = [*task.fields.values(), task.label]
    if task.header:
        columns = list(task.header)
    elif task.name == "mrpc":
        columns = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
    rows = []
    for i in range(ROWS):
        label = task.words[i % len(task.words)] if task.labels_are_words else str(i % len(task.words)) if task.words else f"{i % 50 / 10}"
        rows.append("\t".join(label if column == task.label else str(i + 7 * (column == "#2 ID")) if column.endswith("ID")
                              else f'{column} “{i}” of {form} {file}, it\'s "quoted" – ☃' for column in columns))
    return ([] if task.header else ["\t".join(columns)]), rows


class Shop:
    """The whole files, a folder for damaged ones, and what reading the whole ones gives."""

    def __init__(self, folder: Path):
        self.here = folder / "here"
        self.here.mkdir()
        self.made = folder / "made"
        self.backbone = self.made / "backbone"
        self.backbone.mkdir(parents=True)
        labels = [word for task in data.TASKS.values() for word in task.words]
        spm.SentencePieceTrainer.train(sentence_iterator=iter([*labels, "sst2 sentence: a good film", "the dull plot of a story", *"0123456789."] * 3),
                                       model_prefix=str(self.backbone / "spiece"), vocab_size=80, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
                                       num_threads=1, minloglevel=2)
        torch.manual_seed(0)
        save_t5(T5(T5Config(vocab_size=load_tokenizer(self.backbone).vocab_size + 3, **WIDTHS)), self.backbone)
        self.weights = (self.backbone / "model.safetensors").read_bytes()
        self.config = json.loads((self.backbone / "config.json").read_text())
        self.state = dict(load_t5(self.backbone).state_dict())

        self.tables = {}  # (task, form): {file: (header, rows)}
        for task in data.TASKS.values():
            self.tables[task.name, "official"] = {name: table(task, name, "official") for name in task.files}
        texts = self.tables["mrpc", "official"]
        ids = texts["mrpc_dev_ids.tsv"] = [], ["\t".join(row.split("\t")[1:3]) for row in texts["msr_paraphrase_train.txt"][1][::4]]
        assert len(ids[1]) == 38
        self.tables["mrpc", "divided"] = {name: table(data.TASKS["mrpc"], name, "divided") for name in ("train.tsv", "dev.tsv")}
        self.examples = {}  # (task, form): {line: the example it stands for}
        for (task, form), files in self.tables.items():
            glue = self.made / form
            write_tables(glue, task, {name: as_bytes(*content) for name, content in files.items()})
            dataset = data.load(task, str(glue))
            assert dataset.skipped == 0
            found = {(words := example.source.split("“"))[1].partition("”")[0] + words[1].partition(" of ")[2].partition(",")[0]: example
                     for example in [*dataset.train, *dataset.val, *dataset.test]}
            lines = [row for _, rows in files.values() for row in rows if "“" in row]
            self.examples[task, form] = {row.encode(): found[row.split("“")[1].partition("”")[0] + row.partition(" of ")[2].partition(",")[0]] for row in lines}
            assert len(set(self.examples[task, form].values())) == len(lines)

        self.run = self.made / "run"
        train.main(["--task", "sst2", "--model", str(self.backbone), "--data", str(self.made / "official"), "--out", str(self.run), "--r", "4",
                    "--init", "random", "--max-steps", "1", "--max-train-rows", "8", "--batch-size", "64", "--device", "cpu"])
        self.trained = (self.run / "trained.safetensors").read_bytes()
        self.run_config = read_config(self.run)
        self.ladder, _ = train.load(self.run)
        self.learned = load_file(self.run / "trained.safetensors")


def as_bytes(header, rows) -> bytes:
    return "".join(row + "\n" for row in [*header, *rows]).encode()


def write_tables(folder: Path, task: str, files: dict[str, bytes]) -> None:
    (folder / data.TASKS[task].folder).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / data.TASKS[task].folder / name).write_bytes(content)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Shop(tmp_path_factory.mktemp("fuzz"))


def parts(safetensors: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(safetensors[:8], "little")
    return json.loads(safetensors[8 : 8 + size]), safetensors[8 + size :]


def joined(header: str, tensors: bytes) -> bytes:
    text = header.encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + tensors


def misfitting(draw: random.Random, whole: bytes) -> bytes:
    """A safetensors file whose header says something else than it should."""
    header, tensors = parts(whole)
    name = draw.choice([key for key in header if key != "__metadata__"])
    entry, (start, end) = header[name], header[name]["data_offsets"]
    change = draw.choice(("dtype", "shape", "offsets", "drop", "add", "rename", "json", "length", "metadata"))
    if change == "dtype":  # the bytes are there: only the type is another
        kind, bits = draw.choice((("F16", 16), ("BF16", 16), ("F64", 64), ("I32", 32), ("U32", 32), ("I64", 64), ("U8", 8), ("BOOL", 8), ("F8_E4M3", 8),
                                  ("F8_E8M0", 8), ("F8_E5M2", 8), ("F6_E2M3", 6), ("F6_E3M2", 6), ("F4", 4), ("C64", 64), ("F33", 32), ("f32", 32)))
        whole_bytes = (end - start) // 4 * bits // 8
        tensors = tensors[:start] + bytes(whole_bytes) + tensors[end:]
        for other in header.values():
            if "data_offsets" in other and other["data_offsets"][0] >= end:
                other["data_offsets"] = [place + whole_bytes - (end - start) for place in other["data_offsets"]]
        header[name] = {"dtype": kind, "shape": entry["shape"], "data_offsets": [start, start + whole_bytes]}
    elif change == "shape":
        entry["shape"] = draw.choice(([], [0], entry["shape"][::-1], [1, *entry["shape"]], [10**9, 10**9, 10**9], [-1], [2**64], [1.5], "16", None))
    elif change == "offsets":
        entry["data_offsets"] = draw.choice(([0, end - start], [end, start], [start - 4, end - 4], [start, end + 4], [start, 2**63], [-4, 0], [0], [], None, "0"))
    elif change == "drop":
        del header[name]
    elif change == "add":
        header[draw.choice(("more", *ODD))] = {"dtype": "F32", "shape": [4], "data_offsets": [len(tensors), len(tensors) + 16]}
        tensors += bytes(16)
    elif change == "rename":
        header[draw.choice(("other", *ODD))] = header.pop(name)
    elif change == "json":
        return joined(absurd_json(draw, header), tensors)
    elif change == "metadata":
        header["__metadata__"] = draw.choice((None, [], 5, {"format": None}, {"format": 5}, {"": ""}, {"format": "tf"}, {"x": "y" * 10**5}))
    else:
        return draw.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(whole), 100 * 2**20)).to_bytes(8, "little") + whole[8:]
    return joined(json.dumps(header), tensors)


# ---------------------------------------------------------------------------------------------------------------- kinds
# Each makes the damaged input number `draw` below `here`, reads it, and checks what it got.

def is_sane(config: T5Config) -> bool:
    return (all(type(getattr(config, name)) is int and 1 <= getattr(config, name) <= 2**20 for name in SIZES)
            and type(config.tie_word_embeddings) is bool and config.feed_forward_proj in ("relu", "gated-gelu")
            and 0 <= config.dropout_rate < 1 and 0 <= config.layer_norm_epsilon <= 1)


def backbone_with(shop: Shop, **files: bytes) -> Path:
    for name in ("config.json", "model.safetensors"):
        (shop.here / name).write_bytes(files.get(name.partition(".")[0]) or (shop.backbone / name).read_bytes())
    return shop.here


def config_values(draw: random.Random, shop: Shop) -> None:
    folder = backbone_with(shop, config=absurd_json(draw, shop.config).encode("utf-8", "surrogatepass"))
    assert is_sane(T5Config.from_json(folder / "config.json"))
    loaded = load_t5(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in shop.state.items()), "other weights"


def config_bytes(draw: random.Random, shop: Shop) -> None:
    folder = backbone_with(shop, config=strike(draw, (shop.backbone / "config.json").read_bytes()))
    assert is_sane(T5Config.from_json(folder / "config.json"))
    loaded = load_t5(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in shop.state.items()), "other weights"


def safetensors_bytes(draw: random.Random, shop: Shop) -> None:
    """A blow that only hits the numbers cannot be noticed: the public files of a folder have no checksum.  All else must be as it was."""
    size = 8 + int.from_bytes(shop.weights[:8], "little")
    hit = strike(draw, shop.weights, head=size)
    loaded = load_t5(backbone_with(shop, model=hit)).state_dict()
    assert len(hit) == len(shop.weights) and loaded.keys() == shop.state.keys()
    if hit[size:] == shop.weights[size:]:
        assert all(torch.equal(loaded[name], tensor) for name, tensor in shop.state.items()), "other weights"
    assert all(tensor.dtype == torch.float32 and tensor.shape == shop.state[name].shape for name, tensor in loaded.items())


def safetensors_headers(draw: random.Random, shop: Shop) -> None:
    loaded = load_t5(backbone_with(shop, model=misfitting(draw, shop.weights))).state_dict()
    assert loaded.keys() == shop.state.keys()
    assert all(tensor.dtype == torch.float32 and tensor.shape == shop.state[name].shape for name, tensor in loaded.items())


def shard_index(draw: random.Random, shop: Shop) -> None:
    folder, names = backbone_with(shop), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (folder / "model.safetensors").unlink()
    state = load_file(shop.backbone / "model.safetensors")
    where = {key: names[i % 2] for i, key in enumerate(sorted(state))}
    for name in names:
        if draw.random() < 0.9:
            save_file({key: state[key] for key in state if where[key] == name}, folder / name)
    change = draw.choice(("bytes", "json", "map", "name", "everywhere"))
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": where})
    if change == "json":
        text = absurd_json(draw, {"metadata": {}, "weight_map": where})
    elif change == "map":
        text = '{"weight_map": ' + absurd_json(draw, where) + "}"
    elif change in ("name", "everywhere"):
        name = draw.choice((*ODD, "..", ".", "x.safetensors", "../model.safetensors", "a/../model.safetensors", "a\0.safetensors", "two\nlines.safetensors",
                            "\ud800.safetensors", "x" * 250 + ".safetensors", "x" * 5000 + ".safetensors", "..safetensors", "C:\\x.safetensors"))
        text = json.dumps({"weight_map": dict.fromkeys(where, name) if change == "everywhere" else where | {draw.choice(sorted(where)): name}})
    content = text.encode("utf-8", "surrogatepass")
    (folder / "model.safetensors.index.json").write_bytes(strike(draw, content) if change == "bytes" else content)
    loaded = load_t5(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in shop.state.items()), "other weights"


def spoil(draw: random.Random, line: str) -> list[bytes]:
    """What becomes of one row: other lines, as bytes."""
    cells, how = line.split("\t"), draw.choice(("short", "long", "empty", "label", "utf8", "giant", "many", "quotes", "control", "return", "dash", "twice", "gone"))
    odd = draw.choice(("7", "", " 1", "1.0", "nan", "inf", "1e9", "5.0001", "-0.1", "entailment ", "ENTAILMENT", "１", "0\0"))
    return {"short": ["\t".join(cells[:-1]).encode()], "long": [line.encode() + b"\tmore"], "empty": [b"", b" ", b"\r"][: draw.randint(1, 3)],
            "label": ["\t".join([*cells[:-1], odd]).encode()], "utf8": [line.encode()[: line.encode().index("☃".encode()) + 1] if "☃" in line else b"\xff"],
            "giant": [line.replace("“", "x" * 300_000 + "\u2028“").encode()], "many": [line.encode() + b"\t" * 100_000],
            "quotes": [line.replace("“", '"“').encode(), b'"'], "control": [line.replace("“", "\x0b\x0c\x1c\x85\u2029\0“").encode()],
            "return": [line.replace("“", "\r“").encode()], "dash": ["\t".join([*cells[:-1], "-"]).encode()], "twice": [line.encode()] * 2, "gone": []}[how]


def read_tables(shop: Shop, task: str, form: str, files: dict[str, bytes]) -> None:
    """Reads these files.  Every row must be there or be counted, and what is left of the whole file's rows must be unchanged."""
    write_tables(shop.here, task, files)
    dataset = data.load(task, str(shop.here))
    read = [*dataset.train, *dataset.val, *dataset.test]
    lines = []
    for name, content in files.items():
        if name != "mrpc_dev_ids.tsv":
            content = content.removeprefix(b"\xef\xbb\xbf")
            lines += content.removesuffix(b"\n").split(b"\n")[0 if data.TASKS[task].header else 1 :] if content else []
    assert len(read) + dataset.skipped == len(lines), f"{len(lines)} rows, {len(read)} read, {dataset.skipped} skipped"
    known = shop.examples[task, form]
    untouched = Counter(known[line.removesuffix(b"\r")] for line in lines if line.removesuffix(b"\r") in known)
    assert untouched <= Counter(read), "an untouched row has changed"
    if task != "mnli":
        assert dataset.skipped <= 0.01 * len(lines), "more than 1 % were skipped"
    if task == "mrpc" and form == "official":
        ids = {tuple(line.rstrip(b"\r").split(b"\t")) for line in files["mrpc_dev_ids.tsv"].removeprefix(b"\xef\xbb\xbf").split(b"\n")}
        pairs = {tuple(row.split(b"\t")[1:3]) for row in known}
        held_out = Counter(known[row] for line in lines if (row := line.removesuffix(b"\r")) in known and tuple(row.split(b"\t")[1:3]) in ids)
        assert held_out <= Counter([*dataset.val, *dataset.test]) and len(ids - pairs - {(b"",)}) <= dataset.skipped, "validation rows are among the training rows"
    assert all(type(example.label) in (int, float) and example.source.startswith(task) for example in read)


def tsv_rows(draw: random.Random, shop: Shop) -> None:
    task, form = draw.choice(list(shop.tables))
    files = {name: ([*header], [row.encode() for row in rows]) for name, (header, rows) in shop.tables[task, form].items()}
    for _ in range(draw.choice((0, 1, 1, 1, 2, 5))):
        header, rows = files[draw.choice(list(files))]
        if rows:
            at = draw.randrange(len(rows))
            rows[at : at + 1] = spoil(draw, rows[at].decode("utf-8", "replace"))
    whole = {}
    for name, (header, rows) in files.items():
        end = draw.choice((b"\n", b"\n", b"\r\n", b"\r") if draw.random() < 0.1 else (b"\n", b"\r\n"))
        content = draw.choice((b"", b"\xef\xbb\xbf")) + b"".join(line + end for line in [*(line.encode() for line in header), *rows])
        whole[name] = content.removesuffix(end) if draw.random() < 0.2 else content + end * draw.choice((0, 0, 0, 1, 2))
    read_tables(shop, task, form, whole)


def tsv_bytes(draw: random.Random, shop: Shop) -> None:
    task, form = draw.choice(list(shop.tables))
    files = {name: as_bytes(*content) for name, content in shop.tables[task, form].items()}
    name = draw.choice(list(files))
    files[name] = draw.choice((lambda: strike(draw, files[name], head=100), lambda: files[name].decode().encode("utf-16"), lambda: files[name][:draw.randrange(300)],
                               lambda: strike(draw, files[name])))()
    read_tables(shop, task, form, files)


def zips(draw: random.Random, shop: Shop) -> None:
    """data.fetch with an archive that has arrived.  Only task.files may appear, each of them whole."""
    task = data.TASKS[draw.choice([name for name, task in data.TASKS.items() if name != "mrpc"])]
    files = {f"{task.folder}/{name}": as_bytes(*content) for name, content in shop.tables[task.name, "official"].items()}
    archive, home = shop.here / "made.zip", shop.here / "cache"
    method = draw.choice((zipfile.ZIP_DEFLATED,) * 4 + (zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    change = draw.choice(("bytes", "bytes", "bytes", "foreign", "link", "bomb", "missing", "folder", "sizes", "twice"))
    with zipfile.ZipFile(archive, "w", method) as packed:
        for member in ("../outside", f"{shop.made.parent}/outside", f"{task.folder}/../../outside", "C:\\outside", f"{task.folder}\\train.tsv"):
            if change in ("foreign", "bytes"):
                packed.writestr(member, "outside")
        for member, content in files.items():
            if change == "link":
                entry = zipfile.ZipInfo(member)
                entry.create_system, entry.external_attr = 3, 0o120777 << 16
                packed.writestr(entry, "../../../outside")
            elif change == "bomb":
                packed.writestr(member, bytes(3 * 10**6))
            elif change == "folder":
                packed.writestr(member + "/", "")
            elif change != "missing" or draw.random() < 0.5:
                packed.writestr(member, content)
    whole = archive.read_bytes()
    if change == "bytes":
        archive.write_bytes(strike(draw, whole) if draw.random() < 0.5 else whole[:-1000] + strike(draw, whole[-1000:]))  # the directory is at the end
    elif change == "sizes":  # the sizes in the directory are wrong
        at = whole.index(b"PK\1\2") + draw.choice((8, 10, 16, 20, 24, 28, 30, 42))  # flags, method, CRC, sizes, lengths of names, place
        archive.write_bytes(whole[:at] + draw.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\1\0\0\0", b"\0\1\0\0", draw.randbytes(4))) + whole[at + 4 :])
    elif change == "twice":
        archive.write_bytes(whole + whole)
    home.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "download", lambda url, path, sha256: Path(shutil.copy(archive, path)))
        patch.setattr(data, "UNPACKED_LIMIT", 10**6)
        try:
            data.fetch(task, home)
        finally:
            there = {path.relative_to(home).as_posix(): path for path in home.rglob("*") if path.name != ".lock" and not path.is_dir()}
            assert there.keys() <= files.keys(), f"more than the task's files: {sorted(there)}"
            assert all(path.is_file() and not path.is_symlink() and path.stat().st_size <= 10**6 for path in there.values())
            assert {path.name for path in shop.here.iterdir()} == {"made.zip", "cache"} and {path.name for path in shop.made.parent.iterdir()} == {"made", "here"}
            if change not in ("link", "bomb"):
                assert all(path.read_bytes() == files[name] for name, path in there.items()), "a file that is not whole"
    assert there.keys() == files.keys() and (change in ("bytes", "link") or method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED))


def trained_bytes(draw: random.Random, shop: Shop) -> None:
    """The file of a run has a checksum: what is read is what was written."""
    read_trained(shop, strike(draw, shop.trained, head=8 + int.from_bytes(shop.trained[:8], "little")))
    own = dict(shop.ladder.named_parameters())
    assert all(torch.equal(own[name], tensor) for name, tensor in shop.learned.items()), "other weights"
    assert read_config(shop.here) == shop.run_config


def trained_headers(draw: random.Random, shop: Shop) -> None:
    header, tensors = parts(shop.trained)
    if draw.random() < 0.8:
        header["__metadata__"].pop("sha256", None)  # a run of the first version has none
    if draw.random() < 0.5:
        header["__metadata__"]["config"] = absurd_json(draw, shop.run_config)
    content = joined(json.dumps(header), tensors)
    read_trained(shop, content if draw.random() < 0.5 else misfitting(draw, content))
    assert all(tensor.dtype == torch.float32 for tensor in load_file(shop.here / "trained.safetensors").values()), "not as train.py writes"


def read_trained(shop: Shop, content: bytes) -> None:
    (shop.here / "trained.safetensors").write_bytes(content)
    config = read_config(shop.here)
    assert type(config["r"]) is int and type(config["as_authors"]) is bool and all(type(config[name]) is str for name in ("task", "model", "method"))
    load_trained(shop.here, shop.ladder)


KINDS = {config_values: 900, config_bytes: 400, safetensors_bytes: 700, safetensors_headers: 700, shard_index: 400, tsv_rows: 900, tsv_bytes: 600, zips: 600,
         trained_bytes: 400, trained_headers: 400}


# ---------------------------------------------------------------------------------------------------------------- tests

@contextlib.contextmanager
def one_line_or_right(shop: Shop):
    """Around the making and reading of one input; `refused` is in the list if a ValueError or OSError said in one line what is wrong."""
    for path in shop.here.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    outcome = []
    try:
        signal.alarm(SECONDS)
        yield outcome
    except (ValueError, OSError) as error:
        text = str(error)
        assert text.isprintable() and 10 < len(text) <= 600, f"not one clear line: {text[:700]!r}"
        assert str(shop.here) in text, f"names no file: {text!r}"
        outcome.append("refused")
    finally:
        signal.alarm(0)
        assert not list(shop.here.rglob("*.partial")), "a partial file is left"


@pytest.fixture
def alarm():
    before = signal.signal(signal.SIGALRM, hang)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("share", [10, pytest.param(1, marks=pytest.mark.slow)], ids=["a tenth", "all"])
def test_thousands_of_damaged_files_are_read_rightly_or_refused_in_one_line(shop, alarm, capfd, share):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wrong, report, kinds = [], Counter(), {kind: count // share for kind, count in KINDS.items()}
    for kind, count in kinds.items():
        for number in range(count):
            try:
                with one_line_or_right(shop) as outcome:
                    kind(random.Random(f"{kind.__name__} {number}"), shop)
                report[kind.__name__, *outcome] += 1
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # Hang; a panic in Rust is no Exception either
                wrong.append(f"{kind.__name__} {number}: {type(error).__name__}: {str(error)[:400]}")
    said = capfd.readouterr()
    with capfd.disabled():
        print(f"\n{sum(kinds.values())} damaged inputs, {len(wrong)} wrong" + "".join(
            f"\n  {kind.__name__:<20}{count:>5} inputs {report[kind.__name__,]:>5} read {report[kind.__name__, 'refused']:>5} refused" for kind, count in kinds.items()))
    assert not wrong, "\n".join(wrong[:20])
    assert sum(report.values()) == sum(kinds.values()) >= 5000 / share
    assert all(report[kind.__name__, "refused"] and (report[kind.__name__,] or kind is trained_bytes) for kind in kinds), "a kind that proves nothing"
    assert said == ("", ""), f"something was printed: {said}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 500e6, f"{grown} bytes for files of some kilobytes"


def test_the_byte_that_is_no_text_is_named_behind_a_byte_order_mark_too(tmp_path):
    write_tables(tmp_path, "cola", dict.fromkeys(("train.tsv", "dev.tsv"), b"\xef\xbb\xbfgj04\t1\t*\tcaf\xe9\n"))
    with pytest.raises(ValueError, match="train.tsv, line 1: byte 0xe9 is not UTF-8"):
        data.load("cola", str(tmp_path))


@pytest.mark.slow
def test_damaged_tokenizers(shop, alarm, capfd):
    """SentencePiece checks little: a flipped byte in the table of its normalization can end the process.  So this runs in a child, and such ends
    are counted; the public tokenizers are checked by sha256 when they come, and a run's backbone before it answers."""
    count, at, outcomes = 250, 0, ""
    while at < count:
        read_end, write_end = os.pipe()
        if not (child := os.fork()):
            faulthandler.disable()
            try:
                for number in range(at, count):
                    draw, wrong = random.Random(f"tokenizers {number}"), b"?"
                    try:
                        with one_line_or_right(shop) as outcome:
                            (shop.here / "spiece.model").write_bytes(strike(draw, (shop.backbone / "spiece.model").read_bytes(), head=3000))
                            tokenizer = load_tokenizer(shop.here)
                            for text in ("sst2 sentence: a good film", "", "Ａ ﬁ ½ \u3000 株式会社 \U0001f600 é", "<extra_id_3> " + "".join(map(chr, range(32, 0x3000, 5)))):
                                ids = tokenizer.encode(text)
                                assert all(0 <= i < tokenizer.vocab_size for i in ids) and type(tokenizer.decode(ids)) is str
                        wrong = b"x" if outcome else b"r"
                    finally:
                        os.write(write_end, wrong)
            finally:
                os._exit(0)
        os.close(write_end)
        with open(read_end, "rb") as pipe:
            outcomes += pipe.read().decode()
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGSEGV, f"tokenizers {len(outcomes)}: signal {os.WTERMSIG(status)}"
            outcomes += "s"
        assert "?" not in outcomes, f"tokenizers {outcomes.index('?')}"
        at = len(outcomes)
    read, refused, ended = (outcomes.count(letter) for letter in "rxs")
    with capfd.disabled():
        print(f"\n  {'tokenizers':<20}{count:>5} inputs {read:>5} read {refused:>5} refused {ended:>5} ended SentencePiece's process")
    assert read and refused and ended < 0.05 * count


# ------------------------------------------------------------------------------------------------------- the command line

def hit_file(name: str, change):
    def damage(folder: Path) -> None:
        path = next(folder.rglob(name))
        path.write_bytes(change(path.read_bytes()))
    return damage


def set_config(**values):
    return hit_file("config.json", lambda whole: json.dumps(json.loads(whole) | values).encode())


def flip(place: float):
    """One bit, at this part of the file."""
    def change(whole: bytes) -> bytes:
        at = int(place * len(whole))
        return whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]
    return change


def shards_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"shared.weight": "../model.safetensors"}}')


# what is damaged -> (which folder, how, whether a run can still be right, and then what it says)
COMMANDS = {
    "model cut": ("backbone", hit_file("model.safetensors", lambda whole: whole[:-100]), None),
    "model cut in its header": ("backbone", hit_file("model.safetensors", lambda whole: whole[:500]), None),
    "model's header flipped": ("backbone", hit_file("model.safetensors", flip(0.02)), None),
    "model's header is 2^63 bytes": ("backbone", hit_file("model.safetensors", lambda whole: (2**63).to_bytes(8, "little") + whole[8:]), None),
    "a value flipped": ("backbone", hit_file("model.safetensors", flip(0.9)), ""),
    "shards elsewhere": ("backbone", shards_elsewhere, None),
    "config with 10^12 layers": ("backbone", set_config(num_layers=10**12), None),
    "config with a long text": ("backbone", set_config(d_model="x" * 10**6), None),
    "config with a vocabulary of a million": ("backbone", set_config(vocab_size=2**20), None),
    "config nested": ("backbone", hit_file("config.json", lambda whole: b"[" * 10**5), None),
    "config with more": ("backbone", set_config(more=[1, {}]), ""),
    "tokenizer cut": ("backbone", hit_file("spiece.model", lambda whole: whole[: len(whole) // 2]), None),
    "rows: BOM, CRLF, quotes": ("data", hit_file("train.tsv", lambda whole: b"\xef\xbb\xbf" + whole.replace(b"\n", b"\r\n").replace(b" of", b' "of')), ""),
    "rows: one short": ("data", hit_file("train.tsv", lambda whole: whole + b"short\n"), "1 skipped"),
    "rows: three short and long": ("data", hit_file("train.tsv", lambda whole: whole + b"short\na\t1\tlong\n\n"), None),
    "rows: empty lines": ("data", hit_file("dev.tsv", lambda whole: whole.replace(b"\n", b"\n\n")), None),
    "rows: no UTF-8": ("data", hit_file("train.tsv", lambda whole: whole + b"caf\xe9\t1\n"), None),
    "rows: UTF-16": ("data", hit_file("dev.tsv", lambda whole: whole.decode().encode("utf-16")), None),
    "rows: a giant field": ("data", hit_file("train.tsv", lambda whole: whole + b"giant " * 10**6 + b"\t1\n"), ""),
    "rows: a flipped tab": ("data", hit_file("dev.tsv", lambda whole: whole[::-1].replace(b"\t", b"\r", 1)[::-1]), "1 skipped"),
    "weights cut": ("run", hit_file("trained.safetensors", lambda whole: whole[:-1]), None),
    "weights' header flipped": ("run", hit_file("trained.safetensors", flip(0.1)), None),
    "weights flipped": ("run", hit_file("trained.safetensors", flip(0.9)), None),
    "weights empty": ("run", hit_file("trained.safetensors", lambda whole: b""), None),
    "zip cut": ("zip", hit_file("RTE.zip", lambda whole: whole[:-100]), None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_says_one_line(shop, tmp_path, name):
    what, damage, right = COMMANDS[name]
    folders = {"backbone": shop.backbone, "data": shop.made / "official", "run": shop.run}
    if what == "zip":
        (tmp_path / "zip").mkdir()
        shutil.make_archive(str(tmp_path / "zip" / "RTE"), "zip", shop.made / "official", "RTE")
    else:
        folders[what] = shutil.copytree(folders[what] / "SST-2" if what == "data" else folders[what], tmp_path / what / ("SST-2" if what == "data" else ""))
    damage(tmp_path / what)
    folders["data"] = tmp_path / "data" if what == "data" else folders["data"]
    out = folders["run"] if what == "run" else tmp_path / "out"
    train_it = ["--task", "rte" if what == "zip" else "sst2", "--model", folders["backbone"], *(["--data", folders["data"]] if what != "zip" else []),
                "--init", "magnitude", "--r", "4", "--max-steps", "1", "--batch-size", "64"]
    command = [sys.executable, ROOT / "train.py", "--out", out, "--device", "cpu", *(["--predict", "a good film"] if what == "run" else train_it)]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = subprocess.run(map(str, command), capture_output=True, text=True, timeout=120, cwd=tmp_path,
                          env={**os.environ, "HOME": str(tmp_path / "home"), "GLUE_BASE_URL": (tmp_path / "zip").as_uri()})
    left = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    assert "Traceback" not in done.stdout + done.stderr and not any(path.suffix == ".partial" for path in left)
    if right is None:
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and len(done.stderr) < 700, done.stderr
        assert left == before, "something was written"
    else:
        assert done.returncode == 0 and not done.stderr and right in done.stdout and ("skipped" in done.stdout) == bool(right), done.stderr
        assert (out / "results.json").is_file()

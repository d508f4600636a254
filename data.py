"""GLUE: official files -> text pairs -> token ids -> batches (Sec. 4, "Training and Evaluation Setup").

    rows of <folder>/train.tsv, dev.tsv --load--> Example(source, target, label) --encode--> Row of token ids
        --batches, in_order--> lists of indices --collate--> Batch of padded tensors

The split is the paper's: it has no test labels, so the official validation set serves as the test set and the
validation set is taken from elsewhere (Task.split).
"""

import os
import re
import textwrap
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urljoin

import torch
from torch import Tensor

from download import download, one_at_a_time, sha256_of
from metrics import glue_score

DATA_SEED = 42                                               # the same split for every training seed, as the authors'
CACHE = "~/.cache/ladder-side-tuning/glue"
SAMPLE = Path(__file__).parent / "assets" / "sample"
GLUE = "https://dl.fbaipublicfiles.com/glue/data"            # GLUE_BASE_URL names a mirror of it
UNPACKED_LIMIT = 10**9                                       # bytes; the largest file, MNLI's train.tsv, has less than half
PAD, EOS, START, IGNORE = 0, 1, 0, -100
POOL = 20                                                    # batches that are sorted by length together


@dataclass(frozen=True)
class Task:
    """One GLUE task: its files, its prompt and its split."""

    name: str
    folder: str
    fields: dict[str, str]                    # tag in the prompt -> column of the file
    label: str                                # column of the label
    words: tuple[str, ...]                    # T5's targets, in the order of the label ids; none: a score from 0 to 5
    split: str                                # where validation comes from: "half of dev", "part of train", "mismatched"
    downloads: dict[str, str]                 # address below GLUE -> sha256
    labels_are_words: bool = False            # in the file; otherwise "0" and "1"
    header: tuple[str, ...] = ()              # the columns, where the file does not name them itself
    files: tuple[str, ...] = ("train.tsv", "dev.tsv")

    @property
    def epochs(self) -> int:
        return 20 if self.split == "half of dev" else 10


TASKS = {task.name: task for task in (
    Task("cola", "CoLA", {"sentence": "sentence"}, "label", ("unacceptable", "acceptable"), "half of dev",
         {"CoLA.zip": "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"}, header=("source", "label", "mark", "sentence")),
    Task("sst2", "SST-2", {"sentence": "sentence"}, "label", ("negative", "positive"), "part of train",
         {"SST-2.zip": "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"}),
    Task("mrpc", "MRPC", {"sentence1": "#1 String", "sentence2": "#2 String"}, "Quality", ("not_equivalent", "equivalent"), "half of dev",
         {"../../senteval/senteval_data/msr_paraphrase_train.txt": "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
          "mrpc_dev_ids.tsv": "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7"},
         files=("msr_paraphrase_train.txt", "mrpc_dev_ids.tsv")),
    Task("qqp", "QQP", {"question1": "question1", "question2": "question2"}, "is_duplicate", ("not_duplicate", "duplicate"),
         "part of train", {"QQP-clean.zip": "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"}),
    Task("mnli", "MNLI", {"premise": "sentence1", "hypothesis": "sentence2"}, "gold_label", ("entailment", "neutral", "contradiction"),
         "mismatched", {"MNLI.zip": "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"}, labels_are_words=True,
         files=("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv")),
    Task("qnli", "QNLI", {"question": "question", "sentence": "sentence"}, "label", ("entailment", "not_entailment"), "part of train",
         {"QNLIv2.zip": "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"}, labels_are_words=True),
    Task("rte", "RTE", {"sentence1": "sentence1", "sentence2": "sentence2"}, "label", ("entailment", "not_entailment"), "half of dev",
         {"RTE.zip": "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"}, labels_are_words=True),
    Task("stsb", "STS-B", {"sentence1": "sentence1", "sentence2": "sentence2"}, "score", (), "half of dev",
         {"STS-B.zip": "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85"}),
)}


class Example(NamedTuple):
    source: str
    target: str
    label: int | float  # the class, or STS-B's score


@dataclass(frozen=True)
class Dataset:
    """What `load` gives: the three parts, and where they come from."""

    train: list[Example]
    val: list[Example]
    test: list[Example]
    name: str               # "glue", "bundled-sample", "scenes", "easy-vqa", ...
    folder: Path            # of the files
    sha256: str             # of the bytes of the files, or of scenes.py
    skipped: int            # rows left out: malformed, or without a label
    fallback: str | None    # why the bundled sample stands in for SST-2, if it does


# ---------------------------------------------------------------------------------------------------------------- load

def load(task_name: str, data: str | None = None, prompts: str = "paper") -> Dataset:
    """The task's training, validation and test examples.

    data: None downloads once into CACHE (sha256 checked); "sample" is the bundled sentences (sst2 only); anything else is a
    folder that holds the unpacked official folders, e.g. SST-2/train.tsv and SST-2/dev.tsv.
    Any failure with the downloaded SST-2 falls back to the sample and leaves the reason in `fallback`; everything else that
    is wrong raises a ValueError of one line.
    """
    if task_name not in TASKS:
        raise ValueError(f"no task {task_name!r}; choose one of {', '.join(TASKS)}")
    if prompts not in ("paper", "t5"):
        raise ValueError(f"no prompts {prompts!r}; choose paper or t5")
    task = TASKS[task_name]
    if data == "sample":
        if task_name != "sst2":
            raise ValueError(f"the bundled sample has sst2 only, not {task_name}; give a folder with {_wanted(task)}, or no --data")
        return _read(task, SAMPLE, prompts, "bundled-sample")
    if data is not None:
        return _read(task, Path(os.path.expanduser(data)), prompts, "glue")
    cache = Path(os.path.expanduser(CACHE))
    try:
        fetch(task, cache)
        return _read(task, cache, prompts, "glue")
    except (ValueError, OSError) as error:
        if task_name != "sst2":
            raise ValueError(f"{error}. Or put {_wanted(task)} into {cache}, or into a folder DIR and give --data DIR") from error
        return _read(task, SAMPLE, prompts, "bundled-sample", fallback=str(error))


def banner(reason: str) -> str:
    """The box that train.py prints when the bundled sample stands in for SST-2."""
    text = ["THIS IS NOT SST-2: IT COULD NOT BE LOADED.",
            "Training on the small bundled sample; no score below can be compared with the paper's.",
            "", f"Reason: {reason}", "", f"For the real task put {_wanted(TASKS['sst2'])} into a folder DIR and give --data DIR."]
    lines = [line for paragraph in text for line in textwrap.wrap(paragraph, 92) or [""]]
    return "\n".join(["#" * 98, *(f"#  {line:<92}  #" for line in ["", *lines, ""]), "#" * 98])


def fetch(task: Task, folder: Path) -> None:
    """Downloads the task's files into folder/<task.folder> if one is missing, and takes nothing else out of a zip."""
    home = folder / task.folder
    if all((home / name).is_file() for name in task.files):
        return
    base = os.environ.get("GLUE_BASE_URL") or GLUE
    with one_at_a_time(home):
        for address, sha256 in task.downloads.items():
            if all((home / name).is_file() for name in task.files):
                return  # another run brought them while this one waited
            arrived = download(urljoin(base.rstrip("/") + "/", address), home / address.rpartition("/")[2], sha256)
            if arrived.suffix == ".zip":
                try:
                    unpack(arrived, task, home)
                finally:
                    arrived.unlink()


def unpack(archive: Path, task: Task, home: Path) -> None:
    """Takes task.files out of the zip. Only these names are asked for, so nothing in the zip chooses where it is written."""
    home.mkdir(parents=True, exist_ok=True)
    for name in task.files:
        member, partial = f"{task.folder}/{name}", home / f"{name}.partial"
        try:
            with zipfile.ZipFile(archive) as packed:
                entry = packed.getinfo(member)
                if entry.file_size > UNPACKED_LIMIT:
                    raise ValueError(f"{member} has {entry.file_size} bytes, {UNPACKED_LIMIT} are allowed")
                if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # zipfile unpacks the others without a limit
                    raise ValueError(f"{member} is packed by method {entry.compress_type}")
                with packed.open(member) as source, open(partial, "wb") as target:
                    while chunk := source.read(1 << 20):  # reads no further than file_size, and checks the CRC
                        target.write(chunk)
            os.replace(partial, home / name)
        except KeyError:
            raise ValueError(f"{archive} holds no {member}: it is not GLUE's zip; check GLUE_BASE_URL") from None
        except Exception as error:  # zipfile has a dozen kinds for a damaged archive
            raise ValueError(f"{archive} is damaged, not GLUE's, or too big for the disk ({error!r:.200}); try again, or check GLUE_BASE_URL") from error
        finally:
            partial.unlink(missing_ok=True)


def _wanted(task: Task) -> str:
    return " and ".join(f"{task.folder}/{name}" for name in task.files)


def _read(task: Task, folder: Path, prompts: str, name: str, fallback: str | None = None) -> Dataset:
    paths = [folder / task.folder / file for file in task.files]
    if task.name == "mrpc" and not paths[0].is_file() and (paths[0].parent / "train.tsv").is_file():
        paths = [paths[0].parent / "train.tsv", paths[0].parent / "dev.tsv"]  # already divided, as GLUE's own script leaves it
    for path in paths:
        if not path.is_file():
            near = folder.parent if folder.is_file() else folder  # DIR/SST-2/train.tsv or DIR/SST-2, where DIR is meant
            hint = f"; give --data {near.parent}" if near.name == task.folder and (near / path.name).is_file() else ""
            raise ValueError(f"{path} is missing; {task.name} needs {_wanted(task)} in {folder}{hint}")
    if paths[-1].name == "mrpc_dev_ids.tsv":
        official, skipped = _divide_mrpc(task, *paths)
    else:
        tables = [_table(task, path) for path in paths]
        official, skipped = [rows for rows, _ in tables], sum(count for _, count in tables)
    for rows, what in zip(official, ("training", "validation", "validation")):
        if len(rows) < 2:
            raise ValueError(f"{folder / task.folder} has {len(rows)} {what} rows, 2 are needed; put the official files there")
    sets = split(task, *[[_example(task, row, prompts) for row in rows] for rows in official], sample=name == "bundled-sample")
    return Dataset(*sets, name, folder, sha256_of(*paths), skipped, fallback)


def split(task: Task, train: list, dev: list, mismatched: list | None = None, sample: bool = False) -> tuple[list, list, list]:
    """Sec. 4, official parts -> (train, val, test). Shuffled as the authors' code does, with torch and seed 42."""
    if task.split == "mismatched":
        return train, mismatched, dev
    divided = dev if task.split == "half of dev" else train
    order = torch.randperm(len(divided), generator=torch.Generator().manual_seed(DATA_SEED)).tolist()
    if task.split == "half of dev":
        size = len(dev) // 2
        return train, [dev[i] for i in order[:size]], [dev[i] for i in order[size:]]
    tenth = max(1, len(train) // 10)
    size = tenth if sample else min(1000, tenth)  # a user's own small file has fewer than 1000 to give, too
    return [train[i] for i in order[size:]], [train[i] for i in order[:size]], dev


# ---------------------------------------------------------------------------------------------------------------- rows

def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of a TSV file. Only a newline ends a row and only a tab a cell; quotes are data."""
    with open(path, "rb") as file:  # binary: text mode and str.splitlines would also cut at other characters
        for number, line in enumerate(file, 1):
            try:
                yield number, line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").rstrip(b"\r\n").decode("utf-8").split("\t")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: byte {error.object[error.start]:#04x} is not UTF-8 text; "
                                 f"save the file as UTF-8 or put the official file there") from error


def _table(task: Task, path: Path) -> tuple[list[dict[str, str]], int]:
    """The rows of a file, as dicts of the columns that matter, and how many rows were skipped.

    MNLI's rows without a gold label ("-") are skipped, malformed ones too as long as no more than 1 % are.
    """
    used = [*task.fields.values(), task.label, *(("#1 ID", "#2 ID") if task.name == "mrpc" else ())]
    answers = task.words if task.labels_are_words else [str(i) for i in range(len(task.words))]
    header, rows, unlabelled, bad = list(task.header), [], 0, []
    for number, cells in _lines(path):
        if not header:
            header = cells
            if missing := [column for column in used if column not in header]:
                raise ValueError(f"{path}, line 1: a header with the columns {', '.join(used)} is expected, {', '.join(missing)} is not in "
                                 f"{' | '.join(cells)[:80]!r}; put {task.name}'s official file there")
            continue
        if len(cells) != len(header):
            bad.append((number, f"{len(cells)} column{'s' * (len(cells) > 1)} instead of {len(header)}"))
            continue
        row = {column: cells[header.index(column)] for column in used}
        given = row[task.label]
        if given == "-" and task.name == "mnli":
            unlabelled += 1
        elif given in answers or (not answers and 0 <= _score(given, otherwise=-1) <= 5):
            rows.append(row)
        else:
            bad.append((number, f"label {given[:20]!r} instead of {' or '.join(answers) or 'a number from 0 to 5'}"))
    refuse_many(path, bad, len(rows) + unlabelled + len(bad), "line")
    return rows, unlabelled + len(bad)


def refuse_many(path: Path, bad: list[tuple[int, str]], count: int, unit: str) -> None:
    """ValueError that names the first three of the malformed rows (number, what is wrong), if they are more than 1 % of `count`."""
    if len(bad) > 0.01 * count:
        raise ValueError(f"{path}: {len(bad)} of {count} rows are malformed, at most 1 % may be; "
                         f"{'; '.join(f'{unit} {number}: {what}' for number, what in bad[:3])}{'; ...' if len(bad) > 3 else ''}; "
                         f"correct these {unit}s or put the official file there")


def _divide_mrpc(task: Task, text: Path, ids: Path) -> tuple[list[list[dict[str, str]]], int]:
    """MRPC comes as one file: a row is validation if its pair of ids is in GLUE's list, training otherwise."""
    rows, skipped = _table(task, text)
    pairs = [(row["#1 ID"], row["#2 ID"]) for row in rows]
    known, held_out = set(pairs), {tuple(cells): number for number, cells in _lines(ids)}
    strange = [number for pair, number in held_out.items() if pair not in known]
    if len(strange) > skipped:  # a skipped row may have been validation; any other pair of ids has a row, or that would train
        raise ValueError(f"{ids}, line {strange[0]}: no row of {text.name} has these two ids ({len(strange)} such lines); get both files again")
    is_dev = [pair in held_out for pair in pairs]
    return [[row for row, dev in zip(rows, is_dev) if dev == wanted] for wanted in (False, True)], skipped


def _score(text: str, otherwise: float | None = None) -> float | None:
    """A plain decimal number, or `otherwise`: float() would also take nan, inf, 1e99 and 1_0."""
    return float(text) if re.fullmatch(r"-?[0-9]{1,3}(\.[0-9]*)?", text) else otherwise


# ------------------------------------------------------------------------------------------------------------- prompts

def _source(task: Task, texts: dict[str, str], prompts: str) -> str:
    """The paper's prompt, e.g. `rte sentence1: A sentence2: B`, or T5's, with the tags in alphabetical order."""
    # Paper: the authors' MNLI prompt has no colon after "hypothesis"; kept, it is what their numbers were made with.
    no_colon = prompts == "paper" and task.name == "mnli"
    tags = sorted(task.fields) if prompts == "t5" else task.fields
    return " ".join([task.name, *(f"{tag}{'' if no_colon and tag == 'hypothesis' else ':'} {texts[tag]}" for tag in tags)])


def prompt(task_name: str, text: str, prompts: str = "paper") -> str:
    """The source of a user's own text; the two texts of a task that reads a pair are parted by " | " or a tab."""
    tags = TASKS[task_name].fields
    texts = [text] if len(tags) == 1 else re.split(r"\s*[|\t]\s*", text)
    if len(texts) != len(tags):
        raise ValueError(f"{task_name} reads {' and '.join(tags)}, {text[:60]!r} has {len(texts)} of {len(tags)} parts; "
                         f"write them as 'A | B'")
    return _source(TASKS[task_name], dict(zip(tags, texts)), prompts)


def _example(task: Task, row: dict[str, str], prompts: str) -> Example:
    """Targets: the paper's are the label ids as text, T5's are words."""
    raw = row[task.label]
    if task.words:
        label = task.words.index(raw) if task.labels_are_words else int(raw)
        target = task.words[label] if prompts == "t5" else str(label)
    else:
        label = float(raw)
        # Paper: the authors meant T5's rounding to 0.2, but their code rounds to 0.1.
        target = f"{round(label * 5) / 5:.1f}" if prompts == "t5" else f"{label:.1f}"
    return Example(_source(task, {tag: row[column] for tag, column in task.fields.items()}, prompts), target, label)


def read_answer(task_name: str, text: str, prompts: str = "paper") -> int | float | None:
    """Generated text -> label, the inverse of Example.target. None if it is no answer of the task; STS-B takes any number."""
    task, text = TASKS[task_name], text.strip()
    if not task.words:
        return _score(text)
    answers = task.words if prompts == "t5" else [str(i) for i in range(len(task.words))]
    return answers.index(text) if text in answers else None


def score(task_name: str, texts: Sequence[str], examples: Sequence[Example], prompts: str = "paper") -> dict[str, float | int]:
    """The task's metrics of generated answers, in percent (metrics.glue_score)."""
    return glue_score(task_name, [read_answer(task_name, text, prompts) for text in texts], [example.label for example in examples])


# ------------------------------------------------------------------------------------------------------------- batches

class Row(NamedTuple):
    source: list[int]            # token ids
    target: list[int]
    images: tuple[str, ...] = ()  # keys of the pictures that belong to it
    weight: float = 1.0          # of its loss


class Batch(NamedTuple):
    source_ids: Tensor    # (B, S)
    source_mask: Tensor   # (B, S) bool, True = attend
    decoder_ids: Tensor   # (B, T) the labels shifted right, behind the start token
    decoder_mask: Tensor  # (B, T) bool, True = attend
    labels: Tensor        # (B, T) -100 on padding
    weights: Tensor | None = None  # (B,) of the rows' losses, where they differ
    images: Tensor | None = None   # (B, N, P, C) what CLIP saw


def encode(examples: Sequence[Example], tokenizer, max_source: int = 128) -> list[Row]:
    """Token ids of source and target, each closed by the end token; the source has at most `max_source` with it."""
    return [Row(tokenizer.encode(example.source)[:max_source - 1] + [EOS], tokenizer.encode(example.target) + [EOS]) for example in examples]


def batches(encoded: Sequence[Row], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """An epoch's batches as indices: random, but of similar source length. The same (seed, epoch) gives the same batches.

    Shuffles all rows, sorts pools of POOL batches by length, cuts the batches, shuffles their order. The last may be smaller.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(len(encoded), generator=generator).tolist()
    pools = [order[i:i + POOL * batch_size] for i in range(0, len(order), POOL * batch_size)]
    cut = [pool[i:i + batch_size] for pool in (sorted(pool, key=lambda i: len(encoded[i][0])) for pool in pools)
           for i in range(0, len(pool), batch_size)]
    return [cut[i] for i in torch.randperm(len(cut), generator=generator).tolist()]


def in_order(encoded: Sequence[Row], batch_size: int) -> list[list[int]]:
    """Batches for evaluation: every row once, from the shortest to the longest source."""
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))
    return [order[i:i + batch_size] for i in range(0, len(order), batch_size)]


def collate(rows: Sequence[Row]) -> Batch:
    """Pads to the longest source and the longest target of the batch."""
    sources, targets, _, weights = zip(*rows)
    decoder = [[START, *target[:-1]] for target in targets]
    return Batch(_pad(sources, PAD), _pad([[1] * len(ids) for ids in sources], 0).bool(),
                 _pad(decoder, PAD), _pad([[1] * len(ids) for ids in decoder], 0).bool(), _pad(targets, IGNORE),
                 None if set(weights) == {1.0} else torch.tensor(weights))


def _pad(rows: Sequence[list[int]], value: int) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

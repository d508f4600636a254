"""GLUE: official files -> text pairs -> token ids -> batches (Sec. 4, "Training and Evaluation").

    rows of <folder>/train.tsv, dev.tsv --load--> Example(source, target, label)
        --encode--> Row of token ids --batches, in_order--> indices --collate--> Batch of tensors
"""
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urljoin

import torch
from torch import Tensor, nn

from model import PAD, Tokenizer
from run.folder import lock
from run.hub import download, sha256_of
from run.metrics import glue_score
from run.prompts import PLAIN

GLUE = "https://dl.fbaipublicfiles.com/glue/data/"  # GLUE_BASE_URL names a mirror of it
CACHE = "~/.cache/ladder-side-tuning/glue"
SAMPLE = Path(__file__).parent / "assets" / "sample"
DATA_SEED = 42  # the same split for every training seed, as the authors'
POOL = 20  # batches that are sorted by length together


class Example(NamedTuple):
    source: str
    target: str
    label: int | float  # the class, or STS-B's score


@dataclass(frozen=True)
class Dataset:
    train: list
    val: list
    test: list
    name: str  # "glue", "bundled-sample", "scenes", "easy-vqa" ...
    folder: Path  # of the files
    sha256: str  # of the bytes of the files, or of vision/scenes.py
    skipped: int  # rows left out: malformed, or without a label
    fallback: str | None  # why the bundled sample stands in for SST-2, if it does


class Row(NamedTuple):
    source: list[int]  # token ids
    target: list[int]
    images: tuple[str, ...] = ()  # keys of its pictures
    weight: float = 1.0  # of its loss


class Batch(NamedTuple):
    source_ids: Tensor  # (B, S)
    source_mask: Tensor  # (B, S) bool, True = attend
    decoder_ids: Tensor  # (B, T) the labels shifted right, behind the start token
    decoder_mask: Tensor  # (B, T) bool, True = attend
    labels: Tensor  # (B, T) -100 on padding
    weights: Tensor | None = None  # (B,) of the rows' losses, where they differ
    images: Tensor | None = None  # (B, N, P, C) what CLIP saw


@dataclass(frozen=True)
class Task:
    """A task of GLUE: its files, its prompt, its split, and what a run asks of it."""
    name: str
    title: str  # its folder, and its column in the paper's tables
    words: tuple[str, ...]  # T5's targets, in the order of the label ids; none: a score from 0 to 5
    fields: dict[str, str]  # tag in the paper's prompt: column of the file
    label: str  # its column
    validation: str  # where `split` takes it from
    epochs: int
    downloads: dict[str, str]  # address below GLUE: sha256
    files: tuple[str, ...] = ("train.tsv", "dev.tsv")
    header: tuple[str, ...] = ()  # the columns, where the file does not name them itself
    pictures, max_length, max_new_tokens = 0, None, 20  # None: the tokenizer's

    def load(self, folder: str | None = None, prompts: str = "paper") -> Dataset:
        """Return a folder's examples; None: downloaded once into CACHE; "sample": bundled ones."""
        if folder is not None:
            return self._read(SAMPLE if folder == "sample" else Path(folder).expanduser(), prompts)
        cache = Path(CACHE).expanduser()
        try:
            self._download(cache / self.title)
            return self._read(cache, prompts)
        except (ValueError, OSError) as error:
            if self.name == "sst2":  # the sample stands in
                return replace(self._read(SAMPLE, prompts), fallback=str(error))
            raise ValueError(f"{error}. Or put it into DIR/{self.title}: --data DIR") from error

    def encode(self, examples: Sequence[Example], tokenizer: Tokenizer) -> list[Row]:
        """Return token ids, each target with its end token; a longer text is cut."""
        most, start, end = self.max_length or tokenizer.longest, tokenizer.start, tokenizer.end
        kept = slice(most - 1) if end else slice(1 - most, None)  # a plain prompt ends with its ask
        targets = {text: tokenizer.encode(tokenizer.space * (text[:1] != " ") + text)[:most - 1]
                   + [tokenizer.eos] for text in {example.target for example in examples}}
        return [Row(start + tokenizer.encode(example.source)[kept] + end, targets[example.target])
                for example in examples]

    def draw(self, rows: list[Row], seed: int, step: int) -> list[Row]:
        return rows  # texts have one target each

    def answer(self, model: nn.Module, tokenizer: Tokenizer, batch: Batch) -> list[str]:
        """Return what the model generates for each row, greedily."""
        ids = model.generate(batch.source_ids, batch.source_mask, self.max_new_tokens)
        return [tokenizer.decode(row) for row in ids.tolist()]

    def score(self, texts: Sequence[str], examples: Sequence[Example], prompts: str) -> dict:
        """Return the task's metrics of generated answers, in percent (run/metrics.py)."""
        labels = [example.label for example in examples]
        return glue_score(self.name, [self.read(text, prompts)[0] for text in texts], labels)

    def ask(self, text: str, prompts: str) -> Example:
        """Return a user's own text as an example; " | " or a tab parts the two texts of a pair."""
        texts = [text] if len(self.fields) == 1 else re.split(r"\s*[|\t]\s*", text)
        if len(texts) != len(self.fields):
            raise ValueError(f"{self.name} reads two texts, not {text[:60]!r}: write 'A | B'")
        return Example(self._source(texts, prompts), "", 0)

    def read(self, text: str, prompts: str) -> tuple[int | float | None, str]:
        """Return the label of a generated text, None if it is no answer, and how to show it."""
        text = text.strip()
        answers = [self.target(label, prompts) for label in range(len(self.words))]
        label = answers.index(text) if text in answers else None if answers else self._label(text)
        if label is None:
            return None, f"{text!r}, which is no answer of {self.name}"
        return label, self.words[label] if self.words else str(label)

    def _label(self, text: str) -> int | float | None:
        if not self.words:  # a plain decimal: float() would also take nan, inf, 1e99 and 1_0
            return float(text) if re.fullmatch(r"-?[0-9]{1,3}(\.[0-9]*)?", text) else None
        known = [*self.words, *map(str, range(len(self.words)))]
        return known.index(text) % len(self.words) if text in known else None

    def target(self, label: int | float, prompts: str) -> str:
        if self.words:
            words = {"t5": self.words, "plain": PLAIN[self.name][1]}.get(prompts)
            return words[label] if words else str(label)
        # Paper: the authors meant T5's rounding to 0.2, but their code rounds to 0.1.
        return f"{round(label * 5) / 5:.1f}" if prompts == "t5" else f"{label:.1f}"

    def _source(self, texts: Sequence[str], prompts: str) -> str:
        """Return the prompt: `rte sentence1: A sentence2: B`. T5 has the tags in their order."""
        if prompts == "plain":
            return PLAIN[self.name][0].format(*texts)
        tags = [tag.rstrip(":") + ":" if prompts == "t5" else tag for tag in self.fields]
        parts = [f"{tag} {text}" for tag, text in zip(tags, texts)]
        return " ".join([self.name, *(sorted(parts) if prompts == "t5" else parts)])

    def _download(self, home: Path) -> None:
        """Bring the task's files to `home`, if one is missing, and nothing else from a zip."""
        base = (os.environ.get("GLUE_BASE_URL") or GLUE).rstrip("/") + "/"
        with lock(home):
            for address, sha256 in self.downloads.items():
                if all((home / name).is_file() for name in self.files):
                    return
                arrived = home / address.rpartition("/")[2]
                download(urljoin(base, address), arrived, sha256)
                if arrived.suffix == ".zip":
                    with zipfile.ZipFile(arrived) as packed:
                        for name in self.files:
                            os.replace(packed.extract(f"{self.title}/{name}", home), home / name)
                    (home / self.title).rmdir()
                    arrived.unlink()

    def _read(self, folder: Path, prompts: str) -> Dataset:
        home, files = folder / self.title, self.files
        if (home / "train.tsv").is_file() and not (home / files[0]).is_file():
            files = ("train.tsv", "dev.tsv")  # MRPC divided already, by GLUE's own script
        paths = [home / name for name in files]
        if missing := [path for path in paths if not path.is_file()]:
            raise ValueError(f"{missing[0]} is missing; --data names the folder with {self.title}, "
                             f"which holds {' and '.join(self.files)}")
        tables = [(path, rows_of(path)) for path in paths]
        if files[-1] == "mrpc_dev_ids.tsv":  # one file, and the pairs of ids that validate
            rows, ids = list(rows_of(paths[0])), {tuple(cells) for _, cells in rows_of(paths[1])}
            dev = [row for row in rows if tuple(row[1][1:3]) in ids]
            train = [row for row in rows if tuple(row[1][1:3]) not in ids]
            tables = [(paths[0], iter(train)), (paths[0], iter([*rows[:1], *dev]))]
        parts, skipped = zip(*(self._examples(*table, prompts) for table in tables))
        name = "bundled-sample" if folder == SAMPLE else "glue"
        return Dataset(*split(self.validation, *parts, most=10**9 if folder == SAMPLE else 1000),
                       name, folder, sha256_of(*paths), sum(skipped), fallback=None)

    def _examples(self, path: Path, lines: Iterator, prompts: str) -> tuple[list[Example], int]:
        """Return a file's examples and how many rows were skipped: unlabelled or malformed."""
        columns = [*self.fields.values(), self.label]
        header = self.header or next(lines, (1, columns))[1]
        if missing := [column for column in columns if column not in header]:
            raise ValueError(f"{path}, line 1 has no column {missing[0]}; put {self.title}'s there")
        examples, unlabelled, bad = [], 0, []
        for number, cells in lines:
            row = dict(zip(header, cells))
            given = row.get(self.label, "")
            label = self._label(given)
            if given == "-":  # MNLI's annotators disagree
                unlabelled += 1
            elif len(cells) != len(header) or label is None or not 0 <= label <= 5:
                bad.append((number, f"{len(cells)} of {len(header)} columns, label {given[:20]!r}"))
            else:
                source = self._source([row[column] for column in columns[:-1]], prompts)
                examples.append(Example(source, self.target(label, prompts), label))
        refuse_many(path, bad, len(examples) + unlabelled + len(bad), "line")
        if len(examples) < 2:
            raise ValueError(f"{path} has {len(examples)} rows; put the official file there")
        return examples, unlabelled + len(bad)


SENTENCE = {"sentence:": "sentence"}
PAIR = {"sentence1:": "sentence1", "sentence2:": "sentence2"}
TASKS = {task.name: task for task in (
    Task("cola", "CoLA", ("unacceptable", "acceptable"), SENTENCE, "label", "half of dev", 20,
         {"CoLA.zip": "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"},
         header=("source", "label", "mark", "sentence")),
    Task("sst2", "SST-2", ("negative", "positive"), SENTENCE, "label", "part of train", 10,
         {"SST-2.zip": "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"}),
    Task("mrpc", "MRPC", ("not_equivalent", "equivalent"),
         {"sentence1:": "#1 String", "sentence2:": "#2 String"}, "Quality", "half of dev", 20,
         {"../../senteval/senteval_data/msr_paraphrase_train.txt":
          "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
          "mrpc_dev_ids.tsv": "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7"},
         files=("msr_paraphrase_train.txt", "mrpc_dev_ids.tsv")),
    Task("qqp", "QQP", ("not_duplicate", "duplicate"),
         {"question1:": "question1", "question2:": "question2"}, "is_duplicate", "part of train",
         10, {"QQP-clean.zip": "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"}),
    # Paper: the authors' prompt has no colon after "hypothesis"; their numbers were made with it.
    Task("mnli", "MNLI", ("entailment", "neutral", "contradiction"),
         {"premise:": "sentence1", "hypothesis": "sentence2"}, "gold_label", "mismatched", 10,
         {"MNLI.zip": "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"},
         files=("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv")),
    Task("qnli", "QNLI", ("entailment", "not_entailment"),
         {"question:": "question", "sentence:": "sentence"}, "label", "part of train", 10,
         {"QNLIv2.zip": "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"}),
    Task("rte", "RTE", ("entailment", "not_entailment"), PAIR, "label", "half of dev", 20,
         {"RTE.zip": "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"}),
    Task("stsb", "STS-B", (), PAIR, "score", "half of dev", 20,
         {"STS-B.zip": "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85"}),
)}


def rows_of(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield number and cells of each line. Only a newline ends it; a quote is a character."""
    with open(path, "rb") as file:  # text mode would also cut at other characters
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number} is not UTF-8 text: {error}") from error
            yield number, text.rstrip("\r\n").split("\t")


def refuse_many(path: Path, bad: list[tuple[int, str]], count: int, unit: str) -> None:
    """Raise a ValueError with the first bad (number, what is wrong) if over 1 % of `count` are."""
    if len(bad) > 0.01 * count:
        first = "; ".join(f"{unit} {number}: {what}" for number, what in bad[:3])
        raise ValueError(f"{path}: {len(bad)} of {count} rows are malformed, 1 % may be; {first}")


def split(validation: str, train: list, dev: list, mismatched: list = (), most: int = 1000):
    """Return (train, val, test), shuffled as the authors do. Dev tests: test labels are secret."""
    if validation == "mismatched":
        return train, mismatched, dev
    half, generator = validation == "half of dev", torch.Generator().manual_seed(DATA_SEED)
    rows, size = (dev, len(dev) // 2) if half else (train, min(most, max(1, len(train) // 10)))
    rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
    return (train, rows[:size], rows[size:]) if half else (rows[size:], rows[:size], dev)


def batches(rows: Sequence[Row], size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return an epoch's batches as indices: random, but each of rows of similar length."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(len(rows), generator=generator).tolist()
    cut = []
    for start in range(0, len(order), POOL * size):
        pool = sorted(order[start:start + POOL * size], key=lambda i: len(rows[i][0]))
        cut += [pool[i:i + size] for i in range(0, len(pool), size)]
    return [cut[i] for i in torch.randperm(len(cut), generator=generator).tolist()]


def in_order(rows: Sequence[Row], size: int) -> list[list[int]]:
    """Return batches for evaluation: every row once, from the shortest to the longest source."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    return [order[i:i + size] for i in range(0, len(order), size)]


def collate(rows: Sequence[Row]) -> Batch:
    """Pad to the longest source and the longest target of the batch."""
    sources, targets, _, weights = zip(*rows)
    decoder = [[PAD, *target[:-1]] for target in targets]
    return Batch(_pad(sources, PAD), _pad([[True] * len(ids) for ids in sources], False),
                 _pad(decoder, PAD), _pad([[True] * len(ids) for ids in decoder], False),
                 _pad(targets, -100), None if set(weights) == {1.0} else torch.tensor(weights))


def _pad(rows: Sequence[list], value: int | bool) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

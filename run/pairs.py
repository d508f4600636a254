"""One's own pairs of texts (--task text), scored by exact match; the best epoch has the least loss.

    train.tsv, dev.tsv      two columns, source and target; no header, a quote is a character
    train.jsonl, dev.jsonl  in each line an object with "prompt" and "completion"
"""
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data import Dataset, Example, Task, refuse_many, rows_of, split
from model import Tokenizer
from run.folder import atomic_write
from run.hub import sha256_of
from run.metrics import accuracy

KEYS = ("prompt", "completion")
ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class Pairs(Task):
    """The task of one run: its two lengths depend on options and data (`lengths`)."""
    max_length: int = 512
    max_new_tokens: int = 20

    def load(self, folder: str, prompts: str = "paper") -> Dataset:
        """Return a folder's rows. A tenth of train, at most 1,000 rows, validates; dev tests."""
        home = Path(folder).expanduser()
        every = [home / f"{part}.{kind}" for kind in ("tsv", "jsonl") for part in ("train", "dev")]
        paths = [path for path in every if path.is_file()]
        if paths not in (every[:2], every[2:]):
            held = " and ".join(path.name for path in paths) or "none of them"
            raise ValueError(f"{home} must hold train.tsv and dev.tsv, or train.jsonl and "
                             f"dev.jsonl, not both kinds; it holds {held}")
        (train, skipped), (dev, more) = map(_examples, paths)
        if len(train) < 3 or not dev:  # one of train validates, two are left
            raise ValueError(f"{home} has {len(train)} rows in {paths[0].name} and {len(dev)} in "
                             f"{paths[1].name}; put at least 3 and 1 there")
        parts = split(self.validation, train, dev)
        return Dataset(*parts, "own-data", home, sha256_of(*paths), skipped + more, fallback=None)

    def lengths(self, dataset: Dataset, tokenizer: Tokenizer) -> dict[str, int]:
        """Return how long answers may be in tokens: as the longest target of training, at least 20;
        how many texts are cut, and how many targets of the test the tokenizer cannot write."""
        parts = {name: getattr(dataset, name) for name in ("train", "val", "test")}
        rows = {name: replace(self, max_length=10**9).encode(part, tokenizer)
                for name, part in parts.items()}
        sizes = [len(ids) for part in rows.values() for row in part for ids in row[:2]]
        longest = max(len(row.target) for row in rows["train"])
        written = [tokenizer.decode(row.target[:self.max_length]) for row in rows["test"]]
        return {"max_new_tokens": max(20, min(longest, self.max_length)),
                "cut_texts": sum(size > self.max_length for size in sizes),
                "altered_targets": sum(text.strip() != example.target.strip()
                                       for text, example in zip(written, dataset.test))}

    def score(self, texts: Sequence[str], examples: Sequence[Example], prompts: str) -> dict:
        """Return the exact match in percent; space around a text does not count."""
        targets = [example.target.strip() for example in examples]
        exact = 100 * accuracy([text.strip() for text in texts], targets)
        return {"exact_match": exact, "score": exact, "invalid": 0, "undefined": 0}

    def ask(self, text: str, prompts: str) -> Example:
        if not text.strip():
            raise ValueError("the text is empty: write what is to be continued")
        return Example(text, "", 0)

    def read(self, text: str, prompts: str) -> tuple[None, str]:
        return None, text

    def write(self, out: Path, texts: Sequence[str], examples: Sequence[Example]) -> None:
        """Write every answer, a JSON object in each line."""
        rows = [{"source": source, "target": target, "answer": text}
                for (source, target, _), text in zip(examples, texts, strict=True)]
        with atomic_write(out / ANSWERS) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))


def first_answers(out: Path, count: int = 20) -> list[dict]:
    return [json.loads(line) for line in (out / ANSWERS).read_bytes().splitlines()[:count]]


def _examples(path: Path) -> tuple[list[Example], int]:
    """Return a file's examples, and how many malformed rows are skipped. A blank line is no row."""
    examples, bad = [], []
    for number, cells in rows_of(path):
        try:
            if cells != [""]:
                examples.append(Example(*_texts(cells, path.suffix), 0))
        except ValueError as error:
            bad.append((number, str(error)))
    refuse_many(path, bad, len(examples) + len(bad), "line")
    return examples, len(bad)


def _texts(cells: list[str], kind: str) -> list[str]:
    """Return source and target of a line. ValueError: what is wrong with it."""
    if kind == ".jsonl":
        try:
            row = json.loads("\t".join(cells))
        except (ValueError, RecursionError):
            raise ValueError("no JSON") from None
        found = [row.get(key) for key in KEYS] if isinstance(row, dict) else []
        cells = [text for text in found if isinstance(text, str)]
    if len(cells) != 2:
        need = "columns" if kind == ".tsv" else f"texts {' and '.join(KEYS)}"
        raise ValueError(f"{len(cells)} of the 2 {need}")
    if not all(text.strip().encode() for text in cells):  # UnicodeEncodeError: half a character
        raise ValueError("an empty text")
    return cells

"""Vision and language: official files -> examples -> steps of several tasks (Sec. 4, "Vision-and-language").

    rows of <folder>/*.json --load--> Example(source, answers, images, references) --multitask--> one task a step

What the pictures look like to CLIP is images.py's.
"""
import contextlib
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import scenes
from data import DATA_SEED, Dataset, Row, refuse_many
from download import sha256_of
from metrics import bleu, cider_d, vqa_accuracy, vqa_soft_labels
from model import EOS, brief


class Example(NamedTuple):
    source: str                        # the text behind its prompt
    answers: dict[str, float]          # answer -> weight; training draws one; a question of VQA may have none
    images: tuple[str, ...]            # keys: names of the pictures without folder and ending; NLVR2 has two
    references: tuple[str, ...] = ()   # what the score compares with: VQA's ten annotators where the files have them, all captions


Parts = tuple[list[Example], list[Example], list[Example]]  # train, val, test


class Layout(NamedTuple):
    """One way in which a task's files come."""

    files: tuple[str, ...]
    read: Callable[..., tuple[str, Parts, int]]  # (task, paths, paths of optional files) -> name, parts, skipped rows
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    name: str
    folders: tuple[str, ...]   # below the one that the user gives, where its files may lie too
    prompt: str
    max_source: int | None     # tokens with the end token, beyond which texts are cut; None: never
    max_target: int | None
    share: float               # rows of its steps over those of VQA's, where several tasks are learned together (Sec. 4)
    layouts: tuple[Layout, ...]


# ----------------------------------------------------------------------------------------------------------------- files

def load(task_name: str, folder: str | Path | None) -> Dataset:
    """The task's examples from the official files in a folder, or None: about drawn scenes (scenes.py).
    ValueError of one line: unknown task, missing or damaged files."""
    if task_name not in TASKS:
        raise ValueError(f"no task {task_name!r}; choose one of {', '.join(TASKS)}")
    if folder is None:
        return of_scenes(TASKS[task_name])
    task, folder = TASKS[task_name], Path(os.path.expanduser(folder))
    places = [(home, layout) for home in (folder, *(folder / name for name in task.folders)) for layout in task.layouts]
    home, layout = max(places, key=lambda place: sum((place[0] / name).is_file() for name in place[1].files) / len(place[1].files))
    paths = [home / name for name in layout.files]
    if missing := [path for path in paths if not path.is_file()]:
        wanted = ", or ".join(" and ".join(layout.files) for layout in task.layouts)
        raise ValueError(f"{missing[0]} is missing; {task.name} needs {wanted} in {folder}")
    extra = [home / name for name in layout.optional if (home / name).is_file()]
    name, parts, skipped = layout.read(task, paths, extra)
    for part, what in zip(parts, ("training", "validation", "test")):
        if not part:
            raise ValueError(f"{home} has no {what} rows of {task.name}; put the official files there")
    folder = home if (home / "images").is_dir() else folder  # where the pictures are looked for
    return Dataset(*parts, name, folder, sha256_of(*paths, *extra), skipped, fallback=None)


def of_scenes(task: Task) -> Dataset:
    if task.name not in ("vqa", "gqa", "nlvr2", "coco"):
        raise ValueError(f"{task.name} needs --data, the folder of its questions.json and pictures; vqa, gqa, nlvr2 and coco do without")

    def examples(row: scenes.Row, part: str) -> list[Example]:
        answers = [row.answer] if isinstance(row.answer, str) else row.answer
        references = () if isinstance(row.answer, str) else tuple(row.answer)
        each = [{answer: 1.0} for answer in answers] if part == "train" else [dict.fromkeys(answers, 1.0)]  # a caption an example, or all of an image
        return [Example(task.prompt + row.text, answers, row.scenes, references) for answers in each]

    parts = [[example for row in scenes.examples(task.name, part) for example in examples(row, part)] for part in scenes.SCENES]
    return Dataset(*parts, "scenes", Path(scenes.__file__).parent, sha256_of(Path(scenes.__file__)), 0, fallback=None)


def _json(path: Path, kind: type, inside: str | None = None) -> Any:
    """The list or dict that a file holds, or that its part `inside` is."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no JSON ({str(error)[:100]}); put the official file there") from None
    if inside:
        content = content.get(inside) if isinstance(content, dict) else None
    if not isinstance(content, kind):
        what = "a list" if kind is list else "an object"
        raise ValueError(f"{path} should hold {what}{f' named {inside!r}' if inside else ''}; put the official file there")
    return content


class Malformed(ValueError):
    """Why a row is skipped."""


def _get(row: Any, name: str, kind: type, blank: bool = False) -> Any:
    """A field of a row; a text says something, unless it may be blank, and UTF-8 can write it."""
    if not isinstance(row, dict):
        raise Malformed(f"{brief.repr(row)} is no JSON object")
    value = row.get(name)
    if type(value) is not kind or (kind is str and not _text(value) and not (blank and value == "")):
        raise Malformed(f"{name} is {brief.repr(value)}")
    return value


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.encode("utf-8", "ignore").decode() == value


def _collect(path: Path, rows: Iterable, make: Callable[[Any], tuple[int, list[Example]]], parts: Sequence[list[Example]]) -> int:
    """Puts what `make` finds in each row into its part; returns how many rows were skipped because they are malformed, at most 1 %."""
    count, bad = 0, []
    for count, row in enumerate(rows, 1):
        try:
            part, examples = make(row)
            parts[part].extend(examples)
        except Malformed as error:
            bad.append((count, error))
    refuse_many(path, bad, count, "row")
    return len(bad)


def _three(paths: Sequence[Path], rows: Callable[[Path], Iterable], example: Callable[[Any], Example]) -> tuple[Parts, int]:
    """One file a part, one example a row."""
    parts: Parts = ([], [], [])
    return parts, sum(_collect(path, rows(path), lambda row: (part, [example(row)]), parts) for part, path in enumerate(paths))


def by_image(examples: list[Example], train: float, val: float) -> Parts:
    """Divides by picture, so that none is in two parts: these shares of the pictures, the rest to test; the same for every seed."""
    images = sorted({example.images for example in examples})
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(DATA_SEED)).tolist()
    ends = round(train * len(images)), round((train + val) * len(images))
    part_of = {images[i]: sum(place >= end for end in ends) for place, i in enumerate(order)}
    parts: Parts = ([], [], [])
    for example in examples:
        parts[part_of[example.images]].append(example)
    return parts


# ----------------------------------------------------------------------------------------------------------------- tasks

def read_lists(task: Task, paths: list[Path], extra: list[Path]) -> tuple[str, Parts, int]:
    """The authors' lists, {"sent", "img_id", "label": {answer: weight}}, or for NLVR2 {"sent", "img0", "img1", "label": 0 or 1}.

    They know frequent answers alone, so a question may have none.  VQA's ten answers come from the official annotations, if those are there.
    """
    ten: dict[str, tuple[str, ...]] = {}
    for path in extra:
        ten |= _ten_answers(path)

    def example(row: Any) -> Example:
        source = task.prompt + _get(row, "sent", str)
        if task.name == "nlvr2":
            return Example(source, {_truth(row): 1.0}, (_get(row, "img0", str), _get(row, "img1", str)))
        answers = _get(row, "label", dict)
        if not all(_text(answer) and type(weight) in (int, float) and 0 <= weight <= 1 for answer, weight in answers.items()):
            raise Malformed(f"label is {brief.repr(answers)}")
        weighted = {answer: float(weight) for answer, weight in answers.items() if weight}
        return Example(source, weighted, (_get(row, "img_id", str),), ten.get(str(row.get("question_id")), ()))

    return f"{task.name}-lists", *_three(paths, lambda path: _json(path, list), example)


def read_vqa(task: Task, paths: list[Path], extra: list[Path]) -> tuple[str, Parts, int]:
    """VQA v2's questions and annotations.  Beside dataset_coco.json they are split as there, which is the paper's split; otherwise
    the pictures of val2014 are halved into validation and test, whose scores are near the paper's but not comparable."""
    split, halved, parts, skipped = {}, [], ([], [], []), 0
    for path in extra:
        rows = (row for row in _json(path, list, "images") if isinstance(row, dict))
        split = {Path(str(row.get("filename"))).stem: KARPATHY.get(str(row.get("split"))) for row in rows}
    for year, questions, annotations in (("train2014", *paths[:2]), ("val2014", *paths[2:])):
        ten = _ten_answers(annotations)

        def make(row: Any) -> tuple[int, list[Example]]:
            key, answers = f"COCO_{year}_{_get(row, 'image_id', int):012d}", ten.get(str(_get(row, "question_id", int)))
            if answers is None:
                raise Malformed(f"question {row['question_id']} has no ten answers in {annotations.name}")
            if extra and split.get(key) is None:
                raise Malformed(f"picture {key} is not in {extra[0].name}")
            counts = Counter(answer for answer in answers if answer)
            return split.get(key, 0), [Example(task.prompt + _get(row, "question", str), vqa_soft_labels(counts), (key,), answers)]

        skipped += _collect(questions, _json(questions, list, "questions"), make, parts if extra or year == "train2014" else [halved])
    return ("vqa-karpathy", parts, skipped) if extra else ("vqa-halved", (parts[0], *by_image(halved, 0, 0.5)[1:]), skipped)


def _ten_answers(path: Path) -> dict[str, tuple[str, ...]]:
    """VQA's annotations: question id -> the answers of its ten annotators.  What is malformed is left out."""
    found = {}
    for row in _json(path, list, "annotations"):
        with contextlib.suppress(Malformed):
            answers = tuple(sys.intern(_get(answer, "answer", str, blank=True)) for answer in _get(row, "answers", list))  # each text once in memory
            if len(answers) == 10:
                found[str(_get(row, "question_id", int))] = answers
    return found


def read_gqa(task: Task, paths: list[Path], extra: list[Path]) -> tuple[str, Parts, int]:
    """GQA's balanced questions, {id: {"question", "answer", "imageId"}}."""
    # Paper: the authors train on train and valid and watch testdev after each epoch; ours keeps valid to choose the epoch, and testdev tests.
    def example(row: Any) -> Example:
        return Example(task.prompt + _get(row, "question", str), {_get(row, "answer", str): 1.0}, (_get(row, "imageId", str),))

    return "gqa", *_three(paths, lambda path: _json(path, dict).values(), example)


def read_nlvr2(task: Task, paths: list[Path], extra: list[Path]) -> tuple[str, Parts, int]:
    """NLVR2's JSON lines: dev-896-0-1 is sentence 1 on the pictures dev-896-0-img0 and dev-896-0-img1.  test1 is the public test-P."""
    def lines(path: Path) -> Iterator:
        for line in path.read_bytes().splitlines():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                yield line.decode("utf-8", "replace")  # malformed, since no object

    def example(row: Any) -> Example:
        pair = _get(row, "identifier", str).rpartition("-")[0]
        if not pair:
            raise Malformed(f"identifier is {brief.repr(row['identifier'])}")
        return Example(task.prompt + _get(row, "sentence", str), {_truth(row): 1.0}, (f"{pair}-img0", f"{pair}-img1"))

    return "nlvr2", *_three(paths, lines, example)


def _truth(row: dict) -> str:
    """NLVR2's label as the authors' target word."""
    word = {"true": "true", "1": "true", "false": "false", "0": "false"}.get(str(row.get("label")).lower())
    if word is None:
        raise Malformed(f"label is {brief.repr(row.get('label'))}")
    return word


def read_coco(task: Task, paths: list[Path], extra: list[Path]) -> tuple[str, Parts, int]:
    """Karpathy's dataset_coco.json.  In training each caption of a picture is an example; in validation and test all are references."""
    def make(row: Any) -> tuple[int, list[Example]]:
        key, part = Path(_get(row, "filename", str)).stem, KARPATHY.get(_get(row, "split", str))
        captions = tuple(_get(sentence, "raw", str).strip() for sentence in _get(row, "sentences", list))
        if part is None or not captions:
            raise Malformed(f"split is {brief.repr(row['split'])}" if captions else "it has no captions")
        targets = [{caption: 1.0} for caption in captions] if part == 0 else [dict.fromkeys(captions, 1.0)]
        return part, [Example(task.prompt, answers, (key,), captions) for answers in targets]

    parts: Parts = ([], [], [])
    return "coco-karpathy", parts, _collect(paths[0], _json(paths[0], list, "images"), make, parts)


def read_easy_vqa(task: Task, paths: list[Path], extra: list[Path]) -> tuple[str, Parts, int]:
    """Rows [question, answer, number of the picture]; a tenth of the pictures validates, another tests."""
    def make(row: Any) -> tuple[int, list[Example]]:
        if not (isinstance(row, list) and len(row) == 3 and _text(row[0]) and _text(row[1]) and type(row[2]) is int and row[2] >= 0):
            raise Malformed(f"{brief.repr(row)} is not [question, answer, number of the picture]")
        return 0, [Example(task.prompt + row[0], {row[1]: 1.0}, (str(row[2]),))]

    examples: list[Example] = []
    skipped = _collect(paths[0], _json(paths[0], list), make, [examples])
    return "easy-vqa", by_image(examples, 0.8, 0.1), skipped


KARPATHY = {"train": 0, "restval": 0, "val": 1, "test": 2}  # his split of COCO's train2014 and val2014
VQA_FILES = ("v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json",
             "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json")
TASKS = {task.name: task for task in (
    Task("vqa", ("vqa",), "vqa: ", 20, 10, 1, (
        Layout(("karpathy_train.json", "karpathy_val.json", "karpathy_test.json"), read_lists, optional=VQA_FILES[1::2]),
        Layout(VQA_FILES, read_vqa, optional=("dataset_coco.json",)))),
    # Paper: the authors' prompt is "gpa: ", a slip of the pen; the side network learns either.
    Task("gqa", ("GQA", "questions1.2"), "gqa: ", 20, None, 100 / 60, (
        Layout(("train_balanced_questions.json", "val_balanced_questions.json", "testdev_balanced_questions.json"), read_gqa),
        Layout(("train.json", "valid.json", "testdev.json"), read_lists))),
    Task("nlvr2", ("nlvr",), "nlvr: ", None, None, 20 / 60, (
        Layout(("train.json", "dev.json", "test1.json"), read_nlvr2),
        Layout(("train.json", "valid.json", "test.json"), read_lists))),
    Task("coco", ("COCO",), "caption:", None, 40, 50 / 60, (Layout(("dataset_coco.json",), read_coco),)),
    Task("easy-vqa", ("easy_vqa", "train"), "vqa: ", 20, 10, 1, (Layout(("questions.json",), read_easy_vqa),)),
)}


class Question(NamedTuple):
    """An encoded example; `draw` chooses one of its answers."""

    source: list[int]
    answers: tuple[tuple[list[int], float], ...]  # token ids, weight
    images: tuple[str, ...]


def encode(task_name: str, examples: Sequence[Example], tokenizer) -> list[Question]:
    """Token ids, closed by the end token, at most as long as the task allows."""
    task = TASKS[task_name]

    def ids(text: str, most: int | None) -> list[int]:
        return tokenizer.encode(text)[: most and most - 1] + [EOS]

    return [Question(ids(example.source, task.max_source), tuple((ids(answer, task.max_target), weight) for answer, weight in example.answers.items()),
                     example.images) for example in examples]


def draw(questions: Sequence[Question], seed: int, step: int) -> list[Row]:
    """One answer for each question, with probabilities proportional to the weights, and with its weight in the loss.

    The same for every process.  A question without an answer has weight 0 (VQA's lists keep the frequent answers alone).
    """
    rng, rows = random.Random(f"{seed} {step}"), []
    for source, answers, images in questions:
        target, weight = rng.choices(answers, [weight for _, weight in answers])[0] if answers else ([EOS], 0.0)
        rows.append(Row(source, target, images, weight))
    return rows


def score(task_name: str, texts: Sequence[str], examples: Sequence[Example]) -> dict[str, float | int]:
    """The task's metric in percent: VQA's accuracy (where the ten answers are not there, the weight of the given one), exact match, or CIDEr-D.

    CIDEr too is times 100, as in Table 3.
    """
    if task_name == "coco":
        value = {"cider": 100 * cider_d(texts, [list(example.references) for example in examples]),
                 "bleu4": 100 * bleu(texts, [list(example.references) for example in examples])[3]}
        return value | {"score": value["cider"], "invalid": 0, "undefined": 0}
    each = [vqa_accuracy(text, list(example.references)) if example.references else example.answers.get(text, 0.0)
            for text, example in zip(texts, examples, strict=True)]
    return {"accuracy": 100 * sum(each) / len(each), "score": 100 * sum(each) / len(each), "invalid": 0, "undefined": 0}


def multitask(batches: Mapping[str, Sequence], epoch: int) -> list[tuple[str, Any]]:
    """An epoch's steps, each of one task: all batches of all tasks, their order shuffled with the epoch as seed (the authors' "roundrobin").

    {task: its batches in their order} -> [(task, batch), ...]; a task of many batches has many steps.
    """
    names = [task for task, of_task in batches.items() for _ in of_task]
    random.Random(epoch).shuffle(names)
    waiting = {task: iter(of_task) for task, of_task in batches.items()}
    return [(task, next(waiting[task])) for task in reversed(names)]  # the authors take tasks from the list's end

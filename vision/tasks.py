"""Questions about pictures: official files or drawn scenes -> examples -> token ids (Sec. 4).

    <folder>/*.json --load--> Example --encode--> Question --draw--> Row
"""
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from data import DATA_SEED, Batch, Dataset, Row, refuse_many
from model import EOS, PAD
from run.hub import sha256_of
from vision import scenes
from vision.metrics import bleu, cider_d, vqa_accuracy

MAX_NEW_TOKENS = 20  # of a generated answer
KARPATHY = {"train": 0, "restval": 0, "val": 1, "test": 2}  # his split of COCO's pictures
MALFORMED = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


class Example(NamedTuple):
    source: str                       # prompt and text
    answers: dict[str, float]         # answer -> weight; a question of VQA may have none
    images: tuple[str, ...]           # names of the pictures without folder and ending
    references: tuple[str, ...] = ()  # what scores compare with: VQA's ten answers, all captions


class Question(NamedTuple):
    source: list[int]                             # token ids
    answers: tuple[tuple[list[int], float], ...]  # token ids, weight
    images: tuple[str, ...]


class Task:
    """What the tasks share. `make` of each turns a row of a file into (part, examples)."""
    name = title = prompt = ""      # title: of its column in a table
    files, folders = (), ()         # also looked for in these folders below --data
    inside = None                   # key of the rows in a JSON file
    max_source = max_target = None  # tokens with the end token, at which texts are cut
    share = 1                       # rows of a step over those of VQA's, among several tasks
    pictures, epochs, num_beams = 1, 20, 1  # Table 6: 20 epochs

    def load(self, folder: str | None = None, prompts: str = "paper") -> Dataset:
        """Return the examples of a folder's files, or of drawn scenes; ValueError if damaged."""
        if folder is None:
            return self.from_scenes()
        folder = Path(folder).expanduser()
        homes = [folder, *(folder / name for name in self.folders)]
        paths = [next(filter(Path.is_file, (home / name for home in homes)), folder / name)
                 for name in self.files]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise ValueError(f"{self.name} needs {' and '.join(missing)} in {folder}")
        parts, skipped = self.read(paths)
        if not all(parts):
            raise ValueError(f"{folder} has no rows of {self.name} to train, validate or test")
        if (paths[0].parent / "images").is_dir():  # easy-VQA's train and test name them alike
            folder = paths[0].parent
        return Dataset(*parts, self.name, folder, sha256_of(*paths), skipped, fallback=None)

    def from_scenes(self) -> Dataset:
        parts = [[example for row in scenes.examples(self.name, name)
                  for example in self.examples(row.text, row.answer, row.scenes, part)]
                 for part, name in enumerate(scenes.SCENES)]
        path = Path(scenes.__file__)
        return Dataset(*parts, "scenes", path.parent, sha256_of(path), 0, fallback=None)

    def read(self, paths: list[Path], make: Callable | None = None) -> tuple:
        """Return (train, val, test), and how many malformed rows are skipped."""
        parts, skipped = ([], [], []), 0
        for number, path in enumerate(paths):
            rows, bad = self.rows(path), []
            for count, row in enumerate(rows, 1):
                try:
                    part, examples = (make or self.make)(row, number)
                    parts[part].extend(examples)
                except MALFORMED as error:
                    bad.append((count, f"{error!r:.100}"))
            refuse_many(path, bad, len(rows), "row")
            skipped += len(bad)
        return parts, skipped

    def rows(self, path: Path, inside: str | None = None) -> list:
        """Return the rows of a JSON file, or of its part `inside`."""
        try:
            content, inside = json.loads(path.read_bytes()), inside or self.inside
            content = content[inside] if inside else content
            return list(content.values() if isinstance(content, dict) else content)
        except MALFORMED as error:
            raise ValueError(f"{path} is damaged ({error!r:.100}); get the official file") from None

    def examples(self, text: str, answer: str | list, images: tuple, part: int) -> list[Example]:
        """Return a row's examples: in training one of each caption, else one."""
        if isinstance(answer, str):
            return [Example(self.prompt + text_of(text), {text_of(answer): 1.0}, images)]
        captions = tuple(text_of(caption).strip() for caption in answer)
        each = [captions] if part else [(caption,) for caption in captions]
        return [Example(self.prompt, dict.fromkeys(one, 1.0), images, captions) for one in each]

    def encode(self, examples: Sequence[Example], tokenizer) -> list[Question]:
        """Return token ids, closed by the end token, at most as long as the task allows."""
        def ids(text: str, most: int | None) -> list[int]:
            return tokenizer.encode(text)[: most and most - 1] + [EOS]

        return [Question(ids(source, self.max_source), tuple(
            (ids(text, self.max_target), weight) for text, weight in answers.items()), images)
            for source, answers, images, _ in examples]

    def draw(self, rows: Sequence[Question], seed: int, step: int) -> list[Row]:
        """Draw an answer of each question by its weight, which also weighs its loss; none: 0."""
        rng, drawn = random.Random(f"{seed} {step}"), []
        for source, answers, images in rows:
            weights = [weight for _, weight in answers]
            target, weight = rng.choices(answers, weights)[0] if answers else ([EOS], 0.0)
            drawn.append(Row(source, target, images, weight))
        return drawn

    @torch.no_grad()
    def answer(self, model, tokenizer, batch: Batch) -> list[str]:
        """Return the text that the model generates for each row."""
        ids = model.generate(batch.source_ids, batch.source_mask, MAX_NEW_TOKENS, self.num_beams,
                             batch.images)
        return [tokenizer.decode(row) for row in ids.tolist()]

    def score(self, texts: Sequence[str], examples: Sequence[Example], prompts="paper") -> dict:
        """Return the accuracy in percent: VQA's where ten people answered, else exact match."""
        each = [vqa_accuracy(text, list(example.references)) if example.references
                else example.answers.get(text, 0.0) for text, example in zip(texts, examples)]
        accuracy = 100 * sum(each) / len(each)
        return {"accuracy": accuracy, "score": accuracy, "invalid": 0, "undefined": 0}

    def ask(self, text: str, prompts: str = "paper") -> Example:
        """Return the example of a user's question; for captions it is empty."""
        return Example(self.prompt + text, {}, ())


def text_of(value) -> str:
    """Return a text that says something and that UTF-8 can write; otherwise an error."""
    if not value.encode().strip():  # AttributeError if it is no text, and UnicodeEncodeError
        raise ValueError("an empty text")
    return value


class VQA(Task):
    """VQA v2, split by Karpathy's dataset_coco.json. An answer weighs what it would score."""
    name, title, prompt, folders, inside = "vqa", "VQA", "vqa: ", ("vqa", "COCO"), "questions"
    files = ("v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json",
             "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json",
             "dataset_coco.json")
    max_source, max_target = 20, 10

    def read(self, paths):
        (coco, _), ten = TASKS["coco"].read(paths[4:]), {}
        part_of = {one.images: part for part, examples in enumerate(coco) for one in examples}
        for path in (paths[1], paths[3]):
            for row in self.rows(path, "annotations"):
                with suppress(*MALFORMED):  # then its question counts as malformed
                    given = tuple(sys.intern(answer["answer"]) for answer in row["answers"])
                    ten[row["question_id"]] = given

        def make(row, number):
            images = (f"COCO_{('train2014', 'val2014')[number]}_{row['image_id']:012d}",)
            given = ten[row["question_id"]]
            weights = {text: min(10, 3 * n) / 10 for text, n in Counter(given).items() if text}
            source = self.prompt + text_of(row["question"])
            return part_of[images], [Example(source, weights, images, given)]

        return super().read([paths[0], paths[2]], make)


class GQA(Task):
    """GQA's balanced questions, {id: {"question", "answer", "imageId"}}."""
    # Paper: the authors' prompt is "gpa: ", a slip of the pen; the side network learns either.
    # Paper: they train on train and val and watch testdev; ours chooses the epoch by val.
    name, title, prompt, folders = "gqa", "GQA", "gqa: ", ("GQA", "questions1.2")
    files = tuple(f"{part}_balanced_questions.json" for part in ("train", "val", "testdev"))
    max_source, share = 20, 100 / 60

    def make(self, row, part):
        return part, self.examples(row["question"], row["answer"], (text_of(row["imageId"]),), part)


class NLVR2(Task):
    """NLVR2's JSON lines: dev-896-0-1 is a sentence about dev-896-0-img0 and dev-896-0-img1."""
    name, title, prompt, folders = "nlvr2", "NLVR2", "nlvr: ", ("nlvr",)
    files = ("train.json", "dev.json", "test1.json")  # test1 is the public test-P
    pictures, share = 2, 20 / 60

    def rows(self, path):
        return path.read_bytes().splitlines()

    def make(self, row, part):
        row = json.loads(row)
        pair = text_of(row["identifier"].rpartition("-")[0])
        word = {"True": "true", "False": "false"}[str(row["label"])]
        return part, self.examples(row["sentence"], word, (f"{pair}-img0", f"{pair}-img1"), part)

    @torch.no_grad()
    def answer(self, model, tokenizer, batch):
        """Return the likelier of the two words."""
        state = model.start(batch.source_ids, batch.source_mask, images=batch.images)
        logits = model.step(torch.full_like(batch.source_ids[:, :1], PAD), state)  # (B, V)
        false, true = (logits[:, tokenizer.encode(word)[0]] for word in ("false", "true"))
        return ["true" if one else "false" for one in (true >= false).tolist()]


class COCO(Task):
    """Karpathy's dataset_coco.json."""
    name, title, prompt, folders = "coco", "COCO", "caption:", ("COCO",)
    files, inside = ("dataset_coco.json",), "images"
    max_target, share, num_beams = 40, 50 / 60, 5

    def make(self, row, part):
        captions = [sentence["raw"] for sentence in row["sentences"]] or [None]  # no captions: bad
        part, images = KARPATHY[row["split"]], (Path(text_of(row["filename"])).stem,)
        return part, self.examples("", captions, images, part)

    def score(self, texts, examples, prompts="paper"):
        """Return CIDEr-D, times 100 as in Table 3, and BLEU-4."""
        references = [example.references for example in examples]
        cider, bleu4 = 100 * cider_d(texts, references), 100 * bleu(texts, references)[3]
        return {"cider": cider, "bleu4": bleu4, "score": cider, "invalid": 0, "undefined": 0}


class EasyVQA(Task):
    """Rows [question, answer, picture's number]; a tenth of the pictures validates, one tests."""
    name, title, prompt, folders = "easy-vqa", "easy-VQA", "vqa: ", ("train",)
    files, max_source, max_target = ("questions.json",), 20, 10

    def make(self, row, part):
        question, answer, number = row
        return part, self.examples(question, answer, (f"{number:d}",), part)

    def read(self, paths):
        (examples, *_), skipped = super().read(paths)
        images = sorted({example.images for example in examples})
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(DATA_SEED))
        ends = round(0.8 * len(images)), round(0.9 * len(images))
        parts = [{images[i] for i in part} for part in order.tensor_split(ends)]
        return [[one for one in examples if one.images in part] for part in parts], skipped


TASKS = {task.name: task for task in (VQA(), GQA(), NLVR2(), COCO(), EasyVQA())}


def multitask(batches: Mapping[str, Sequence], epoch: int) -> list[tuple]:
    """Return an epoch's steps, (task, batch): all of all tasks, shuffled as the authors do."""
    names = [task for task, of_task in batches.items() for _ in of_task]
    random.Random(epoch).shuffle(names)
    waiting = {task: iter(of_task) for task, of_task in batches.items()}
    return [(task, next(waiting[task])) for task in reversed(names)]  # theirs pops from the end

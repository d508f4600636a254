"""What the loop of train.py asks of a task, be it about texts (data.py) or about pictures (data_vl.py, images.py).

    "vqa+gqa" --load--> {task: Dataset} --encode--> {task: rows} --batches--> [(task, rows of a step)] --draw, collate--> Batch

One run learns one task, or several at once that are joined by "+", as the CLIP-T5 of Table 3 does.
"""
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import data
import data_vl
import images
import scenes
from clip import load_clip, sha256_of_clip
from model import PAD, Tokenizer

TASKS = data.TASKS | data_vl.TASKS
MAX_NEW_TOKENS = 20  # of a generated answer
Rows = dict[str, list]  # task -> encoded examples


def has_pictures(names: str) -> bool:
    """Is this task, or are these tasks joined by "+", about pictures?"""
    return names.partition("+")[0] in data_vl.TASKS


def load(names: str, folder: str | Path | None, prompts: str) -> dict[str, data.Dataset]:
    """Each task's examples, from the folder or from where they are when None is given.  ValueError of one line, as of data.load and data_vl.load."""
    return {task: data_vl.load(task, folder) if task in data_vl.TASKS else data.load(task, folder, prompts) for task in names.split("+")}


def encode(task: str, examples: Sequence, tokenizer: Tokenizer) -> list:
    """Token ids of sources and targets: data.Row, or data_vl.Question with several answers."""
    return data_vl.encode(task, examples, tokenizer) if task in data_vl.TASKS else data.encode(examples, tokenizer)


def pictures_of(dataset: data.Dataset) -> tuple[list[str], Callable[[str], Tensor]]:
    """The keys of all its pictures, and what reads one, uint8 (H, W, 3).  ValueError if one is missing."""
    keys = sorted({key for part in (dataset.train, dataset.val, dataset.test) for example in part for key in example.images})
    if dataset.name == "scenes":
        return keys, lambda key: torch.from_numpy(scenes.draw(scenes.scene_of(key)))
    paths = images.find_images(dataset.folder, keys)
    return keys, lambda key: images.read_image(paths[key])


def look(datasets: dict[str, data.Dataset], clip: str, device: str) -> images.Features:
    """What the frozen CLIP sees in all pictures of the tasks: computed once, kept in a folder for each CLIP and origin of pictures.
    A picture that is replaced under its name is not looked at again."""
    tower, sha256, found = load_clip(clip, device=device), sha256_of_clip(clip), images.Features()
    for dataset in datasets.values():
        keys, read = pictures_of(dataset)
        origin = f"scenes {dataset.sha256}" if dataset.name == "scenes" else str(Path(dataset.folder).resolve())
        folder = images.CACHE / f"{Path(dataset.folder).resolve().name}-{hashlib.sha256(origin.encode()).hexdigest()[:8]}-{sha256[:12]}"
        more = images.features(tower, read, keys, folder, made_by=f"{sha256} {origin}", size=tower.config.image_size, device=device)
        found.where, found.shape = found.where | more.where, more.shape
    return found


def joined(datasets: dict[str, data.Dataset]) -> data.Dataset:
    """All rows of all tasks, and what there is to say of them."""
    if len(datasets) == 1:
        return next(iter(datasets.values()))
    each = list(datasets.values())
    parts = [[example for dataset in each for example in getattr(dataset, part)] for part in ("train", "val", "test")]
    sha256 = hashlib.sha256("".join(dataset.sha256 for dataset in each).encode()).hexdigest()
    return data.Dataset(*parts, "+".join(dict.fromkeys(dataset.name for dataset in each)), each[0].folder, sha256, sum(dataset.skipped for dataset in each), None)


# ----------------------------------------------------------------------------------------------------------- in training

def batch_size(task: str, size: int, joint: bool) -> int:
    """Rows of a step of this task: `size`, or beside other tasks its share, where VQA's is `size`."""
    return max(1, round(size * data_vl.TASKS[task].share)) if joint else size


def epoch_steps(rows: Rows, size: int) -> int:
    """Steps in which every row of every task comes once."""
    return sum(math.ceil(len(of_task) / batch_size(task, size, len(rows) > 1)) for task, of_task in rows.items())


def batches(rows: Rows, size: int, seed: int, epoch: int) -> list[tuple[str, list]]:
    """An epoch's steps: each of one task, with its rows."""
    order = data_vl.multitask({task: data.batches(of_task, batch_size(task, size, len(rows) > 1), seed, epoch) for task, of_task in rows.items()}, epoch)
    return [(task, [rows[task][i] for i in indices]) for task, indices in order]


def draw(task: str, rows: list, seed: int, step: int) -> list[data.Row]:
    """Rows with one answer each: a question about a picture may have several, of which every step draws one."""
    return data_vl.draw(rows, seed, step) if task in data_vl.TASKS else rows


def collate(rows: Sequence[data.Row], features: images.Features | None) -> data.Batch:
    """Padded text, and with it what CLIP saw in the pictures."""
    batch = data.collate(rows)
    return batch if features is None else batch._replace(images=features.lookup([row.images for row in rows]))  # (B, N, P, C)


# ------------------------------------------------------------------------------------------------------------ in answering

@torch.no_grad()
def answer(model: nn.Module, tokenizer: Tokenizer, batch: data.Batch, task: str) -> list[str]:
    """The text that the model generates for each row: greedily; captions with 5 beams; NLVR2 takes the likelier of its two words."""
    if task == "nlvr2":
        words = ["true", "false"]
        start = model.start(batch.source_ids, batch.source_mask, images=batch.images)
        logits = model.step(torch.full_like(batch.source_ids[:, :1], PAD), start)  # (B, V)
        return [words[i] for i in logits[:, [tokenizer.encode(word)[0] for word in words]].argmax(dim=-1).tolist()]
    ids = model.generate(batch.source_ids, batch.source_mask, MAX_NEW_TOKENS, 5 if task == "coco" else 1, batch.images)
    return [tokenizer.decode(row) for row in ids.tolist()]


def score(task: str, texts: Sequence[str], examples: Sequence, prompts: str) -> dict[str, float | int]:
    """The task's metrics of generated answers, in percent."""
    return data_vl.score(task, texts, examples) if task in data_vl.TASKS else data.score(task, texts, examples, prompts)


def together(scores: dict[str, dict]) -> dict:
    """One task's metrics as they are; of several tasks the score of each and their mean, Table 3's last column."""
    if len(scores) == 1:
        return next(iter(scores.values()))
    return {**{task: values["score"] for task, values in scores.items()}, "score": sum(values["score"] for values in scores.values()) / len(scores),
            **{name: sum(values[name] for values in scores.values()) for name in ("invalid", "undefined")}}

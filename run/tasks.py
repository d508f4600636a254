"""The tasks by name, and what it takes to learn several at once, as the CLIP-T5 of Table 3 does."""
import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn

import data
import vision.tasks
from model import EOS, PAD, Tokenizer
from run.pairs import Pairs
from run.processes import gather, rank, world_size
from run.report import Progress
from vision.features import Features

OWN = Pairs("text", "own data", words=(), fields={}, label="", validation="part of train", epochs=3,
            downloads={})
TASKS = data.TASKS | vision.tasks.TASKS | {OWN.name: OWN}
Rows = dict[str, list]  # task -> encoded examples


def has_pictures(names: str) -> bool:
    """Is this task, or are these joined by "+", about pictures?"""
    return TASKS[names.partition("+")[0]].pictures > 0


def task_of(name: str, args: argparse.Namespace) -> data.Task | vision.tasks.Task:
    """The task as a run has it: one's own data have the lengths of the run."""
    if name != OWN.name:
        return TASKS[name]
    return replace(OWN, max_length=args.max_length, max_new_tokens=args.max_new_tokens)


def encode(parts: dict[str, list], tokenizer: Tokenizer, args: argparse.Namespace) -> Rows:
    return {name: task_of(name, args).encode(examples, tokenizer)
            for name, examples in parts.items()}


def batches(rows: Rows, size: int, seed: int, epoch: int) -> list[tuple[str, list]]:
    """An epoch's steps: each of one task, with `size` of its rows; of several tasks with its share,
    where VQA's is 1. Every row comes once."""
    each = {}
    for task, of_task in rows.items():
        share = TASKS[task].share if len(rows) > 1 else 1
        each[task] = data.batches(of_task, max(1, round(size * share)), seed, epoch)
    return [(task, [rows[task][i] for i in indices])
            for task, indices in vision.tasks.multitask(each, epoch)]


def collate(rows: list[data.Row], features: Features | None, device: str) -> data.Batch:
    """Padded tensors on the device, and with them what CLIP sees in the rows' pictures."""
    images = features and features.lookup([row.images for row in rows])  # (B, N, P, C)
    batch = data.collate(rows)._replace(images=images)
    return data.Batch(*(tensor if tensor is None else tensor.to(device) for tensor in batch))


@torch.no_grad()
def mean_loss(loss_of: Callable, model: nn.Module, rows: list[data.Row],
              args: argparse.Namespace) -> float:
    """The loss per label token of all rows. Each process takes its share of the batches."""
    losses = {}
    for indices in data.in_order(rows, args.batch_size)[rank() :: world_size()]:
        batch = collate([rows[i] for i in indices], None, args.device)
        losses[indices[0]] = loss_of(model, batch).item()
    return math.fsum(gather(losses).values()) / sum(len(row.target) for row in rows)


def class_texts(task: str, prompts: str, tokenizer: Tokenizer) -> Tensor:
    """The token ids of what stands for each class in a target, padded: (C, T)"""
    texts = [TASKS[task].target(label, prompts) for label in range(len(TASKS[task].words))]
    rows = TASKS[task].encode([data.Example("", text, 0) for text in texts], tokenizer)
    return data.collate(rows).labels.clamp(min=PAD)


def as_classes(rows: Rows, answers: Tensor) -> Rows:
    """Rows whose target is the number of their class."""
    texts = [ids[ids != PAD].tolist() for ids in answers]
    return {task: [row._replace(target=[texts.index(row.target)]) for row in of_task]
            for task, of_task in rows.items()}


def some(rows: Rows, count: int, seed: int, device: str, size: int = 32) -> Iterator[data.Batch]:
    """Batches of so many random rows, without pictures; those of similar length are together."""
    each = [(task, row) for task, of_task in rows.items() for row in of_task
            if getattr(row, "answers", True)]  # VQA has questions without an answer
    order = torch.randperm(len(each), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [TASKS[task].draw([row], seed, number)[0]
              for number, (task, row) in enumerate((each[i] for i in order[:count]), 1)]
    chosen.sort(key=lambda row: (len(row.source), len(row.target)))
    progress = Progress("Fisher information, sample", len(chosen))
    for i in range(0, len(chosen), size):
        progress.step(min(i + size, len(chosen)))
        yield collate(chosen[i : i + size], None, device)


def distinct(rows: Rows, answered: Rows) -> list[data.Row]:
    """From short to long, each row once; of a question about pictures one for each answer. What is
    answered, not trained on, comes with an empty target."""
    found = {(tuple(row.source), (EOS,)): data.Row(row.source, [EOS])
             for row in chain(*answered.values())}
    for row in chain(*rows.values()):
        question = isinstance(row, vision.tasks.Question)
        targets = [ids for ids, _ in row.answers] or [[EOS]] if question else [row.target]
        found |= {(tuple(row.source), tuple(ids)): data.Row(row.source, ids) for ids in targets}
    return sorted(found.values(), key=lambda row: len(row.source))


def average(scores: dict[str, dict]) -> dict:
    """One task's metrics as they are; of several the scores and their mean, as in Table 3."""
    if len(scores) == 1:
        return next(iter(scores.values()))
    each = {task: values["score"] for task, values in scores.items()}
    wrong = {name: sum(values[name] for values in scores.values())
             for name in ("invalid", "undefined")}
    return {**each, "score": sum(each.values()) / len(each), **wrong}

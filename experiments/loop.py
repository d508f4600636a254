"""What the training loop costs beside the computation, and what its batches save.

    python experiments/loop.py --data glue     # some minutes; writes experiments/loop.json
    python experiments/loop.py --data glue --steps 20 --rounds 1 --json loop.json

SST-2, the ladder beside the bundled backbone. In turns, --rounds times: train.py for --steps steps,
with a stopwatch at what its loop calls; then training steps on a sample of an epoch's batches, a
tenth as many, padded in three ways. Shown are the medians over the rounds.
"""
import argparse
import contextlib
import functools
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import train  # noqa: E402
from model import load_tokenizer  # noqa: E402
from run import kernels, options, report, settings  # noqa: E402
from run.options import Parser, positive  # noqa: E402
from run.folder import Run, trainable, write_json  # noqa: E402

COMPUTATION = {
    "forward": [(train, "loss_of")],
    "backward": [(Tensor, "backward")],
    "optimizer": [(nn.utils, "clip_grad_norm_"), (torch.optim.AdamW, "step"),
                  (torch.optim.AdamW, "zero_grad")],
}
LOOP = {  # and what train.fit does itself: log, progress
    "order of the rows, once": [(data, "batches")],
    "padding": [(data, "collate")],
    "seeds": [(train, "seed_everything")],
    "peak of memory": [(Run, "peak")],
    "saving": [(Run, "save")],
}
WIDTH = 128  # tokens that Task.encode lets through
PADDINGS = (f"all to {WIDTH} tokens", "to a batch's longest, in random order",
            "to a batch's longest, by length")


def timed(function: Callable, spans: list[tuple[float, float]]) -> Callable:
    """The function, which notes when it began and ended."""
    @functools.wraps(function)
    def call(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        spans.append((start, time.perf_counter()))
        return result

    return call


def time_loop(folder: str, steps: int) -> dict[str, float]:
    """Seconds of the parts of train.py's loop, from its first batch to the evaluation."""
    spans = defaultdict(list)
    with contextlib.ExitStack() as stack:
        parts = COMPUTATION | LOOP | {"evaluation": [(train, "evaluate")]}
        for part, calls in parts.items():
            for owner, name in calls:
                watched = timed(getattr(owner, name), spans[part])
                stack.enter_context(mock.patch.object(owner, name, watched))
        out = stack.enter_context(tempfile.TemporaryDirectory())
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        train.main(["--task", "sst2", "--data", folder, "--init", "random", "--device", "cpu",
                    "--max-steps", str(steps), "--out", out])
    began, ended = spans["order of the rows, once"][0][0], spans["evaluation"][0][0]
    seconds = {part: sum(end - start for start, end in spans[part] if began <= start < ended)
               for part in COMPUTATION | LOOP}
    return seconds | {"log, progress, the rest": ended - began - sum(seconds.values())}


def widest(rows: list[data.Row], batch: list[int]) -> int:
    return max(len(rows[i].source) for i in batch)


def arrange(rows: list[data.Row], batch_size: int, seed: int) -> dict[str, list[list[int]]]:
    """An epoch's batches for each way of padding, from the narrowest to the widest."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    epochs = (shuffled, shuffled, data.batches(rows, batch_size, seed, epoch=0))
    return {padding: sorted(batches, key=functools.partial(widest, rows))
            for padding, batches in zip(PADDINGS, epochs)}


def to_width(collate: Callable, rows: list[data.Row]) -> data.Batch:
    batch = collate(rows)
    missing = (0, WIDTH - batch.source_ids.shape[1])
    return batch._replace(source_ids=F.pad(batch.source_ids, missing),
                          source_mask=F.pad(batch.source_mask, missing))


def time_epochs(args: argparse.Namespace, rows: list[data.Row], epochs: dict[str, list[list[int]]],
                sample: int, seed: int) -> dict[str, float]:
    """Seconds of an epoch for each way of padding, one batch of each in turn.

    From `sample` of its batches, evenly from narrow to wide.
    """
    model, seconds = train.build(args).train(), defaultdict(list)
    kernels.install(model)
    offset = random.Random(seed).random()
    parameters = list(trainable(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0, fused=True)
    for number in (0, *range(sample)):  # the first of each is not counted
        for padding, batches in epochs.items():
            batch = [rows[i] for i in batches[int((number + offset) / sample * len(batches))]]
            wide = functools.partial(to_width, data.collate)
            collate = wide if padding == PADDINGS[0] else data.collate
            start = time.perf_counter()
            with mock.patch.object(data, "collate", collate):
                train.backward(model, batch, args)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds[padding].append(time.perf_counter() - start)
    return {padding: statistics.mean(seconds[padding][1:]) * len(epochs[padding])
            for padding in PADDINGS}


def show(values: dict[str, float], unit: str, notes: dict[str, str]) -> None:
    for name, value in values.items():
        bar = "█" * round(20 * value / max(values.values()))
        print(f"{name:38}{value:9.2f} {unit:2}  {notes[name]:>16}  {bar}")


def main(args: argparse.Namespace) -> dict:
    command = ["--task", "sst2", "--device", "cpu", "--data", args.data]
    training = options.parse(command, __doc__)
    training.task, task = "sst2", data.TASKS["sst2"]
    rows = task.encode(task.load(args.data, "paper").train, load_tokenizer("nano"))
    settings.fill_defaults(training, {"sst2": rows}, sample=False)
    loops, seconds, sample = [], [], max(1, args.steps // 10)
    progress = report.Progress("round", args.rounds)
    for number in range(args.rounds):
        epochs = arrange(rows, training.batch_size, seed=number)
        loops.append(time_loop(args.data, args.steps))
        seconds.append(time_epochs(training, rows, epochs, sample, seed=number))
        progress.step(number + 1)

    shares = [{part: 100 * took / sum(parts.values()) for part, took in parts.items()}
              for parts in loops]
    step = {part: statistics.median(1000 * parts[part] / args.steps for parts in loops)
            for part in loops[0]}
    share = statistics.median(100 - sum(one[part] for part in COMPUTATION) for one in shares)
    print(f"\nSST-2, LST on nano, batch {training.batch_size}, fp32; {report.hardware('cpu')}, "
          f"torch {torch.__version__}; medians of {args.rounds} rounds\n"
          f"\na step of train.py, in runs of {args.steps}\n")
    show(step, "ms", {part: f"{statistics.median(one[part] for one in shares):.2f} %"
                      for part in step})
    print(f"all but forward, backward and optimizer: {share:.1f} % of the time")

    tokens = {padding: sum(len(batch) * (WIDTH if padding == PADDINGS[0] else widest(rows, batch))
                           for batch in batches) for padding, batches in epochs.items()}
    epoch = {padding: statistics.median(one[padding] for one in seconds) for padding in PADDINGS}
    dynamic, grouped = (statistics.median(one[slow] / one[fast] for one in seconds)
                        for slow, fast in zip(PADDINGS, PADDINGS[1:]))
    print(f"\nan epoch of {len(rows):,} rows, {sum(len(row.source) for row in rows):,} source "
          f"tokens without padding, from {sample} batches a round\n")
    show(epoch, "s", {padding: f"{count:,} tokens" for padding, count in tokens.items()})
    print(f"padding to a batch's longest row is {dynamic:.2f} times faster than to {WIDTH} tokens, "
          f"and grouping by length {grouped:.2f} times faster than random order")
    return {"hardware": report.hardware("cpu"), "versions": report.versions(), "steps": args.steps,
            "rounds": args.rounds, "sampled_batches": sample, "rows": len(rows),
            "batch_size": training.batch_size, "loop_percent": share, "step_milliseconds": step,
            "loops_seconds": loops, "epoch_seconds": epoch, "epochs_seconds": seconds,
            "epoch_tokens": tokens, "times_faster_than_128": dynamic,
            "times_faster_by_length": grouped}


if __name__ == "__main__":
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", required=True, help="folder of GLUE's official folders")
    add("--steps", type=positive, default=200, help="of train.py in each round (default 200)")
    add("--rounds", type=positive, default=3)
    add("--json", type=Path, default=ROOT / "experiments" / "loop.json", help="for the numbers")
    arguments = parser.parse_args()
    report.exit_cleanly(lambda: write_json(arguments.json, main(arguments)))

"""What bench_memory.py tells beside Section 3.1 and Table 1; a case is one of its steps."""
import bisect
import gc
import itertools
import math
import os
import statistics
import timeit
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from data import Row
from memory import account, plot
from memory.environment import CONVENTIONS, OF_TABLE_1, OF_TABLE_3
from run import kernels
from run.cache import States, kept_states
from run.report import Progress, hardware, peak_memory, reset_peak

KINDS = dict(weights="░", gradients="▒", optimizer="▓", saved_activations="█", temporary="·")
SWEEPS = {"batch": (10, 25, 50, 75, 100), "length": (32, 64, 128, 256, 384, 512),
          "r": (2, 4, 8, 16, 32), "keep": (1, 3, 6, 9, 12), "freeze": (0, 6, 12, 18),
          "size": (1, 2, 4, 8)}  # so many times smaller than in Table 1
FEWER = ("as published", "softmax keeps only its output", "gradients freed after a step",
         "no cache while training", "one kernel for a norm", "dropout before ReLU",
         "no mask for attention maps")  # row i: without the first i conventions of Table 1
CHANGES = {"fused attention": {"attention": "fused"}, "--checkpoint": {"checkpoint": True},
           "bf16 backbone": {"dtype": "bf16"}}


def new_file(text: str) -> Path:
    path = Path(text).expanduser().absolute()
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise ArgumentTypeError(f"{text!r} cannot be written: name a file in a folder")
    return path


def count_all(cases: Sequence, count: Callable[..., dict]) -> list[dict]:
    """Return count(case) for each case, and show how far it is."""
    rows, progress = [], Progress("rows", len(cases))
    for case in cases:
        rows.append({"method": case.method, "model": case.model, "label": case.label} | count(case))
        progress.step(len(rows), case.label)
    return rows


def show_cases(args: Namespace, title: str, cases: Sequence) -> list[dict]:
    """Count a step of each case. Print its numbers, then its bar; draw the bars with --plot."""
    rows, cuda = count_all(cases, lambda case: case.account()), args.device == "cuda"
    for case, row in zip(cases, rows):
        if cuda and not case.conventions:
            with suppress(torch.OutOfMemoryError):  # then it prints 0
                row["measured_peak"] = measured_peak(case)
    width = max(len(row["label"]) for row in rows)
    unit = (50 - width - 7 * cuda) / max(row["peak"] for row in rows)
    print(f"\n{title}\nunits of 1000 MiB; inference at batch 1\n\n"
          f"{'':{width - 1}}░weights ▒grads  ▓Adam █saved ·temp.   peak paper")
    for row in rows:
        numbers = "".join(f"{row[kind] / account.GB:7.2f}" for kind in (*KINDS, "peak"))
        print(f"{row['label']:{width}}{numbers}{row['paper_gb'] or '':>6}")
    print(f"\n{'':{width}}trained  infer paper TFLOP{'    GPU' * cuda}")
    for row in rows:
        measured = f"{row.get('measured_peak', 0) / account.GB:7.2f}" * cuda
        bar = "".join(mark * round(row[kind] * unit) for kind, mark in KINDS.items())
        print(f"{row['label']:{width}}{row['trainable_percent']:7.2f}"
              f"{row['inference_peak_paper_gb']:7.2f}{row['paper_inference_gb'] or '':>6}"
              f"{row['flops'] / 1e12:6.1f}{measured}  {bar}")
    print(*(f"  - {CONVENTIONS[name]}" for name in cases[0].conventions), "", sep="\n")
    if args.plot:
        draw(args.plot, f"{title}; in 1000 MiB; mark: the paper", rows)
    return rows


def draw(file: Path, title: str, rows: Sequence[dict], GB: int = account.GB) -> None:
    bars = [(row["label"], [row[kind] / GB for kind in KINDS], row["paper_gb"]) for row in rows]
    plot.stacked_bars(file, title, [kind.replace("_", " ") for kind in KINDS], bars)


def show_twice(args: Namespace, cases: Sequence) -> dict:
    """Tables 3 and 4: each row as published, and today with the options given."""
    both, (B, S, T) = [], args.batch
    conventions = OF_TABLE_3 if args.table == 3 else OF_TABLE_1
    for case in cases:
        both += [replace(case, attention="eager", checkpoint=False, dtype="fp32",
                         conventions=conventions), replace(case, title="  today")]
    cells = " and an image's 36 cells" * (args.table == 3)
    title = f"Table {args.table}: batch {B}, source {S}{cells}, target {T}"
    rows = show_cases(args, title, both)
    return {"rows": [row | {"today": today} for row, today in zip(rows[0::2], rows[1::2])]}


def tricks(case) -> list[dict]:
    """What makes our LST smaller than the published one, one step at a time."""
    cases = [replace(case, title=title, conventions=OF_TABLE_1[i:-1])  # it has no GELU
             for i, title in enumerate(FEWER)]
    for title, change in CHANGES.items():
        cases.append(replace(cases[-1], title=title, **change))
    return show_cases(Namespace(device="meta", plot=None), "LST: what each step brings", cases)


def sweep(args: Namespace, cases: Sequence) -> dict:
    """Peaks of some methods over what --sweep names."""
    swept, (B, S, T), N = [], args.batch, cases[0].config.num_layers
    for value, case in product(SWEEPS[args.sweep], cases):
        if args.sweep == "size":
            value = 16 * value if case.method == "adapters" else 32 // value
        spread = tuple((i + 1) * N // value - 1 for i in range(value))  # evenly, with the last one
        changes = {"batch": {"batch": (value, S, T)}, "length": {"batch": (B, value, T)},
                   "keep": {"keep": spread}}.get(args.sweep, {args.sweep: value})
        with suppress(ValueError):  # this model has no such r, not so many layers
            title = f"{args.sweep} {value}, {case.name}"
            swept.append(replace(case, title=title, **changes).check())
    title = f"Peak of a step of {cases[0].model}, {args.attention} attention"
    return {"rows": show_cases(args, title, swept)}


def fits(args: Namespace, cases: Sequence, lengths: str = "") -> dict:
    """The largest batch whose step stays within the card, by bisection on the count."""
    limit, (_, S, T) = args.fits * 2**30, args.batch
    lengths = lengths or f"source {S}, target {T}"

    def largest(case) -> dict:
        with torch.device("meta"):
            net = case.build()
            peak = lambda B: account.training_step(net, case.make_batch(B))["peak"]
            too_many = next(4**i for i in itertools.count() if peak(4**i) > limit)
            return {"largest_batch": bisect.bisect_right(range(1, too_many), limit, key=peak)}

    rows = count_all(cases, largest)
    print(f"\nthe largest batch in {args.fits} GB of 2^30 bytes, {lengths}, "
          f"{args.attention} attention\n(the CUDA context takes 0.5 GB more)\n")
    width = max(24, *(len(row["label"]) for row in rows))
    for row in rows:
        print(f"{row['label']:{width}}{row['largest_batch']:7,}")
    return {"rows": rows}


def step_of(net: nn.Module, batch: account.Batch) -> Callable[..., None]:
    """A training step as in train.py: step(checkpoint=False)."""
    trained = [p for p in net.train().parameters() if p.requires_grad]
    optimizer = kernels.AdamW(trained, lr=1e-6, weight_decay=0.0, fused=True)

    def step(checkpoint: bool = False) -> None:
        net.encoder.checkpoint = net.decoder.checkpoint = checkpoint
        account.loss_of(net, batch).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measured_peak(case) -> int:
    """The most bytes that CUDA held in three steps."""
    gc.collect()  # what the last case left
    with torch.device("cuda"):
        step = step_of(case.build(), case.make_batch())
    reset_peak("cuda")
    for _ in range(3):
        step(case.checkpoint)
    return peak_memory("cuda")[0]


def show_time(args: Namespace, cases: Sequence) -> dict:
    """Seconds of a step of LST, LoRA and full fine-tuning, without and with checkpointing; of LST
    when its backbone's states are kept (run/cache.py), reading included; and of the forward pass.
    They take turns: in each two untimed ones first, until memory settles."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # memory in huge pages, as in train.py
    (B, S, T), device, lst = args.batch, "cuda" if args.device == "cuda" else "cpu", cases[0]
    by_name = {case.name + ", bf16" * (case.dtype == "bf16"): case for case in cases}
    ours, by_name["LST"] = next(iter(by_name)), replace(lst, dtype="fp32")
    with torch.device(device):
        batch, nets = lst.make_batch(), {name: case.build() for name, case in by_name.items()}
    steps, ladder = {name: step_of(net, batch) for name, net in nets.items()}, nets[ours]
    forward = torch.no_grad()(partial(account.loss_of, ladder.backbone, batch))
    runs = {ours.replace("LST", "forward pass"): forward, **steps}
    runs |= {f"{name}, checkpointing": partial(step, True) for name, step in steps.items()}
    with TemporaryDirectory() as folder:
        rows = [Row(ids, [0] * T) for ids in batch[0].tolist()]
        states = kept_states(ladder, States(ladder, rows, math.inf, Path(folder)))
        runs[f"{ours}, states kept"] = states(steps[ours])
        seconds, turns = {name: [] for name in runs}, list(runs) * 3
        progress = Progress("turns", len(turns))
        for turn, name in enumerate(turns, 1):
            step = partial(finish, runs[name], device)
            seconds[name] += timeit.repeat(step, repeat=4, number=1)[2:]
            progress.step(turn, name)
    print(f"\n{lst.model}'s sizes, random weights, batch {B}, source {S}, target {T}, "
          f"{args.attention} attention,\nr = {args.r}, {len(args.keep) or 'all'} side layers; "
          f"{hardware(device)}\n\n{'seconds of a step':32}   median  fastest  slowest")
    for name, times in seconds.items():
        print(f"{name:32}{statistics.median(times):9.3f}{min(times):9.3f}{max(times):9.3f}")
    return {"rows": [{"method": name, "seconds": statistics.median(times), "fastest": min(times),
                      "slowest": max(times)} for name, times in seconds.items()]}


def finish(step: Callable, device: str) -> None:
    step()
    if device == "cuda":
        torch.cuda.synchronize()

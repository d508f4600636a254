"""Steps that are really taken: their seconds on this machine, and their peak on a GPU."""
import gc
import os
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from memory import account, plot
from run.report import Progress, hardware


def step_of(net: nn.Module, batch: account.Batch) -> Callable[[], None]:
    """Return a training step: forward, backward, clipping, AdamW, as in train.py."""
    parameters = [p for p in net.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0, fused=True)

    def step() -> None:
        account.loss_of(net, batch).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure_cuda(case) -> int | None:
    """Return the most bytes that CUDA held in the second and third step; None: too many for it."""
    gc.collect()
    torch.cuda.empty_cache()
    try:
        with torch.device("cuda"):
            step = step_of(case.build(), case.make_batch())
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        step()
        return torch.cuda.max_memory_allocated()
    except torch.OutOfMemoryError:
        return None


def show(args: Namespace, cases: list) -> dict:
    """Time LST, LoRA and full fine-tuning with and without checkpointing, and the bare backbone.

    The kinds of step take turns in one process: two untimed steps, until memory has settled as it
    has in training, then two timed ones.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # memory in huge pages, as in train.py
    batch, nets = cases[0].make_batch(), {case.name: case.build() for case in cases}
    steps = {name: step_of(net, batch) for name, net in nets.items()}

    @torch.no_grad()
    def forward() -> None:
        account.loss_of(nets["LST"].backbone, batch)

    def step(name: str, checkpoint: bool) -> None:
        nets[name].encoder.checkpoint = nets[name].decoder.checkpoint = checkpoint
        steps[name]()

    runs = {"backbone forward, no dropout": forward}
    runs |= {name: partial(step, name, False) for name in nets}
    runs |= {f"{name} + checkpointing": partial(step, name, True) for name in nets}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    turns = list(runs) * args.rounds
    progress = Progress("turns", len(turns))
    for turn, name in enumerate(turns, start=1):
        for timed in (False, False, True, True):
            start = time.perf_counter()
            runs[name]()
            if timed:
                seconds[name].append(time.perf_counter() - start)
        progress.step(turn, name)

    rows = [{"method": name, "model": cases[0].model, "seconds": statistics.median(times),
             "fastest": min(times), "slowest": max(times)} for name, times in seconds.items()]
    (B, S, T), median = cases[0].batch, {row["method"]: row["seconds"] for row in rows}
    print(f"\n{cases[0].model}'s sizes, random weights, batch {B}, source {S}, target {T}, fp32, "
          f"{args.attention} attention\nLST: r = {args.r}, {len(args.keep) or 'all'} layers; "
          f"{hardware('cpu')}, torch {torch.__version__}\n"
          f"median of {2 * args.rounds} steps in seconds (fastest, slowest)\n")
    plot.show_bars([(row["method"], row["seconds"], f"({row['fastest']:.3f}, {row['slowest']:.3f})")
                    for row in rows], digits=3)
    for one, other in (("LST", "full fine-tuning"), ("LST", "backbone forward, no dropout"),
                       ("LST + checkpointing", "LoRA + checkpointing")):
        print(f"{one} takes {median[one] / median[other]:.2f} of {other}")
    return {"rows": rows}

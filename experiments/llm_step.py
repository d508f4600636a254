"""Seconds and memory of a training step beside SmolLM2-135M in 4 bits: LST, QLoRA, checkpointing.

    python experiments/llm_step.py smollm2      # the folder that assets/make/smollm2.py writes

Four texts of 512 tokens, every token labelled. The steps take turns, so that a change of the
machine's speed hits all of them. Memory is what a step's peak is above the process after loading,
each in a process of its own. Writes experiments/llm_step.json.
"""
import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from run import kernels, report  # noqa: E402
from run.backbones import build_lm  # noqa: E402
from run.folder import trainable, write_json  # noqa: E402

B, S, TURNS = 4, 512, 5
STEPS = {
    "LST, r = 8": {},
    "LST, r = 8, side bf16": {"side_dtype": "bf16"},
    "LST, r = 8, every third layer": {"keep": range(2, 30, 3)},
    "xLadder, 15 rungs, 26 blocks free": {"keep": range(15, 30), "free": 26},
    "QLoRA, rank 64": {"method": "qlora"},
    "QLoRA, rank 64, checkpointing": {"method": "qlora", "checkpoint": True},
}


def step_of(model: str, name: str) -> Callable[[], None]:
    options = dict(model=model, device="cpu", dtype="nf4", checkpoint=False, method="lst",
                   size=None, dropout=0.0, r=8, keep=None, free=0, end="sum", side_dtype="fp32")
    net = build_lm(argparse.Namespace(**options | STEPS[name])).train()
    for weight in net.parameters():  # they are mapped from the disk until they are read
        weight.sum()
    learned = list(trainable(net).values())
    optimizer = kernels.AdamW(learned, 1e-6, fused=True)
    ids = torch.randint(3, net.config.vocab_size, (B, S + 1))
    mask = torch.ones(B, S, dtype=torch.bool)

    def step() -> None:
        logits = net(ids[:, :-1], mask)  # (B, S, V)
        kernels.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).mean().backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def resident() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])


def peak(model: str, name: str) -> int:
    """Bytes of a step above what the process has after loading; the second step's, with moments."""
    step = step_of(model, name)
    gc.collect()
    loaded = resident()
    step()
    report.reset_peak("cpu")
    step()
    return report.peak_memory("cpu")[0] - loaded


def main(model: str) -> None:
    steps, seconds = {name: step_of(model, name) for name in STEPS}, {name: [] for name in STEPS}
    for turn in range(TURNS + 1):  # the first is not counted: memory settles
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name] += [time.perf_counter() - began] if turn else []
            print(f"turn {turn} of {TURNS}: {name}", flush=True)
    rows = {}
    for name, times in seconds.items():
        done = subprocess.run([sys.executable, __file__, model, "--peak", name],
                              capture_output=True, text=True, check=True)
        rows[name] = {"seconds": statistics.median(times), "each": times, "peak": int(done.stdout)}
        print(f"{name:36}{rows[name]['seconds']:8.2f} s{rows[name]['peak'] / 2**20:8.0f} MiB")
    write_json(ROOT / "experiments" / "llm_step.json",
               {"batch": [B, S], "hardware": report.hardware("cpu"), "rows": rows})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--peak", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(peak(args.model, args.peak))
    else:
        main(args.model)

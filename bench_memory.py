"""Where the memory and the time of a training step go (Sec. 3.1).

    python bench_memory.py                # bytes, counted without weights and without a GPU: nothing is computed
    python bench_memory.py --time         # seconds of a step at T5-base's sizes, random weights, all three in one run

Saved activations are what autograd keeps between forward and backward: every tensor that it saves is seen by a hook, and each
storage is counted once; parameters are left out, and dropout keeps one byte for an element, as it does on a GPU.  On torch's meta device tensors have shapes and no content, so a T5-3B takes no memory.
"""
import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import T5, T5Config
from report import Parser, hardware, positive
from side import LadderT5, side_config

SIZES = {  # the public T5 v1.0 checkpoints
    "t5-small": dict(d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8),
    "t5-base": dict(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12),
    "t5-large": dict(d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16),
    "t5-3b": dict(d_model=1024, d_kv=128, d_ff=16384, num_layers=24, num_heads=32),
}
TABLE_1 = [1, 2, 3, 5, 6, 7, 9, 10, 11]  # the layers that Table 1's LST row keeps
GB = 2**20 * 1000  # the paper's "GB" is 1000 MiB


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", default="t5-base", choices=SIZES)
    parser.add_argument("--batch-size", type=positive, help="default: the paper's 100, or 8 with --time")
    parser.add_argument("--source-length", type=positive, default=128)
    parser.add_argument("--target-length", type=positive, default=2)
    parser.add_argument("--r", type=positive, default=8)
    parser.add_argument("--attention", default="eager", choices=("eager", "fused"), help="the same for every row (default eager, as the paper's)")
    parser.add_argument("--time", action="store_true", help="measure steps instead of counting bytes")
    parser.add_argument("--rounds", type=positive, default=5, help="timed rounds after one that is not counted (default 5)")
    parser.add_argument("--json", help="also write the result to this file")
    args = parser.parse_args(argv)
    if args.attention == "fused" and not args.time:
        parser.error("--attention fused goes with --time: without a GPU there is no fused kernel whose bytes could be counted")
    args.batch_size = args.batch_size or (8 if args.time else 100)
    try:
        side_config(T5Config(**SIZES[args.model]), args.r)
    except ValueError as error:
        parser.error(str(error))
    if args.json and (Path(args.json).is_dir() or not Path(args.json).absolute().parent.is_dir()):
        parser.error(f"--json {args.json} cannot be written: name a file in a folder that is there")
    return args


def make_batch(args: argparse.Namespace, vocabulary: int) -> tuple[Tensor, ...]:
    """Source ids (B, S), mask, decoder ids (B, T), labels (B, T): full length, no padding."""
    B, S, T = args.batch_size, args.source_length, args.target_length
    return torch.randint(2, vocabulary, (B, S)), torch.ones(B, S, dtype=torch.bool), torch.zeros(B, T, dtype=torch.long), torch.ones(B, T, dtype=torch.long)


def loss_of(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    source_ids, source_mask, decoder_ids, labels = batch
    return F.cross_entropy(model(source_ids, source_mask, decoder_ids).flatten(0, 1), labels.flatten())


# ----------------------------------------------------------------------------------------------------------------- bytes

def dropout_of_a_gpu(self: nn.Dropout, x: Tensor) -> Tensor:
    return torch.native_dropout(x, self.p, True)[0] if self.training and self.p else x


def saved_bytes(model: nn.Module, batch: tuple[Tensor, ...]) -> int:
    """Bytes that autograd holds at the end of a training step's forward pass, parameters and the batch left out."""
    left_out = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *batch]}
    saved = {}

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in left_out:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor), patch.object(nn.Dropout, "forward", dropout_of_a_gpu):
        loss = loss_of(model, batch)  # holds the graph, so that no storage is freed and its place counted twice
    del loss
    return sum(saved.values())


def count(args: argparse.Namespace) -> list[dict]:
    """Weights, gradients, Adam's two moments and saved activations in bytes, of full fine-tuning and of LST."""
    config = T5Config(**SIZES[args.model], attention=args.attention)
    cases = {"full fine-tuning": lambda: T5(config), f"LST, r = {args.r}, all layers": lambda: LadderT5(T5(config), args.r)}
    if args.model == "t5-base":
        cases[f"LST, r = {args.r}, Table 1's layers"] = lambda: LadderT5(T5(config), args.r, TABLE_1)
    rows = []
    with torch.device("meta"):
        for method, build in cases.items():
            model, batch = build(), make_batch(args, config.vocab_size)
            weights = sum(p.numel() * p.element_size() for p in model.parameters())
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            rows.append({"method": method, "model": args.model, "trainable_params": trained,
                         "trainable_percent": 100 * trained / sum(p.numel() for p in model.parameters() if method == "full fine-tuning" or not p.requires_grad), "weights": weights, "gradients": 4 * trained,
                         "optimizer": 8 * trained, "saved_activations": saved_bytes(model, batch)})
    for row in rows:
        row["total"] = row["weights"] + row["gradients"] + row["optimizer"] + row["saved_activations"]
    return rows


def show_bytes(rows: list[dict], args: argparse.Namespace) -> None:
    print(f"{args.model}, batch {args.batch_size}, source {args.source_length}, target {args.target_length}, fp32, {args.attention} attention; "
          "units of 1000 MiB, the paper's GB\n")
    print(f"{'':32}{'trained':>13}{'weights':>10}{'gradients':>11}{'Adam':>8}{'saved activations':>20}{'sum':>8}")
    for row in rows:
        print(f"{row['method']:32}{row['trainable_params']:>13,}{row['weights'] / GB:>10.2f}{row['gradients'] / GB:>11.2f}"
              f"{row['optimizer'] / GB:>8.2f}{row['saved_activations'] / GB:>20.2f}{row['total'] / GB:>8.2f}  {'█' * round(40 * row['total'] / rows[0]['total'])}")
    print("\nNot in the sum: temporary tensors while a step runs.")


# --------------------------------------------------------------------------------------------------------------- seconds

def step_of(model: nn.Module, batch: tuple[Tensor, ...]) -> Callable[[], None]:
    """A training step: forward, backward, clipping, AdamW, as in train.py."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0, fused=True)

    def step() -> None:
        model.train()
        loss_of(model, batch).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(args: argparse.Namespace) -> list[dict]:
    """Median seconds of a bare forward pass, an LST step and a full fine-tuning step, taken in turns in one process."""
    config = T5Config(**SIZES[args.model], attention=args.attention)
    batch = make_batch(args, config.vocab_size)
    plain, beside = T5(config), T5(config)
    ladder = LadderT5(beside, args.r)

    def forward() -> None:
        plain.eval()
        with torch.no_grad():
            loss_of(plain, batch)

    cases = {"backbone forward, no dropout": forward, f"LST step, r = {args.r}, all layers": step_of(ladder, batch), "full fine-tuning step": step_of(plain, batch)}
    seconds = {name: [] for name in cases}
    for i in range(args.rounds + 1):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            if i:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
            print(f"\rround {i}/{args.rounds}, {name:40}", end="", flush=True)
    print("\r" + " " * 70, end="\r")
    return [{"method": name, "model": args.model, "seconds": statistics.median(values), "fastest": min(values), "slowest": max(values)}
            for name, values in seconds.items()]


def show_seconds(rows: list[dict], args: argparse.Namespace) -> None:
    forward, ladder, full = (row["seconds"] for row in rows)
    print(f"{args.model}'s sizes, random weights, batch {args.batch_size}, source {args.source_length}, target {args.target_length}, fp32, "
          f"{args.attention} attention\n{hardware('cpu')}, torch {torch.__version__}, "
          f"median of {args.rounds} rounds (fastest, slowest)\n")
    for row in rows:
        print(f"{row['method']:36}{row['seconds']:7.3f} s  ({row['fastest']:.3f}, {row['slowest']:.3f})  {'█' * round(40 * row['seconds'] / full)}")
    print(f"\nan LST step takes {ladder / full:.2f} of a full fine-tuning step and {ladder / forward:.2f} of the bare forward pass")


def main(argv: Sequence[str] | None = None) -> dict:
    """Count or measure as the command line says; returns {"rows": [...]}, one dict for each line of the table."""
    args = parse(argv)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as in train.py
    rows = measure(args) if args.time else count(args)
    (show_seconds if args.time else show_bytes)(rows, args)
    result = {"rows": rows, "arguments": vars(args), "torch": torch.__version__, "hardware": hardware("cpu")}
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)
    return result


if __name__ == "__main__":
    main()

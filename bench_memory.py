"""Where the memory of a training step goes (Sec. 3.1, Tables 1 and 3), and its time.

    python bench_memory.py                          # the whole story in a minute: no weights, no GPU, nothing is computed
    python bench_memory.py --as-published           # Table 1's memory columns, under the conventions of the environment that measured them
    python bench_memory.py --table 3                # the same for Table 3, CLIP-T5, with our code's bytes beside them
    python bench_memory.py --explain                # what one layer keeps for backward, tensor by tensor
    python bench_memory.py --sweep length --plot length.svg    # also: batch, r, keep
    python bench_memory.py --fits 12                # the largest batch on a card of 12 GB
    python bench_memory.py --time                   # seconds of a step at T5-base's sizes, random weights

Bytes come from account.py.  --model, --method and what shapes a step (--batch-size, --attention, --checkpoint, ...) choose and change the rows.
"""
import argparse
import bisect
import contextlib
import gc
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

import account
import baselines
import plot
from model import T5, Stack, T5Config, VisualEmbedding
from report import Parser, Progress, guarded, hardware, layers, positive, whole
from side import Ladder, LadderT5, SideStack, check_keep, side_config

SIZES = {  # the public T5 v1.0 checkpoints
    "t5-small": dict(d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8),
    "t5-base": dict(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12),
    "t5-large": dict(d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16),
    "t5-3b": dict(d_model=1024, d_kv=128, d_ff=16384, num_layers=24, num_heads=32),
}
VOCABULARY = 32100  # the public files have 32,128 rows; the authors cut them to the tokenizer's
KEEP = {"t5-base": [1, 2, 3, 5, 6, 7, 9, 10, 11], "t5-large": list(range(1, 24, 2)), "t5-3b": [23]}  # Table 1's LST rows (supplement, Table 2)
METHODS = {"full": "full fine-tuning", "adapters": "adapters", "lora": "LoRA", "bitfit": "BitFit", "prompt": "prompt-tuning", "lst": "LST"}
PAPER = {  # Table 1: memory of training and of inference
    ("full", "t5-base"): (17.6, 0.86), ("adapters", "t5-base"): (13.0, 0.87), ("lora", "t5-base"): (12.6, 0.86), ("bitfit", "t5-base"): (10.7, 0.86),
    ("prompt", "t5-base"): (22.2, 0.87), ("lst", "t5-base"): (5.5, 0.88), ("lst", "t5-large"): (12.2, 2.88), ("lst", "t5-3b"): (22.4, 11.01),
}
PAPER_3 = {"full": (36.2, 0.86), "adapters": (28.4, 0.93), "lora": (27.9, 0.86), "bitfit": (22.7, 0.86), "prompt": (38.7, 0.87), "lst": (15.3, 0.93)}
# Of the four tasks GQA's step is the largest: batch 500, questions cut to 20 tokens, answers of up to 9 ("styrofoam": eight pieces and the end).
TABLE_3 = dict(model="t5-base", r=4, batch=(500, 20, 9), images=True)
IMAGES = 1, 36, 2048  # N, P, C: an image is the grid of CLIP's RN101, pooled to 6 x 6 cells
GB = 2**20 * 1000  # the paper's "GB" is 1000 MiB
KINDS = ("weights", "gradients", "optimizer", "saved_activations", "temporary")


# ---------------------------------------------------------------------------------------------------- Section 3.1, an MLP

ACTIVATIONS = {"ReLU": torch.relu, "sigmoid": torch.sigmoid, "GELU": nn.functional.gelu}


def mlp(method: str, activation: Callable[[Tensor], Tensor], N: int, B: int, D: int, r: int) -> tuple[int, int]:
    """Bytes that N layers a_{i+1} = activation(W_{i+1} a_i + b_{i+1}) of width D keep for backward: (formula, count).

    Eq. 1: the gradient of W_{i+1} needs a_i.  Eq. 2: that of a_i, and so of b_i, needs the derivative of each activation above.
    To be called under torch.device("meta").
    """
    backbone, ladders = [nn.Linear(D, D) for _ in range(N)], [Ladder(D, D // r) for _ in range(N)]
    side, down_input = [nn.Linear(D // r, D // r) for _ in range(N)], nn.Linear(D, D // r)
    for layer in backbone:
        layer.weight.requires_grad_(method == "full")
        layer.bias.requires_grad_(method != "ladder")

    def run() -> Tensor:
        a = torch.randn(B, D)
        h = down_input(a) if method == "ladder" else None
        for i, layer in enumerate(backbone):
            a = activation(layer(a))
            if method == "ladder":
                h = activation(side[i](ladders[i](h, a)))
        return (a if h is None else h).sum()

    full, narrow = 4 * B * D, 4 * B * D // r  # one activation of each width
    from_input = activation is nn.functional.gelu  # GELU's derivative needs its input z_i; ReLU's and sigmoid's their output, which is a_i
    formula = {
        "full": (2 * N if from_input else N + 1) * full,  # a_0 ... a_{N-1}, and the derivatives: z_1 ... z_N, or a_N as well
        "bias": N * full,  # the derivatives alone: z_1 ... z_N or a_1 ... a_N
        # the backbone's a_0 ... a_N for down's weights; at each rung down(a), h and their mix, the derivatives, mu and 1 - mu
        "ladder": (N + 1) * full + (3 * N + (N if from_input else 1)) * narrow + 8 * N,
    }[method]
    return formula, account.saved_bytes(run, [p for layer in [*backbone, *side, *ladders, down_input] for p in layer.parameters()])


def show_section_3_1(N: int = 12, B: int = 100, D: int = 768, r: int = 8) -> list[dict]:
    print(f"Section 3.1: {N} layers of width {D}, batch {B}; bytes kept for backward, formula = count by autograd's hooks\n")
    print(f"{'':10}{'full fine-tuning':>24}{'biases alone':>24}{f'a ladder, r = {r}':>24}")
    rows = []
    for name, activation in ACTIVATIONS.items():
        row, line = {"activation": name}, f"{name:10}"
        for method in ("full", "bias", "ladder"):
            with torch.device("meta"):
                formula, counted = mlp(method, activation, N, B, D, r)
            row |= {f"{method}_formula": formula, f"{method}_counted": counted}
            cell = f"{formula:,} {'=' if formula == counted else '≠'} {counted:,}"
            line += f"{cell:>24}"
        rows.append(row)
        print(line)
    t5_base = T5Config(**SIZES["t5-base"], attention="eager")
    ratio = account.formula_bytes(account.layer_formula(t5_base, 1, 128)) / (4 * 128 * t5_base.d_model)
    # Paper: a ladder's memory is 1/r of (|a| + |derivatives|).  That leaves out the inputs of its down-projections, which have the backbone's width.
    print(f"""
Eq. 1 and 2 need {{a}} and the derivatives; training biases alone needs only the derivatives: "up to 50 %" less.  So it is for GELU.  For ReLU
and sigmoid autograd keeps one tensor for both, a_{{i+1}}, and only the input is saved.  A ladder needs 1/r of either, and also all the {{a}}: the
gradients of its down-projections read them.  In an MLP, which keeps little else, a ladder therefore saves nothing, or little.  A Transformer
layer keeps {ratio:.0f} times its output, and of these the ladder reads one.
""")
    return rows


DTYPES = {1: "bool", 4: "float32", 8: "int64"}  # by the bytes of an element


def show_explain(args: argparse.Namespace) -> dict:
    """One encoder layer of the backbone under full fine-tuning, and the side network's beside it."""
    model, (B, S, _), found = args.model or "t5-base", args.batch, []
    config = T5Config(**SIZES[model], attention=args.attention)
    narrow = side_config(config, args.r)
    for title, own, D in (("a backbone layer while all of it trains", config, None),
                          (f"the side layer beside it, r = {args.r}", narrow, config.d_model)):
        rows = account.layer_formula(own, B, S, D)
        with torch.device("meta"):
            stack = SideStack(own, D, [0, 1], is_decoder=False) if D else Stack(own, is_decoder=False)
            h, h_backbone = torch.randn(B, S, own.d_model, requires_grad=True), torch.randn(B, S, config.d_model)
            bias, _ = stack.train().biases(h, torch.ones(B, S, dtype=torch.bool), None, None)
            counted = account.saved_bytes(lambda: stack.rung(0, h, h_backbone, bias) if D else stack.blocks[0](h, bias), stack.parameters())
        formula = account.formula_bytes(rows)
        print(f"{model}, batch {B}, source {S}, {args.attention} attention, train mode: {title}\n")
        for what, shape, size, why in rows:
            print(f"  {what:24}{str(list(shape)):24}{DTYPES[size]:9}{math.prod(shape) * size:>13,}  {why}")
        print(f"  {'formula':57}{formula:>13,}  = 4 B S d x {formula / (4 * B * S * own.d_model):.1f}")
        print(f"  {'counted by hooks':57}{counted:>13,}  {'equal' if counted == formula else 'NOT EQUAL'}\n")
        tensors = [{"what": what, "shape": shape, "bytes": math.prod(shape) * size, "why": why} for what, shape, size, why in rows]
        found.append({"layer": title, "formula": formula, "counted": counted, "tensors": tensors})
    return {"rows": found}


# ---------------------------------------------------------------------------------------------------------------- Table 1

def kept(model: str) -> tuple[int, ...] | None:
    return tuple(KEEP[model]) if model in KEEP else None


@cache
def parameters_of(config: T5Config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in T5(config).parameters())


@dataclass(frozen=True)
class Case:
    """One step that is accounted for or timed."""

    method: str
    model: str = "t5-base"
    r: int = 8
    keep: tuple[int, ...] | None = None
    freeze: int = 0
    attention: str = "eager"
    checkpoint: bool = False
    dtype: str = "fp32"  # of a frozen backbone
    as_authors: bool = False
    batch: tuple[int, int, int] = (100, 128, 2)  # B, S, T
    images: bool = False  # Table 3's CLIP-T5

    @property
    def label(self) -> str:
        words = f"{METHODS[self.method]}, {self.model[3:]}" + " + checkpointing" * self.checkpoint
        return words + ", bf16" * (self.dtype == "bf16") + (f", {self.freeze} frozen" if self.freeze else "")

    @property
    def config(self) -> T5Config:
        vocabulary = VOCABULARY + 100 * self.images  # the authors add 100 words for the positions of an image
        return T5Config(**SIZES[self.model], vocab_size=vocabulary, attention=self.attention, checkpoint=self.checkpoint)

    def check(self, on_cuda: bool = True) -> "Case":
        """ValueError where sizes do not go together: before the first row is counted, not when this one's turn has come."""
        N, narrow = self.config.num_layers, side_config(self.config, self.r)
        check_keep(self.keep, self.config)
        if self.freeze >= 2 * N:
            raise ValueError(f"freeze is {self.freeze}, it must be from 0 to {2 * N - 1}, so that something is left to train")
        if self.dtype == "bf16" and self.method == "full":
            raise ValueError("--dtype bf16 is for a frozen backbone and full fine-tuning has none: name another --method")
        if self.method == "lst" and self.attention == "fused" and narrow.d_kv % 4 and on_cuda:
            raise ValueError(f"r is {self.r}: CUDA's fused kernel takes heads of a multiple of 4, the side network's would be {narrow.d_kv} wide; "
                             "use --attention eager")
        return self

    def build(self) -> nn.Module:
        t5 = T5(self.config)
        if self.dtype == "bf16":
            t5 = t5.to(torch.bfloat16)
        if self.images:
            t5.visual = VisualEmbedding(IMAGES[-1], t5.config)
        if self.method == "lst":
            return LadderT5(t5, self.r, self.keep)
        return baselines.apply(t5, self.method, as_authors=self.as_authors, freeze=self.freeze)

    def make_batch(self, B: int | None = None) -> account.Batch:
        return account.make_batch(B or self.batch[0], *self.batch[1:], self.config.vocab_size, IMAGES if self.images else None)

    def account(self, conventions: Collection[str] = (), operations: bool = False) -> dict:
        """A row: bytes of training and of inference at batch 1, on the meta device."""
        with torch.device("meta"):
            net, batch = self.build(), self.make_batch()
            trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
            total = sum(p.numel() for p in net.parameters()) if self.images else parameters_of(self.config)  # Table 1's shares are of the backbone
            step = account.training_step(net, batch, conventions)
            flops = {"flops": account.flops(net, batch)} if operations else {}
            if self.images and self.method == "lora":
                baselines.merge(net)  # Paper: Table 3's 0.86 is that of merged weights; without it is 0.93, and Table 1's rows are without
            inference = account.inference(net, self.make_batch(1))
        usual = self == Case(self.method, as_authors=self.as_authors, **(TABLE_3 if self.images else dict(model=self.model, keep=kept(self.model))))
        numbers = PAPER_3[self.method] if self.images else PAPER.get((self.method, self.model), (None, None))
        paper, paper_inference = numbers if usual else (None, None)
        return {"method": self.method, "model": self.model, "label": self.label, "trainable_params": trained,
                "trainable_percent": 100 * trained / total, **step, "peak_paper_gb": step["peak"] / GB, "paper_gb": paper,
                "inference_peak_paper_gb": inference / GB, "paper_inference_gb": paper_inference, **flops}


def show_rows(rows: list[dict]) -> None:
    print("units of 1000 MiB                         trained  weights  grads   Adam  saved  temp.    peak  paper   infer  paper    TFLOP")
    for row in rows:
        kinds = "".join(f"{row[kind] / GB:>{width}.2f}" for kind, width in zip(KINDS, (9, 7, 7, 7, 7)))
        print(f"{row['label']:40}{row['trainable_percent']:>7.2f} %{kinds}{row['peak'] / GB:>8.2f}{row['paper_gb'] or '':>7}"
              f"{row['inference_peak_paper_gb']:>8.2f}{row['paper_inference_gb'] or '':>7}{row['flops'] / 1e12:>9.1f}{measured(row)}")
    print()
    most = max(row["peak"] for row in rows)
    for row in rows:  # what the eye compares
        print(f"{row['label']:40}" + "".join(plot.bar(row[kind], most, mark) for kind, mark in zip(KINDS, "░▒▓█·")))
    print(f"{'':40}░ weights  ▒ gradients  ▓ Adam  █ saved activations  · temporary\n")


def show_table(args: argparse.Namespace, wanted: list[Case]) -> list[dict]:
    rows, progress, (B, S, T) = [], Progress("accounts", len(wanted)), args.batch
    for case in wanted:
        rows.append(case.account(list(account.CONVENTIONS) if args.as_published else (), operations=True))
        if args.device == "cuda":
            rows[-1]["measured_peak"] = measure_cuda(case)
        progress.step(len(rows), case.label)
    title = "training steps" if args.model or args.method or args.freeze or args.keep or args.batch != (100, 128, 2) else "Table 1"
    print(f"\n{title}{' as published' * args.as_published}: batch {B}, source {S}, target {T}, {args.attention} attention, {args.dtype}; "
          "inference at batch 1\n")
    show_rows(rows)
    draw(args.plot, f"Peak of a training step, batch {B}, source {S}, {args.attention} attention, units of 1000 MiB; mark: the paper",
         [(row["label"], row, row["paper_gb"]) for row in rows])
    if args.as_published:
        print("conventions: batch 100, source 128, target 2; eager attention, float32; 32,100 words; a GB is 1000 MiB; LoRA with the authors' biases; and")
        print("\n".join(f"  - {words}" for words in account.CONVENTIONS.values()))
    return rows


def show_table_3(args: argparse.Namespace, wanted: list[Case]) -> list[dict]:
    """Table 3: every row under the conventions of its environment, and what our code holds with today's torch and the options given."""
    rows, progress, (B, S, T) = [], Progress("accounts", len(wanted)), args.batch
    for case in wanted:
        today = case.account()
        rows.append(replace(case, attention="eager", checkpoint=False, dtype="fp32").account(account.CONVENTIONS_3) | {"today": today})
        if args.device == "cuda":
            rows[-1]["measured_peak"] = measure_cuda(case)
        progress.step(len(rows), case.label)
    print(f"\nTable 3, CLIP-T5: batch {B}, source {S} and {IMAGES[1]} cells of an image, target {T}; inference at batch 1; units of 1000 MiB\n")
    print("                      trained   paper  accounted  ours today    inference: paper  accounted")
    for row in rows:
        print(f"{METHODS[row['method']]:20}{row['trainable_percent']:>7.2f} %{row['paper_gb'] or '':>8}{row['peak_paper_gb']:>11.2f}"
              f"{row['today']['peak_paper_gb']:>12.2f}{row['paper_inference_gb'] or '':>18}{row['inference_peak_paper_gb']:>11.3f}{measured(row)}")
    print(f"\nours today: torch {torch.__version__}, {args.attention} attention, {args.dtype}{', checkpointing' * args.checkpoint}\n"
          "accounted: eager attention, float32, 32,200 words, a GB is 1000 MiB, LoRA merged for inference; and")
    print("\n".join(f"  - {words}" for words in account.CONVENTIONS_3.values()))
    draw(args.plot, f"Table 3: peak of a training step, batch {B}, units of 1000 MiB; mark: the paper",
         [bar for row in rows for bar in ((row["label"], row, row["paper_gb"]), ("ours today", row["today"], None))])
    return rows


def measured(row: dict) -> str:
    return f"  measured {row['measured_peak'] / GB:.2f}" if row.get("measured_peak") else "  does not fit" if "measured_peak" in row else ""


def draw(path: Path | None, title: str, bars: list[tuple[str, dict, float | None]]) -> None:
    if path:
        plot.stacked_bars(path, title, [kind.replace("_", " ") for kind in KINDS],
                          [(label, [row[kind] / GB for kind in KINDS], mark) for label, row, mark in bars])


def measure_cuda(case: Case) -> int | None:
    """The largest number of bytes that CUDA held in the second and third step; None if the card is too small."""
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


def show_tables(args: argparse.Namespace) -> dict:
    """Table 1, or the rows that were asked for; by default with Section 3.1, rows with checkpointing, and what made our LST small."""
    wanted = cases(args)
    if args.table == 3:
        return {"rows": show_table_3(args, wanted)}
    if any((args.as_published, args.model, args.method, args.checkpoint, args.freeze, args.keep, args.device == "cuda")):
        return {"rows": show_table(args, wanted)}
    section_3_1 = show_section_3_1(r=args.r)
    wanted += [replace(case, checkpoint=True) for case in wanted if case.method in ("full", "lora", "lst") and case.model == "t5-base"]
    rows = show_table(args, wanted)
    of = {row["label"]: row for row in rows}
    lora, again, lst, lst_again = (of[label] for label in ("LoRA, base", "LoRA, base + checkpointing", "LST, base", "LST, base + checkpointing"))
    print(f"With checkpointing LoRA comes down to {again['peak'] / GB:.2f}, below LST without it ({lst['peak'] / GB:.2f}); LST with it needs "
          f"{lst_again['peak'] / GB:.2f}.  What remains is time:\nLoRA takes {lora['flops'] / lst['flops']:.1f} times LST's operations, and with "
          f"checkpointing, a second forward pass of the backbone, {again['flops'] / lst_again['flops']:.1f} times.\n")
    tricks = show_tricks(args)
    print("more: --as-published  --explain  --sweep length  --fits 12  --time  --attention fused")
    return {"rows": rows, "section_3_1": section_3_1, "tricks": tricks}


TRICKS = {  # what each step does: a convention of Table 1's environment that it leaves, or what it changes in the case
    "torch of today: softmax keeps its output alone": "softmax",
    "gradients are freed after each step": "gradients",
    "no key/value cache while training": "cache",
    "one kernel for a norm": "norm",
    "dropout before ReLU: one tensor serves both": "feed-forward",
    "attention maps without a dropout mask": "mask",
    "fused attention: the map is computed again": {"attention": "fused"},
    "--checkpoint: so is the rest of a side block": {"checkpoint": True},
    "bf16 backbone: half the weights and rung inputs": {"dtype": "bf16"},
}


def show_tricks(args: argparse.Namespace) -> list[dict]:
    """What makes our LST smaller than the published one, one step at a time."""
    lst, conventions, rows = Case("lst", r=args.r, keep=kept("t5-base"), batch=args.batch), list(account.CONVENTIONS), []
    print(f"LST on T5-base, r = {args.r}, {len(lst.keep)} layers, batch {args.batch[0]}: what each step brings, units of 1000 MiB\n")
    for words, trick in {"as published": {}, **TRICKS}.items():
        if isinstance(trick, str):
            conventions.remove(trick)
        else:
            lst = replace(lst, **trick)
        rows.append(lst.account(conventions) | {"step": words})
        print(f"{words:52}{rows[-1]['peak'] / GB:6.2f}  {plot.bar(rows[-1]['peak'], rows[0]['peak'])}", flush=True)
    print()
    return rows


# -------------------------------------------------------------------------------------------------- sweeps, and what fits

SWEEPS = {"batch": (10, 25, 50, 75, 100), "length": (32, 64, 128, 256, 384, 512), "r": (2, 4, 8, 16, 32), "keep": (1, 3, 6, 9, 12)}
AXES = {"batch": "batch", "length": "source length", "r": "reduction factor r", "keep": "side layers kept in encoder and decoder"}


def show_sweep(args: argparse.Namespace) -> dict:
    """Peaks of full fine-tuning, LoRA and LST over what --sweep names."""
    model, (B, S, T), wanted, rows = args.model or "t5-base", args.batch, {}, []
    methods = [args.method] if args.method else ["lst"] if args.sweep in ("r", "keep") else ["full", "lora", "lst"]
    N = SIZES[model]["num_layers"]
    for value in SWEEPS[args.sweep]:
        change = {"batch": {"batch": (value, S, T)}, "length": {"batch": (B, value, T)}, "r": {"r": value},
                  "keep": {"keep": tuple((i + 1) * N // value - 1 for i in range(value))}}[args.sweep]  # evenly spread, the last one among them
        with contextlib.suppress(ValueError):  # an r that does not divide this model's sizes, more layers than it has
            wanted[value] = [replace(case_of(args, method, model), **change).check() for method in methods]
    progress = Progress("accounts", len(wanted) * len(methods))
    for value in wanted:
        for case in wanted[value]:
            rows.append({args.sweep: value} | case.account())
            progress.step(len(rows))
    series = {METHODS[method]: [row["peak"] / GB for row in rows if row["method"] == method] for method in methods}
    most = max(max(peaks) for peaks in series.values())
    print(f"\n{model}, {args.attention} attention{', checkpointing' * args.checkpoint}: the peak of a step in units of 1000 MiB\n")
    for i, value in enumerate(wanted):
        for name, peaks in series.items():
            ratio = f"  full / LST {series[METHODS['full']][i] / peaks[i]:.2f}" if name == "LST" and len(series) == 3 else ""
            print(f"{args.sweep} {value:<5}{name:18}{peaks[i]:7.2f}  {plot.bar(peaks[i], most)}{ratio}")
    if args.plot:
        title = f"Peak of a training step, {model}, {args.attention} attention, units of 1000 MiB"
        plot.lines(args.plot, title, AXES[args.sweep], list(wanted), series)
    return {"rows": rows}


def show_fits(args: argparse.Namespace) -> dict:
    """The largest batch whose step stays within the card, by bisection on the account."""
    limit, rows, wanted = args.fits * 2**30, [], cases(args)
    progress, (_, S, T) = Progress("methods", len(wanted)), args.batch
    for case in wanted:
        with torch.device("meta"):
            net, high = case.build(), 16

            def peak(B: int) -> int:
                return account.training_step(net, account.make_batch(B, S, T, VOCABULARY))["peak"]

            while peak(high) <= limit:
                high *= 4
            largest = bisect.bisect_right(range(1, high), limit, key=peak)  # so many of 1, 2, ... fit
        rows.append({"method": case.method, "model": case.model, "label": case.label, "largest_batch": largest})
        progress.step(len(rows), case.label)
    most = max(row["largest_batch"] for row in rows)
    print(f"\nthe largest batch in {args.fits} GB (2^30 bytes each), source {S}, target {T}, {args.attention} attention\n")
    for row in rows:
        largest = row["largest_batch"]
        print(f"{row['label']:40}{largest:>7}  {plot.bar(largest, most) if largest else 'not even one row fits'}")
    print("\nNot in the account: the CUDA context, about 0.5 GB, and fragmentation.")
    return {"rows": rows}


# --------------------------------------------------------------------------------------------------------------- seconds

def step_of(net: nn.Module, batch: account.Batch) -> Callable[[], None]:
    """A training step: forward, backward, clipping, AdamW, as in train.py."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0, fused=True)
    net.train()

    def step() -> None:
        account.loss_of(net, batch).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def show_seconds(args: argparse.Namespace) -> dict:
    """Median seconds of steps, taken in turns in one process: in each round four of a kind, of which the last two are timed."""
    model, keep = args.model or "t5-base", None if args.keep in (None, "all") else args.keep
    lst, batch = Case("lst", model, args.r, keep, attention=args.attention), account.make_batch(*args.batch, VOCABULARY)
    nets = {METHODS[method]: replace(lst, method=method).build() for method in ("lst", "lora", "full")}
    steps = {name: step_of(net, batch) for name, net in nets.items()}

    @torch.no_grad()
    def forward() -> None:
        account.loss_of(nets["LST"].backbone, batch)

    def step(name: str, checkpoint: bool) -> None:
        nets[name].encoder.checkpoint = nets[name].decoder.checkpoint = checkpoint
        steps[name]()

    runs = {"backbone forward, no dropout": forward, **{name: partial(step, name, False) for name in nets}}
    runs |= {f"{name} + checkpointing": partial(step, name, True) for name in nets}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    progress = Progress("steps", args.rounds * len(runs))
    for _ in range(args.rounds):
        for name, run in runs.items():
            run()
            run()  # until memory has settled, as it has in training
            for _ in range(2):
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
            progress.step(sum(map(len, seconds.values())) // 2, name)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    B, S, T = args.batch
    print(f"\n{model}'s sizes, random weights, batch {B}, source {S}, target {T}, fp32, {args.attention} attention, LST: r = {args.r}, "
          f"{len(keep) if keep else 'all'} layers\n{hardware('cpu')}, torch {torch.__version__}, median of {2 * args.rounds} steps (fastest, slowest)\n")
    for name, values in seconds.items():
        print(f"{name:34}{middle[name]:7.3f} s  ({min(values):.3f}, {max(values):.3f})  {plot.bar(middle[name], max(middle.values()), width=50)}")
    print()
    for one, other in (("LST", "full fine-tuning"), ("LST", "backbone forward, no dropout"), ("LST + checkpointing", "LoRA + checkpointing")):
        print(f"{one} takes {middle[one] / middle[other]:.2f} of {other}")
    return {"rows": [{"method": name, "model": model, "seconds": middle[name], "fastest": min(values), "slowest": max(values)}
                     for name, values in seconds.items()]}


# ---------------------------------------------------------------------------------------------------------- command line

ROW = {"model", "method", "source_length", "target_length", "r", "keep", "freeze", "attention", "checkpoint", "dtype", "as_authors"}
READS = {  # what each story reads, beside --table 1 and --json; any other option would be ignored, so it is refused
    "as_published": {"method", "plot", "table"},
    "explain": {"model", "batch_size", "source_length", "r", "attention"},
    "sweep": ROW | {"batch_size", "plot"},
    "fits": ROW,
    "time": {"model", "batch_size", "source_length", "target_length", "r", "keep", "attention", "rounds"},
    "tables": ROW | {"batch_size", "device", "plot"},
    "table 3": ROW - {"model", "freeze", "as_authors"} | {"batch_size", "device", "plot", "table"},
}
READ_BY = {"r": {"lst"}, "keep": {"lst"}, "freeze": {"full", "adapters", "lora", "bitfit"}, "as_authors": {"lora", "prompt"}}  # not by every method
SWEPT = {"batch": "batch_size", "length": "source_length", "r": "r", "keep": "keep"}  # the option whose place a sweep takes


def new_file(text: str) -> Path:
    path = Path(text).absolute()
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: name a file in a folder that is there")
    return path


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    stories = parser.add_argument_group("what to show (default: Section 3.1, Table 1, what made our LST small)").add_mutually_exclusive_group()
    stories.add_argument("--as-published", action="store_true", help="Table 1 under the conventions of its environment")
    stories.add_argument("--explain", action="store_true", help="the tensors that one layer keeps, with the reason")
    stories.add_argument("--sweep", choices=SWEEPS, help="the peak over batch, source length, r or number of kept layers")
    stories.add_argument("--fits", type=positive, metavar="GB", help="the largest batch of each method on a card of so many GB (2^30 bytes)")
    stories.add_argument("--time", action="store_true", help="seconds of a step on this machine")
    step = parser.add_argument_group("the step")
    step.add_argument("--table", type=int, choices=(1, 3), help="the rows of this table of the paper (default 1); 3: as published and today")
    step.add_argument("--model", choices=SIZES, help="all methods at this size, instead of Table 1's rows")
    step.add_argument("--method", choices=METHODS, help="this method alone")
    step.add_argument("--batch-size", type=positive, help="default: the paper's 100, or 8 with --time")
    step.add_argument("--source-length", type=positive, default=128)
    step.add_argument("--target-length", type=positive, default=2)
    step.add_argument("--r", type=positive, default=8)
    step.add_argument("--keep", type=lambda text: text if text == "all" else layers(text),
                      help="0-based layers of the ladder, or all (default: Table 1's; with --time all)")
    step.add_argument("--freeze", type=whole, default=0, metavar="K", help="the baselines' lowest K layers stay as they are (Fig. 6)")
    step.add_argument("--attention", choices=("eager", "fused"), default="eager", help="of every row (default eager, as the paper's)")
    step.add_argument("--checkpoint", action="store_true", help="gradient checkpointing of every row: of backbone blocks, LST's of side blocks")
    step.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the frozen backbone")
    step.add_argument("--as-authors", action="store_true", help="LoRA with the authors' biases, prompts from noise")
    step.add_argument("--device", choices=("meta", "cuda"), default="meta", help="cuda: also run each row and read CUDA's peak")
    step.add_argument("--rounds", type=positive, default=3, help="of --time, two timed steps each (default 3)")
    files = parser.add_argument_group("files")
    files.add_argument("--json", type=new_file, help="also write what was found to this file")
    files.add_argument("--plot", type=new_file, help="also draw it, as SVG; for tables and --sweep")
    args = parser.parse_args(argv)
    if args.table == 3:  # with its own defaults
        parser.set_defaults(**dict(zip(("batch_size", "source_length", "target_length"), TABLE_3["batch"])), r=TABLE_3["r"])
        args = parser.parse_args(argv)

    story = next(name for name in READS if getattr(args, name, name == "tables"))
    story = "table 3" if story == "tables" and args.table == 3 else story
    method = "lst" if args.sweep in ("r", "keep") else args.method
    if args.method not in (None, method):
        parser.error(f"--sweep {args.sweep} is about the ladder: leave --method {args.method} out")
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)} - {story, "json"} - ({"table"} if args.table == 1 else set())
    read = {name for name in READS[story] if method is None or method in READ_BY.get(name, METHODS)} - {SWEPT.get(args.sweep)}
    if idle := given - read:
        parser.error(f"--{min(idle)} has no part in what is asked for here{f' (--{story})' * (story != 'tables')}: leave it out".replace("_", "-"))
    if args.json and args.json == args.plot:
        parser.error("--json and --plot name the same file")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; leave it out, the account needs none")
    args.batch = args.batch_size or (8 if args.time else 100), args.source_length, args.target_length
    try:
        for case in cases(args):
            case.check(on_cuda=not args.time)
    except ValueError as error:
        parser.error(str(error))
    return args


def case_of(args: argparse.Namespace, method: str, model: str) -> Case:
    images = args.table == 3
    keep = (None if images else kept(model)) if method != "lst" or args.keep is None else None if args.keep == "all" else tuple(args.keep)
    freeze = args.freeze if method in READ_BY["freeze"] else 0
    as_authors = args.as_authors or (args.as_published and not images)  # Table 3's LoRA has no added biases
    return Case(method, model, args.r, keep, freeze, args.attention, args.checkpoint, args.dtype, as_authors, args.batch, images)


def cases(args: argparse.Namespace) -> list[Case]:
    """The rows that the command line asks for: a table's, or all methods at one size."""
    model = TABLE_3["model"] if args.table == 3 else args.model
    which = [(method, model) for method in METHODS] if model else PAPER
    return [case_of(args, method, model) for method, model in which if args.method in (None, method)]


# ------------------------------------------------------------------------------------------------------------------ main

def run(args: argparse.Namespace) -> dict:
    shows = {"explain": show_explain, "sweep": show_sweep, "fits": show_fits, "time": show_seconds}
    show = next((shows[name] for name in shows if getattr(args, name)), show_tables)
    try:
        result = show(args)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not any(words in str(error) for words in ("overflow", "allocate")):
            raise
        raise ValueError("a step of this size is more than 64 bits can count or this machine can hold: make the batch or a length smaller") from None
    result |= {"arguments": {name: value for name, value in vars(args).items() if name not in ("json", "plot")}, "torch": torch.__version__,
               "hardware": hardware("cuda" if args.device == "cuda" else "cpu")}
    text = json.dumps(result, indent=2)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    return json.loads(text)


def main(argv: Sequence[str] | None = None) -> dict:
    """Show what the command line asks for; returns what --json writes: {"rows": [...]}, one dict for each line."""
    args = parse(argv)
    return guarded(lambda: run(args))


if __name__ == "__main__":
    main()

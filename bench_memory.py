"""Where the memory of a training step goes (Sec. 3.1, Table 1), and its time.

    python bench_memory.py                          # the whole story in a minute: no weights, no GPU, nothing is computed
    python bench_memory.py --as-published           # Table 1's memory columns, under the conventions of the environment that measured them
    python bench_memory.py --explain                # what one layer keeps for backward, tensor by tensor
    python bench_memory.py --sweep length --plot length.svg    # also: batch, r, keep
    python bench_memory.py --fits 12                # the largest batch on a card of 12 GB
    python bench_memory.py --time                   # seconds of a step at T5-base's sizes, random weights

Bytes come from account.py.  --model, --method and what shapes a step (--batch-size, --attention, --checkpoint, ...) choose and change the rows.
"""
import argparse
import gc
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import account
import baselines
import plot
from model import T5, Stack, T5Config
from report import Parser, Progress, guarded, hardware, layers, positive, whole
from side import Ladder, LadderT5, SideStack, check_keep, side_config

SIZES = {  # the public T5 v1.0 checkpoints
    "t5-small": dict(d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8),
    "t5-base": dict(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12),
    "t5-large": dict(d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16),
    "t5-3b": dict(d_model=1024, d_kv=128, d_ff=16384, num_layers=24, num_heads=32),
}
KEEP = {"t5-base": [1, 2, 3, 5, 6, 7, 9, 10, 11], "t5-large": list(range(1, 24, 2)), "t5-3b": [23]}  # Table 1's LST rows (supplement, Table 2)
METHODS = {"full": "full fine-tuning", "adapters": "adapters", "lora": "LoRA", "bitfit": "BitFit", "prompt": "prompt-tuning", "lst": "LST"}
PAPER = {  # Table 1: memory of training and of inference
    ("full", "t5-base"): (17.6, 0.86), ("adapters", "t5-base"): (13.0, 0.87), ("lora", "t5-base"): (12.6, 0.86), ("bitfit", "t5-base"): (10.7, 0.86),
    ("prompt", "t5-base"): (22.2, 0.87), ("lst", "t5-base"): (5.5, 0.88), ("lst", "t5-large"): (12.2, 2.88), ("lst", "t5-3b"): (22.4, 11.01),
}
GB = 2**20 * 1000  # the paper's "GB" is 1000 MiB
KINDS = ("weights", "gradients", "optimizer", "saved_activations", "temporary")
SWEEPS = {"batch": (10, 25, 50, 75, 100), "length": (32, 64, 128, 256, 384, 512), "r": (2, 4, 8, 16, 32), "keep": (1, 3, 6, 9, 12)}


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

    @property
    def label(self) -> str:
        return f"{METHODS[self.method]}, {self.model[3:]}" + (" + checkpointing" if self.checkpoint else "") + (", bf16" if self.dtype == "bf16" else "") + (
            f", {self.freeze} frozen" if self.freeze else "")

    def build(self) -> nn.Module:
        # The public files have 32,128 rows; the authors cut the vocabulary to the tokenizer's 32,100.
        t5 = T5(T5Config(**SIZES[self.model], vocab_size=32100, attention=self.attention, checkpoint=self.checkpoint))
        if self.dtype == "bf16":
            t5 = t5.to(torch.bfloat16)
        if self.method == "lst":
            return LadderT5(t5, self.r, self.keep)
        return baselines.apply(t5, self.method, as_authors=self.as_authors, freeze=self.freeze)

    def account(self, conventions: Sequence[str] = ()) -> dict:
        """A row: bytes of training and of inference at batch 1, on the meta device."""
        with torch.device("meta"):
            net = self.build()
            trained, inputs = sum(p.numel() for p in net.parameters() if p.requires_grad), account.make_batch(*self.batch, 32100)
            own = sum(p.numel() for p in T5(T5Config(**SIZES[self.model], vocab_size=32100)).parameters())
            row = {"method": self.method, "model": self.model, "label": self.label, "trainable_params": trained, "trainable_percent": 100 * trained / own}
            row |= account.training_step(net, inputs, conventions)
            inference = account.inference(net, account.make_batch(1, *self.batch[1:], 32100))
        usual = replace(self, as_authors=False) == Case(self.method, self.model, keep=kept(self.model))
        paper, paper_inference = PAPER.get((self.method, self.model), (None, None)) if usual else (None, None)
        return row | {"peak_paper_gb": row["peak"] / GB, "paper_gb": paper, "inference_peak_paper_gb": inference / GB, "paper_inference_gb": paper_inference}


def kept(model: str) -> tuple[int, ...] | None:
    return tuple(KEEP[model]) if model in KEEP else None


# ------------------------------------------------------------------------------------------------------------- arguments

def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    story = parser.add_argument_group("what to show (default: Section 3.1, Table 1, what made our LST small)")
    story.add_argument("--as-published", action="store_true", help="Table 1 under the conventions of its environment")
    story.add_argument("--explain", action="store_true", help="the tensors that one layer keeps, with the reason")
    story.add_argument("--sweep", choices=SWEEPS, help="the peak over batch, source length, r or number of kept layers")
    story.add_argument("--fits", type=positive, metavar="GB", help="the largest batch of each method on a card of so many GB (2^30 bytes)")
    story.add_argument("--time", action="store_true", help="seconds of a step on this machine")
    step = parser.add_argument_group("the step")
    step.add_argument("--table", type=int, choices=(1,), help="the rows of this table of the paper (default 1)")
    step.add_argument("--model", choices=SIZES, help="all methods at this size, instead of Table 1's rows")
    step.add_argument("--method", choices=METHODS, help="this method alone")
    step.add_argument("--batch-size", type=positive, help="default: the paper's 100, or 8 with --time")
    step.add_argument("--source-length", type=positive, default=128)
    step.add_argument("--target-length", type=positive, default=2)
    step.add_argument("--r", type=positive, default=8)
    step.add_argument("--keep", type=lambda text: text if text == "all" else layers(text), help="0-based layers of the ladder, or all (default: Table 1's; with --time all)")
    step.add_argument("--freeze", type=whole, default=0, metavar="K", help="the baselines' lowest K layers stay as they are (Fig. 6)")
    step.add_argument("--attention", choices=("eager", "fused"), default="eager", help="of every row (default eager, as the paper's)")
    step.add_argument("--checkpoint", action="store_true", help="gradient checkpointing of every row: of backbone blocks, LST's of side blocks")
    step.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the frozen backbone")
    step.add_argument("--as-authors", action="store_true", help="LoRA with the authors' biases, prompts from noise")
    step.add_argument("--device", choices=("meta", "cuda"), default="meta", help="cuda: also run each row and read CUDA's peak")
    step.add_argument("--rounds", type=positive, default=3, help="of --time, two timed steps each (default 3)")
    files = parser.add_argument_group("files")
    files.add_argument("--json", help="also write what was found to this file")
    files.add_argument("--plot", help="also draw it, as SVG; for tables and --sweep")
    args = parser.parse_args(argv)
    modes = [name for name in ("as_published", "explain", "sweep", "fits", "time") if getattr(args, name)]
    given = {action.dest for action in step._group_actions if getattr(args, action.dest) != action.default}
    if len(modes) > 1:
        parser.error(f"--{modes[0].replace('_', '-')} and --{modes[1]} are two stories: ask for one at a time")
    everything = {action.dest for action in step._group_actions}
    read = {"as_published": {"table", "method"}, "explain": {"model", "batch_size", "source_length", "r", "attention"},
            "time": {"model", "batch_size", "source_length", "target_length", "r", "keep", "attention", "rounds"},
            "fits": everything - {"batch_size", "device", "rounds"},
            "sweep": everything - {"table", "device", "rounds"} - ({"freeze", "as_authors", args.sweep} if args.sweep in ("r", "keep") else
                                                                  {"batch_size" if args.sweep == "batch" else "source_length"})}
    idle = given - (read[modes[0]] if modes else everything - {"rounds"})
    idle |= given & ({"r", "keep"} if args.method not in (None, "lst") else set())
    idle |= given & ({"freeze"} if args.method in ("lst", "prompt") else set()) | given & ({"as_authors"} if args.method not in (None, "lora", "prompt") else set())
    if idle:
        parser.error(f"--{min(idle).replace('_', '-')} has no part in what is asked for here{f' (--{modes[0]})'.replace('_', '-') if modes else ''}: leave it out")
    if args.sweep in ("r", "keep") and args.method not in (None, "lst"):
        parser.error(f"--sweep {args.sweep} is about the ladder: leave --method {args.method} out")
    if args.json and args.plot and Path(args.json).absolute() == Path(args.plot).absolute():
        parser.error("--json and --plot name the same file")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; leave it out, the account needs none")
    if args.dtype == "bf16" and args.method in (None, "full"):
        parser.error("--dtype bf16 is for a frozen backbone and full fine-tuning has none: name another --method")
    if args.plot and (args.explain or args.fits or args.time):
        parser.error("--plot draws a table or a --sweep: leave it out here")
    for name in ("json", "plot"):
        path = getattr(args, name)
        folder = Path(path or "").absolute().parent
        if path and (Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK)):
            parser.error(f"--{name} {path} cannot be written: name a file in a folder that is there")
    args.batch = args.batch_size or (8 if args.time else 100), args.source_length, args.target_length
    try:
        for case in cases(args):
            config = T5Config(**SIZES[case.model])
            side_config(config, case.r)
            check_keep(case.keep, config)
            if not 0 <= args.freeze < 2 * config.num_layers:
                raise ValueError(f"freeze is {args.freeze}, it must be from 0 to {2 * config.num_layers - 1}, so that something is left to train")
            if case.method == "lst" and case.attention == "fused" and config.d_kv // case.r % 4 and not args.time:
                raise ValueError(f"r is {case.r}: CUDA's fused kernel takes heads of a multiple of 4, the side network's would be {config.d_kv // case.r} wide; use --attention eager")
    except ValueError as error:
        parser.error(str(error))
    return args


def cases(args: argparse.Namespace) -> list[Case]:
    """The rows that the command line asks for."""
    which = [(method, args.model) for method in METHODS] if args.model else list(PAPER)
    which = [(method, model) for method, model in which if args.method in (None, method)]
    made = []
    for method, model in which:
        keep = kept(model) if args.keep is None else None if args.keep == "all" else tuple(args.keep)
        made.append(Case(method, model, args.r, keep if method == "lst" else kept(model), args.freeze if method not in ("lst", "prompt") else 0,
                         args.attention, args.checkpoint, args.dtype, args.as_authors, args.batch))
    return made


# ---------------------------------------------------------------------------------------------------- Section 3.1, an MLP

ACTIVATIONS = {"ReLU": torch.relu, "sigmoid": torch.sigmoid, "GELU": nn.functional.gelu}


def mlp(method: str, activation: Callable[[Tensor], Tensor], N: int, B: int, D: int, r: int) -> tuple[int, int]:
    """Bytes that N layers a_{i+1} = activation(W_{i+1} a_i + b_{i+1}) of width D keep for backward: (formula, count).

    Eq. 1: the gradient of W_{i+1} needs a_i.  Eq. 2: that of a_i, and so of b_i, needs the derivative of each activation above.
    To be called under torch.device("meta").
    """
    backbone = [nn.Linear(D, D) for _ in range(N)]
    side, down_input, ladders = [nn.Linear(D // r, D // r) for _ in range(N)], nn.Linear(D, D // r), [Ladder(D, D // r) for _ in range(N)]
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
    derivatives = N * (activation is nn.functional.gelu)  # GELU's derivative needs its input; ReLU's and sigmoid's their output, which is a_{i+1}
    if method == "full":
        formula = (N + derivatives) * full + (0 if derivatives else full)  # a_0 ... a_{N-1}, and the derivatives: z_1 ... z_N, or a_N as well
    elif method == "bias":
        formula = N * full  # the derivatives alone: z_1 ... z_N or a_1 ... a_N
    else:  # the backbone's a_0 ... a_N for down's weights; at each rung down(a), h and their mix, the derivatives, mu and 1 - mu
        formula = (N + 1) * full + (3 * N + (derivatives or 1)) * narrow + 8 * N
    return formula, account.saved_bytes(run, [p for layer in [*backbone, *side, *ladders, down_input] for p in layer.parameters()])


def show_section_3_1(N: int = 12, B: int = 100, D: int = 768, r: int = 8) -> list[dict]:
    rows = []
    with torch.device("meta"):
        for name, activation in ACTIVATIONS.items():
            row = {"activation": name}
            for method in ("full", "bias", "ladder"):
                row[f"{method}_formula"], row[f"{method}_counted"] = mlp(method, activation, N, B, D, r)
            rows.append(row)
    print(f"Section 3.1: {N} layers of width {D}, batch {B}; bytes kept for backward, formula = count by autograd's hooks\n")
    print(f"{'':10}{'full fine-tuning':>24}{'biases alone':>24}{f'a ladder, r = {r}':>24}")
    for row in rows:
        cells = [f"{row[f'{method}_formula']:,} {'=' if row[f'{method}_formula'] == row[f'{method}_counted'] else '≠'} {row[f'{method}_counted']:,}" for method in ("full", "bias", "ladder")]
        print(f"{row['activation']:10}" + "".join(f"{cell:>24}" for cell in cells))
    # Paper: a ladder's memory is 1/r of (|a| + |derivatives|).  That leaves out the inputs of its down-projections, which have the backbone's width.
    print("\nEq. 1 and 2 need {a} and the derivatives; training biases alone needs only the derivatives: \"up to 50 %\" less.  So it is for GELU.  For ReLU"
          "\nand sigmoid autograd keeps one tensor for both, a_{i+1}, and only the input is saved.  A ladder needs 1/r of either, and also all the {a}: the"
          "\ngradients of its down-projections read them.  In an MLP, which keeps little else, a ladder therefore saves nothing, or little.  A Transformer"
          f"\nlayer keeps {transformer_ratio():.0f} times its output, and of these the ladder reads one.\n")
    return rows


def transformer_ratio() -> float:
    config = T5Config(**SIZES["t5-base"], attention="eager")
    return account.formula_bytes(account.layer_formula(config, 1, 128)) / (4 * 128 * config.d_model)


# ---------------------------------------------------------------------------------------------------------------- tables

def count(wanted: list[Case], args: argparse.Namespace, conventions: Sequence[str] = ()) -> list[dict]:
    rows, progress = [], Progress("accounts", len(wanted))
    for done, case in enumerate(wanted, 1):
        rows.append(case.account(conventions))
        with torch.device("meta"):
            rows[-1]["flops"] = account.flops(case.build(), account.make_batch(*case.batch, 32100))
        if args.device == "cuda":
            rows[-1]["measured_peak"] = measure_cuda(case)
        progress.step(done, case.label)
    return rows


def measure_cuda(case: Case) -> int | None:
    """The largest number of bytes that CUDA held in the second and third step; None if the card is too small."""
    gc.collect()
    torch.cuda.empty_cache()
    try:
        with torch.device("cuda"):
            net, batch = case.build(), account.make_batch(*case.batch, 32100)
        step = step_of(net, batch)
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        step()
        return torch.cuda.max_memory_allocated()
    except torch.OutOfMemoryError:
        return None


def show(rows: list[dict]) -> None:
    print(f"{'units of 1000 MiB':40}{'trained':>9}{'weights':>9}{'grads':>7}{'Adam':>7}{'saved':>7}{'temp.':>7}{'peak':>8}{'paper':>7}{'infer':>8}{'paper':>7}{'TFLOP':>9}")
    most = max(row["peak"] for row in rows)
    for row in rows:
        paper, paper_inference = f"{row['paper_gb']:.1f}" if row["paper_gb"] else "", f"{row['paper_inference_gb']:.2f}" if row["paper_inference_gb"] else ""
        measured = "" if "measured_peak" not in row else f"  measured {row['measured_peak'] / GB:.2f}" if row["measured_peak"] else "  does not fit"
        numbers = "".join(f"{row[kind] / GB:>{width}.2f}" for kind, width in zip(KINDS, (9, 7, 7, 7, 7)))
        print(f"{row['label']:40}{row['trainable_percent']:>7.2f} %{numbers}{row['peak'] / GB:>8.2f}{paper:>7}{row['inference_peak_paper_gb']:>8.2f}{paper_inference:>7}"
              f"{row['flops'] / 1e12:>9.1f}{measured}")
    print()
    for row in rows:  # what the eye compares
        print(f"{row['label']:40}" + "".join(mark * round(60 * row[kind] / most) for kind, mark in zip(KINDS, "░▒▓█·")))
    print(f"{'':40}░ weights  ▒ gradients  ▓ Adam  █ saved activations  · temporary\n")


def draw(rows: list[dict], path: str | None, title: str) -> None:
    if path:
        plot.stacked_bars(path, title, [kind.replace("_", " ") for kind in KINDS], [(row["label"], [row[kind] / GB for kind in KINDS], row["paper_gb"]) for row in rows])


def show_tricks(args: argparse.Namespace) -> list[dict]:
    """What makes our LST smaller than the published one, one step at a time."""
    lst, rows, remaining = Case("lst", r=args.r, keep=kept("t5-base"), batch=args.batch), [], list(account.CONVENTIONS)
    steps: list[tuple[str, list[str], Case]] = [("as published", list(remaining), lst)]
    for words, convention in (("torch of today: softmax keeps its output alone", "softmax"), ("gradients are freed after each step", "gradients"),
                              ("no key/value cache while training", "cache"), ("one kernel for a norm", "norm"), ("dropout before ReLU: one tensor serves both", "feed-forward"), ("attention maps without a dropout mask", "mask")):
        remaining.remove(convention)
        steps.append((words, list(remaining), lst))
    for words, change in (("fused attention: the map is computed again", {"attention": "fused"}), ("--checkpoint: so is the rest of a side block", {"checkpoint": True}),
                          ("bf16 backbone: half the weights and rung inputs", {"dtype": "bf16"})):
        lst = replace(lst, **change)
        steps.append((words, [], lst))
    print(f"LST on T5-base, r = {args.r}, {len(lst.keep)} layers, batch {args.batch[0]}: what each step brings, units of 1000 MiB\n")
    for words, conventions, case in steps:
        rows.append(case.account(conventions) | {"step": words})
        print(f"{words:52}{rows[-1]['peak'] / GB:6.2f}  {'█' * round(60 * rows[-1]['peak'] / rows[0]['peak'])}", flush=True)
    print()
    return rows


def show_explain(args: argparse.Namespace) -> list[dict]:
    """One encoder layer of the backbone under full fine-tuning, and the side network's beside it."""
    model, (B, S, _), found = args.model or "t5-base", args.batch, []
    config = T5Config(**SIZES[model], attention=args.attention)
    narrow = side_config(config, args.r)
    for title, own, D in (("a backbone layer while all of it trains", config, None), (f"the side layer beside it, r = {args.r}", narrow, config.d_model)):
        rows = account.layer_formula(own, B, S, D)
        with torch.device("meta"):
            stack = SideStack(own, D, [0, 1], is_decoder=False) if D else Stack(own, is_decoder=False)
            h, h_backbone = torch.randn(B, S, own.d_model, requires_grad=True), torch.randn(B, S, config.d_model)
            bias, _ = stack.train().biases(h, torch.ones(B, S, dtype=torch.bool), None, None)
            counted = account.saved_bytes(lambda: stack.rung(0, h, h_backbone, bias) if D else stack.blocks[0](h, bias), stack.parameters())
        total = account.formula_bytes(rows)
        print(f"{model}, batch {B}, source {S}, {args.attention} attention, train mode: {title}\n")
        for what, shape, size, why in rows:
            print(f"  {what:24}{str(list(shape)):24}{'float32' if size == 4 else 'bool' if size == 1 else 'int64':9}{math.prod(shape) * size:>13,}  {why}")
        print(f"  {'formula':57}{total:>13,}  = 4 B S d x {total / (4 * B * S * own.d_model):.1f}\n  {'counted by hooks':57}{counted:>13,}  {'equal' if counted == total else 'NOT EQUAL'}\n")
        found.append({"layer": title, "formula": total, "counted": counted, "tensors": [{"what": what, "shape": shape, "bytes": math.prod(shape) * size, "why": why} for what, shape, size, why in rows]})
    return found


def show_sweep(args: argparse.Namespace) -> list[dict]:
    """Peaks of full fine-tuning, LoRA and LST over what --sweep names."""
    model, (B, S, T) = args.model or "t5-base", args.batch
    N = SIZES[model]["num_layers"]
    methods = [method for method in (("lst",) if args.sweep in ("r", "keep") else ("full", "lora", "lst")) if args.method in (None, method)] or [args.method]
    values = [value for value in SWEEPS[args.sweep] if args.sweep != "keep" or value <= N]
    values = [value for value in values if args.sweep != "r" or not any(SIZES[model][key] % value for key in ("d_model", "d_kv", "d_ff")) and (args.attention == "eager" or SIZES[model]["d_kv"] // value % 4 == 0)]
    rows, progress = [], Progress("accounts", len(values) * len(methods))
    for value in values:
        for case in cases(argparse.Namespace(**vars(args) | {"model": model})):
            if case.method in methods:
                change = {"batch": {"batch": (value, S, T)}, "length": {"batch": (B, value, T)}, "r": {"r": value},
                          "keep": {"keep": tuple((i + 1) * N // value - 1 for i in range(value))}}[args.sweep]  # evenly spread, the last one among them
                rows.append({args.sweep: value} | replace(case, **change).account())
                progress.step(len(rows))
    series = {METHODS[method]: [row["peak"] / GB for row in rows if row["method"] == method] for method in methods}
    most = max(max(peaks) for peaks in series.values())
    print(f"\n{model}, {args.attention} attention{', checkpointing' * args.checkpoint}: the peak of a step in units of 1000 MiB\n")
    for i, value in enumerate(values):
        for name, peaks in series.items():
            ratio = f"  full / LST {series[METHODS['full']][i] / peaks[i]:.2f}" if name == "LST" and len(series) == 3 else ""
            print(f"{args.sweep} {value:<5}{name:18}{peaks[i]:7.2f}  {'█' * round(60 * peaks[i] / most)}{ratio}")
    if args.plot:
        names = {"batch": "batch", "length": "source length", "r": "reduction factor r", "keep": "side layers kept in encoder and decoder"}
        plot.lines(args.plot, f"Peak of a training step, {model}, {args.attention} attention, units of 1000 MiB", names[args.sweep], values, series)
    return rows


def show_fits(args: argparse.Namespace) -> list[dict]:
    """The largest batch whose step stays within the card, by bisection on the account."""
    limit, rows, wanted = args.fits * 2**30, [], cases(args)
    progress = Progress("methods", len(wanted))
    for done, case in enumerate(wanted, 1):
        def fits(B: int) -> bool:
            with torch.device("meta"):
                batch = (B, *case.batch[1:])
                return account.training_step(case.build(), account.make_batch(*batch, 32100))["peak"] <= limit

        low, high = 0, 16
        while fits(high):
            low, high = high, 4 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        rows.append({"method": case.method, "model": case.model, "label": case.label, "largest_batch": low})
        progress.step(done, case.label)
    most = max(row["largest_batch"] for row in rows) or 1
    print(f"\nthe largest batch in {args.fits} GB (2^30 bytes each), source {case.batch[1]}, target {case.batch[2]}, {args.attention} attention\n")
    for row in rows:
        bar = "█" * round(60 * row["largest_batch"] / most) if row["largest_batch"] else "not even one row fits"
        print(f"{row['label']:40}{row['largest_batch']:>7}  {bar}")
    print("\nNot in the account: the CUDA context, about 0.5 GB, and fragmentation.")
    return rows


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


def show_seconds(args: argparse.Namespace) -> list[dict]:
    """Median seconds of steps, taken in turns in one process: in each round four of a kind, of which the last two are timed."""
    model = args.model or "t5-base"
    keep = None if args.keep in (None, "all") else args.keep
    lst = Case("lst", model, args.r, keep, 0, args.attention, False, batch=args.batch)
    batch, net, lora, full = account.make_batch(*args.batch, 32100), lst.build(), replace(lst, method="lora").build(), replace(lst, method="full").build()
    plain = {"LST": step_of(net, batch), "LoRA": step_of(lora, batch), "full fine-tuning": step_of(full, batch)}

    def forward() -> None:
        with torch.no_grad():
            account.loss_of(net.backbone, batch)

    def checkpointing(name: str) -> None:
        stacks = [stack for model in (net, lora, full) for stack in (model.encoder, model.decoder)]
        for stack in stacks:
            stack.checkpoint = True
        plain[name]()
        for stack in stacks:
            stack.checkpoint = False

    runs = {"backbone forward, no dropout": forward, **plain, **{f"{name} + checkpointing": partial(checkpointing, name) for name in plain}}
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
    print(f"\n{model}'s sizes, random weights, batch {args.batch[0]}, source {args.batch[1]}, target {args.batch[2]}, fp32, {args.attention} attention, "
          f"LST: r = {args.r}, {len(keep) if keep else 'all'} layers\n{hardware('cpu')}, torch {torch.__version__}, median of {2 * args.rounds} steps (fastest, slowest)\n")
    for name, values in seconds.items():
        print(f"{name:34}{middle[name]:7.3f} s  ({min(values):.3f}, {max(values):.3f})  {'█' * round(50 * middle[name] / max(middle.values()))}")
    print()
    for one, other in (("LST", "full fine-tuning"), ("LST", "backbone forward, no dropout"), ("LST + checkpointing", "LoRA + checkpointing")):
        print(f"{one} takes {middle[one] / middle[other]:.2f} of {other}")
    return [{"method": name, "model": model, "seconds": middle[name], "fastest": min(values), "slowest": max(values)} for name, values in seconds.items()]


# ------------------------------------------------------------------------------------------------------------------ main

def show_tables(args: argparse.Namespace) -> dict:
    conventions = list(account.CONVENTIONS) if args.as_published else []
    wanted = cases(args)
    if args.as_published:
        wanted = [replace(case, as_authors=True) for case in wanted]
    story = not any((args.as_published, args.model, args.method, args.checkpoint, args.freeze, args.keep, args.device == "cuda")) and args.dtype == "fp32"
    result = {"section_3_1": show_section_3_1(r=args.r)} if story else {}
    if story:
        wanted += [replace(case, checkpoint=True) for case in wanted if case.method in ("full", "lora", "lst") and case.model == "t5-base"]
    B, S, T = args.batch
    rows = count(wanted, args, conventions)
    usual = "Table 1" if args.batch == (100, 128, 2) and not (args.model or args.method or args.freeze or args.keep) else "training steps"
    print(f"\n{usual}{' as published' * args.as_published}: batch {B}, source {S}, target {T}, {args.attention} attention, {args.dtype}; inference at batch 1\n")
    show(rows)
    draw(rows, args.plot, f"Peak of a training step, batch {B}, source {S}, {args.attention} attention, units of 1000 MiB; mark: the paper")
    if args.as_published:
        print("conventions: batch 100, source 128, target 2; eager attention, float32; 32,100 words; a GB is 1000 MiB; LoRA with the authors' biases; and")
        print("\n".join(f"  - {words}" for words in account.CONVENTIONS.values()))
    if story:
        lora, ladder = (next(row for row in rows if row["label"] == f"{METHODS[method]}, base + checkpointing") for method in ("lora", "lst"))
        plain_lora, plain = (next(row for row in rows if row["label"] == f"{METHODS[method]}, base") for method in ("lora", "lst"))
        print(f"With checkpointing LoRA comes down to {lora['peak'] / GB:.2f}, below LST without it ({plain['peak'] / GB:.2f}); LST with it needs {ladder['peak'] / GB:.2f}.  What remains "
              f"is time:\nLoRA takes {plain_lora['flops'] / plain['flops']:.1f} times LST's operations, and with checkpointing, a second forward pass of the backbone, "
              f"{lora['flops'] / ladder['flops']:.1f} times.\n")
        result["tricks"] = show_tricks(args)
        print("more: --as-published  --explain  --sweep length  --fits 12  --time  --attention fused")
    return {"rows": rows} | result


def main(argv: Sequence[str] | None = None) -> dict:
    """Show what the command line asks for; returns what --json writes: {"rows": [...]}, one dict for each line."""
    args = parse(argv)
    return guarded(lambda: run(args))


def run(args: argparse.Namespace) -> dict:
    shows = {"explain": show_explain, "sweep": show_sweep, "fits": show_fits, "time": show_seconds}
    chosen = [shows[name] for name in shows if getattr(args, name)]
    try:
        result = {"rows": chosen[0](args)} if chosen else show_tables(args)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not any(words in str(error) for words in ("overflow", "allocate")):
            raise
        raise ValueError("a step of this size is more than 64 bits can count or this machine can hold: make the batch or a length smaller") from None
    result |= {"arguments": {name: value for name, value in vars(args).items() if name not in ("json", "plot")}, "torch": torch.__version__,
               "hardware": hardware("cuda" if args.device == "cuda" else "cpu")}
    text = json.dumps(result, indent=2)
    if args.json:
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    return json.loads(text)


if __name__ == "__main__":
    main()

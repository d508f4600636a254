"""What bench_memory.py tells beside Section 3.1 and Table 1; a case is one of its steps."""
import bisect
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from memory import account, formula, plot
from memory.account import GB
from memory.published import CONVENTIONS, CONVENTIONS_3
from run.report import Progress
from side import side_config

KINDS = dict(weights="░", gradients="▒", optimizer="▓", saved_activations="█", temporary="·")
SWEEPS = {"batch": (10, 25, 50, 75, 100), "length": (32, 64, 128, 256, 384, 512),
          "r": (2, 4, 8, 16, 32), "keep": (1, 3, 6, 9, 12)}
TRICKS = {  # a convention of Table 1's environment that a step leaves, or how it changes the case
    "torch of today: softmax keeps only its output": "softmax",
    "gradients are freed after each step": "gradients",
    "no key/value cache while training": "cache",
    "one kernel for a norm": "norm",
    "dropout before ReLU: one tensor serves both": "feed-forward",
    "attention maps without a dropout mask": "mask",
    "fused attention: the map is computed again": {"attention": "fused"},
    "--checkpoint: so is the rest of a side block": {"checkpoint": True},
    "bf16 backbone: half the weights, rung inputs": {"dtype": "bf16"},
}


def count_all(cases: Sequence, count: Callable[..., dict]) -> list[dict]:
    """Return count(case) for each case, and show how far it is."""
    rows, progress = [], Progress("rows", len(cases))
    for case in cases:
        rows.append(count(case))
        progress.step(len(rows), case.label)
    return rows


def show_rows(args: Namespace, title: str, rows: Sequence[dict]) -> None:
    """Print a line of numbers for each row, then a bar for each; draw the bars with --plot."""
    width, most = max(len(row["label"]) for row in rows), max(row["peak"] for row in rows)
    measured = "   GPU" if args.device == "cuda" else ""
    print(f"\n{title}\nunits of 1000 MiB; inference at batch 1\n\n{'':{width}}trained weights "
          f"grads  Adam saved temp.  peak paper infer paper TFLOP{measured}")
    for row in rows:
        cells = [f"{row[kind] / GB:.2f}" for kind in (*KINDS, "peak")]
        cells += [row["paper_gb"] or "", f"{row['inference_peak_paper_gb']:.2f}"]
        cells.append(row["paper_inference_gb"] or "")
        cells.append(f"{row['flops'] / 1e12:.1f}" if "flops" in row else "")
        cells += [f"{(row['measured_peak'] or 0) / GB:.2f}"] if "measured_peak" in row else []
        line = "".join(f"{cell:>6}" for cell in cells)
        print(f"{row['label']:{width}}{row['trainable_percent']:7.2f}  {line}")
    print()
    for row in rows:  # what the eye compares
        bars = [plot.bar(row[kind], most, mark) for kind, mark in KINDS.items()]
        print(f"{row['label']:{width}}  {''.join(bars)}")
    names = [kind.replace("_", " ") for kind in KINDS]
    print(*(f"  {mark} {name}" for name, mark in zip(names, KINDS.values())), "\n")
    if args.plot:
        bars = [(row["label"], [row[kind] / GB for kind in KINDS], row["paper_gb"]) for row in rows]
        plot.stacked_bars(args.plot, f"{title}; in 1000 MiB; mark: the paper", names, bars)


def tricks(case) -> list[dict]:
    """What makes our LST smaller than the published one, one step at a time."""
    rows, conventions = [], list(CONVENTIONS)
    for words, trick in {"as published": {}, **TRICKS}.items():
        if trick in conventions:
            conventions.remove(trick)
        else:
            case = replace(case, **trick)
        rows.append(case.account(conventions) | {"step": words})
    print(f"LST on T5-base, r = {case.r}, batch {case.batch[0]}: what each step brings\n")
    plot.show_bars([(row["step"], row["peak_paper_gb"], "") for row in rows])
    return rows


def table_3(args: Namespace, cases: list) -> dict:
    """CLIP-T5: each row as published, and today with the options given."""
    def count(case) -> dict:
        published = replace(case, attention="eager", checkpoint=False, dtype="fp32")
        today = case.account(measure=args.device == "cuda")
        return published.account(CONVENTIONS_3) | {"today": today}

    rows, shown, (B, S, T) = count_all(cases, count), [], args.batch
    for row in rows:
        today = {"label": "  today", "paper_gb": None, "paper_inference_gb": None}
        shown += [row, row["today"] | today]
    show_rows(args, f"Table 3: batch {B}, source {S} and an image's 36 cells, target {T}", shown)
    print(f"today: torch {torch.__version__}, {args.attention} attention, {args.dtype}"
          f"{', checkpointing' * args.checkpoint}\nabove: eager attention, fp32, 32,200 words, "
          "LoRA merged for inference; and", *CONVENTIONS_3.values(), sep="\n  - ")
    return {"rows": rows}


def explain(args: Namespace, cases: list) -> dict:
    """The tensors of a backbone layer while all of it trains, and of the side layer beside it."""
    found, (B, S, _), wide = [], args.batch, cases[0].config
    layers = {"a backbone layer while all of it trains": (wide, B, S),
              "the side layer beside it": (side_config(wide, args.r), B, S, wide.d_model)}
    for title, sizes in layers.items():
        rows, predicted = formula.layer_formula(*sizes), formula.layer_bytes(*sizes)
        with torch.device("meta"):
            layer, inputs = formula.build_layer(*sizes)
            counted = account.saved_bytes(lambda: layer(*inputs), layer.parameters())
        print(f"{cases[0].model}, batch {B}, source {S}, {args.attention} attention: {title}\n")
        for row in rows:
            shape = str(list(row["shape"]))
            print(f"  {row['what']:21}{shape:20}{row['bytes']:>13,}  {row['why']}")
        times, same = predicted / (4 * B * S * sizes[0].d_model), counted == predicted
        print(f"  {'formula':41}{predicted:>13,}  = 4 B S d x {times:.1f}\n"
              f"  {'counted by hooks':41}{counted:>13,}  {'equal' if same else 'NOT EQUAL'}\n")
        found.append({"layer": title, "formula": predicted, "counted": counted, "tensors": rows})
    return {"rows": found}


def sweep(args: Namespace, cases: list) -> dict:
    """Peaks of full fine-tuning, LoRA and LST over what --sweep names."""
    swept, (B, S, T), N = [], args.batch, cases[0].config.num_layers
    for value in SWEEPS[args.sweep]:
        spread = tuple((i + 1) * N // value - 1 for i in range(value))  # evenly, with the last one
        change = {"batch": {"batch": (value, S, T)}, "length": {"batch": (B, value, T)},
                  "r": {"r": value}, "keep": {"keep": spread}}[args.sweep]
        with suppress(ValueError):  # this model has no such r, not so many layers
            swept += [(value, replace(case, **change).check()) for case in cases]
    rows = count_all([case for _, case in swept], lambda case: case.account())
    for (value, case), row in zip(swept, rows):
        row |= {args.sweep: value, "label": f"{args.sweep} {value}, {case.name}"}
    show_rows(args, f"Peak of a step of {cases[0].model}, {args.attention} attention", rows)
    if len(cases) == 3:
        for full, lst in zip(rows[0::3], rows[2::3]):
            print(f"{args.sweep} {lst[args.sweep]}: full / LST {full['peak'] / lst['peak']:.2f}")
    return {"rows": rows}


def fits(args: Namespace, cases: list) -> dict:
    """The largest batch whose step stays within the card, by bisection on the count."""
    limit, (_, S, T) = args.fits * 2**30, args.batch

    def largest(case) -> dict:
        with torch.device("meta"):
            net, high = case.build(), 16

            def peak(B: int) -> int:
                return account.training_step(net, case.make_batch(B))["peak"]

            while peak(high) <= limit:
                high *= 4
            found = bisect.bisect_right(range(1, high), limit, key=peak)  # so many of 1, 2, ... fit
        return {"method": case.method, "model": case.model, "label": case.label,
                "largest_batch": found}

    rows = count_all(cases, largest)
    print(f"\nthe largest batch in {args.fits} GB of 2^30 bytes, source {S}, target {T}, "
          f"{args.attention} attention\n(the CUDA context takes 0.5 GB more)\n")
    none = "not even one row fits"
    plot.show_bars([(row["label"], row["largest_batch"], "" if row["largest_batch"] else none)
                    for row in rows], digits=0)
    return {"rows": rows}

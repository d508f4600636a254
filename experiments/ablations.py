"""Run the paper's ablations beside nano on SST-2: Figs 5 to 8, Tables 2 and 4.

    python experiments/ablations.py --data glue                 # what ablations.json lacks
    python experiments/ablations.py --data glue --only fig8,cross --seeds 0
    python experiments/ablations.py                             # only print the tables

One epoch of 20,000 phrases, three seeds for Fig. 8 and two for the rest. Each run's folder is kept
in runs/ablations: what was cut off goes on, and what experiments/ablations.json has is not run
again. A row of it is a run's results.json, with the bytes of a training step of that very model,
counted for the widest batch of its epoch with eager attention, as a CPU takes it.
"""
import argparse
import statistics
import sys
import threading
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from data import TASKS, batches  # noqa: E402
from experiments import runs  # noqa: E402
from experiments.runs import Variant  # noqa: E402
from memory import account  # noqa: E402
from model import Attention, load_tokenizer  # noqa: E402
from run import kernels  # noqa: E402
from run.options import Parser, numbers, positive  # noqa: E402
from run.report import exit_cleanly  # noqa: E402

RUN = "--task sst2 --epochs 1 --max-train-rows 20000 --data glue"


def variant(title: str, flags: str = "", seeds: int = 2) -> Variant:
    return Variant(title, f"{RUN} {flags}".strip(), seeds=seeds)


VARIANTS = {
    "lst": variant("LST, r = 8, Fisher", seeds=3),
    "lst-distill": variant("LST, distilled", "--init distill", 3),
    "last": variant("Side-tuning, Fisher", "--side last", 3),
    "last-distill": variant("Side-tuning, distilled", "--side last --init distill", 3),
    "alone": variant("compression, Fisher", "--side alone", 3),
    "alone-distill": variant("compression, distilled", "--side alone --init distill", 3),
    "random": variant("LST, r = 8, random", "--init random"),
    "magnitude": variant("LST, r = 8, magnitude", "--init magnitude"),
    "r4": variant("LST, r = 4, Fisher", "--r 4"),
    "r4-random": variant("LST, r = 4, random", "--r 4 --init random"),
    "r4-magnitude": variant("LST, r = 4, magnitude", "--r 4 --init magnitude"),
    "r2": variant("LST, r = 2, Fisher", "--r 2"),
    "r16": variant("LST, r = 16, Fisher", "--r 16"),
    "r32": variant("LST, r = 32, Fisher", "--r 32"),
    "keep-0,2": variant("LST, two layers", "--keep 0,2"),
    "keep-2": variant("LST, one layer", "--keep 2"),
    "cross": variant("blocks, cross-attention", "--side cross"),
    "adapter-blocks": variant("adapter blocks, gates, r = 16", "--side adapters"),
    "classify": variant("LST on the encoder", "--classify"),
    "y-tuning": variant("Y-tuning", "--method y-tuning"),
}
for method, name, sizes in (("adapters", "adapters", (32, 64, 128)), ("lora", "LoRA", (16, 8, 4)),
                            ("bitfit", "BitFit", ())):
    VARIANTS[method] = variant(name, f"--method {method}")
    for size in sizes:
        flags = f"--method {method} --size {size}"
        VARIANTS[f"{method}-{size}"] = variant(f"{name}, size {size}", flags)
    for layers in (2, 3, 5):
        flags = f"--method {method} --freeze {layers}"
        VARIANTS[f"{method}-freeze-{layers}"] = variant(f"{name}, {layers} frozen", flags)
FIGURES = {
    "fig8": ("lst", "lst-distill", "last", "last-distill", "alone", "alone-distill"),
    "fig7": ("lst", "magnitude", "random", "r4", "r4-magnitude", "r4-random"),
    "table4": ("lst", "cross", "adapter-blocks"),
    "table2": ("classify", "y-tuning"),
    "fig6": ("lst", "keep-0,2", "keep-2", *(name for name in VARIANTS if "freeze" in name),
             "adapters", "lora", "bitfit"),
    "fig5": ("r2", "r4", "lst", "r16", "r32", "adapters", "adapters-32", "adapters-64",
             "adapters-128", "lora", "lora-16", "lora-8", "lora-4"),
}
runs.TABLES["ablations"] = (VARIANTS, {})


@cache
def widest(data: str, model: str, prompts: str, count: int, B: int, seed: int) -> tuple[int, int]:
    """Source and target length of the widest batch of the epoch."""
    task = TASKS["sst2"]
    rows = task.encode(task.load(data, prompts).train[:count], load_tokenizer(model))
    chosen = max(batches(rows, B, seed, 0), key=lambda batch: max(len(rows[i].source)
                                                                  for i in batch))
    return (max(len(rows[i].source) for i in chosen), max(len(rows[i].target) for i in chosen))


def accounted(config: dict, data: str) -> dict:
    """The bytes of a training step of the run's own model (memory/account.py)."""
    args = argparse.Namespace(**config | {"device": "cpu", "model": "nano"})
    net, V = train.build(args), 3  # any vocabulary has more than two
    kernels.install(net)
    for module in net.modules():
        if isinstance(module, Attention):
            module.fused = False
    S, T = widest(data, args.model, args.prompts, args.max_train_rows, args.batch_size, args.seed)
    with torch.device("meta"):
        batch = account.make_batch(args.batch_size, S, 1 if args.classify else T, V)
        step = account.training_step(net.to("meta"), batch)
    return {"batch": [args.batch_size, S, T], "attention": "eager", **step}


class Ablations(runs.Runs):
    """experiments/ablations.json."""

    def __init__(self, data: str | None):
        super().__init__("ablations")
        self.data, self.counting = data, threading.Lock()

    def add(self, run: dict) -> None:
        with self.counting:
            counted = accounted(run["config"], self.data)
        super().add(run | {"accounted": counted})

    def show(self, figure: str) -> None:
        """A table in Markdown, as docs/results.md has it."""
        print(f"\n{figure}\n\n| | trained | score | each seed | MiB of a step |")
        print("|---|---:|---:|---:|---:|")
        for name in FIGURES[figure]:
            found = [run for run in self.current() if run["variant"] == name]
            scores = [run["test"]["score"] for run in found]
            if found:
                variant, peak = self.variants[name], found[0]["accounted"]["peak"] / 2**20
                print(f"| {variant.title} | {found[0]['trainable_params']:,} | "
                      f"**{statistics.mean(scores):.1f}** ± {statistics.pstdev(scores):.1f} | "
                      f"{', '.join(f'{score:.1f}' for score in scores)} | {peak:.0f} |")


def main(args: argparse.Namespace, ablations: Ablations, names: list[str]) -> dict:
    failed = 0
    if args.data:
        failed = ablations.make_missing(names, args.seeds, ablations.data, args.jobs)
    for figure in FIGURES:
        ablations.show(figure)
    return {"failed": failed}


if __name__ == "__main__":
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", help="folder of GLUE's official folders; without it nothing is run")
    add("--jobs", type=positive, default=1, help="runs at a time (default 1)")
    add("--only", type=lambda text: text.split(","), default=list(FIGURES),
        help=f"figures and tables ({', '.join(FIGURES)}), or variants as in the json file")
    add("--seeds", type=numbers, default=[0, 1, 2], help="seeds to run (default 0,1,2)")
    arguments = parser.parse_args()
    chosen = [name for part in arguments.only for name in FIGURES.get(part, [part])]
    for name in chosen:
        if name not in VARIANTS:
            parser.error(f"{name!r} is no variant; choose from {', '.join([*FIGURES, *VARIANTS])}")
    folder = arguments.data and str(Path(arguments.data).resolve())
    order = list(dict.fromkeys(chosen))
    sys.exit(exit_cleanly(lambda: main(arguments, Ablations(folder), order))["failed"] > 0)

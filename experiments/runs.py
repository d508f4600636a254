"""Make the runs that the README's tables of scores show, and print the tables.

    python experiments/runs.py glue --data glue --jobs 2    # what experiments/glue.json lacks
    python experiments/runs.py glue --data glue --only lst,rte-lst --seeds 0
    python experiments/runs.py pictures --data easy_vqa     # the same for experiments/pictures.json
    python experiments/runs.py glue                         # only print the tables

Small models use one core better than several: --jobs 2 makes two runs at a time, which share the
cores. Each run's folder is kept in runs/glue or runs/pictures: what was cut off there goes on, and
what has ended is not run again until its folder is deleted.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from run.options import Parser, numbers, positive  # noqa: E402
from run.folder import write_json  # noqa: E402
from run.report import exit_cleanly  # noqa: E402


class Variant(NamedTuple):
    title: str
    flags: str  # of train.py; SEED stands for the seed
    paper: str = ""  # the paper's score with T5-base (Table 1)
    seeds: int = 3  # it is run with so many of --seeds, the first ones

    def command(self, numbers: list[int]) -> str:
        """As the README has it. If each seed starts from another run, a line for each."""
        if "SEED" in self.flags and len(numbers) > 1:
            return "\n    ".join(self.command([number]) for number in numbers)
        flags, s = self.flags.replace("SEED", str(numbers[0])), "s" * (len(numbers) > 1)
        return f"python train.py {flags} --seed{s} {','.join(map(str, numbers))}"


SST2 = {
    "lst": Variant("LST, r = 8, Fisher pruning", "--task sst2 --data glue", "94.1 ± 0.3"),
    "lst-random": Variant("LST, random start", "--task sst2 --init random --data glue"),
    "lst-alone": Variant("LST without ladders", "--task sst2 --side alone --data glue"),
    "full": Variant("full fine-tuning", "--task sst2 --method full --data glue", "93.9 ± 0.6"),
    "adapters": Variant("adapters", "--task sst2 --method adapters --data glue", "94.2 ± 0.5"),
    "lora": Variant("LoRA", "--task sst2 --method lora --data glue", "94.3 ± 0.1"),
    "bitfit": Variant("BitFit", "--task sst2 --method bitfit --data glue", "94.3 ± 0.1"),
    "prompt": Variant("prompt-tuning", "--task sst2 --method prompt --data glue", "90.3"),
}
SMALL = {}
for task, title, *papers in (("cola", "CoLA, Matthews", "58.1 ± 3.2", "62.8 ± 2.5"),
                             ("mrpc", "MRPC, accuracy and F1", "90.4 ± 1.0", "91.9 ± 1.0"),
                             ("rte", "RTE, accuracy", "71.9 ± 2.1", "74.1 ± 1.0"),
                             ("stsb", "STS-B, Pearson and Spearman", "90.7 ± 0.2", "90.3 ± 0.1")):
    flags = f"--task {task} --epochs 3"  # Paper: 20 epochs; ours is done in minutes
    SMALL[f"{task}-lst"] = Variant(f"{title}: LST", f"{flags} --data glue", papers[0])
    SMALL[f"{task}-full"] = Variant(f"{title}: full fine-tuning",
                                    f"{flags} --method full --data glue", papers[1])
EASY = {f"easy-vqa-{method}": Variant(title, f"--task easy-vqa {flags} --data easy_vqa")
        for method, title, flags in (("lst", "LST, r = 4", "--dtype bf16"),
                                     ("full", "full fine-tuning", "--method full"),
                                     ("adapters", "adapters", "--method adapters"),
                                     ("lora", "LoRA", "--method lora"),
                                     ("bitfit", "BitFit", "--method bitfit"),
                                     ("prompt", "prompt-tuning", "--method prompt"))}
SCENES = {}
for task, title in (("vqa", "VQA"), ("gqa", "GQA"), ("nlvr2", "NLVR2"),
                    ("coco", "captions, CIDEr-D")):
    SCENES[f"{task}-lst"] = Variant(f"{title}: LST, r = 4", f"--task {task} --dtype bf16")
    SCENES[f"{task}-full"] = Variant(f"{title}: full fine-tuning", f"--task {task} --method full")
SCENES["nlvr2-lst"] = Variant("NLVR2: LST, r = 4, from VQA's run",
                              "--task nlvr2 --dtype bf16 --init runs/pictures/vqa-lst-SEED")
SCENES["together-lst"] = Variant("VQA and NLVR2 in one: LST, r = 4",
                                 "--task vqa+nlvr2 --dtype bf16")
TABLES = {"glue": (SST2, SMALL), "pictures": (EASY, SCENES)}


class Runs:
    """What was run for the tables of `which`: experiments/<which>.json."""

    def __init__(self, which: str):
        self.which, self.path = which, ROOT / "experiments" / f"{which}.json"
        self.variants, self.here = TABLES[which][0] | TABLES[which][1], {"python": sys.executable}
        self.lock = threading.Lock()

    def all(self) -> list[dict]:
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else []

    def current(self) -> list[dict]:
        """Runs that this file would still make with the same command."""
        commands = {name: variant.command for name, variant in self.variants.items()}
        return [run for run in self.all() if run["variant"] in commands
                and run["command"] == commands[run["variant"]]([run["seed"]])]

    def add(self, run: dict) -> None:
        with self.lock:
            order = {name: number for number, name in enumerate(self.variants)}
            runs = [other for other in self.all() if other["command"] != run["command"]]
            write_json(self.path, sorted([*runs, run], key=lambda run: (
                order.get(run["variant"], len(order)), run["seed"])))

    def make(self, name: str, seed: int, data: str, jobs: int) -> tuple[str, float | None]:
        """One run in a process of its own: a line about it, and its seconds if it went well."""
        variant, folder = self.variants[name], f"runs/{self.which}"
        start = f"{folder}/vqa-lst-{seed}/results.json"  # what SEED stands for
        if "SEED" in variant.flags and not (ROOT / start).exists():
            line, took = self.make("vqa-lst", seed, data, jobs)
            if took is None:
                return line, took
        here = self.here | {"glue": data, "easy_vqa": data}  # on this machine
        command = [here.get(word, word) for word in variant.command([seed]).split()]
        command += ["--out", f"{folder}/{name}-{seed}", "--resume"]
        threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))}
        done = subprocess.run(command, cwd=ROOT, env=threads | os.environ, text=True,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if done.returncode:
            reason = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
            return f"{name}, seed {seed}: failed, {reason}", None
        run = json.loads((ROOT / folder / f"{name}-{seed}" / "results.json").read_text("utf-8"))
        self.keep(name, run, jobs)
        score = run["test"]["score"]
        return f"{name}, seed {seed}: {score:.2f} in {run['seconds']:.0f} s", run["seconds"]

    def keep(self, name: str, run: dict, jobs: int) -> None:
        """Add what a run's results.json holds, without paths of this machine."""
        run["config"] = {key: value for key, value in run["config"].items()
                         if not str(value).startswith("/")}
        self.add({"variant": name} | run | {
            "command": self.variants[name].command([run["seed"]]), "runs_at_a_time": jobs,
            "model": Path(run["model"]).name})

    def make_missing(self, names: list[str], numbers: list[int], data: str, jobs: int) -> int:
        """Return how many runs failed."""
        there, took = {run["command"] for run in self.current()}, []
        missing = [(name, seed) for name in names for seed in numbers[: self.variants[name].seeds]
                   if self.variants[name].command([seed]) not in there]
        missing.sort(key=lambda case: numbers.index(case[1]))  # one seed of everything first
        pool = ThreadPoolExecutor(jobs)
        try:
            futures = [pool.submit(self.make, *case, data, jobs) for case in missing]
            for number, future in enumerate(as_completed(futures), 1):
                line, seconds = future.result()
                took.append(seconds)
                known = [seconds for seconds in took if seconds is not None] or [0]
                left = round(statistics.mean(known) * (len(missing) - number) / jobs)
                print(f"{line}; {number} of {len(missing)} runs, {timedelta(seconds=left)} left",
                      flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
        return took.count(None)

    def table(self, variants: dict[str, Variant]) -> str:
        """Rows in Markdown, and the commands that make them."""
        pictures, papers, rows, commands = self.which == "pictures", self.which == "glue", [], []
        for name, variant in variants.items():
            runs = [run for run in self.current() if run["variant"] == name]
            if not runs:
                continue
            scores = [run["test"]["score"] for run in runs]
            spread = f" ± {statistics.pstdev(scores):.1f}" if len(scores) > 1 else ""
            share = f"{runs[0]['trainable_params']:,} ({runs[0]['trainable_percent']:.2f} %)"
            seconds = statistics.mean(run["seconds"] for run in runs)
            peak = statistics.mean(run["peak_memory_bytes"] for run in runs) / 2**20
            cells = [variant.title, share, f"**{statistics.mean(scores):.1f}**{spread}",
                     ", ".join(f"{score:.1f}" for score in scores)]
            if pictures:
                hidden = statistics.mean(run["test_hidden"]["score"] for run in runs)
                cells.append(f"{hidden:.1f}")
            cells += [f"{seconds:.0f}", f"{peak:.0f} MiB"] + [variant.paper] * papers
            rows.append(f"| {' | '.join(cells)} |")
            commands.append("    " + variant.command([run["seed"] for run in runs]))
        head = ["", "trained parameters", "score, mean ± deviation", "each seed"]
        head += ["the pictures hidden"] * pictures + ["seconds", "peak memory"]
        head += ["the paper, T5-base"] * papers
        lines = [f"|{' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|", *rows]
        return "\n".join(["", *lines, "", *commands]) if rows else ""


def main(args: argparse.Namespace, runs: Runs) -> dict:
    failed = 0
    if args.data:
        names, data = args.only or list(runs.variants), str(Path(args.data).resolve())
        failed = runs.make_missing(names, args.seeds, data, args.jobs)
    for variants in TABLES[args.which]:
        print(runs.table(variants))
    print()
    for line in sorted({f"{run['hardware']}, {run['runs_at_a_time']} runs at a time, "
                        f"torch {run['versions']['torch']}" for run in runs.current()}):
        print(line)
    return {"failed": failed}


if __name__ == "__main__":
    parser = Parser(__doc__)
    add = parser.add_argument
    add("which", choices=TABLES)
    add("--data", help="folder of GLUE's official folders, or of easy-VQA's files; without it "
        "nothing is run")
    add("--jobs", type=positive, default=1, help="runs at a time (default 1)")
    add("--only", type=lambda text: text.split(","), help="variants to run, as in the json file")
    add("--seeds", type=numbers, default=[0, 1, 2], help="seeds to run (default 0,1,2)")
    arguments = parser.parse_args()
    chosen = Runs(arguments.which)
    for name in arguments.only or []:
        if name not in chosen.variants:
            parser.error(f"{name!r} is no variant; choose from {', '.join(chosen.variants)}")
    sys.exit(exit_cleanly(lambda: main(arguments, chosen))["failed"] > 0)

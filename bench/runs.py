"""Run what the README's tables of scores show, and rebuild the tables from what was run.

    python bench/runs.py glue --data glue --jobs 2                 # what bench/glue.json does not have yet: each variant, each seed
    python bench/runs.py glue --data glue --only lst,rte-lst       # of these variants only; --seeds 0,1,2
    python bench/runs.py pictures --data easy_vqa --jobs 2         # the same for bench/pictures.json
    python bench/runs.py glue                                      # only print the tables

Small models use a core better than several: --jobs 2 makes two runs at a time, which share the cores.  Each run's folder is kept in
runs/glue or runs/pictures: what was cut off there goes on, what has ended is not run again before its folder is deleted.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import write_json  # noqa: E402
from report import Parser, guarded, positive, seeds  # noqa: E402

SMALL_EPOCHS = 3  # Paper: 20 on the small tasks; ours is done in minutes
SST2_VARIANTS = {  # name: title, flags of train.py, the paper's score with T5-base (Table 1)
    "lst": ("LST, r = 8, Fisher pruning", "--task sst2 --data glue", "94.1 ± 0.3"),
    "lst-random": ("LST, random start", "--task sst2 --init random --data glue", ""),
    "lst-shut": ("LST without ladders", "--task sst2 --gates shut --data glue", ""),
    "full": ("full fine-tuning", "--task sst2 --method full --data glue", "93.9 ± 0.6"),
    "adapters": ("adapters", "--task sst2 --method adapters --data glue", "94.2 ± 0.5"),
    "lora": ("LoRA", "--task sst2 --method lora --data glue", "94.3 ± 0.1"),
    "bitfit": ("BitFit", "--task sst2 --method bitfit --data glue", "94.3 ± 0.1"),
    "prompt": ("prompt-tuning", "--task sst2 --method prompt --data glue", "90.3"),
}
SMALL_VARIANTS = {
    f"{task}-{method}": (f"{title}: {method_title}", f"--task {task} --epochs {SMALL_EPOCHS}{flags} --data glue", paper)
    for task, title, papers in (
        ("cola", "CoLA, Matthews", ("58.1 ± 3.2", "62.8 ± 2.5")),
        ("mrpc", "MRPC, accuracy and F1", ("90.4 ± 1.0", "91.9 ± 1.0")),
        ("rte", "RTE, accuracy", ("71.9 ± 2.1", "74.1 ± 1.0")),
        ("stsb", "STS-B, Pearson and Spearman", ("90.7 ± 0.2", "90.3 ± 0.1")))
    for (method, method_title, flags), paper in zip((("lst", "LST", ""), ("full", "full fine-tuning", " --method full")), papers)
}
METHODS = {"lst": ("LST, r = 4", " --dtype bf16"), "blank": ("LST, trained without pictures", " --dtype bf16 --blank"),
           "full": ("full fine-tuning", " --method full"), "adapters": ("adapters", " --method adapters"), "lora": ("LoRA", " --method lora"),
           "bitfit": ("BitFit", " --method bitfit"), "prompt": ("prompt-tuning", " --method prompt")}
EASY_VARIANTS = {f"easy-vqa-{name}": (title, f"--task easy-vqa{flags} --data easy_vqa", "") for name, (title, flags) in METHODS.items()}
SCENE_VARIANTS = {f"{task}-{name}": (f"{title}: {METHODS[name][0]}", f"--task {task}{METHODS[name][1]}", "")
                  for task, title in (("vqa", "VQA"), ("gqa", "GQA"), ("nlvr2", "NLVR2"), ("coco", "captions, CIDEr-D")) for name in ("lst", "full")}
SCENE_VARIANTS["nlvr2-lst"] = ("NLVR2: LST, r = 4, from VQA's run", "--task nlvr2 --dtype bf16 --init runs/pictures/vqa-lst-SEED", "")
SCENE_VARIANTS["together-lst"] = ("VQA and NLVR2 in one: LST, r = 4", "--task vqa+nlvr2 --dtype bf16", "")
TABLES = {"glue": (SST2_VARIANTS, SMALL_VARIANTS), "pictures": (EASY_VARIANTS, SCENE_VARIANTS)}
VARIANTS, RESULTS = {}, Path()  # what the command line chooses: the variants of its tables; the results.json of every run, and its variant
LOCK = threading.Lock()


def command(name: str, numbers: list[int]) -> str:
    """As the README has it, with the data in the folder `glue` or `easy_vqa`.  Where each seed has a start of its own, a line for each."""
    if "SEED" in VARIANTS[name][1] and len(numbers) > 1:
        return "\n    ".join(command(name, [number]) for number in numbers)
    flags = VARIANTS[name][1].replace("SEED", str(numbers[0]))
    return f"python train.py {flags} --seed{'s' * (len(numbers) > 1)} {','.join(map(str, numbers))}"


def all_runs() -> list[dict]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []


def read() -> list[dict]:
    """The runs that are there and that this file would still make with the same command."""
    return [run for run in all_runs() if run["variant"] in VARIANTS and run["command"] == command(run["variant"], [run["seed"]])]


def add(run: dict) -> None:
    with LOCK:
        runs, order = [*(other for other in all_runs() if other["command"] != run["command"]), run], [*VARIANTS]
        write_json(RESULTS, sorted(runs, key=lambda run: (order.index(run["variant"]) if run["variant"] in order else len(order), run["seed"])))


def train(name: str, seed: int, folder: str, jobs: int) -> tuple[str, float | None]:
    """One run, in a process of its own and a folder of its own: a line about it, and its seconds if it went well."""
    if "SEED" in VARIANTS[name][1] and not (ROOT / "runs" / RESULTS.stem / f"vqa-lst-{seed}" / "results.json").exists():  # where it starts
        line, took = train("vqa-lst", seed, folder, jobs)
        if took is None:
            return line, took
    own = {"python": sys.executable} | dict.fromkeys(("glue", "easy_vqa"), str(Path(folder).resolve()))  # of this machine
    words = [own.get(word, word) for word in command(name, [seed]).split()]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))}
    out = f"runs/{RESULTS.stem}/{name}-{seed}"
    done = subprocess.run([*words, "--out", out, "--resume"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        return f"{name}, seed {seed}: failed, {done.stderr.strip().rpartition(chr(10))[2] or f'exit code {done.returncode}'}", None
    run = json.loads((ROOT / out / "results.json").read_text(encoding="utf-8"))
    run["config"] = {key: value for key, value in run["config"].items() if not str(value).startswith("/")}  # no paths of this machine
    add({"variant": name} | run | {"command": command(name, [seed]), "runs_at_a_time": jobs})
    return f"{name}, seed {seed}: {run['test']['score']:.2f} in {run['seconds']:.0f} s", run["seconds"]


def table(names: dict) -> str:
    """The variants' runs as rows in Markdown, and the commands that make them."""
    pictures = names in TABLES["pictures"]
    lines = [f"| | trained parameters | score, mean ± deviation | each seed |{' the pictures hidden |' * pictures} seconds | peak memory |{' the paper, T5-base |' * (not pictures)}"]
    lines.append("|---" + "|---:" * 6 + "|")
    commands = []
    for name, (title, _, paper) in names.items():
        runs = [run for run in read() if run["variant"] == name]
        if not runs:
            continue
        scores = [run["test"]["score"] for run in runs]
        mean = f"**{statistics.mean(scores):.1f}**" + (f" ± {statistics.pstdev(scores):.1f}" if len(scores) > 1 else "")
        lines.append(f"| {title} | {runs[0]['trainable_params']:,} ({runs[0]['trainable_percent']:.2f} %) | {mean} | {', '.join(f'{score:.1f}' for score in scores)} |"
                     + (f" {statistics.mean(run['test_hidden']['score'] for run in runs):.1f} |" if pictures else "")
                     + f" {statistics.mean(run['seconds'] for run in runs):.0f} | {statistics.mean(run['peak_memory_bytes'] for run in runs) / 2**20:.0f} MiB |{f' {paper} |' * (not pictures)}")
        commands.append("    " + command(name, [run["seed"] for run in runs]))
    return "\n".join(["", *lines, "", *commands]) if commands else ""


def run_missing(args: argparse.Namespace) -> int:
    """How many runs failed."""
    there, seconds, failed = {run["command"] for run in read()}, [], 0
    missing = [(name, seed) for seed in args.seeds for name in args.only if command(name, [seed]) not in there]
    pool = ThreadPoolExecutor(args.jobs)
    try:
        for number, future in enumerate(as_completed([pool.submit(train, *case, args.data, args.jobs) for case in missing]), 1):
            line, took = future.result()
            seconds, failed = seconds + [took] * (took is not None), failed + (took is None)
            left = statistics.mean(seconds or [0]) * (len(missing) - number) / args.jobs
            print(f"{line}; {number} of {len(missing)} runs, {timedelta(seconds=round(left))} left", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("which", choices=TABLES)
    parser.add_argument("--data", help="folder of the official GLUE folders, or of easy-VQA's pictures and questions; without it nothing is run")
    parser.add_argument("--jobs", type=positive, default=1, help="runs at a time (default 1)")
    parser.add_argument("--only", type=lambda text: text.split(","), help="variants to run, as in the json file (default: all)")
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2], help="seeds to run (default 0,1,2)")
    args = parser.parse_args()
    global VARIANTS, RESULTS
    VARIANTS, RESULTS = {name: row for names in TABLES[args.which] for name, row in names.items()}, ROOT / "bench" / f"{args.which}.json"
    args.only = args.only or list(VARIANTS)
    if unknown := [name for name in args.only if name not in VARIANTS]:
        parser.error(f"{unknown[0]!r} is no variant; choose from {', '.join(VARIANTS)}")
    failed = run_missing(args) if args.data else 0
    for names in TABLES[args.which]:
        print(table(names))
    print()
    for words in sorted({f"{run['hardware']}, {run['runs_at_a_time']} runs at a time, torch {run['versions']['torch']}" for run in read()}):
        print(words)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(guarded(main))

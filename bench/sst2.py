"""SST-2 with the bundled backbone: run what the README's table shows, and rebuild the table from what was run.

    python bench/sst2.py --data glue --jobs 2    # 6 variants x 3 seeds; one JSON per run in bench/sst2/, those that are there are kept
    python bench/sst2.py                         # only print the table

Small models use a core better than several: --jobs 2 makes two runs at a time, with one thread each.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT, RESULTS = Path(__file__).parent.parent, Path(__file__).parent / "sst2"
VARIANTS = {
    "lst": ("LST, r = 8, Fisher pruning", []),
    "lst-random": ("LST, random start", ["--init", "random"]),
    "lst-shut": ("LST without ladders", ["--gates", "shut"]),
    "full": ("full fine-tuning", ["--method", "full"]),
    "few-lst": ("LST, few rows", ["--max-train-rows", "4000"]),
    "few-lst-shut": ("LST without ladders, few rows", ["--max-train-rows", "4000", "--gates", "shut"]),
}
SEEDS = (0, 1, 2)


def run(name: str, seed: int, data: str, threads: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--task", "sst2", "--data", str(Path(data).resolve()), "--seed", str(seed), "--out", folder, *VARIANTS[name][1]]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, cwd=ROOT, check=True, env=environment, stdout=subprocess.DEVNULL)
        results = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
    results["config"].pop("data")  # a path of the machine that ran it
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}-{seed}.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"{name}, seed {seed}: {results['test']['score']:.2f} % in {results['seconds']:.0f} s", flush=True)


def table() -> str:
    lines = ["| | trained parameters | accuracy, mean ± deviation | each seed | minutes | peak memory |", "|---|---:|---:|---:|---:|---:|"]
    for name, (title, flags) in VARIANTS.items():
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(f"{name}-[0-9].json"))]
        if not runs:
            continue
        scores = [run["test"]["score"] for run in runs]
        spread = ", ".join(f"{score:.1f}" for score in scores)
        lines.append(f"| {title}{f' (`{chr(32).join(flags)}`)' if flags else ''} | {runs[0]['trainable_params']:,} ({runs[0]['trainable_percent']:.2f} %) "
                     f"| **{statistics.mean(scores):.1f}** ± {statistics.pstdev(scores):.1f} | {spread} "
                     f"| {statistics.mean(run['seconds'] for run in runs) / 60:.1f} | {statistics.mean(run['peak_memory_bytes'] for run in runs) / 2**20:.0f} MiB |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the official GLUE folders; without it nothing is run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores (default 1)")
    args = parser.parse_args()
    missing = [(name, seed) for seed in SEEDS for name in VARIANTS if not (RESULTS / f"{name}-{seed}.json").exists()]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda case: run(*case, args.data, max(1, os.cpu_count() // args.jobs)), missing if args.data else []))
    print(table())

"""The runs of a command, one for each task and seed; of several also their table, as in Table 1."""
import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

from run.folder import (check_folder, clear, lock_run, new_folder, read_json, write_json,
                        write_text)
from run.processes import first, start
from run.report import print0
from run.settings import load_data
from run.tasks import TASKS, has_pictures
from vision.features import clip_features


def run_all(args: argparse.Namespace, build: Callable, train: Callable) -> dict:
    """One run in --out, or several in folders below it. Return what results.json holds."""
    args.device = start(args.device)
    name = f"{args.task[0] if len(args.task) == 1 else 'several'}-{args.method}"
    first(check_folder, args.out, args.overwrite, args.resume)
    args.out = args.out or str(first(new_folder, name))
    runs = [argparse.Namespace(**vars(args) | {"task": task, "seed": seed})
            for task in args.task for seed in args.seeds]
    with lock_run(Path(args.out)):
        if len(runs) == 1:
            return train(runs[0], Path(args.out))
        return run_many(args, runs, build, train)


def run_many(args: argparse.Namespace, runs: list[argparse.Namespace], build: Callable,
             train: Callable) -> dict:
    """The runs one after the other; their table is written after each. A resume may have more."""
    for run in runs[:: len(args.seeds)]:  # say now what is missing, not after the first task's days
        datasets = load_data(run)
        build(run)
        if has_pictures(run.task):
            clip_features(datasets, run.clip, run.device)
    out = Path(args.out)
    folders = [out / f"{run.task}-{run.seed}" for run in runs]
    if not first(goes_on, args):
        for folder in folders:
            with lock_run(folder):
                first(clear, folder)
        first(clear, out)
    config = {"task": args.task, "seeds": args.seeds, "command": args.command}
    first(write_json, out / "config.json", config)
    results = []
    for run, folder in zip(runs, folders):
        print0(f"\n{run.task}, seed {run.seed}: run {len(results) + 1} of {len(runs)}")
        first(check_folder, folder, args.overwrite, args.resume)
        with lock_run(folder):
            results.append(train(run, folder))
        summary = summarize(results) | {"command": args.command, "runs": results}
        first(write_json, out / "results.json", summary)
        first(write_text, out / "results.md", table(results))
    print0(f"\n{table(results)}\nsaved in {out}")
    return summary


def goes_on(args: argparse.Namespace) -> bool:
    config = Path(args.out) / "config.json"
    if not args.resume or not config.exists():
        return False
    if "seeds" not in read_json(config):
        raise ValueError(f"{args.out} cannot go on so: a single run is in it; choose another --out")
    return True


def summarize(runs: list[dict]) -> dict:
    """Mean and deviation over seeds of each task's score, and the mean over the tasks."""
    tasks = {}
    for name in dict.fromkeys(run["task"] for run in runs):
        scores = {run["seed"]: run["test"]["score"] for run in runs if run["task"] == name}
        mean, values = statistics.mean(scores.values()), list(scores.values())
        # Paper: the authors' script prints the population's deviation too (and reads seed 0 only).
        tasks[name] = {"seeds": list(scores), "scores": values, "mean": mean,
                       "deviation": statistics.pstdev(values)}
    return {"tasks": tasks, "average": statistics.mean(task["mean"] for task in tasks.values())}


def table(runs: list[dict]) -> str:
    """The runs as a row of Table 1 in Markdown, its columns in the paper's order."""
    summary, first_run = summarize(runs), runs[0]
    memory = max(run["peak_memory_bytes"] for run in runs) / 2**20
    cells = {"": f"{first_run['method']} on {first_run['model']}",
             "trained": f"{first_run['trainable_percent']:.2f} %", "memory": f"{memory:.0f} MiB"}
    for name in sorted(summary["tasks"], key=[*TASKS, *summary["tasks"]].index):
        task, title = summary["tasks"][name], TASKS[name].title if name in TASKS else name
        cells[title] = f"{task['mean']:.2f} ± {task['deviation']:.2f}"
    cells["average"] = f"{summary['average']:.2f}"
    width = [max(map(len, column)) for column in cells.items()]
    rows = [cells.keys(), ["-" * n for n in width], cells.values()]
    return "\n".join("| " + " | ".join(map(str.ljust, row, width)) + " |" for row in rows)

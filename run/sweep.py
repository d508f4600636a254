"""The runs of a command, one for each task and seed; and, of several, the table of their scores."""
import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

from run.folder import check_folder, clear, lock_run, new_folder, write_json
from run.processes import first, start
from run.report import print0
from run.settings import load_data
from run.tasks import TASKS


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
            return train(runs[0], Path(args.out), {})
        return run_many(args, runs, build, train)


def run_many(args: argparse.Namespace, runs: list[argparse.Namespace], build: Callable,
             train: Callable) -> dict:
    """The runs one after the other; their scores are written after each. A resume may have more."""
    out, results, shared = Path(args.out), [], {}
    folders = [out / f"{run.task}-{run.seed}" for run in runs]
    if args.resume and first((out / "metrics.jsonl").exists):
        raise ValueError(f"{out} holds a single run: choose another --out")
    for run in runs[:: len(args.seeds)]:  # say now, not after days, if data or weights are missing
        load_data(run)
        build(run)
    if not args.resume:
        first(clear, out)
        for folder in folders:
            with lock_run(folder):
                first(clear, folder)
    first(write_json, out / "config.json", {"command": args.command})
    for run, folder in zip(runs, folders):
        print0(f"\n{run.task}, seed {run.seed}: run {len(results) + 1} of {len(runs)}")
        with lock_run(folder):
            results.append(train(run, folder, shared))
        summary = summarize(results) | {"command": args.command, "runs": results}
        first(write_json, out / "results.json", summary)
    print0(f"\n{table(results)}\nsaved in {out}")
    return summary


def summarize(runs: list[dict]) -> dict:
    """Mean and deviation over seeds of each task's score, and the mean over the tasks."""
    tasks = {}
    for name in dict.fromkeys(run["task"] for run in runs):
        scores = {run["seed"]: run["test"]["score"] for run in runs if run["task"] == name}
        values = list(scores.values())
        # Paper: the authors' script prints the population's deviation too (and reads seed 0 only).
        tasks[name] = {"seeds": list(scores), "scores": values, "mean": statistics.mean(values),
                       "deviation": statistics.pstdev(values)}
    return {"tasks": tasks, "average": statistics.mean(task["mean"] for task in tasks.values())}


def table(runs: list[dict]) -> str:
    """The runs' scores as in Table 1, a line for each task, in the paper's order."""
    tasks, run = summarize(runs), runs[0]
    memory = max(run["peak_memory_bytes"] for run in runs) / 2**20
    lines = [f"{run['method']} on {run['model']}: {run['trainable_percent']:.2f} % trained, peak "
             f"{memory:.0f} MiB; mean and deviation over seeds"]
    for name in sorted(tasks["tasks"], key=[*TASKS, *tasks["tasks"]].index):
        task, title = tasks["tasks"][name], TASKS[name].title if name in TASKS else name
        lines.append(f"  {title:12}{task['mean']:7.2f} ± {task['deviation']:.2f}")
    return "\n".join([*lines, f"  {'average':12}{tasks['average']:7.2f}"])

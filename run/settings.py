"""What a run is made with, Tables 5 and 6 above all, and what it tells at its start and end."""
import argparse
import math
from dataclasses import replace

import torch
from torch import nn

from data import Dataset, banner
from model import T5, T5Config, load_tokenizer, locate
from run import processes, report
from run.folder import Run, trainable
from run.options import INITS
from run.predict import check_start, hashes
from run.report import print0
from run.tasks import TASKS, Rows, epoch_steps, has_pictures

ANY = "any"
DEFAULTS = (  # Tables 5 and 6, and the authors' code. Of the lines that fit a run the last counts
    # data       model   method    (warmup_steps None: a tenth of all; epochs: the task's own)
    ("texts",    ANY,    ANY,      dict(lr=3e-4, batch_size=100, warmup_steps=500, r=8)),
    ("texts",    ANY,    ANY,      dict(weight_decay=0.0, epsilon=1e-8, beta2=0.999, max_norm=1.)),
    ("texts",    ANY,    "prompt", dict(lr=3e-1)),
    ("texts",    ANY,    "lst",    dict(lr=3e-3)),
    ("pictures", ANY,    ANY,      dict(lr=3e-4, batch_size=300, warmup_steps=None, r=4)),
    ("pictures", ANY,    ANY,      dict(weight_decay=0.01, epsilon=1e-6, beta2=0.999, max_norm=5.)),
    ("pictures", ANY,    "bitfit", dict(lr=3e-3)),
    ("pictures", ANY,    "prompt", dict(lr=3e-3)),
    ("pictures", ANY,    "lst",    dict(lr=3e-3, weight_decay=0.03)),
    ("gqa",      ANY,    ANY,      dict(batch_size=500)),
    ("nlvr2",    ANY,    ANY,      dict(batch_size=100)),
    ("coco",     ANY,    ANY,      dict(batch_size=250)),
    ("joint",    ANY,    ANY,      dict(batch_size=300)),
    # Paper: the rest is ours, so that a run beside the bundled backbone is done in minutes. With
    # BitFit's 3e-4 biases learn nothing in SST-2's 664 steps.
    ("texts",    "nano", ANY,      dict(warmup_steps=60)),
    ("texts",    "nano", "bitfit", dict(lr=1e-2)),
    ("large",    "nano", ANY,      dict(epochs=1)),
    ("sample",   ANY,    ANY,      dict(epochs=5, warmup_steps=None)),
    ("pictures", "nano", ANY,      dict(batch_size=32, epochs=3, dropout=0.0)),
    # Paper: 3e-3, 1e-6 and 0.999. With them this small side network ignores the pictures: after
    # early gradients 100 times as large, its queries' are about 1e-7, below that epsilon.
    ("pictures", "nano", "lst",    dict(batch_size=16, lr=5e-4, epsilon=1e-8, beta2=0.99)),
    ("easy-vqa", "nano", "lst",    dict(epochs=4)),
    ("nlvr2",    "nano", "lst",    dict(epochs=6)),
    ("vqa",      "nano", "lst",    dict(epochs=14)),
    ("gqa",      "nano", "lst",    dict(epochs=14)),
)


def fill_defaults(args: argparse.Namespace, rows: Rows, sample: bool) -> None:
    """Fill in what the command line left open, for a run on these training rows."""
    names = args.task.split("+")
    fits = {ANY, args.model, args.method, *names}
    fits |= {"pictures" if has_pictures(args.task) else "texts"}
    fits |= {"joint"} if len(names) > 1 else set()
    fits |= {"large"} if sum(map(len, rows.values())) > 30_000 else set()
    fits |= {"sample"} if sample else set()
    settings = {"epochs": TASKS[names[0]].epochs}
    for *line, values in DEFAULTS:
        settings |= values if fits >= set(line) else {}
    for name, value in settings.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    per_epoch = epoch_steps(rows, args.batch_size)
    args.steps = min(args.max_steps or math.inf, args.epochs * per_epoch)
    args.epochs = math.ceil(args.steps / per_epoch)
    if args.warmup_steps is None:
        args.warmup_steps = args.steps // 10


def check_ladder(config: T5Config, r: int, keep: list[int] | None) -> None:
    """ValueError if a ladder of this shape does not fit beside such a backbone."""
    good = [n for n in range(1, config.d_kv + 1)
            if not (config.d_model % n or config.d_kv % n or config.d_ff % n)]
    if r not in good:
        raise ValueError(f"r is {r}, but it must divide d_model, d_kv and d_ff: choose from {good}")
    layers = range(min(config.num_layers, config.num_decoder_layers))
    if keep and not set(keep) <= set(layers):
        raise ValueError(f"keep is {keep}, but the backbone's layers are 0 to {layers[-1]}")


def load_data(args: argparse.Namespace) -> dict[str, Dataset]:
    """Each task's data, with which the options are complete: they are filled in and checked."""
    config = T5Config.from_json(locate(args.model, "config.json"))
    if not 0 <= config.vocab_size - load_tokenizer(args.model).vocab_size < 128:  # T5 has 28 spare
        raise ValueError(f"{args.model}: spiece.model does not fit config.json's vocab_size "
                         f"{config.vocab_size}: they do not belong together")
    datasets = {}
    for name in args.task.split("+"):
        dataset = TASKS[name].load(args.data, args.prompts)
        datasets[name] = replace(dataset, train=dataset.train[: args.max_train_rows])
    fill_defaults(args, {name: dataset.train for name, dataset in datasets.items()},
                  sample=dataset.name == "bundled-sample")
    if args.method == "lst":
        check_ladder(config, args.r, args.keep)
        if args.init not in INITS and not args.resume:
            check_start(args)
    return datasets


def identity(args: argparse.Namespace, datasets: dict[str, Dataset]) -> dict:
    """What a resume must repeat: the options, the files' bytes, the number of processes."""
    free = ("out", "overwrite", "resume", "predict", "image", "save_steps", "seeds", "command")
    config = {name: value for name, value in vars(args).items() if name not in free}
    data_sha256 = "+".join(dataset.sha256 for dataset in datasets.values())
    if processes.first(lambda: data_sha256) != data_sha256:  # one may have had no network
        raise ValueError("the processes read different data; give --data a folder that all see")
    config |= {"device": args.device.partition(":")[0], "processes": processes.world_size()}
    return config | hashes(args) | {"data_sha256": data_sha256}


def about(args: argparse.Namespace) -> dict:
    """What a resume may change: the command, the versions, the machine."""
    return {"command": args.command, "versions": report.versions(),
            "hardware": report.hardware(args.device)}


def announce(args: argparse.Namespace, model: nn.Module, datasets: dict[str, Dataset]) -> dict:
    """Print what a run is; return it as the first part of the results."""
    each = list(datasets.values())
    if each[0].fallback:
        print0(banner(each[0].fallback))
    trained = sum(p.numel() for p in trainable(model).values())
    total, whole = sum(p.numel() for p in model.parameters()), "all"  # Table 3's share
    if not has_pictures(args.task):
        with torch.device("meta"):  # the backbone as it was before the method added to it
            backbone = T5(getattr(model, "backbone", model).config)
        total, whole = sum(p.numel() for p in backbone.parameters()), "the backbone's"
    percent = 100 * trained / total
    print0(f"{args.method} on {args.model}: {trained:,} parameters train, {percent:.3f} % of "
           f"{whole} {total:,}")
    name, skipped = "+".join({d.name: 0 for d in each}), sum(d.skipped for d in each)
    rows = [sum(len(getattr(d, part)) for d in each) for part in ("train", "val", "test")]
    print0(f"{args.task} ({name}): {rows[0]:,} training, {rows[1]:,} validation, {rows[2]:,} test "
           "rows" + f", {skipped} skipped" * (skipped > 0))
    print0(f"{args.epochs} epoch{'s' * (args.epochs > 1)}, {args.steps} steps of {args.batch_size} "
           f"rows, peak learning rate {args.lr:g} after {args.warmup_steps} steps")
    several = f", {processes.world_size()} processes" if processes.world_size() > 1 else ""
    print0(f"seed {args.seed}, {report.hardware(args.device)}{several}")
    return {"task": args.task, "model": args.model, "method": args.method, "data": name,
            "seed": args.seed, "trainable_params": trained, "total_params": total,
            "trainable_percent": percent, "fallback": each[0].fallback, "skipped_rows": skipped}


def stopped(args: argparse.Namespace, run: Run) -> None:
    """Print how far a run has come that was interrupted, and what is kept of it."""
    kept = f"epoch {run.best['epoch']} is kept in {run.out}" if run.best else "no weights were kept"
    print0(f"\nstopped after {run.step} of {args.steps} steps; {kept}\n"
           f"to go on: the same command, with --resume --out {args.out}, without --overwrite")


def conclude(args: argparse.Namespace, model: nn.Module, run: Run, results: dict) -> dict:
    """Print what came out, and write it."""
    if args.method == "lst":
        blocks = {name: getattr(model, name).blocks for name in ("encoder", "decoder")}
        results["gates"] = {name: [block.rung.mu.item() for block in of_stack]
                            for name, of_stack in blocks.items()}
        print0(report.gates(model))
    print0(f"test {report.scores(results['test'])}  (epoch {run.best['epoch']}, the best on "
           "validation)")
    if "test_hidden" in results:
        print0(f"with the pictures hidden {report.scores(results['test_hidden'])}")
    results = run.finish(results)
    print0(f"{results['seconds'] / 60:.1f} minutes, {results['peak_memory_kind']} memory "
           f"{results['peak_memory_bytes'] / 2**20:.0f} MiB, saved in {run.out}")
    return results

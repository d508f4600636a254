"""What a run is made with, and what it tells at its start and end."""
import argparse
import math
import shutil
import textwrap
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

from data import Dataset
from llm import Llama, LlamaConfig
from methods.defaults import ANY, DEFAULTS
from model import T5, T5Config
from run import report
from run.backbones import config_of, decoder_only, files_of, load_tokenizer
from run.cache import States
from run.folder import Run, read_config, read_json, trainable
from run.hub import sha256_of
from run.options import INITS
from run.pairs import first_answers
from run.processes import first, world_size
from run.report import print0
from run.tasks import OWN, TASKS, Rows, batches, distinct, has_pictures
from vision.clip import clip_files


def fill_defaults(args: argparse.Namespace, datasets: dict[str, Dataset]) -> None:
    """Fill in what the command line left open, for a run on these data."""
    rows = {name: dataset.train for name, dataset in datasets.items()}
    fits = {ANY, args.model, args.method, f"--side {args.side}", *rows}
    fits |= {"pictures" if has_pictures(args.task) else "texts"}
    fits |= {"joint"} if len(rows) > 1 else set()
    if decoder_only(args.model):
        wide = config_of(args.model).head_dim > 64
        fits |= {"decoder-only", "wide heads"} if wide else {"decoder-only"}
    fits |= {"large"} if sum(map(len, rows.values())) > 30_000 else set()
    fits |= {dataset.name for dataset in datasets.values()}
    settings = {"epochs": TASKS[next(iter(rows))].epochs, "fisher_samples": 1024}
    for *line, values in DEFAULTS:
        settings |= values if fits >= set(line) else {}
    for name, value in settings.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    per_epoch = len(batches(rows, args.batch_size, seed=0, epoch=0))
    args.steps = min(args.max_steps or math.inf, args.epochs * per_epoch)
    args.epochs = math.ceil(args.steps / per_epoch)
    if args.warmup_steps is None:
        args.warmup_steps = args.steps // 10


def check_ladder(config: T5Config | LlamaConfig, r: int, keep: Collection[int] | None) -> None:
    """ValueError if a ladder of this shape does not fit beside such a backbone."""
    if isinstance(config, LlamaConfig):  # rotary positions turn pairs of numbers: K / 2
        widths = config.hidden_size, config.intermediate_size, config.head_dim // 2
        num_layers, names = config.num_hidden_layers, "hidden_size, intermediate_size, head_dim / 2"
    else:
        widths, names = (config.d_model, config.d_kv, config.d_ff), "d_model, d_kv and d_ff"
        num_layers = min(config.num_layers, config.num_decoder_layers)
    good = [n for n in range(1, min(widths) + 1) if not any(width % n for width in widths)]
    if r not in good:
        raise ValueError(f"r is {r}, but it must divide {names}: choose from {good}")
    if keep and not set(keep) <= set(range(num_layers)):
        raise ValueError(f"keep is {[*keep]}, but the backbone's layers are 0 to {num_layers - 1}")


def load_data(args: argparse.Namespace) -> dict[str, Dataset]:
    """Each task's data, with which the options are complete: they are filled in and checked."""
    config, tokenizer = config_of(args.model), load_tokenizer(args.model)
    datasets = {}
    for name in args.task.split("+"):
        dataset = TASKS[name].load(args.data, args.prompts)
        datasets[name] = replace(dataset, train=dataset.train[: args.max_train_rows])
    fill_defaults(args, datasets)
    if args.task == OWN.name:
        own = replace(OWN, max_length=args.max_length)
        vars(args).update(own.lengths(datasets[OWN.name], tokenizer))
        most = getattr(config, "max_position_embeddings", math.inf)  # a T5 has no limit
        if args.max_length + args.max_new_tokens > most:
            raise ValueError(f"--max-length {args.max_length} and an answer of "
                             f"{args.max_new_tokens} tokens are more than the {most} that "
                             f"{args.model} reads: give a smaller --max-length")
    if args.accumulate > args.batch_size:
        raise ValueError(f"--accumulate {args.accumulate} is more than the {args.batch_size} rows")
    if args.method == "lst":
        check_ladder(config, args.r, args.keep)
        if args.init not in INITS and not args.resume:
            start = check_frozen(args.init, args)
            shape = ("r", "keep", "free", "side", "classify", "end")
            if any(start[name] != getattr(args, name) for name in shape):
                had = f"--r {start['r']} --keep {start['keep'] or 'all'} --side {start['side']}"
                had += " --classify" * start["classify"]
                had += f" --free {start['free']} --end {start['end']}"
                raise ValueError(f"the side network in {args.init} has {had}: it does not fit, "
                                 "give the same")
    return datasets


def hashes(args: argparse.Namespace) -> dict[str, str]:
    """sha256 of a run's frozen networks: of its backbone, with pictures also of its image tower."""
    found = {"backbone_sha256": sha256_of(*files_of(args.model))}
    if has_pictures(args.task):
        found["clip_sha256"] = sha256_of(*clip_files(args.clip))
    return found


def check_frozen(folder: str | Path, args: argparse.Namespace) -> dict:
    """The config of the run in this folder. ValueError: not the frozen networks of args."""
    config = read_config(folder)
    if changed := [name for name, found in hashes(args).items() if found != config.get(name)]:
        raise ValueError(f"backbone {args.model} or image tower {args.clip} is not the one of "
                         f"{folder}: another {' and '.join(changed)}")
    return config


def cache_size(args: argparse.Namespace, out: Path, shared: dict[str, States]) -> float:
    """GB of states that may be kept: as given, as in the run that goes on or the one before, or a
    quarter of what is free. On a GPU, where reading may take longer, only as given."""
    reads = args.method == "lst" and args.side not in ("alone", "last") and not args.classify
    if reads and world_size() > 1 and (args.cache or args.epochs > 1):
        print0("hidden states are not kept from epoch to epoch: there are several processes")
    if not reads or world_size() > 1:
        return 0.0
    if args.cache is not None:
        return args.cache
    if args.resume and (out / "config.json").exists():
        return read_json(out / "config.json").get("cache", 0.0)
    if args.task in shared:
        return shared[args.task].gigabytes
    free = min(report.free_memory(), shutil.disk_usage(out).free) / 1e9
    return round(free / 4, 3) if args.epochs > 1 and args.device == "cpu" else 0.0


def states_of(args: argparse.Namespace, ladder: nn.Module, rows: Rows, answered: Rows,
              shared: dict[str, States]) -> States | None:
    """The states of these rows; the runs of a command share them while their task is the same."""
    if args.cache and args.task in shared:
        shared[args.task].about = shared[args.task].about | {"seconds": 0.0}
    elif args.cache:
        shared.clear()
        kept = distinct(rows, {} if decoder_only(args.model) else answered)
        if decoder_only(args.model):  # what it reads in training: prompt and answer as one text
            kept = [row._replace(source=row.source + row.target[:-1]) for row in kept]
            kept.sort(key=lambda row: len(row.source))
        shared[args.task] = States(ladder, kept, args.cache, Path(args.out))
    return shared[args.task] if args.cache else None


def run_of(args: argparse.Namespace, out: Path, datasets: dict[str, Dataset], began: float,
           shared: dict[str, States]) -> Run:
    """The run in this folder, with the config that a resume must repeat."""
    args.cache = cache_size(args, out, shared)
    free = ("out", "overwrite", "resume", "predict", "image", "plot", "save_steps", "seeds",
            "command")
    config = {name: value for name, value in vars(args).items() if name not in free}
    data_sha256 = "+".join(dataset.sha256 for dataset in datasets.values())
    if first(lambda: data_sha256) != data_sha256:  # one may have had no network
        raise ValueError("the processes read different data; give --data a folder that all see")
    config |= {"device": args.device.partition(":")[0], "processes": world_size()}
    config |= hashes(args) | {"data_sha256": data_sha256}
    about = {"command": args.command, "versions": report.versions(),
             "hardware": report.hardware(args.device)}
    return Run(out, config, about, args.resume, args.device, began)


def announce(args: argparse.Namespace, model: nn.Module, datasets: dict[str, Dataset]) -> dict:
    """Print what a run is; return it as the first part of the results."""
    each, whole, of = list(datasets.values()), model, "all"  # Table 3's percent
    if not has_pictures(args.task):
        with torch.device("meta"), patch("torch.nn.init.normal_"):
            # Table 1's are of the backbone, before the method adds to it
            config = getattr(model, "backbone", model).config
            of, whole = "the backbone's", (T5 if isinstance(config, T5Config) else Llama)(config)
    trained, total = (sum(p.numel() for p in parameters)
                      for parameters in (trainable(model).values(), whole.parameters()))
    results = {"task": args.task, "model": args.model, "method": args.method,
               "data": "+".join({dataset.name: 0 for dataset in each}), "seed": args.seed,
               "trainable_params": trained, "total_params": total,
               "trainable_percent": 100 * trained / total, "fallback": each[0].fallback,
               "skipped_rows": sum(dataset.skipped for dataset in each)}
    rows = {part: sum(len(getattr(dataset, part)) for dataset in each)
            for part in ("train", "val", "test")}
    if each[0].fallback:
        print0(banner(each[0].fallback))
    print0(f"{args.method} on {args.model}: {trained:,} parameters train, "
           f"{results['trainable_percent']:.3f} % of {of} {total:,}\n"
           f"{args.task} ({results['data']}): {rows['train']:,} training, {rows['val']:,} "
           f"validation, {rows['test']:,} test rows"
           + f", {results['skipped_rows']} skipped" * (results["skipped_rows"] > 0))
    if getattr(args, "cut_texts", 0):
        print0(f"{args.cut_texts} texts are cut to {args.max_length} tokens")
    if getattr(args, "altered_targets", 0):
        print0(f"no answer can match {args.altered_targets} test targets: the tokenizer cannot "
               "write them, or they are cut")
    print0(f"{args.epochs} epoch{'s' * (args.epochs > 1)}, {args.steps} steps of {args.batch_size} "
           f"rows, peak learning rate {args.lr:g} after {args.warmup_steps} steps\n"
           f"seed {args.seed}, {report.hardware(args.device)}"
           + f", {world_size()} processes" * (world_size() > 1))
    return results


def banner(reason: str) -> str:
    """Return the box that says that the bundled sample stands in for SST-2."""
    text = (f"THIS IS NOT SST-2: THE DOWNLOAD FAILED: {reason}. No score of this small bundled "
            "sample can be compared with the paper's. For SST-2 give --data DIR with DIR/SST-2.")
    box = [f"#  {line:<72}  #" for line in ["", *textwrap.wrap(text, 72), ""]]
    return "\n".join(["#" * 78, *box, "#" * 78])


def conclude(args: argparse.Namespace, model: nn.Module, run: Run, results: dict) -> dict:
    """Print what came out, and write it."""
    if args.method == "lst":
        results["gates"] = report.gates(model)
    print0(f"test {report.scores(results['test'])}  (epoch {run.best['epoch']}, the best on "
           "validation)")
    if args.task == OWN.name:
        results["answers"] = first(first_answers, run.out)
    if "test_hidden" in results:
        print0(f"with the pictures hidden {report.scores(results['test_hidden'])}")
    results = run.finish(results)
    print0(f"{results['seconds'] / 60:.1f} minutes, {results['peak_memory_kind']} memory "
           f"{results['peak_memory_bytes'] / 2**20:.0f} MiB, saved in {run.out}")
    return results

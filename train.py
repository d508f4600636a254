"""Train a ladder side network, or what the paper compares it with, on GLUE or on tasks about pictures, then test it (Sec. 4).

    python train.py --task sst2                                        # the bundled backbone, minutes on a laptop
    python train.py --task rte --model t5-base --keep 1,2,3,5,6,7,9,10,11    # Table 1's LST row
    python train.py --task glue --seeds 0,1,2 --model t5-base --keep 1,2,3,5,6,7,9,10,11 --out table1 --resume    # the whole row, go on if cut off
    python train.py --task rte --model t5-base --method lora
    torchrun --nproc-per-node 4 train.py --task mnli --model t5-large
    python train.py --out runs/sst2-lst-0 --predict "a gripping , beautifully acted film"
    python train.py --task vqa                                         # questions about drawn pictures
    python train.py --task nlvr2 --init runs/vqa-lst-0                 # a sentence about two pictures, with a side network that has learned to look
    python train.py --out runs/vqa-lst-0 --predict "what color is the star?" --image picture.png

A run's folder holds config.json, metrics.jsonl, results.json and trained.safetensors (what was trained, and nothing else); of several
runs each has a folder in it, beside their results.json and results.md.
"""
import argparse
import contextlib
import json
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import baselines
import checkpoint
import data
import data_vl
import distributed
import images
import prune
import report
import tasks
from checkpoint import Position, load_trained, read_config, save_trained, sha256_of_backbone, trainable, write_json
from clip import load_clip, sha256_of_clip
from model import T5, Tokenizer, VisualEmbedding, load_t5, load_tokenizer
from options import DTYPES, INITS, METHODS, PROMPTS, parse, settle
from report import guarded, say
from side import LadderT5
from tasks import TASKS

NO_CONFIG = ("out", "overwrite", "resume", "predict", "image", "save_steps", "seeds", "command")  # may differ when a run goes on


# ----------------------------------------------------------------------------------------------------------------- model

def build(args: argparse.Namespace) -> nn.Module:
    """The backbone with what the method trains: requires_grad says which parameters those are."""
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {args.device!r} cannot be used here; choose cpu, or cuda where there is one") from None
    if args.method == "full" and DTYPES.get(args.dtype) == torch.bfloat16:
        raise ValueError("--dtype bf16 is for a frozen backbone; --method full trains it, so use --dtype fp32")
    if args.dtype not in DTYPES:
        raise ValueError(f"dtype is {args.dtype!r}, choose from fp32, bf16")
    t5 = load_t5(args.model, device=args.device, dtype=DTYPES[args.dtype], checkpoint=args.checkpoint, dropout=args.dropout)
    if tasks.has_pictures(args.task):
        t5.visual = VisualEmbedding(load_clip(args.clip).channels, t5.config)
    if args.method != "lst":
        return baselines.apply(t5, args.method, args.as_authors, args.freeze)
    ladder = LadderT5(t5, r=args.r, keep=args.keep)
    return ladder.shut_gates() if args.gates == "shut" else ladder


def initialize(ladder: LadderT5, args: argparse.Namespace, rows: tasks.Rows) -> None:
    """Sec. 3.3: weights for the side network out of the backbone, by the importance that --init names, or out of a run.  The backbone reads text alone."""
    if args.init == "magnitude":
        prune.init_side(ladder, prune.magnitude(ladder.backbone), args.prune)
    elif args.init == "fisher":
        each = [(task, row) for task, of_task in rows.items() for row in of_task if getattr(row, "answers", True)]  # VQA has questions without one
        order = torch.randperm(len(each), generator=torch.Generator().manual_seed(args.seed)).tolist()[: args.fisher_samples]
        progress = report.Progress("Fisher information, sample", len(order))

        def samples() -> Iterator[data.Batch]:
            for done, (task, row) in enumerate((each[i] for i in order), 1):
                progress.step(done)  # before the last one is taken, after which nobody asks for more
                yield to_device(data.collate(tasks.draw(task, [row], args.seed, done)), args.device)

        prune.init_side(ladder, prune.fisher(ladder.backbone, samples(), len(order)), args.prune)
    elif args.init != "random":  # Paper: always out of the backbone.  What one task has taught, to look for instance, helps with another
        say(f"the side network starts as {start_from(ladder, args)} has left it in {args.init}")


def to_device(batch: data.Batch, device: str) -> data.Batch:
    return data.Batch(*(tensor if tensor is None else tensor.to(device) for tensor in batch))


def loss_of(model: nn.Module, batch: data.Batch) -> Tensor:
    """Cross-entropy, summed over the label tokens of the batch, each with the weight of its row."""
    # Paper: with pictures the authors take the mean over each answer's tokens, then over the batch; ours is over all label tokens, as with text.
    logits = model(batch.source_ids, batch.source_mask, batch.decoder_ids, batch.decoder_mask, batch.images)  # (B, T, V)
    if batch.weights is None:
        return F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=-100, reduction="sum")
    each = F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=-100, reduction="none")
    return each.view_as(batch.labels).sum(dim=1) @ batch.weights


def backward(model: nn.Module, rows: list[data.Row], args: argparse.Namespace, features: images.Features | None = None) -> Tensor:
    """The batch's mean cross-entropy over its label tokens, and the gradient.  Of a batch this process takes its share of the rows, in
    --accumulate passes; each counts by its label tokens, so the sum over passes and processes is the mean of the undivided batch."""
    parts, first = distributed.processes() * args.accumulate, distributed.rank() * args.accumulate
    tokens, loss = sum(len(row.target) for row in rows), torch.zeros((), device=args.device)
    for part in range(first, first + args.accumulate):
        last = part == first + args.accumulate - 1
        if part >= len(rows) and not last:
            continue  # the last batch of an epoch may have fewer rows than parts
        weight = (part < len(rows)) / tokens  # the last pass sends the gradient: without a row of its own it takes one that counts nothing
        batch = to_device(tasks.collate(rows[part::parts] or rows[:1], features), args.device)
        with contextlib.nullcontext() if last else distributed.sent_later(model):
            share = loss_of(model, batch) * weight
            (share * distributed.processes()).backward()  # DistributedDataParallel takes the mean over the processes
        loss += share.detach()
    return loss


def seed_everything(*numbers: int) -> None:
    """Every generator a function of (seed, step, process): a resumed run draws the same dropout without having saved any state."""
    python, numpy, torchs = np.random.SeedSequence(numbers).generate_state(3, np.uint32).tolist()
    random.seed(python)
    np.random.seed(numpy)
    torch.manual_seed(torchs)  # of the CPU and of every GPU


def learning_rate(step: int, peak: float, warmup: int, total: int) -> float:
    """Linear warm-up, then linear decay to 0.  step counts from 0."""
    return peak * (step + 1) / warmup if step < warmup else peak * (total - step) / max(1, total - warmup)


def evaluate(model: nn.Module, tokenizer: Tokenizer, args: argparse.Namespace, parts: dict[str, list], features: images.Features | None = None) -> dict:
    """Generated answers -> the metrics of each task in percent.  Each process answers its share."""
    scores, was_training = {}, model.training
    model.eval()
    for task, examples in parts.items():
        rows, texts = tasks.draw(task, tasks.encode(task, examples, tokenizer), args.seed, 0), {}
        for indices in data.in_order(rows, args.batch_size)[distributed.rank()::distributed.processes()]:
            batch = to_device(tasks.collate([rows[i] for i in indices], features), args.device)
            texts |= zip(indices, tasks.answer(model, tokenizer, batch, task))
        texts = distributed.gather(texts)
        if len(set(texts.values())) == 1 and not (features and features.hidden) and len({tuple(row.target) for row in rows}) > 1:
            say(f"warning: every answer is {texts[0]!r}: the model has learned nothing yet, or the learning rate {args.lr} is too high")
        scores[task] = tasks.score(task, [texts[i] for i in range(len(examples))], examples, args.prompts)
    model.train(was_training)
    return tasks.together(scores)


def load(folder: str | Path, device: str = "cpu") -> tuple[nn.Module, Tokenizer]:
    """What a run left, ready to answer: the model in eval mode, and its tokenizer.  ValueError if the backbone is not the same."""
    args = argparse.Namespace(**read_config(folder) | {"device": device})
    if not set(args.task.split("+")) <= TASKS.keys() or args.method not in METHODS or args.prompts not in PROMPTS:
        raise ValueError(f"{folder} holds a run of method {args.method!r} on task {args.task!r} with prompts {args.prompts!r}, which are not known here")
    check_frozen(folder, vars(args), args)
    model = build(args)
    load_trained(folder, model)
    return model.eval(), load_tokenizer(args.model)


def check_frozen(folder: str | Path, run: dict, args: argparse.Namespace) -> None:
    """ValueError if the run in this folder, whose config is `run`, was beside another backbone or image tower."""
    if (found := sha256_of_backbone(args.model)) != run["backbone_sha256"]:
        raise ValueError(f"the backbone {args.model} is not the one of {folder}: sha256 {found[:12]}..., was {run['backbone_sha256'][:12]}...")
    if tasks.has_pictures(run["task"]) and (found := sha256_of_clip(args.clip)) != run["clip_sha256"]:
        raise ValueError(f"the image tower {args.clip} is not the one of {folder}: sha256 {found[:12]}..., was {run['clip_sha256'][:12]}...")


def start_from(ladder: LadderT5, args: argparse.Namespace) -> str:
    """The side network of the run that --init names; returns the run's task.  ValueError if that run has not ended, or does not fit."""
    run = read_config(args.init)
    if not (Path(args.init) / "results.json").is_file():
        raise ValueError(f"the run in {args.init} has not ended: let it go on to its end (--resume), or start from another")
    if run["method"] != "lst" or tasks.has_pictures(run["task"]) != tasks.has_pictures(args.task):
        raise ValueError(f"{args.init} holds {run['method']} on {run['task']}, and {args.task} needs the side network of a run "
                         f"{'about pictures' if tasks.has_pictures(args.task) else 'on texts'}: start from another")
    if other := [f"--{name} {run[name]}" for name in ("r", "keep", "gates") if run[name] != getattr(args, name)]:
        raise ValueError(f"the side network in {args.init} has another shape, {', '.join(other).replace('None', '(all layers)')}: ask for the same")
    check_frozen(args.init, run, args)
    load_trained(args.init, ladder)
    return run["task"]


# ------------------------------------------------------------------------------------------------------------------ main

def predict(args: argparse.Namespace) -> dict:
    """The answer of the run in --out to one text, about the pictures of --image if it has learned about pictures."""
    run = argparse.Namespace(**read_config(args.out))
    names, wanted = run.task.split("+"), args.task or run.task.split("+")
    if len(wanted) > 1 or wanted[0] not in names:
        raise ValueError(f"the run in {args.out} has learned {', '.join(names)}: --task says which of them --predict is about")
    task = wanted[0]
    number = 2 if task == "nlvr2" else int(tasks.has_pictures(task))
    if len(args.image or []) != number:
        raise ValueError(f"{task} asks about {('no picture: leave --image out', 'a picture: give --image FILE', 'two pictures: give --image FILE FILE')[number]}; {len(args.image or [])} given")
    if not args.predict.isascii() and args.predict != args.predict.encode("utf-8", "ignore").decode():
        raise ValueError(f"--predict takes UTF-8 text, given was {args.predict[:40]!r}")
    if number and (task == "coco") != (not args.predict.strip()):
        raise ValueError("coco describes a picture without being asked: give --predict \"\"" if task == "coco" else "--predict is empty: give it a question")
    pictures = [images.read_image(os.path.expanduser(path)) for path in args.image or []]
    model, tokenizer = load(args.out, args.device)
    if pictures:
        example = data_vl.Example(data_vl.TASKS[task].prompt + args.predict, {}, ())
    else:
        example = data.Example(data.prompt(task, args.predict, run.prompts), "", 0)
    batch = data.collate(tasks.draw(task, tasks.encode(task, [example], tokenizer), 0, 0))
    if pictures:
        tower = load_clip(run.clip)
        with torch.no_grad():
            seen = images.pool(tower(images.preprocess(pictures, tower.config.image_size))).half().float()[None]  # (1, N, P, C), rounded as on the disk
        batch = batch._replace(images=torch.zeros_like(seen) if run.blank else seen)
    text = tasks.answer(model, tokenizer, to_device(batch, args.device), task)[0]
    if pictures:
        say(text)
        return {"text": text}
    label, words = data.read_answer(task, text, run.prompts), data.TASKS[task].words
    say(f"{text!r}, which is no answer of {task}" if label is None else words[label] if words else str(label))
    return {"text": text, "label": label}


def train(args: argparse.Namespace, out: Path) -> dict:
    """One run in the folder `out`, from the arguments to what results.json holds."""
    start = time.time()
    seed_everything(args.seed)
    torch.use_deterministic_algorithms(args.deterministic)

    # model: the frozen backbone and what is trained
    model, tokenizer = build(args), load_tokenizer(args.model)
    backbone = model.backbone if args.method == "lst" else model
    if not 0 <= backbone.config.vocab_size - tokenizer.vocab_size < 128:  # T5's head has 28 spare rows
        raise ValueError(f"{args.model}: spiece.model has {tokenizer.vocab_size} ids, config.json's vocab_size is {backbone.config.vocab_size}: they do not belong together")

    # data: rows of a file -> text pairs -> token ids
    pictures, datasets = tasks.has_pictures(args.task), tasks.load(args.task, args.data, args.prompts)
    dataset = tasks.joined(datasets)
    if dataset.fallback:
        say(data.banner(dataset.fallback))
    if distributed.agree(dataset.sha256) != dataset.sha256:  # one process may have had no network
        raise ValueError("the processes have read different data; give --data with a folder that all of them see")
    datasets = {task: replace(part, train=part.train[: args.max_train_rows]) for task, part in datasets.items()}
    rows = {task: tasks.encode(task, part.train, tokenizer) for task, part in datasets.items()}
    val, test = ({task: getattr(part, name) for task, part in datasets.items()} for name in ("val", "test"))
    settle(args, rows, sample=dataset.name == "bundled-sample")

    with torch.device("meta"):
        total = sum(p.numel() for p in T5(backbone.config).parameters())  # the backbone's own, before a method added to it
    whole = "the backbone's"
    if pictures:
        total, whole = sum(p.numel() for p in model.parameters()), "all"  # Table 3's share, those added among them
    count = sum(p.numel() for p in trainable(model).values())
    say(f"{args.method} on {args.model}: {count:,} parameters train, {100 * count / total:.3f} % of {whole} {total:,}")
    say(f"{args.task} ({dataset.name}): {sum(map(len, rows.values())):,} training, {len(dataset.val):,} validation, {len(dataset.test):,} test rows"
        + (f", {dataset.skipped} skipped" if dataset.skipped else ""))
    epochs = math.ceil(args.steps / tasks.epoch_steps(rows, args.batch_size))
    sizes = [str(min(tasks.batch_size(task, args.batch_size, len(rows) > 1), len(of_task))) for task, of_task in rows.items()]
    say(f"{epochs} epoch{'s' * (epochs > 1)}, {args.steps} steps of {' or '.join(sizes)} rows, peak learning rate {args.lr:g} after {args.warmup_steps} steps, "
        f"seed {args.seed}, {report.hardware(args.device)}" + (f", {distributed.processes()} processes" if distributed.processes() > 1 else ""))

    # what was asked for; a run that goes on is asked for the same
    config = {name: value for name, value in vars(args).items() if name not in NO_CONFIG}
    config |= {"processes": distributed.processes(), "device": args.device.partition(":")[0]}
    for name in ("model", "clip"):
        if config[name] != "nano" and Path(config[name]).is_dir():
            config[name] = str(Path(config[name]).resolve())
    config |= {"backbone_sha256": sha256_of_backbone(args.model), "data_sha256": dataset.sha256}
    config |= {"clip_sha256": sha256_of_clip(args.clip)} if pictures else {}
    about = {"command": args.command, "versions": report.versions(), "hardware": report.hardware(args.device)}
    there = distributed.agree([name for name in checkpoint.FILES if args.resume and (out / name).exists()])
    if "config.json" in there:
        checkpoint.check_same(out, config)
    if "results.json" in there:
        results = checkpoint.read_json(out / "results.json")
        (out / "state.safetensors").unlink(missing_ok=True)
        say(f"the run in {out} has ended, nothing is left to do")
        return results

    features = tasks.look(datasets, args.clip, args.device) if pictures else None
    if args.blank:
        features.hidden = True

    # where it begins
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=args.lr, betas=(0.9, args.beta2), eps=args.epsilon, weight_decay=args.weight_decay, fused=True)
    at = Position(began=start)
    if "state.safetensors" in there:
        at = checkpoint.load_state(out, model, optimizer)
        at.began = start - at.seconds
        say(f"goes on after step {at.step} of {args.steps}")
    elif args.method == "lst":
        initialize(model, args, rows)
    if distributed.rank() == 0 and "config.json" not in there:
        checkpoint.clear(out)
        write_json(out / "config.json", config | about)

    report.reset_peak(args.device)  # training's peak, as in the paper, without the Fisher pass
    try:
        fit(args, model, optimizer, tokenizer, rows, val, features, out, config, at)
        load_trained(out, model)  # the best epoch.  Paper: with pictures the authors test the last one
        scores = evaluate(model, tokenizer, args, test, features)
        hidden = scores
        if pictures and not args.blank:
            features.hidden = True
            hidden = evaluate(model, tokenizer, args, test, features)
    except (KeyboardInterrupt, FloatingPointError):
        say(f"\nstopped after {at.step} of {args.steps} steps; " + (f"epoch {at.best['epoch']} (validation {at.best['val']['score']:.2f}) is kept in {out}"
                                                                   if at.best else "no epoch had ended, no weights were kept"))
        raise
    peak, kind = report.peak_memory(args.device)
    took = {"seconds": round(time.time() - at.began, 1), "peak_memory_bytes": max(peak, at.peak), "peak_memory_kind": kind}
    results = {
        "task": args.task, "model": config["model"], "method": args.method, "data": dataset.name, "seed": args.seed,
        "trainable_params": count, "total_params": total, "trainable_percent": 100 * count / total,
        "steps": at.step, "best_epoch": at.best["epoch"], **took, "val": at.best["val"], "test": scores,
        "fallback": dataset.fallback, "skipped_rows": dataset.skipped, **about, "config": config,
    }
    if pictures:
        results["test_hidden"] = hidden
    if args.method == "lst":
        results["gates"] = {name: [rung.mu.item() for rung in getattr(model, name).ladders] for name in ("encoder", "decoder")}
        say(report.gates(model))
    say(f"test {report.scores(scores)}  (epoch {at.best['epoch']}, the best on validation)")
    if pictures and not args.blank:
        say(f"with the pictures hidden {report.scores(hidden)}")
    say(f"{results['seconds'] / 60:.1f} minutes, {kind} memory {results['peak_memory_bytes'] / 2**20:.0f} MiB, saved in {out}")
    if distributed.rank() == 0:
        write_json(out / "config.json", config | about | took)
        write_json(out / "results.json", results)
        (out / "state.safetensors").unlink(missing_ok=True)
    return results


def fit(args: argparse.Namespace, model: nn.Module, optimizer: torch.optim.Optimizer, tokenizer: Tokenizer, rows: tasks.Rows, val: dict[str, list],
        features: images.Features | None, out: Path, config: dict, at: Position) -> None:
    """The plain loop, from position `at` to the last step; the best epoch on validation is kept in `out`."""
    writes, parameters, replica = distributed.rank() == 0, list(trainable(model).values()), distributed.wrap(model)
    log = open(out / "metrics.jsonl" if writes else os.devnull, "a", encoding="utf-8", buffering=1)
    if writes:
        log.truncate(at.log)
    epoch_steps, seen, busy = tasks.epoch_steps(rows, args.batch_size), 0, 0.0
    progress = report.Progress("step", args.steps, at.step)

    def save() -> None:
        if writes:
            os.fsync(log.fileno())
            at.log, at.seconds, at.peak = os.path.getsize(log.name), time.time() - at.began, max(at.peak, report.peak_memory(args.device)[0])
            checkpoint.save_state(out, model, optimizer, at)

    with log, report.asked_to_stop() as asked:
        for epoch in range(at.epochs, math.ceil(args.steps / epoch_steps)):
            model.train()
            for task, chosen in tasks.batches(rows, args.batch_size, args.seed, epoch)[at.step - epoch * epoch_steps : args.steps - epoch * epoch_steps]:
                began = time.time()
                seed_everything(args.seed, at.step, distributed.rank())
                lr = learning_rate(at.step, args.lr, args.warmup_steps, args.steps)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                loss = backward(replica, tasks.draw(task, chosen, args.seed, at.step), args, features)
                norm = nn.utils.clip_grad_norm_(parameters, args.max_norm)
                loss, stop = distributed.total(torch.stack([loss, torch.full_like(loss, len(asked))])).tolist()  # one asked to stop, all stop
                if not (math.isfinite(loss) and norm.isfinite()):
                    raise FloatingPointError(f"step {at.step + 1} at learning rate {lr:.2e} has loss {loss} and gradient norm {norm.item()}; try a lower --lr")
                optimizer.step()
                optimizer.zero_grad()
                at.step += 1

                seen, busy, peak = seen + len(chosen), busy + time.time() - began, report.peak_memory(args.device)[0] / 2**20
                progress.step(at.step, f"epoch {epoch + 1}  loss {loss:.4f}  {seen / busy:.0f} examples/s  peak {peak:.0f} MiB")
                log.write(json.dumps({"step": at.step, "epoch": epoch + 1, "loss": loss, "lr": lr, "seconds": round(time.time() - at.began, 2)}) + "\n")
                if stop or at.step % args.save_steps == 0 or at.step in (args.steps, (epoch + 1) * epoch_steps):
                    save()
                if stop:
                    distributed.wait()  # for the first process, which saves
                    raise KeyboardInterrupt(*asked)
            result = evaluate(model, tokenizer, args, val, features)
            say(f"epoch {epoch + 1}: validation {report.scores(result)}")
            log.write(json.dumps({"step": at.step, "epoch": epoch + 1, "val": result}) + "\n")
            if at.best is None or result["score"] > at.best["val"]["score"]:
                at.best = {"epoch": epoch + 1, "val": result}
                if writes:
                    save_trained(out, model, config)
            at.epochs = epoch + 1
            save()
            if distributed.total(torch.tensor(float(len(asked)), device=args.device)):
                raise KeyboardInterrupt(*asked)
    distributed.wait()


def several(args: argparse.Namespace, out: Path) -> dict:
    """A run for each task and seed, and their table, which is written anew after each.  A resume may ask for more of either."""
    config, runs = {"task": args.task, "seeds": args.seeds}, []
    load_tokenizer(args.model)
    for task in args.task:  # what is missing is said now, and not when the days of the first task have passed
        of_task = argparse.Namespace(**vars(args) | {"task": task})
        model = build(of_task)
        if args.init not in INITS and not args.resume:
            start_from(model, of_task)
        datasets = tasks.load(task, args.data, args.prompts)
        if tasks.has_pictures(task):
            tasks.look(datasets, args.clip, args.device)
    if distributed.agree(args.resume and (out / "config.json").exists()):
        checkpoint.check_same(out, config)
    elif distributed.rank() == 0:
        for folder in (out / f"{task}-{seed}" for task in args.task for seed in args.seeds):
            with checkpoint.claim(folder):
                checkpoint.clear(folder)
        checkpoint.clear(out)
    if distributed.rank() == 0:
        write_json(out / "config.json", config | {"command": args.command})
    for task in args.task:
        for seed in args.seeds:
            say(f"\n{task}, seed {seed}: run {len(runs) + 1} of {len(args.task) * len(args.seeds)}")
            folder = out / f"{task}-{seed}"
            checkpoint.check_folder(folder, args.overwrite, args.resume)
            with checkpoint.claim(folder, distributed.rank()):
                runs.append(train(argparse.Namespace(**vars(args) | {"task": task, "seed": seed}), folder))
            results = report.summary(runs) | {"command": args.command, "runs": runs}
            table = report.table(runs, {name: getattr(TASKS.get(name), "folder", name) for name in [*TASKS, *args.task]})
            if distributed.rank() == 0:
                write_json(out / "results.json", results)
                checkpoint.write_text(out / "results.md", table + "\n")
    say(f"\n{table}\nsaved in {out}")
    return results


def main(argv: Sequence[str] | None = None) -> dict:
    """Train, or --predict, as the command line says; returns what results.json holds.  Errors: report.guarded."""
    args = parse(argv, __doc__)

    def run() -> dict:
        if args.predict is not None:
            return predict(args)
        args.device = distributed.start(args.device)
        many = len(args.task) * len(args.seeds) > 1
        if distributed.rank() == 0:
            checkpoint.check_folder(args.out, args.overwrite, args.resume)
            args.out = args.out or checkpoint.new_folder(f"{args.task[0] if len(args.task) == 1 else 'several'}-{args.method}")
        out = Path(distributed.agree(args.out))
        try:
            with checkpoint.claim(out, distributed.rank()):
                if many:
                    return several(args, out)
                return train(argparse.Namespace(**vars(args) | {"task": args.task[0], "seed": args.seeds[0]}), out)
        except KeyboardInterrupt:
            if out.exists():
                say(f"to go on from the last step that was saved: the same command, with --resume --out {out}")
            raise

    return guarded(run)


if __name__ == "__main__":
    main()

"""Train a ladder side network, or what the paper compares it with, then test it (Sec. 4).

    python train.py --task sst2                      # the bundled backbone, minutes on a laptop
    python train.py --task rte --model t5-base --keep 1,2,3,5,6,7,9,10,11   # LST's row of Table 1
    python train.py --task glue --seeds 0,1,2 --model t5-base --method lora # 24 runs, their table
    python train.py --out runs/sst2-lst-0 --predict "a gripping , beautifully acted film"
    python train.py --task vqa                       # questions about drawn pictures
    python train.py --out runs/vqa-lst-0 --predict "what color is the star?" --image star.png

A run's folder holds config.json, metrics.jsonl, results.json and trained.safetensors (what was
trained, and nothing else). With several runs each has its own folder in it, beside their results.
"""
import argparse
import contextlib
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import methods
from data import Batch, Row, in_order
from methods.classify import EncoderLadder, YTuning
from model import Tokenizer
from run import kernels, processes, report
from run.backbones import build_lm, decoder_only, load_backbone, load_tokenizer
from run.cache import kept_states
from run.folder import Run, load_trained, read_config, trainable
from run.options import parse
from run.predict import draw, predict
from run.report import print0
from run.settings import announce, check_frozen, conclude, load_data, run_of, states_of
from run.start import initialize
from run.sweep import run_all
from run.tasks import (OWN, TASKS, Rows, as_classes, average, batches, class_texts, collate,
                       encode, has_pictures, mean_loss, task_of)
from vision.clip import load_clip
from vision.features import Features, clip_features


# ------------------------------------------------------------------------------------------- model

def build(args: argparse.Namespace) -> nn.Module:
    """The backbone with what the method trains: requires_grad says which parameters those are."""
    if decoder_only(args.model):
        return build_lm(args)
    channels = load_clip(args.clip).channels if has_pictures(args.task) else None
    t5 = load_backbone(args.model, args.device, args.dtype, checkpoint=args.checkpoint,
                       dropout=args.dropout, channels=channels)
    if args.classify:
        answers = class_texts(args.task, args.prompts, load_tokenizer(args.model))
        y_tuning = args.method == "y-tuning"
        return YTuning(t5, answers) if y_tuning else EncoderLadder(t5, answers, args.r)
    if args.method != "lst":
        return methods.apply(t5, args.method, args.as_authors, args.freeze, args.size)
    free = {"free": args.free} if args.free else {}
    return methods.SIDES[args.side](t5, r=args.r, keep=args.keep, **free)


# -------------------------------------------------------------------------------------------- loop

def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy summed over the batch's label tokens, each with the weight of its row."""
    # Paper: with pictures the authors take the mean over each answer's tokens, then over the batch;
    # ours is over all label tokens, as with text.
    logits = model(batch.source_ids, batch.source_mask, batch.decoder_ids, batch.decoder_mask,
                   batch.images)  # (B, T, V)
    loss = kernels.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())  # uses them up
    loss = loss.view_as(batch.labels).sum(dim=1)  # (B), padding counts 0
    return loss.sum() if batch.weights is None else loss @ batch.weights


def backward(model: nn.Module, rows: list[Row], args: argparse.Namespace,
             features: Features | None = None) -> Tensor:
    """Return this process's share of the batch's mean loss per label token; leave its gradient.

    Each of the world_size processes takes a share of the rows in --accumulate passes. A pass is
    divided by the tokens of the whole batch: the sum over passes and processes is the mean.
    """
    tokens = sum(len(row.target) for row in rows)  # of the whole batch
    world_size, first = processes.world_size(), processes.rank() * args.accumulate
    loss = torch.zeros((), device=args.device)
    for i in range(first, first + args.accumulate):
        share, last = rows[i :: world_size * args.accumulate], i == first + args.accumulate - 1
        if not share and not last:
            continue  # the last batch of an epoch may have fewer rows than there are passes
        batch = collate(share or rows[:1], features, args.device)
        with contextlib.nullcontext() if last else processes.no_sync(model):
            # The last pass sends the gradient. Without a row of its own its loss counts 0.
            part = loss_of(model, batch) * (1 / tokens if share else 0.0)
            # DistributedDataParallel takes the mean over processes, where the sum is wanted
            (part * world_size).backward()
        loss += part.detach()
    return loss


def learning_rate(step: int, peak: float, warmup: int, total: int) -> float:
    """Linear warm-up, then linear decay to 0. step counts from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (total - step) / max(1, total - warmup)


def seed_everything(*numbers: int) -> None:
    """Seed torch from (seed, step, process), so that a resume needs no generator's state."""
    torch.manual_seed(np.random.SeedSequence(numbers).generate_state(3).tolist()[2])


def evaluate(model: nn.Module, tokenizer: Tokenizer, args: argparse.Namespace,
             parts: dict[str, list], features: Features | None = None, out=None) -> dict:
    """Generated answers -> the metrics of each task in percent. Each process answers its share."""
    scores = {}
    model.eval()
    for name, examples in parts.items():
        task = task_of(name, args)
        rows, texts = task.draw(task.encode(examples, tokenizer), args.seed, 0), {}
        for indices in in_order(rows, args.batch_size)[processes.rank() :: processes.world_size()]:
            batch = collate([rows[i] for i in indices], features, args.device)
            texts |= zip(indices, task.answer(model, tokenizer, batch))
        texts = [text for _, text in sorted(processes.gather(texts).items())]
        constant = len(set(texts)) == 1 < len({tuple(row.target) for row in rows})
        if constant and not (features and features.hidden):
            print0(f"warning: every answer is {texts[0][:50]!r}:\n"
                   f"it has learned nothing yet, or the learning rate {args.lr} is too high")
        scores[name] = task.score(texts, examples, args.prompts)
        if name == OWN.name:
            scores[name]["loss"] = mean_loss(loss_of, model, rows, args)
            if out:
                processes.first(task.write, out, texts, examples)
    return average(scores)


# -------------------------------------------------------------------------------------------- main

def train(args: argparse.Namespace, out: Path, shared: dict) -> dict:
    """One run in the folder `out`: what its results.json holds. shared: by a command's runs."""
    began = time.time()
    seed_everything(args.seed)

    # data: rows of a file -> text pairs -> token ids
    datasets, tokenizer = load_data(args), load_tokenizer(args.model)
    rows, val, test = ({name: getattr(dataset, part) for name, dataset in datasets.items()}
                       for part in ("train", "val", "test"))
    rows, answered = encode(rows, tokenizer, args), encode(val, tokenizer, args)

    # model: the backbone and what the method trains
    model = build(args)
    kernels.install(model)  # the same dropout and softmax in less time
    results = announce(args, model, datasets)

    # optimizer, and where the run begins
    optimizer = kernels.AdamW(trainable(model).values(), args.lr, (0.9, args.beta2),
                              args.epsilon, args.weight_decay, fused=True)
    run = run_of(args, out, datasets, began, shared)
    if run.results:
        print0(f"the run in {out} has ended, nothing is left to do")
        return run.results
    features = clip_features(datasets, args.clip, args.device) if has_pictures(args.task) else None
    if run.load(model, optimizer):
        print0(f"goes on after step {run.step} of {args.steps}")
    elif args.method == "lst":
        initialize(model, args, rows, tokenizer)
    if args.classify:
        rows = as_classes(rows, model.answers)
    run.begin()

    # loop, then test
    try:
        with kept_states(model, states_of(args, model, rows, answered, shared)) as results["cache"]:
            fit(args, run, model, optimizer, tokenizer, rows, val, features)
        load_trained(out, model)  # the best epoch. Paper: with pictures the authors test the last
        results["test"] = evaluate(model, tokenizer, args, test, features, out)
        if features:
            features.hidden = True
            results["test_hidden"] = evaluate(model, tokenizer, args, test, features)
    except (KeyboardInterrupt, FloatingPointError) as stop:
        kept = f"epoch {run.best['epoch']} is kept in {out}" if run.best else "no weights were kept"
        print0(f"\nstopped after {run.step} of {args.steps} steps; {kept}")
        if isinstance(stop, KeyboardInterrupt):
            print0(f"to go on: the same command, with --resume --out {out}, without --overwrite")
        raise
    return conclude(args, model, run, results)


def fit(args: argparse.Namespace, run: Run, model: nn.Module, optimizer: torch.optim.Optimizer,
        tokenizer: Tokenizer, rows: Rows, val: dict[str, list], features: Features | None) -> None:
    """The plain loop, from where `run` stands to the last step."""
    parameters, replica = list(trainable(model).values()), processes.wrap(model)
    epoch_length = len(batches(rows, args.batch_size, args.seed, 0))
    progress = report.Progress("step", args.steps, run.step)
    with report.stop_signals() as received:
        for epoch in range(run.epochs, math.ceil(args.steps / epoch_length)):
            model.train()
            began, seen, first = time.time(), 0, epoch * epoch_length
            steps = batches(rows, args.batch_size, args.seed, epoch)[: args.steps - first]
            for task, chosen in steps[run.step - first :]:
                seed_everything(args.seed, run.step, processes.rank())
                lr = learning_rate(run.step, args.lr, args.warmup_steps, args.steps)
                optimizer.param_groups[0]["lr"] = lr

                batch = TASKS[task].draw(chosen, args.seed, run.step)
                loss = backward(replica, batch, args, features)
                norm = nn.utils.clip_grad_norm_(parameters, args.max_norm)
                loss = torch.stack([loss, loss.new_tensor(len(received))])
                loss, stop = processes.all_reduce(loss).tolist()  # told to stop one, all stop
                if not (math.isfinite(loss) and norm.isfinite()):
                    raise FloatingPointError(
                        f"step {run.step + 1} at learning rate {lr:.2e} has loss {loss} and "
                        f"gradient norm {norm.item()}; try a lower --lr")
                optimizer.step()
                optimizer.zero_grad()

                run.step, seen = run.step + 1, seen + len(chosen)
                run.log({"step": run.step, "epoch": epoch + 1, "loss": loss, "lr": lr,
                         "seconds": round(run.seconds(), 2)})
                speed, peak = seen / (time.time() - began), run.peak() / 2**20
                progress.step(run.step, f"epoch {epoch + 1}  loss {loss:.4f}  "
                              f"{speed:.0f} examples/s  peak {peak:.0f} MiB")
                if stop or run.step % args.save_steps == 0 or run.step == first + len(steps):
                    run.save(model, optimizer)
                if stop:
                    raise KeyboardInterrupt(*received)
            scores = evaluate(model, tokenizer, args, val, features)
            print0(f"epoch {epoch + 1}: validation {report.scores(scores)}")
            run.end_epoch(model, optimizer, scores)
            if processes.all_reduce(torch.tensor(float(len(received)), device=args.device)):
                raise KeyboardInterrupt(*received)


def load(folder: str | Path, device: str = "cpu", **moved: str) -> tuple[nn.Module, Tokenizer]:
    """What a run left, ready to answer: the model in eval mode, and its tokenizer.

    model="...", clip="...": where backbone and image tower lie, if they have moved. ValueError if
    they are not the same, byte for byte.
    """
    args = argparse.Namespace(**read_config(folder) | {"device": device} | moved)
    check_frozen(folder, args)
    model = build(args)
    load_trained(folder, model)
    return model.eval(), load_tokenizer(args.model)


def main(argv: Sequence[str] | None = None) -> dict:
    """Train, --predict or --plot, as the command line says; return what results.json holds."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # Linux: huge pages make a CPU step faster
    args = parse(argv, __doc__)
    if args.predict is not None:
        return report.exit_cleanly(lambda: predict(args, load))
    if args.plot:
        return report.exit_cleanly(lambda: draw(args))
    return report.exit_cleanly(lambda: run_all(args, build, train))


if __name__ == "__main__":
    main()

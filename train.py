"""Train a ladder side network, or what the paper compares it with, on a GLUE task, then test it (Sec. 4).

    python train.py --task sst2                                        # the bundled backbone, minutes on a laptop
    python train.py --task rte --model t5-base --keep 1,2,3,5,6,7,9,10,11    # Table 1's LST row
    python train.py --task rte --model t5-base --method lora
    python train.py --out runs/sst2-lst-0 --predict "a gripping , beautifully acted film"

A run's folder holds config.json, metrics.jsonl, results.json and trained.safetensors (what was trained, and nothing else).
"""
import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import baselines
import data
import metrics
import prune
import report
from checkpoint import check_folder, load_trained, make_folder, read_config, save_trained, sha256_of_backbone, trainable, write_json
from model import PUBLIC, T5, Tokenizer, load_t5, load_tokenizer
from report import Parser, guarded, layers, positive, say, whole
from side import LadderT5

METHODS = ("lst", *baselines.METHODS)
PROMPTS = ("paper", "t5")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # load_t5 refuses fp16 and says why
SETTINGS = {  # Sec. 4 and Table 5; what the command line leaves open, beside the task's epochs (10, or 20 for the small tasks)
    "lst": {"lr": 3e-3, "batch_size": 100, "warmup_steps": 500},
    **{method: {"lr": 3e-4, "batch_size": 100, "warmup_steps": 500} for method in ("full", "adapters", "lora", "bitfit")},
    "prompt": {"lr": 3e-1, "batch_size": 100, "warmup_steps": 500},
}
NANO_SETTINGS = {"warmup_steps": 60}  # of 664 steps on SST-2
MAX_NEW_TOKENS = 20  # of a generated answer


# ------------------------------------------------------------------------------------------------------------- arguments

def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    what = parser.add_argument_group("what to train")
    what.add_argument("--task", choices=data.TASKS, help="the GLUE task")
    what.add_argument("--model", default="nano", help=f"frozen backbone: nano (bundled, the default), {', '.join(PUBLIC)}, or a folder")
    what.add_argument("--method", default="lst", choices=METHODS, help="lst: the ladder side network (default); the others: baselines.py")
    what.add_argument("--data", help="folder of the official GLUE folders, or `sample` for the bundled sentences; default: download")
    what.add_argument("--prompts", default="paper", choices=PROMPTS, help="the authors' prompts with digits as answers (default), or T5's with words")
    what.add_argument("--max-train-rows", type=positive, help="use only the first so many training rows")
    ladder = parser.add_argument_group("the ladder (Sec. 3)")
    ladder.add_argument("--r", type=positive, default=8, help="reduction factor (default 8)")
    ladder.add_argument("--keep", type=layers, help="0-based layers kept in side encoder and decoder, e.g. 1,3,5 (default: all)")
    ladder.add_argument("--init", default="fisher", choices=("fisher", "magnitude", "random"), help="importance for the initial weights (default fisher)")
    ladder.add_argument("--prune", default="published", choices=("published", "aligned"), help="how rows are chosen (default published)")
    ladder.add_argument("--fisher-samples", type=positive, default=1024, help="training rows for the Fisher information (default 1024)")
    ladder.add_argument("--gates", default="learned", choices=("learned", "shut"), help="shut: mu = 0, no ladders")
    baseline = parser.add_argument_group("the other methods (Sec. 4)")
    baseline.add_argument("--as-authors", action="store_true", help="the authors' reading of lora (biases beside it) and prompt (starts from noise)")
    baseline.add_argument("--freeze", type=whole, default=0, help="lowest layers left as they are, the encoder's first (default 0)")
    run = parser.add_argument_group("the run (defaults depend on model, method and task; they are printed at the start)")
    run.add_argument("--epochs", type=positive)
    run.add_argument("--max-steps", type=positive, help="stop after so many steps")
    run.add_argument("--batch-size", type=positive)
    run.add_argument("--lr", type=float, help="peak learning rate")
    run.add_argument("--warmup-steps", type=whole)
    run.add_argument("--seed", type=whole, default=0)
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--dtype", default="fp32", help="of the frozen backbone: fp32 (default) or bf16")
    run.add_argument("--checkpoint", action="store_true", help="less memory, more time: backward computes each layer again")
    files = parser.add_argument_group("files")
    files.add_argument("--out", help="the run's folder (default: a new one, runs/<task>-<method>-<number>)")
    files.add_argument("--overwrite", action="store_true", help="allow --out to name a folder that is not empty")
    files.add_argument("--predict", metavar="TEXT", help="answer for one input with the run in --out; for tasks on pairs: \"A | B\"")
    args = parser.parse_args(argv)
    if args.predict is not None and not args.out:
        parser.error("--predict needs --out, the folder of a run that has ended")
    if args.predict is None and not args.task:
        parser.error(f"--task is missing: choose from {', '.join(data.TASKS)}")
    shaped = [name for name in ("r", "keep", "init", "prune", "fisher_samples", "gates") if getattr(args, name) != parser.get_default(name)]
    if args.method != "lst" and shaped:
        parser.error(f"--{', --'.join(shaped).replace('_', '-')}: the side network's shape, and --method {args.method} has none; leave it out")
    if args.method == "lst" and args.freeze:
        parser.error("--freeze is for the other methods: --method lst freezes the whole backbone; use --keep to leave out side layers")
    if args.as_authors and args.method not in ("lora", "prompt"):
        parser.error(f"--as-authors has no other reading of --method {args.method}, only of lora and prompt")
    return args


def settle(args: argparse.Namespace, rows: int, sample: bool) -> None:
    """Fill in what the command line left open, for this many training rows."""
    settings = {"epochs": data.TASKS[args.task].epochs, **SETTINGS[args.method]}
    if args.model == "nano":
        settings |= NANO_SETTINGS | ({"epochs": 1} if rows > 30_000 else {})  # Paper: 10 epochs of the large tasks; ours is done in minutes
    if sample:  # more epochs learn its grammar, not reviews
        settings |= {"epochs": 5, "warmup_steps": None}
    for name, value in settings.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.steps = min(args.max_steps or math.inf, args.epochs * math.ceil(rows / args.batch_size))
    if args.warmup_steps is None:
        args.warmup_steps = args.steps // 10
    if not (args.lr > 0 and math.isfinite(args.lr)):
        raise ValueError(f"lr is {args.lr}, it must be a finite number above 0")


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
    t5 = load_t5(args.model, device=args.device, dtype=DTYPES[args.dtype], checkpoint=args.checkpoint)
    if args.method != "lst":
        return baselines.apply(t5, args.method, args.as_authors, args.freeze)
    ladder = LadderT5(t5, r=args.r, keep=args.keep)
    return ladder.shut_gates() if args.gates == "shut" else ladder


def initialize(ladder: LadderT5, args: argparse.Namespace, rows: list[data.Encoded]) -> None:
    """Sec. 3.3: weights for the side network out of the backbone, by the importance that --init names."""
    if args.init == "magnitude":
        prune.init_side(ladder, prune.magnitude(ladder.backbone), args.prune)
    elif args.init == "fisher":
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed)).tolist()[: args.fisher_samples]
        progress = report.Progress("Fisher information, sample", len(order))

        def samples() -> Iterator[data.Batch]:
            for done, row in enumerate(order, 1):
                yield to_device(data.collate([rows[row]]), args.device)
                progress.step(done)

        prune.init_side(ladder, prune.fisher(ladder.backbone, samples(), len(order)), args.prune)


def to_device(batch: data.Batch, device: str) -> data.Batch:
    return data.Batch(*(tensor.to(device) for tensor in batch))


def loss_of(model: nn.Module, batch: data.Batch) -> Tensor:
    """Mean cross-entropy over the label tokens of the batch."""
    logits = model(batch.source_ids, batch.source_mask, batch.decoder_ids, batch.decoder_mask)  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=-100)


def learning_rate(step: int, peak: float, warmup: int, total: int) -> float:
    """Linear warm-up, then linear decay to 0.  step counts from 0."""
    return peak * (step + 1) / warmup if step < warmup else peak * (total - step) / max(1, total - warmup)


def evaluate(model: nn.Module, tokenizer: Tokenizer, args: argparse.Namespace, examples: list[data.Example]) -> dict:
    """Greedy answers -> the task's metrics in percent."""
    encoded, answers = data.encode(examples, tokenizer), [None] * len(examples)
    was_training = model.training
    model.eval()
    for rows in data.in_order(encoded, args.batch_size):
        batch = to_device(data.collate([encoded[i] for i in rows]), args.device)
        for i, ids in zip(rows, model.generate(batch.source_ids, batch.source_mask, MAX_NEW_TOKENS).tolist()):
            answers[i] = data.read_answer(args.task, tokenizer.decode(ids), args.prompts)
    model.train(was_training)
    if len(set(answers)) == 1 and len(set(e.label for e in examples)) > 1:
        say(f"warning: every answer is {answers[0]!r}: the model has learned nothing yet, or the learning rate {args.lr} is too high")
    return metrics.glue_score(args.task, answers, [example.label for example in examples])


def load(folder: str | Path, device: str = "cpu") -> tuple[nn.Module, Tokenizer]:
    """What a run left, ready to answer: the model in eval mode, and its tokenizer.  ValueError if the backbone is not the same."""
    args = argparse.Namespace(**read_config(folder) | {"device": device})
    if args.task not in data.TASKS or args.method not in METHODS or args.prompts not in PROMPTS:
        raise ValueError(f"{folder} holds a run of method {args.method!r} on task {args.task!r} with prompts {args.prompts!r}, which are not known here")
    if (found := sha256_of_backbone(args.model)) != args.backbone_sha256:
        raise ValueError(f"the backbone {args.model} is not the one of {folder}: sha256 {found[:12]}..., was {args.backbone_sha256[:12]}...")
    model = build(args)
    load_trained(folder, model)
    return model.eval(), load_tokenizer(args.model)


# ------------------------------------------------------------------------------------------------------------------ main

def predict(args: argparse.Namespace) -> dict:
    """The answer of the run in --out to one text."""
    run = argparse.Namespace(**read_config(args.out))
    model, tokenizer = load(args.out, args.device)
    if not args.predict.isascii() and args.predict != args.predict.encode("utf-8", "ignore").decode():
        raise ValueError(f"--predict takes UTF-8 text, given was {args.predict[:40]!r}")
    example = data.Example(data.prompt(run.task, args.predict, run.prompts), "", 0)
    batch = to_device(data.collate(data.encode([example], tokenizer)), args.device)
    text = tokenizer.decode(model.generate(batch.source_ids, batch.source_mask, MAX_NEW_TOKENS)[0].tolist())
    label, words = data.read_answer(run.task, text, run.prompts), data.TASKS[run.task].words
    say(f"{text!r}, which is no answer of {run.task}" if label is None else words[label] if words else str(label))
    return {"text": text, "label": label}


def train(args: argparse.Namespace) -> dict:
    start = time.time()
    torch.manual_seed(args.seed)
    check_folder(args.out, args.overwrite)

    # model: the frozen backbone and what is trained
    model, tokenizer = build(args), load_tokenizer(args.model)
    backbone = model.backbone if args.method == "lst" else model
    if not 0 <= backbone.config.vocab_size - tokenizer.vocab_size < 128:  # T5's head has 28 spare rows
        raise ValueError(f"{args.model}: spiece.model has {tokenizer.vocab_size} ids, config.json's vocab_size is {backbone.config.vocab_size}: they do not belong together")

    # data: rows of a file -> text pairs -> token ids
    dataset = data.load(args.task, args.data, args.prompts)
    if dataset.fallback:
        say(data.banner(dataset.fallback))
    rows = data.encode(dataset.train[: args.max_train_rows], tokenizer)
    settle(args, len(rows), sample=dataset.name == "bundled-sample")

    with torch.device("meta"):
        total = sum(p.numel() for p in T5(backbone.config).parameters())  # the backbone's own, before a method added to it
    count = sum(p.numel() for p in trainable(model).values())
    say(f"{args.method} on {args.model}: {count:,} parameters train, {100 * count / total:.3f} % of the backbone's {total:,}")
    say(f"{args.task} ({dataset.name}): {len(rows):,} training, {len(dataset.val):,} validation, {len(dataset.test):,} test rows"
        + (f", {dataset.skipped} skipped" if dataset.skipped else ""))
    say(f"{args.epochs} epoch{'s' * (args.epochs > 1)}, {args.steps} steps of {args.batch_size} rows, peak learning rate {args.lr:g} after {args.warmup_steps} steps, "
        f"seed {args.seed}, {report.hardware(args.device)}")
    if args.method == "lst":
        initialize(model, args, rows)
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(args.device)  # training's peak, as in the paper; a process's peak has the Fisher pass in it

    config = {name: value for name, value in vars(args).items() if name not in ("out", "overwrite", "predict")}
    if args.model != "nano" and Path(args.model).is_dir():
        config["model"] = str(Path(args.model).resolve())
    config |= {"backbone_sha256": sha256_of_backbone(args.model), "data_sha256": dataset.sha256}
    out = make_folder(args.out, args.task, args.method)
    write_json(out / "config.json", config)

    # optimizer
    parameters = list(trainable(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0, fused=True)

    # the loop
    step, best, progress, loop_start = 0, None, report.Progress("step", args.steps), time.time()
    log = open(out / "metrics.jsonl", "w", encoding="utf-8", buffering=1)
    try:
        for epoch in range(args.epochs):
            model.train()
            for indices in data.batches(rows, args.batch_size, args.seed, epoch)[: args.steps - step]:
                batch = to_device(data.collate([rows[i] for i in indices]), args.device)
                lr = learning_rate(step, args.lr, args.warmup_steps, args.steps)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                loss = loss_of(model, batch)
                loss.backward()
                norm = nn.utils.clip_grad_norm_(parameters, 1.0)
                if not (loss.isfinite() and norm.isfinite()):
                    raise FloatingPointError(f"step {step + 1} at learning rate {lr:.2e} has loss {loss.item()} and gradient norm {norm.item()}; try a lower --lr")
                optimizer.step()
                optimizer.zero_grad()
                step += 1

                rate, peak = step * args.batch_size / (time.time() - loop_start), report.peak_memory(args.device)[0] / 2**20
                progress.step(step, f"epoch {epoch + 1}  loss {loss.item():.4f}  {rate:.0f} examples/s  peak {peak:.0f} MiB")
                log.write(json.dumps({"step": step, "epoch": epoch + 1, "loss": loss.item(), "lr": lr, "seconds": round(time.time() - start, 2)}) + "\n")
            val = evaluate(model, tokenizer, args, dataset.val)
            say(f"epoch {epoch + 1}: validation {report.scores(val)}")
            log.write(json.dumps({"step": step, "epoch": epoch + 1, "val": val}) + "\n")
            if best is None or val["score"] > best["val"]["score"]:
                best = {"epoch": epoch + 1, "val": val}
                save_trained(out, model, config)
            if step == args.steps:
                break
        load_trained(out, model)  # the best epoch
        test = evaluate(model, tokenizer, args, dataset.test)
    except (KeyboardInterrupt, FloatingPointError):
        say(f"\nstopped after {step} of {args.steps} steps; " + (
            f"epoch {best['epoch']} (validation {best['val']['score']:.2f}) is kept in {out}" if best else "no epoch had ended, no weights were kept"))
        raise
    finally:
        log.close()

    peak, kind = report.peak_memory(args.device)
    results = {
        "task": args.task, "model": config["model"], "method": args.method, "data": dataset.name, "seed": args.seed,
        "trainable_params": count, "total_params": total, "trainable_percent": 100 * count / total,
        "steps": step, "best_epoch": best["epoch"], "seconds": round(time.time() - start, 1), "peak_memory_bytes": peak, "peak_memory_kind": kind,
        "val": best["val"], "test": test, "fallback": dataset.fallback, "skipped_rows": dataset.skipped,
        "hardware": report.hardware(args.device), "torch": torch.__version__, "config": config,
    }
    if args.method == "lst":
        results["gates"] = {name: [rung.mu.item() for rung in getattr(model, name).ladders] for name in ("encoder", "decoder")}
    write_json(out / "results.json", results)
    if args.method == "lst":
        say(report.gates(model))
    say(f"test {report.scores(test)}  (epoch {best['epoch']}, the best on validation)")
    say(f"{results['seconds'] / 60:.1f} minutes, {kind} memory {peak / 2**20:.0f} MiB, saved in {out}")
    return results


def main(argv: Sequence[str] | None = None) -> dict:
    """Train, or --predict, as the command line says; returns what results.json holds.  Errors: report.guarded."""
    args = parse(argv)
    return guarded(lambda: predict(args) if args.predict is not None else train(args))


if __name__ == "__main__":
    main()

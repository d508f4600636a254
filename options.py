"""Every option of train.py, what may be combined with what, and what the paper takes where the command line is silent."""
import argparse
import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import baselines
import data
from clip import CLIP_PUBLIC
from model import NANO, PUBLIC
from report import Parser, layers, positive, seeds, whole
from tasks import TASKS, Rows, epoch_steps, has_pictures

METHODS = ("lst", *baselines.METHODS)
PROMPTS = ("paper", "t5")
INITS = ("fisher", "magnitude", "random")  # or the folder of a run
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # load_t5 refuses fp16 and says why
LR = {"lst": 3e-3, "full": 3e-4, "adapters": 3e-4, "lora": 3e-4, "bitfit": 3e-4, "prompt": 3e-1}  # Sec. 4 and Table 5
BATCH_SIZE, WARMUP_STEPS = 100, 500  # the same; a task's epochs are in data.py
PICTURES_LR = LR | {"bitfit": 3e-3, "prompt": 3e-3}  # Table 6
PICTURES_BATCH_SIZE = {"gqa": 500, "nlvr2": 100, "coco": 250}  # the others, and VQA's share of a joint run: 300
NANO_WARMUP_STEPS = 60  # of 664 steps on SST-2
NANO_EPOCHS = {"vqa": 14, "gqa": 14, "nlvr2": 6, "coco": 3, "easy-vqa": 4}  # LST's; several together: the most of theirs.  Paper: 20
NANO_LR = {"bitfit": 1e-2}  # Paper: 3e-4, with which biases alone learn nothing in 664 steps


def parse(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    parser = Parser(description)
    what = parser.add_argument_group("what to train")
    what.add_argument("--task", type=runs_of, help=f"one of {', '.join(TASKS)}; several as a list, the first eight as `glue`; tasks about pictures joined by + are learned together")
    what.add_argument("--model", default="nano", help=f"frozen backbone: nano (bundled, the default), {', '.join(PUBLIC)}, or a folder")
    what.add_argument("--method", default="lst", choices=METHODS, help="lst: the ladder side network (default); the others: baselines.py")
    what.add_argument("--data", help="folder of the official GLUE folders, or `sample` for the bundled sentences; default: download; of pictures: "
                      "folder of the task's files; default: drawn scenes")
    what.add_argument("--prompts", default="paper", choices=PROMPTS, help="the authors' prompts with digits as answers (default), or T5's with words")
    what.add_argument("--clip", default="nano", help=f"image tower: nano (bundled, the default), {', '.join(CLIP_PUBLIC)}, or a folder")
    what.add_argument("--blank", action="store_true", help="train and test with the pictures hidden: what the questions alone tell")
    what.add_argument("--max-train-rows", type=positive, help="use only the first so many training rows")
    ladder = parser.add_argument_group("the ladder (Sec. 3)")
    ladder.add_argument("--r", "--reduction", type=positive, help="reduction factor (default 8, with pictures 4); behind torchrun, which takes --r for an option of its own, write --reduction")
    ladder.add_argument("--keep", type=layers, help="0-based layers kept in side encoder and decoder, e.g. 1,3,5 (default: all)")
    ladder.add_argument("--init", default="fisher", help="importance for the initial weights: fisher (default), magnitude or random; or the folder of a run, "
                        "whose side network is taken")
    ladder.add_argument("--prune", default="published", choices=("published", "aligned"), help="how rows are chosen (default %(default)s)")
    ladder.add_argument("--fisher-samples", type=positive, default=1024, help="training rows for the Fisher information (default %(default)s)")
    ladder.add_argument("--gates", default="learned", choices=("learned", "shut"), help="shut: mu = 0, no ladders")
    baseline = parser.add_argument_group("the other methods (Sec. 4)")
    baseline.add_argument("--as-authors", action="store_true", help="the authors' reading of lora (biases beside it) and prompt (starts from noise)")
    baseline.add_argument("--freeze", type=whole, default=0, help="lowest layers left as they are, the encoder's first (default %(default)s)")
    run = parser.add_argument_group("the run (defaults depend on model, method and task; they are printed at the start)")
    run.add_argument("--epochs", type=positive, help="passes over the training rows")
    run.add_argument("--max-steps", type=positive, help="stop after so many steps")
    run.add_argument("--batch-size", type=positive, help="of all processes together")
    run.add_argument("--accumulate", type=positive, default=1, help="passes that a batch is cut into: less memory, the same gradient")
    run.add_argument("--lr", type=float, help="peak learning rate")
    run.add_argument("--dropout", type=float, help="in what trains (default: the backbone's 0.1; with pictures beside nano 0)")
    run.add_argument("--warmup-steps", type=whole, help="steps in which the learning rate rises from 0")
    run.add_argument("--seed", type=whole, help="of order, dropout and random weights (default 0)")
    run.add_argument("--seeds", type=seeds, help="several runs, for mean and deviation: 0,1,2")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda where there is one, else cpu")
    run.add_argument("--dtype", default="fp32", choices=DTYPES, help="of the frozen backbone: fp32 (default) or bf16")
    run.add_argument("--checkpoint", action="store_true", help="less memory, more time: backward computes each layer again")
    run.add_argument("--deterministic", action="store_true", help="on CUDA too the same bits from the same seed; slower")
    files = parser.add_argument_group("files")
    files.add_argument("--out", help="the run's folder (default: a new one, runs/<task>-<method>-<number>)")
    files.add_argument("--resume", action="store_true", help="go on with the run in --out, exactly; a run that has ended is left as it is")
    files.add_argument("--save-steps", type=positive, default=200, help="steps after which all that a resume needs is saved (default %(default)s)")
    files.add_argument("--overwrite", action="store_true", help="allow --out to name a folder that is not empty")
    files.add_argument("--image", metavar="FILE", nargs="+", help="the picture, or NLVR2's two, that --predict is about")
    files.add_argument("--predict", metavar="TEXT", help="answer for one input with the run in --out; for tasks on pairs: \"A | B\"")
    args = parser.parse_args(argv)
    if args.predict is not None and not args.out:
        parser.error("--predict needs --out, the folder of a run that has ended")
    if args.predict is None and not args.task:
        parser.error(f"--task is missing: choose from {', '.join(TASKS)}")
    shaped = [name for name in ("r", "keep", "init", "prune", "fisher_samples", "gates") if getattr(args, name) != parser.get_default(name)]
    if args.method != "lst" and shaped:
        parser.error(f"--{', --'.join(shaped).replace('_', '-')}: the side network's shape, and --method {args.method} has none; leave it out")
    if args.init not in INITS:
        if not args.init or not (args.resume or os.path.isdir(os.path.expanduser(args.init))):
            parser.error(f"--init {args.init!r} is no folder; choose from {', '.join(INITS)}, or name the folder of a run")
        args.init = os.path.realpath(os.path.expanduser(args.init))
    if args.method == "lst" and args.freeze:
        parser.error("--freeze is for the other methods: --method lst freezes the whole backbone; use --keep to leave out side layers")
    if args.as_authors and args.method not in ("lora", "prompt"):
        parser.error(f"--as-authors has no other reading of --method {args.method}, only of lora and prompt")
    if args.resume and (args.overwrite or not args.out):
        parser.error("--resume goes on with the run in --out" + (", --overwrite begins anew: give one of them" if args.overwrite else ": name its folder"))
    if args.seeds and args.seed is not None:
        parser.error("--seed and --seeds: give one of them")
    pictures = [has_pictures(task) for task in args.task or []]
    if args.task and not any(pictures) and (args.blank or args.clip != "nano"):
        parser.error("--clip and --blank are about pictures, and these tasks have none: leave them out")
    if any(pictures) and not all(pictures):
        parser.error("tasks with and without pictures have other settings: run them one after the other")
    if args.image and args.predict is None:
        parser.error("--image is what --predict is about: give both")
    if args.r is None:
        args.r = 4 if any(pictures) else 8
    if args.dropout is not None and not 0 <= args.dropout < 1:
        parser.error(f"dropout is {args.dropout}, it must be a number from 0 to below 1")
    if args.predict is not None and args.seeds:
        parser.error("--predict asks the run in --out, which knows its seed: leave out --seeds")
    if args.predict is not None and (args.blank or args.clip != "nano"):
        parser.error("--predict asks the run in --out, which knows its image tower and whether pictures are hidden: leave out --clip and --blank")
    if "" in (args.clip, args.data):
        parser.error("--clip or --data is empty: name a folder, or leave it out")
    if any(pictures) and (args.prompts != "paper" or args.data == "sample"):
        parser.error("--prompts t5 and --data sample are for texts: leave them out; without --data the pictures are drawn scenes")
    if args.out == "":
        parser.error("--out is empty: name a folder, or leave it out")
    if args.lr is not None and not (args.lr > 0 and math.isfinite(args.lr)):
        parser.error(f"lr is {args.lr}, it must be a finite number above 0")
    args.out = args.out and os.path.expanduser(args.out)
    args.model = "nano" if Path(args.model).resolve() == NANO else args.model
    if args.dropout is None and args.model == "nano" and any(pictures):
        args.dropout = 0.0  # Paper: 0.1.  A run of minutes beside nano does not overfit, and without it learns sooner to look
    args.seeds = args.seeds or [args.seed or 0]
    args.command = shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv)])
    return args


def runs_of(text: str) -> list[str]:
    """--task's text -> a run each: "vqa, gqa+coco" -> ["vqa", "gqa+coco"].  What + joins is learned together."""
    runs = list(data.TASKS) if text == "glue" else ["+".join(name.strip() for name in run.split("+")) for run in text.split(",")]
    for run in runs:
        names = run.split("+")
        for name in names:
            if name not in TASKS or names.count(name) > 1 or [sorted(other.split("+")) for other in runs].count(sorted(names)) > 1:
                wrong = "is there twice" if name in TASKS else "is no task"
                raise argparse.ArgumentTypeError(f"{name[:20]!r} {wrong}; choose from {', '.join(TASKS)}, or glue")
            if len(names) > 1 and not has_pictures(name):
                raise argparse.ArgumentTypeError(f"{run[:40]!r}: only tasks about pictures are learned together; write a comma for one run after the other")
    return runs


def settle(args: argparse.Namespace, rows: Rows, sample: bool) -> None:
    """Fill in what the command line left open, for these training rows."""
    if has_pictures(args.task):
        settings = {"epochs": 20, "lr": PICTURES_LR[args.method], "batch_size": PICTURES_BATCH_SIZE.get(args.task, 300), "warmup_steps": None}
        args.weight_decay, args.epsilon, args.beta2, args.max_norm = 0.03 if args.method == "lst" else 0.01, 1e-6, 0.999, 5.0
        if args.model == "nano":
            settings |= {"batch_size": 32, "epochs": 3}  # Paper: 100 to 500 rows, 20 epochs; ours is done in minutes
            if args.method == "lst":
                # Paper: 3e-3, 1e-6 and 0.999, with which this small side network learns what is answered, but not to look: its queries' gradients are
                # about 1e-7, after a start when they were a hundred times that.
                settings |= {"batch_size": 16, "epochs": max(NANO_EPOCHS[task] for task in args.task.split("+")), "lr": 5e-4}
                args.epsilon, args.beta2 = 1e-8, 0.99
    else:
        settings = {"epochs": data.TASKS[args.task].epochs, "lr": LR[args.method], "batch_size": BATCH_SIZE, "warmup_steps": WARMUP_STEPS}
        args.weight_decay, args.epsilon, args.beta2, args.max_norm = 0.0, 1e-8, 0.999, 1.0
        if args.model == "nano":
            settings |= {"warmup_steps": NANO_WARMUP_STEPS, "lr": NANO_LR.get(args.method, settings["lr"])}
            if sum(map(len, rows.values())) > 30_000:
                settings["epochs"] = 1  # Paper: 10 epochs of the large tasks; ours is done in minutes
    if sample:  # more epochs learn its grammar, not reviews
        settings |= {"epochs": 5, "warmup_steps": None}
    for name, value in settings.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.steps = min(args.max_steps or math.inf, args.epochs * epoch_steps(rows, args.batch_size))
    if args.warmup_steps is None:
        args.warmup_steps = args.steps // 10

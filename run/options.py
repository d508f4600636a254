"""The options of train.py. What is wrong with them ends the program in one line."""
import argparse
import math
import os
import shlex
import sys
from collections.abc import Sequence

import torch

import data
from methods import METHODS
from model import NANO, PUBLIC
from run.arguments import Parser, numbers, positive, whole
from run.tasks import TASKS, has_pictures
from vision.clip import CLIP_PUBLIC

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INITS = ("fisher", "magnitude", "random")
READ_BY = {  # option -> the runs that read it; one that is not here is read by all that train
    **dict.fromkeys(("out", "task", "model", "device", "predict"), {"training", "--predict"}),
    **dict.fromkeys(("r", "keep", "init", "gates"), {"--method lst"}),
    "prune": {"--init fisher", "--init magnitude"}, "fisher_samples": {"--init fisher"},
    "freeze": {f"--method {method}" for method in METHODS},
    "as_authors": {"--method lora", "--method prompt"}, "prompts": {"a task on texts"},
    "clip": {"a task on pictures", "--predict"}, "image": {"--predict"},
}


def path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("it is empty: name a folder, or leave it out")
    return os.path.expanduser(text)


def runs_of(text: str) -> list[str]:
    """--task's text -> a run each: "vqa, gqa+coco" -> ["vqa", "gqa+coco"]."""
    text = ",".join(data.TASKS) if text == "glue" else text.replace(" ", "")
    runs = text.split(",")
    each = [sorted(run.split("+")) for run in runs]
    for names in each:
        if unknown := sorted(set(names) - TASKS.keys()):
            raise argparse.ArgumentTypeError(f"{unknown[0][:20]!r} is no task; choose from "
                                             f"{', '.join(TASKS)}, or glue")
        if len(set(names)) < len(names) or each.count(names) > 1:
            raise argparse.ArgumentTypeError(f"{'+'.join(names)} is there twice")
        if len(names) > 1 and not all(map(has_pictures, names)):
            raise argparse.ArgumentTypeError(f"{'+'.join(names)}: only tasks about pictures are "
                                             "learned together; a comma makes a run of each")
    return runs


def parse(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    parser = Parser(description)
    add = parser.add_argument_group("what to train").add_argument
    add("--task", type=runs_of, help=f"{', '.join(TASKS)}; a list, or glue; vqa+gqa: in one run")
    add("--model", type=path, help=f"backbone: nano (default), {', '.join(PUBLIC)}, a folder")
    add("--method", default="lst", choices=("lst", *METHODS), help="lst: the ladder (default)")
    add("--data", type=path, help="folder of official files, or sample (default: download, draw)")
    add("--prompts", default="paper", choices=("paper", "t5"), help="answers in digits, in words")
    add("--clip", type=path, help=f"CLIP: nano (default), {', '.join(CLIP_PUBLIC)}, a folder")
    add("--max-train-rows", type=positive, help="use only the first so many training rows")
    add = parser.add_argument_group("the ladder (Sec. 3)").add_argument
    add("--r", "--reduction", type=positive, help="reduction factor (default 8, for pictures 4); "
        "after torchrun, which has an --r of its own, write --reduction")
    add("--keep", type=numbers, help="0-based layers that have a side layer: 1,3,5 (default: all)")
    add("--init", type=path, default="fisher", help="prune by fisher (default) or magnitude; or "
        "random; or the folder of a run, whose side network is taken")
    add("--prune", default="published", choices=("published", "aligned"), help="how to choose rows")
    add("--fisher-samples", type=positive, default=1024, help="training rows (default %(default)s)")
    add("--gates", default="learned", choices=("learned", "shut"), help="shut: mu = 0, no ladder")
    add = parser.add_argument_group("the other methods (Sec. 4)").add_argument
    add("--as-authors", action="store_true", help="the authors' reading of lora or prompt")
    add("--freeze", type=whole, default=0, help="lowest layers left alone, the encoder's first")
    run = parser.add_argument_group("the run (it prints what it takes by default)")
    add, either = run.add_argument, run.add_mutually_exclusive_group().add_argument
    add("--epochs", type=positive, help="passes over the training rows")
    add("--max-steps", type=positive, help="stop after so many steps")
    add("--batch-size", type=positive, help="rows of a step, of all processes together")
    add("--accumulate", type=positive, default=1, help="passes of a step, for less memory")
    add("--lr", type=float, help="peak learning rate")
    add("--warmup-steps", type=whole, help="steps in which the learning rate rises")
    add("--dropout", type=float, help="in what trains (default: the backbone's)")
    either("--seed", type=whole, help="of order, dropout and random weights (default 0)")
    either("--seeds", type=numbers, help="a run each, for mean and deviation: 0,1,2")
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    gpus = ["cuda", *gpus] if gpus else []
    add("--device", default=[*gpus, "cpu"][0], choices=["cpu", *gpus], help="default: %(default)s")
    add("--dtype", default="fp32", choices=DTYPES, help="of the frozen backbone: fp32 or bf16")
    add("--checkpoint", action="store_true", help="less memory: backward computes layers again")
    add("--deterministic", action="store_true", help="the same bits again, on CUDA too; slower")
    files = parser.add_argument_group("files")
    add, either = files.add_argument, files.add_mutually_exclusive_group().add_argument
    add("--out", type=path, help="the run's folder (default: a new runs/<task>-<method>-<number>)")
    either("--resume", action="store_true", help="go on with the run in --out, exactly")
    either("--overwrite", action="store_true", help="--out need not be empty")
    add("--save-steps", type=positive, default=200, help="how often to save (default %(default)s)")
    add("--predict", metavar="TEXT", help="ask the run in --out; for a task on pairs: \"A | B\"")
    add("--image", type=path, metavar="FILE", nargs="+", help="what --predict is about")
    args = parser.parse_args(argv)

    check(parser, args)
    args.command = shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv)])
    args.seeds = args.seeds or [args.seed or 0]
    for name in ("model", "clip"):  # without a name: nano, or with --predict what the run had
        value = getattr(args, name)
        if value is None and args.predict is None:
            value = "nano"
        elif value and value != "nano" and os.path.isdir(value):
            value = os.path.realpath(value)
        setattr(args, name, "nano" if value == str(NANO.resolve()) else value)
    args.init = os.path.realpath(args.init) if args.init not in INITS else args.init
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what does not go together, and an option that means nothing where it is given."""
    if not args.task and args.predict is None:
        parser.error(f"--task is missing: choose from {', '.join(TASKS)}")
    if not args.out and (args.resume or args.predict is not None):
        parser.error("--resume and --predict need --out, the folder of a run")
    kinds = {"--predict"}
    if args.predict is None:
        kinds = {"training", f"--method {args.method}"}
        kinds |= {f"a task on {'pictures' if has_pictures(run) else 'texts'}" for run in args.task}
        kinds |= {f"--init {args.init}"} if args.method == "lst" else set()
    for name, value in vars(args).items():
        readers = READ_BY.get(name, {"training"})
        if value != parser.get_default(name) and not readers & kinds:
            parser.error(f"--{name.replace('_', '-')} means nothing here, only with "
                         f"{' or '.join(sorted(readers))}: leave it out")
    if args.data == "sample" and args.task != ["sst2"]:
        parser.error("--data sample is for sst2; for other tasks name a folder, or leave it out")
    if args.lr is not None and not 0 < args.lr < math.inf:
        parser.error(f"--lr is {args.lr}, it must be a finite number above 0")
    if args.dropout is not None and not 0 <= args.dropout < 1:
        parser.error(f"--dropout is {args.dropout}, it must be a number from 0 to below 1")
    if args.method == "full" and args.dtype == "bf16":
        parser.error("--dtype bf16 is for a frozen backbone, and --method full trains it: use fp32")
    if args.init not in INITS and not (args.resume or os.path.isdir(args.init)):
        parser.error(f"--init {args.init!r} is no folder; choose from {', '.join(INITS)}, or name "
                     "the folder of a run")

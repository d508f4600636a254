"""The options of train.py. What is wrong with them ends the program in one line."""
import argparse
import math
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial

import torch

import data
from llm.llama import PUBLIC as LLMS
from methods import METHODS, SIDES
from model import NANO, PUBLIC
from run.backbones import DTYPES, decoder_only
from run.tasks import TASKS, has_pictures
from vision.clip import CLIP_PUBLIC

INITS = ("fisher", "magnitude", "random", "distill")
NAMES = ("nano", "sample", *INITS)  # not folders, even where there is one
READ_BY = {  # option -> the runs that read it; one that is not here is read by all that train
    **dict.fromkeys(("task", "model", "device", "predict"), {"training", "--predict"}),
    "out": {"training", "--predict", "--plot"}, "plot": {"--plot"},
    **dict.fromkeys(("r", "keep", "free", "init", "side", "classify", "cache"), {"--method lst"}),
    **dict.fromkeys(("end", "side_dtype"), {"--method lst beside a decoder-only --model"}),
    "prune": {"--init fisher", "--init magnitude"}, "fisher_samples": {"--init fisher"},
    "freeze": {f"--method {method}" for method in METHODS if method != "prompt"},
    "size": {f"--method {method}" for method in ("adapters", "lora", "prompt", "qlora")},
    "as_authors": {"--method lora", "--method prompt"}, "prompts": {"a task of GLUE"},
    "clip": {"a task on pictures", "--predict"}, "image": {"--predict"},
    "max_length": {"--task text"},
}


class Parser(argparse.ArgumentParser):
    def __init__(self, description: str):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter)

    def error(self, message: str):
        self.exit(2, f"error: {message}; --help lists every option\n")


def whole(text: str, least: int = 0) -> int:
    if not (text.isascii() and text.isdecimal() and least <= int(text[:11]) <= 10**9):
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is no whole number from {least} to 10^9")
    return int(text)


def positive(text: str) -> int:
    return whole(text, least=1)


def numbers(text: str) -> list[int]:
    """0,2,5: seeds, or 0-based layers; each once."""
    found = [whole(part) for part in text.split(",")]
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} names a number twice")
    return found


def path(text: str) -> str:
    """A file or a folder, or a name that stands for one."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: name a folder, or leave it out")
    text = os.path.expanduser(text)
    return os.path.realpath(text) if os.path.isdir(text) and text not in NAMES else text


def runs_of(text: str) -> list[str]:
    """--task's text -> a run each: "vqa, gqa+coco" -> ["vqa", "gqa+coco"]."""
    runs = (",".join(data.TASKS) if text == "glue" else text.replace(" ", "")).split(",")
    for run in runs:
        names = run.split("+")
        if unknown := sorted(set(names) - TASKS.keys()):
            raise argparse.ArgumentTypeError(f"{unknown[0][:20]!r} is no task; choose from "
                                             f"{', '.join(TASKS)}, or glue")
        if len(set(names)) < len(names) or runs.count(run) > 1:
            raise argparse.ArgumentTypeError(f"{run} is there twice")
        if len(names) > 1 and not all(map(has_pictures, names)):
            raise argparse.ArgumentTypeError(f"{run}: only tasks about pictures are learned "
                                             "together; a comma makes a run of each")
    return runs


def parse(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    parser = Parser(description)
    add = parser.add_argument_group("what to train").add_argument
    add("--task", type=runs_of, help=f"{', '.join(TASKS)}; a list, or glue; vqa+gqa: in one run")
    add("--model", type=path, help=f"backbone: nano (default), {', '.join([*PUBLIC, *LLMS])}, or a "
        "folder")
    add("--method", default="lst", choices=("lst", *METHODS, "y-tuning", "qlora"),
        help="lst: the ladder (default); a decoder-only model knows lst and qlora")
    add("--data", type=path, help="folder of official files, or of your own (text); or sample "
        "(default: download; draw)")
    add("--max-length", type=partial(whole, least=2), help="tokens at which your own texts are cut "
        "(default 512)")
    add("--prompts", choices=("paper", "t5", "plain"), help="labels as digits (default), as T5's "
        "words, or plain English (default of a decoder-only model)")
    add("--clip", type=path, help=f"CLIP: nano (default), {', '.join(CLIP_PUBLIC)}, a folder")
    add("--max-train-rows", type=positive, help="use only the first N training rows")
    add = parser.add_argument_group("the ladder (Sec. 3)").add_argument
    add("--r", "--reduction", type=positive, help="reduction factor (default 8; for pictures 4, "
        "for --side adapters 16); after torchrun, which has an --r of its own, write --reduction")
    add("--keep", type=numbers, help="0-based layers that have a side layer: 1,3,5 (default: all)")
    add("--free", type=whole, default=0, help="side blocks without a rung on top (xLadder)")
    add("--init", type=path, help="prune by fisher (default) or magnitude; distill; random; or the "
        "folder of a run, whose side network is taken")
    add("--prune", default="published", choices=("published", "aligned"), help="how to choose rows")
    add("--fisher-samples", type=positive, help="rows (default 1024; nano, large tasks: 256)")
    add("--cache", type=float, metavar="GB", help="of hidden states to keep from epoch to epoch "
        "(default: a quarter of the free memory; 0 for one epoch, or on a GPU)")
    add("--side", default="ladder", choices=SIDES, help="ladder (default); alone: no rungs; last: "
        "Side-tuning; cross: cross-attention; adapters: adapter blocks")
    add("--end", default="sum", choices=("sum", "up"), help="a decoder-only model's head reads "
        "up added to the backbone's end (default), or up alone as in the paper")
    add("--side-dtype", default="fp32", choices=("fp32", "bf16"), help="beside a decoder-only one")
    add("--classify", action="store_true", help="side encoder and classification head (Table 2)")
    add = parser.add_argument_group("the other methods (Sec. 4)").add_argument
    add("--as-authors", action="store_true", help="the authors' reading of lora or prompt")
    add("--freeze", type=whole, default=0, help="lowest layers left alone, the encoder's first")
    add("--size", type=positive, help="reduction of adapters, rank of (q)lora, number of prompts")
    add = parser.add_argument_group("the run (it prints what it takes by default)").add_argument
    add("--epochs", type=positive, help="passes over the training rows")
    add("--max-steps", type=positive, help="stop after so many steps")
    add("--batch-size", type=positive, help="rows of a step, of all processes together")
    add("--accumulate", type=positive, default=1, help="passes of a step, for less memory")
    add("--lr", type=float, help="peak learning rate")
    add("--warmup-steps", type=whole, help="steps in which the learning rate rises")
    add("--dropout", type=float, help="in what trains (default: the T5's; 0)")
    add("--seed", "--seeds", dest="seeds", type=numbers, default=[0], metavar="0,1,2",
        help="of order, dropout and random weights (default 0); several: one run each")
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    gpus = ["cuda", *gpus] if gpus else []
    add("--device", default=[*gpus, "cpu"][0], choices=["cpu", *gpus], help="default: %(default)s")
    add("--dtype", choices=DTYPES, help="of the frozen backbone: fp32 (default), bf16 (default of "
        "decoder-only ones) or nf4 (4 bits; qlora's)")
    add("--checkpoint", action="store_true", help="less memory: backward computes layers again")
    files = parser.add_argument_group("files")
    add, either = files.add_argument, files.add_mutually_exclusive_group().add_argument
    add("--out", type=path, help="the run's folder (default: a new runs/<task>-<method>-<number>)")
    either("--resume", action="store_true", help="go on with the run in --out, exactly")
    either("--overwrite", action="store_true", help="replace the run in --out")
    add("--save-steps", type=positive, default=200, help="how often to save (default %(default)s)")
    add("--predict", metavar="TEXT", help="ask the run in --out; for a task on pairs: \"A | B\"")
    add("--image", type=path, metavar="FILE", nargs="+", help="what --predict is about")
    add("--plot", type=path, metavar="FILE.svg", help="draw the loss of the run in --out")

    args = parser.parse_args(argv)
    lm = decoder_only(args.model or "nano")
    args.init = args.init or ("random" if lm or args.side == "adapters" else "fisher")
    args.prompts = args.prompts or ("plain" if lm else "paper")
    args.dtype = args.dtype or ("nf4" if args.method == "qlora" else "bf16" if lm else "fp32")
    args.classify = args.classify or args.method == "y-tuning"
    no_defaults = argparse.Namespace(**dict.fromkeys(vars(args)))
    given = vars(parser.parse_args(argv, no_defaults)).items()
    check(parser, args, [name for name, value in given if value is not None])
    args.command = shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv)])
    if args.predict is None:  # with --predict: what the run had
        args.model, args.clip = args.model or "nano", args.clip or "nano"
    args.model = "nano" if args.model == str(NANO.resolve()) else args.model
    return args


def check(parser: Parser, args: argparse.Namespace, given: list[str]) -> None:
    """Refuse what does not go together, and an option that means nothing where it is given."""
    training = args.predict is None and args.plot is None
    pictures, lm = any(map(has_pictures, args.task or [])), decoder_only(args.model or "nano")
    fixed = args.side != "ladder" or args.init in {*INITS} - {"random"} or args.classify
    wrong = {
        f"--task is missing: choose from {', '.join(TASKS)}": training and not args.task,
        "--resume, --predict and --plot need --out, the folder of a run":
            not args.out and (args.resume or not training),
        f"--plot {args.plot}: name a file that ends in .svg":
            args.plot is not None and not args.plot.endswith(".svg"),
        "--task text needs --data DIR, with train.tsv and dev.tsv, or train.jsonl and dev.jsonl":
            "text" in (args.task or []) and training and not args.data,
        "--data sample is for sst2; for other tasks name a folder, or leave it out":
            args.data == "sample" and args.task != ["sst2"],
        f"--lr is {args.lr}, it must be a finite number above 0":
            args.lr is not None and not 0 < args.lr < math.inf,
        f"--cache is {args.cache}, it must be a finite number from 0":
            args.cache is not None and not 0 <= args.cache < math.inf,
        "--cache keeps what rungs read: leave it out with --classify, --side alone and --side last":
            args.cache and (args.classify or args.side in ("alone", "last")),
        f"--dropout is {args.dropout}, it must be a number from 0 to below 1":
            args.dropout is not None and not 0 <= args.dropout < 1,
        "--dtype bf16 is for a frozen backbone, and --method full trains it: use fp32":
            args.method == "full" and args.dtype == "bf16",
        f"--side {args.side} --init {args.init} is for texts, leave it out for pictures":
            (args.side != "ladder" or args.init == "distill") and pictures,
        "--side adapters has other blocks than the backbone: give --init random, or a run's folder":
            args.side == "adapters" and args.init in {*INITS} - {"random"},
        "--classify, y-tuning: they choose a class, which stsb, text and tasks about pictures lack":
            args.classify and (pictures or {"stsb", "text"} & {*(args.task or [])}),
        "--classify has a side encoder with all layers: leave --keep, --side, --init distill out":
            args.classify and (args.keep or args.side != "ladder" or args.init == "distill"),
        "--dtype nf4 is for lst on texts, and for qlora, which has no other: leave --dtype out":
            args.dtype == "nf4" and (pictures or args.method not in ("lst", "qlora"))
            or args.method == "qlora" and args.dtype != "nf4",
        "--dtype fp16 overflows: use bf16": lm and args.dtype == "fp16",
        "--method qlora is for a decoder-only --model": args.method == "qlora" and not lm,
        "a decoder-only --model learns texts, by --method lst or qlora":
            lm and training and (pictures or args.method not in ("lst", "qlora")),
        "beside a decoder-only --model leave --side, --classify out, and --init but for a run's "
        "folder": lm and args.method == "lst" and fixed,
        "--checkpoint computes side blocks again in float32: leave --side-dtype bf16 out":
            args.checkpoint and args.side_dtype == "bf16",
        "--free is for --side ladder, without --classify and --init distill": args.free > 0 and (
            args.side != "ladder" or args.classify or args.init == "distill"),
        f"--init {args.init!r} is no folder; choose from {', '.join(INITS)}, or name a run's":
            args.init not in INITS and not (args.resume or os.path.isdir(args.init)),
    }
    for line in wrong:
        if wrong[line]:
            parser.error(line)
    kinds = {"--plot"} if args.predict is None else {"--predict"}
    if training:
        kinds = {"training", f"--method {args.method}"}
        kinds |= {"--task text" if run == "text" else "a task on pictures" if has_pictures(run)
                  else "a task of GLUE" for run in args.task}
        kinds |= {f"--init {args.init}"} if args.method == "lst" else set()
        kinds |= {f"--method {args.method} beside a decoder-only --model"} if lm else set()
    for name in given:
        readers = READ_BY.get(name, {"training"})
        if not readers & kinds:
            parser.error(f"--{name.replace('_', '-')} means nothing here, only with "
                         f"{' or '.join(sorted(readers))}: leave it out")

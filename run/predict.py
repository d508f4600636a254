"""What a run that has ended is good for: answers (--predict), and the start of another (--init)."""
import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from model import locate, weight_files
from run.folder import read_config
from run.hub import sha256_of
from run.report import print0
from run.tasks import TASKS, collate, has_pictures
from vision.clip import load_clip, sha256_of_clip
from vision.features import pool, preprocess, read_image


def hashes(args: argparse.Namespace) -> dict[str, str]:
    """sha256 of a run's frozen networks: of its backbone, with pictures also of its image tower."""
    files = [locate(args.model, name) for name in ("config.json", "spiece.model")]
    found = {"backbone_sha256": sha256_of(*files, *weight_files(args.model))}
    return found | ({"clip_sha256": sha256_of_clip(args.clip)} if has_pictures(args.task) else {})


def check_frozen(folder: str | Path, args: argparse.Namespace) -> None:
    """ValueError if the run in this folder was beside other frozen networks than those of args."""
    config = read_config(folder)
    if changed := [name for name, found in hashes(args).items() if found != config[name]]:
        raise ValueError(f"backbone {args.model} or image tower {args.clip} is not the one of "
                         f"{folder}: another {' and '.join(changed)}")


def check_start(args: argparse.Namespace) -> None:
    """ValueError if the run that --init names has not ended, or its side network does not fit."""
    config, kind = read_config(args.init), has_pictures(args.task)
    if not (Path(args.init) / "results.json").is_file():
        raise ValueError(f"the run in {args.init} has not ended: --resume it, or take another")
    other = [f"--{name} {config[name]}" for name in ("method", "r", "keep", "gates")
             if config[name] != getattr(args, name)]
    if other or has_pictures(config["task"]) != kind:
        raise ValueError(f"the side network in {args.init} does not fit: it has learned "
                         f"{' '.join([config['task'], *other])}; give the same shape, and a run "
                         f"about {'pictures' if kind else 'texts'}")
    check_frozen(args.init, args)


def predict(args: argparse.Namespace, load: Callable) -> dict:
    """The answer of the run in --out to one text, about the pictures of --image if it has any."""
    config = read_config(args.out)
    learned = config["task"].split("+")
    names = args.task or learned
    if len(names) > 1 or names[0] not in learned:
        raise ValueError(f"the run in {args.out} has learned {', '.join(learned)}: --task says "
                         "which of them --predict is about")
    task, files = TASKS[names[0]], args.image or []
    if len(files) != task.pictures:
        raise ValueError(f"{task.name} takes {task.pictures or 'no'} pictures (--image FILE ...), "
                         f"{len(files)} given")
    args.predict.encode("utf-8")  # ValueError: the terminal's text is not UTF-8
    example, pictures = task.ask(args.predict, config["prompts"]), [read_image(f) for f in files]
    moved = {name: getattr(args, name) for name in ("model", "clip") if getattr(args, name)}
    model, tokenizer = load(args.out, args.device, **moved)
    batch = collate(task.draw(task.encode([example], tokenizer), 0, 0), None, args.device)
    if pictures:
        tower = load_clip(args.clip or config["clip"])
        with torch.no_grad():
            seen = pool(tower(preprocess(pictures, tower.image_size))).half()  # (N, P, C)
        batch = batch._replace(images=seen[None].float().to(args.device))
    text = task.answer(model, tokenizer, batch)[0]
    label, shown = (None, text) if pictures else task.read(text, config["prompts"])
    print0(shown)
    return {"text": text} if pictures else {"text": text, "label": label}

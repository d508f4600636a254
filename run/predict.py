"""What a run is good for: it answers to a text (--predict), and its loss is drawn (--plot)."""
import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from memory.plot import curve
from run.folder import read_config
from run.report import print0
from run.tasks import collate, task_of
from vision.clip import load_clip
from vision.features import pool, preprocess, read_image


def predict(args: argparse.Namespace, load: Callable) -> dict:
    """The answer of the run in --out, about the pictures of --image if its task has any."""
    config = read_config(args.out)
    learned = config["task"].split("+")
    names = args.task or learned
    if len(names) > 1 or names[0] not in learned:
        raise ValueError(f"the run in {args.out} has learned {', '.join(learned)}: --task says "
                         "which of them --predict is about")
    task, files = task_of(names[0], argparse.Namespace(**config)), args.image or []
    if len(files) != task.pictures:
        raise ValueError(f"{task.name} takes {task.pictures or 'no'} pictures (--image FILE ...), "
                         f"{len(files)} given")
    if args.clip and not files:
        raise ValueError(f"{task.name} is not about pictures: leave --clip out")
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
    if pictures:
        print0(text)
        return {"text": text}
    label, shown = task.read(text, config["prompts"])
    print0(shown)
    return {"text": text, "label": label}


def draw(args: argparse.Namespace) -> dict:
    """The loss of the run in --out: of each step, and the mean of every fiftieth part."""
    log = Path(args.out) / "metrics.jsonl"
    try:
        each = [(int(row["step"]), float(row["loss"]))
                for row in map(json.loads, log.read_bytes().splitlines()) if "loss" in row]
        most = 3 * statistics.median(loss for _, loss in each)  # the start is far above the rest
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{log} is damaged, or has no step yet") from None
    each, n = [(step, min(loss, most)) for step, loss in each], max(1, len(each) // 50)
    means = [tuple(map(statistics.mean, zip(*each[i : i + n]))) for i in range(0, len(each), n)]
    lines = [("each step", each), (f"mean of {n}", means)]
    curve(args.plot, f"loss of {Path(args.out).name}, cut off at {most:.3g}", "step", lines)
    print0(f"{len(each)} steps are drawn in {args.plot}")
    return {"steps": len(each)}

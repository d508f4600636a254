"""Draws assets/pictures.svg: test scenes, and what trained runs answer about them.

    cd runs; python ../assets/make/draw_answers.py vqa-lst-0@{7,11} nlvr2-lst-0@3 coco-lst-0@11

A panel for each run@number; the number says which of the test set's scenes (of NLVR2's two pairs)
is shown, from 0.
"""
import sys
import textwrap
from html import escape
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import train  # noqa: E402
from run.options import Parser  # noqa: E402
from run.folder import read_config  # noqa: E402
from run.report import exit_cleanly  # noqa: E402
from vision import scenes  # noqa: E402
from vision.clip import load_clip  # noqa: E402
from vision.features import pool, preprocess  # noqa: E402
from vision.tasks import TASKS, Example, Task  # noqa: E402

WIDTH, LINE, GREEN, RED = 250, 17, "#2a9d4e", "#d1352b"
TITLES = {"vqa": "VQA", "gqa": "GQA", "nlvr2": "NLVR2", "coco": "COCO (captions)"}
STYLE = "<style>text{fill:#333}@media(prefers-color-scheme:dark){text{fill:#ddd}}</style>"


def rgb(color: tuple[int, int, int], light: int) -> str:
    return f'fill="rgb({",".join(str(value * light // 100) for value in color)})"'


def outline(o: scenes.Object, light: int) -> str:
    fill, radius = rgb(scenes.COLORS[o.color], light), scenes.RADIUS[o.size]
    if o.shape == "circle":
        return f'<circle cx="{o.x + 0.5}" cy="{o.y + 0.5}" r="{radius}" {fill}/>'
    cos, sin = (radius * part / 10100 for part in scenes.TILTS[o.tilt])
    points = " ".join(f"{o.x + 0.5 + cos * x - sin * y:.1f},{o.y + 0.5 + sin * x + cos * y:.1f}"
                      for x, y in scenes.OUTLINES[o.shape])
    return f'<polygon points="{points}" {fill}/>'


def picture(scene: scenes.Scene, x: float, y: float, side: float) -> str:
    inside = "".join(outline(o, scene.light) for o in scene.objects)
    return (f'<svg x="{x}" y="{y}" width="{side}" height="{side}" '
            f'viewBox="0 0 {scenes.SIDE} {scenes.SIDE}"><rect width="{scenes.SIDE}" '
            f'height="{scenes.SIDE}" rx="2" {rgb(scene.background, scene.light)}/>{inside}</svg>')


@torch.no_grad()
def answers(folder: str, examples: list[Example], task: Task) -> list[str]:
    model, tokenizer = train.load(folder)
    tower, texts = load_clip(read_config(folder)["clip"]), []
    for row in task.draw(task.encode(examples, tokenizer), 0, 0):
        drawn = [torch.from_numpy(scenes.draw(scenes.scene_of(key))) for key in row.images]
        seen = pool(tower(preprocess(drawn, tower.image_size))).half().float()  # (N, P, C)
        batch = data.collate([row])._replace(images=seen[None])
        texts += task.answer(model, tokenizer, batch)
    return texts


def panel(folder: str, number: int, x: float) -> tuple[str, float]:
    """SVG of a run's panel about its test set's picture of this number, or NLVR2's two pairs, and
    how deep it goes. Wrong answers are red."""
    task = TASKS[read_config(folder)["task"]]
    test = task.load().test
    n, y, gap = task.pictures, 28, 8  # pictures beside each other, and as many such rows
    parts = [f'<text x="{x}" y="18" font-weight="bold">{TITLES[task.name]}</text>']
    side = (WIDTH - gap * (n - 1)) / n
    shown = list(dict.fromkeys(example.images for example in test))[n * number : n * number + n]
    for keys in shown:
        parts += [picture(scenes.scene_of(key), x + i * (side + gap), y, side)
                  for i, key in enumerate(keys)]
        y += side + gap
        examples = [example for example in test if example.images == keys]
        for example, text in zip(examples, answers(folder, examples, task)):
            color = GREEN if text in (example.references or example.answers) else RED
            style = "" if task.name == "coco" else f' style="fill:{color}"'
            lines = [(line, "") for line in
                     textwrap.wrap(example.source.removeprefix(task.prompt).strip(), 38)]
            lines += [(line, f' font-weight="bold"{style}') for line in textwrap.wrap(text, 34)]
            for line, look in lines:
                y += LINE
                parts.append(f'<text x="{x}" y="{y}"{look}>{escape(line)}</text>')
            y += 5
        y += 12
    return "\n".join(parts), y


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="+", help="run@number: a run on drawn scenes")
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "pictures.svg")
    args = parser.parse_args()
    panels = []
    for i, (folder, _, number) in enumerate(name.rpartition("@") for name in args.folders):
        panels.append(panel(folder, int(number), 10 + i * (WIDTH + 30)))
    width, height = len(panels) * (WIDTH + 30) - 10, max(y for _, y in panels) + 14
    args.out.write_text("\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" '
        'font-family="sans-serif" font-size="12.5">',
        STYLE, *(svg for svg, _ in panels), "</svg>\n"]), encoding="utf-8")


if __name__ == "__main__":
    exit_cleanly(main)

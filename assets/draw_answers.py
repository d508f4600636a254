"""Draws assets/pictures.svg: the first test scenes, what is asked about them and what trained runs answer, one run for each panel.

    python assets/draw_answers.py runs/vqa-lst-0 runs/vqa-lst-0 runs/nlvr2-lst-0 runs/coco-lst-0
"""
import sys
import textwrap
from html import escape
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import data_vl  # noqa: E402
import images  # noqa: E402
import scenes  # noqa: E402
import tasks  # noqa: E402
import train  # noqa: E402
from checkpoint import read_config  # noqa: E402
from clip import load_clip  # noqa: E402
from report import Parser, guarded  # noqa: E402

WIDTH, LINE, GREEN, RED = 250, 17, "#2a9d4e", "#d1352b"
TITLES = {"vqa": "VQA", "gqa": "GQA", "nlvr2": "NLVR2", "coco": "COCO (captions)"}


def outline(o: scenes.Object, light: int) -> str:
    fill = f'fill="rgb({",".join(str(value * light // 100) for value in scenes.COLORS[o.color])})"'
    radius, (cos, sin) = scenes.RADIUS[o.size], (part / 101 for part in scenes.TILTS[o.tilt])
    if o.shape == "circle":
        return f'<circle cx="{o.x + 0.5}" cy="{o.y + 0.5}" r="{radius}" {fill}/>'
    corners = [(o.x + 0.5 + radius * (cos * x - sin * y) / 100, o.y + 0.5 + radius * (sin * x + cos * y) / 100) for x, y in scenes.OUTLINES[o.shape]]
    return f'<polygon points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in corners)}" {fill}/>'


def picture(scene: scenes.Scene, x: float, y: float, side: float) -> str:
    background = ",".join(str(value * scene.light // 100) for value in scene.background)
    inside = "".join(outline(o, scene.light) for o in scene.objects)
    return (f'<svg x="{x}" y="{y}" width="{side}" height="{side}" viewBox="0 0 {scenes.SIDE} {scenes.SIDE}">'
            f'<rect width="{scenes.SIDE}" height="{scenes.SIDE}" rx="2" fill="rgb({background})"/>{inside}</svg>')


@torch.no_grad()
def answers(folder: str, examples: list[data_vl.Example], task: str) -> list[str]:
    model, tokenizer = train.load(folder)
    tower = load_clip(read_config(folder)["clip"])
    rows, texts = tasks.draw(task, tasks.encode(task, examples, tokenizer), 0, 0), []
    for row in rows:
        drawn = images.preprocess((torch.from_numpy(scenes.draw(scenes.scene_of(key))) for key in row.images), tower.config.image_size)
        texts += tasks.answer(model, tokenizer, data.collate([row])._replace(images=images.pool(tower(drawn)).half().float()[None]), task)
    return texts


def panel(folder: str, number: int, x: float) -> tuple[str, float]:
    """SVG of a run's panel about its test set's picture of this number, or NLVR2's two pairs, and how deep it goes.  Wrong answers are red."""
    task = read_config(folder)["task"]
    test = data_vl.load(task, None).test
    n = len(test[0].images)  # pictures beside each other, and as many such rows
    y, gap, parts = 28, 8, [f'<text x="{x}" y="18" font-weight="bold">{TITLES[task]}</text>']
    side = (WIDTH - gap * (n - 1)) / n
    for keys in list(dict.fromkeys(example.images for example in test))[n * number: n * number + n]:
        parts += [picture(scenes.scene_of(key), x + i * (side + gap), y, side) for i, key in enumerate(keys)]
        y += side + gap
        shown = [example for example in test if example.images == keys]
        for example, text in zip(shown, answers(folder, shown, task)):
            right = text in (example.references or example.answers)
            for line in textwrap.wrap(example.source.removeprefix(data_vl.TASKS[task].prompt).strip(), 38):
                y += LINE
                parts.append(f'<text x="{x}" y="{y}">{escape(line)}</text>')
            for line in textwrap.wrap(text, 34):
                y += LINE
                color = "" if task == "coco" else f' style="fill:{GREEN if right else RED}"'
                parts.append(f'<text x="{x}" y="{y}" font-weight="bold"{color}>{escape(line)}</text>')
            y += 5
        y += 12
    return "\n".join(parts), y


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="+", help="runs on drawn scenes, one task each")
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "pictures.svg")
    args = parser.parse_args()
    panels = [panel(folder, i, 10 + i * (WIDTH + 30)) for i, folder in enumerate(args.folders)]
    width, height = 20 + len(panels) * (WIDTH + 30) - 30, max(y for _, y in panels) + 14
    args.out.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" font-family="sans-serif" font-size="12.5">\n'
                        "<style>text{fill:#333}@media(prefers-color-scheme:dark){text{fill:#ddd}}</style>\n"
                        + "\n".join(svg for svg, _ in panels) + "\n</svg>\n", encoding="utf-8")


if __name__ == "__main__":
    guarded(main)

"""Draw score over memory from experiments/ablations.json, as the paper's Figs 5 and 6.

    python experiments/plot_ablations.py        # assets/sizes.svg and assets/layers.svg

A point is the mean over the seeds, its line their deviation; the memory is that of a training step,
counted for the very model and batch.
"""
import json
import math
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.ablations import FIGURES  # noqa: E402
from memory.plot import RIGHT, TOP, save, stroke, text, ticks, x_axis  # noqa: E402

LEFT, BOTTOM = 60, 402
NAMES = {"adapters": ("adapters",), "LoRA": ("lora",),
         "LST": ("lst", "r2", "r4", "r16", "r32", "keep"), "BitFit": ("bitfit",)}
LEAST = 45  # what is below stands on the axis, with its number
LABELS = {"lst": "r8", "adapters": "", "lora": "", "bitfit": ""}


def points(figure: str, rows: list[dict]) -> list[tuple[str, list[tuple]]]:
    """Of each method its points, by memory: (MiB, mean score, deviation, label)."""
    lines = []
    for name, begins in NAMES.items():
        found = []
        for variant in FIGURES[figure]:
            runs = [row for row in rows if row["variant"] == variant]
            if runs and variant.startswith(begins):
                scores = [row["test"]["score"] for row in runs]
                label = LABELS.get(variant, variant.rpartition("-")[2])
                found.append((runs[0]["accounted"]["peak"] / 2**20, statistics.mean(scores),
                              statistics.pstdev(scores), label))
        if found:
            lines.append((name, sorted(found)))
    return lines


def draw(file: Path, title: str, lines: list[tuple[str, list[tuple]]]) -> None:
    every = [point for _, each in lines for point in each]
    low = max(LEAST, math.floor(min(score - spread for _, score, spread, _ in every)))
    high = max(low + 1, math.ceil(max(score + spread for _, score, spread, _ in every)))
    x_marks = ticks(max(memory for memory, *_ in every))
    x_unit, y_unit = (RIGHT - LEFT) / x_marks[-1], (BOTTOM - TOP) / (high - low)
    parts = [*x_axis(x_marks, LEFT, x_unit, BOTTOM)]
    parts.append(text((LEFT + RIGHT) / 2, BOTTOM + 34, "MiB of a training step", "middle"))
    for mark in range(low, high + 1, max(1, round((high - low) / 8))):
        y = BOTTOM - (mark - low) * y_unit
        parts += [stroke("grid", f"M{LEFT} {y:.1f} H{RIGHT}"),
                  text(LEFT - 8, y + 4, str(mark), "end")]
    for i, (_, each) in enumerate(lines):
        places = [(LEFT + memory * x_unit, BOTTOM - max(score - low, 0) * y_unit,
                   spread * y_unit * (score > low), label + f": {score:.0f}" * (score < low))
                  for memory, score, spread, label in each]
        line = " L".join(f"{x:.1f} {y:.1f}" for x, y, _, _ in places)
        parts.append(stroke(f"c{i}", f"M{line}"))
        for number, (x, y, spread, label) in enumerate(places):
            parts += [stroke(f"c{i}", f"M{x:.1f} {y - spread:.1f} V{min(y + spread, BOTTOM):.1f}"),
                      stroke(f"c{i}", f"M{x - 4:.1f} {y:.1f} l4 -4 l4 4 l-4 4 z"),
                      text(x + 7, y + (16 if number % 2 else -6), label)]
    save(file, title, [name for name, _ in lines], parts, BOTTOM + 44)


if __name__ == "__main__":
    found = json.loads((ROOT / "experiments" / "ablations.json").read_text(encoding="utf-8"))
    for figure, name, title in (("fig5", "sizes", "sizes (r, reduction, rank)"),
                                ("fig6", "layers", "layers dropped (LST: kept) or frozen")):
        draw(ROOT / "assets" / f"{name}.svg", f"SST-2 beside nano, accuracy in %: {title}",
             points(figure, found))
        print(f"assets/{name}.svg")

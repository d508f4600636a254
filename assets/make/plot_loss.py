"""Draws nano/pretraining.jsonl as nano/loss.svg, for light and dark pages.

    python assets/make/plot_loss.py
"""
import json
from pathlib import Path

NANO = Path(__file__).resolve().parent.parent / "nano"
LEFT, RIGHT, TOP, BOTTOM = 50, 690, 20, 230
STYLE = """<style>text { fill: #57606a } polyline, path { fill: none; stroke-width: 2 }
.span { stroke: #2f6f9f } .crops { stroke: #2f8f46 } .frame { stroke: #8b949e; stroke-width: 1 }
.spantext { fill: #2f6f9f } .croptext { fill: #2f8f46 }
@media (prefers-color-scheme: dark) { text { fill: #9aa7b4 } .span { stroke: #79c0ff }
.crops { stroke: #56d364 } .spantext { fill: #79c0ff } .croptext { fill: #56d364 } }</style>"""


def height(value: float, low: float, high: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * (min(value, high) - low) / (high - low)


def curve(rows: list[dict], key: str, low: float, high: float, kind: str) -> str:
    points = [f"{LEFT + (RIGHT - LEFT) * row['minutes'] / rows[-1]['minutes']:.1f},"
              f"{height(row[key], low, high):.1f}" for row in rows if key in row]
    return f'<polyline class="{kind}" points="{" ".join(points)}"/>'


def text(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}"{more}>{words}</text>'


def main() -> None:
    rows = [json.loads(line) for line in (NANO / "pretraining.jsonl").read_text().splitlines()]
    minutes = rows[-1]["minutes"]
    marks = [text(LEFT - 8, height(loss, 3.5, 6) + 4, f"{loss:.1f}", ' text-anchor="end"')
             for loss in (3.5, 4, 4.5, 5, 5.5, 6)]
    marks += [text(RIGHT + 8, height(share, 0.5, 0.9) + 4, f"{share:.0%}")
              for share in (0.5, 0.6, 0.7, 0.8, 0.9)]
    marks += [text(LEFT + (RIGHT - LEFT) * m / minutes, BOTTOM + 18, f"{m} min",
                   ' text-anchor="middle"') for m in range(0, int(minutes) + 1, 10)]
    (NANO / "loss.svg").write_text("\n".join([
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 270" '
        'font-family="system-ui, sans-serif" font-size="12">', STYLE,
        f'<path class="frame" d="M{LEFT} {TOP} V{BOTTOM} H{RIGHT} V{TOP}"/>',
        curve(rows, "span_loss", 3.5, 6, "span"),
        curve(rows, "sentiment_accuracy", 0.5, 0.9, "crops"), *marks,
        text(LEFT + 60, TOP + 10, "span corruption: loss (left)", ' class="spantext"'),
        text(LEFT + 270, TOP + 10, "crops of reviews: share of the teacher's answers (right)",
             ' class="croptext"'), "</svg>\n"]), encoding="utf-8")


if __name__ == "__main__":
    main()

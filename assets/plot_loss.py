"""Draws nano/pretraining.jsonl as nano/loss.svg, for light and dark pages.    python assets/plot_loss.py"""
import json
from pathlib import Path

NANO = Path(__file__).parent / "nano"
LEFT, RIGHT, TOP, BOTTOM = 50, 690, 20, 230


def curve(rows: list[dict], key: str, low: float, high: float, kind: str) -> str:
    minutes = rows[-1]["minutes"]
    points = [f"{LEFT + (RIGHT - LEFT) * row['minutes'] / minutes:.1f},{BOTTOM - (BOTTOM - TOP) * (min(row[key], high) - low) / (high - low):.1f}"
              for row in rows if key in row]
    return f'<polyline class="{kind}" points="{" ".join(points)}"/>'


def main() -> None:
    rows = [json.loads(line) for line in (NANO / "pretraining.jsonl").read_text().splitlines()]
    marks = [f'<text x="{LEFT - 8}" y="{BOTTOM - (BOTTOM - TOP) * (value - 3.5) / 2.5 + 4:.0f}" text-anchor="end">{value:.1f}</text>' for value in (3.5, 4, 4.5, 5, 5.5, 6)]
    marks += [f'<text x="{RIGHT + 8}" y="{BOTTOM - (BOTTOM - TOP) * (share - 0.5) / 0.4 + 4:.0f}">{share:.0%}</text>' for share in (0.5, 0.6, 0.7, 0.8, 0.9)]
    minutes = rows[-1]["minutes"]
    marks += [f'<text x="{LEFT + (RIGHT - LEFT) * m / minutes:.0f}" y="{BOTTOM + 18}" text-anchor="middle">{m} min</text>' for m in range(0, int(minutes) + 1, 10)]
    (NANO / "loss.svg").write_text(f'''<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 270" font-family="system-ui, sans-serif" font-size="12">
<style>text {{ fill: #57606a }} polyline, path {{ fill: none; stroke-width: 2 }} .span {{ stroke: #2f6f9f }} .crops {{ stroke: #2f8f46 }} .frame {{ stroke: #8b949e; stroke-width: 1 }}
.spantext {{ fill: #2f6f9f }} .croptext {{ fill: #2f8f46 }}
@media (prefers-color-scheme: dark) {{ text {{ fill: #9aa7b4 }} .span {{ stroke: #79c0ff }} .crops {{ stroke: #56d364 }} .spantext {{ fill: #79c0ff }} .croptext {{ fill: #56d364 }} }}</style>
<path class="frame" d="M{LEFT} {TOP} V{BOTTOM} H{RIGHT} V{TOP}"/>
{curve(rows, "span_loss", 3.5, 6, "span")}
{curve(rows, "sentiment_accuracy", 0.5, 0.9, "crops")}
{chr(10).join(marks)}
<text class="spantext" x="{LEFT + 60}" y="{TOP + 10}">span corruption: loss (left)</text>
<text class="croptext" x="{LEFT + 270}" y="{TOP + 10}">crops of reviews: share of the teacher's answers (right)</text>
</svg>
''')


if __name__ == "__main__":
    main()

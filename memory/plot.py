"""Bars on the terminal, and stacked bars as SVG for light and dark pages."""
from collections.abc import Sequence
from html import escape
from pathlib import Path

STYLE = """<style>
text { fill: #424a53; font: 12px system-ui, sans-serif } .title { font-size: 14px }
.grid { stroke: #8b949e; stroke-width: .5 } .mark { stroke: #24292f; stroke-width: 2 }
rect { fill: currentColor }
.c0 { color: #57606a } .c1 { color: #b08800 } .c2 { color: #8250df } .c3 { color: #0969da }
.c4 { color: #1a7f37 } .c5 { color: #cf222e }
@media (prefers-color-scheme: dark) { text { fill: #c9d1d9 } .mark { stroke: #f0f6fc }
.c0 { color: #9aa7b4 } .c1 { color: #d29922 } .c2 { color: #bc8cff } .c3 { color: #58a6ff }
.c4 { color: #56d364 } .c5 { color: #ff7b72 } }
</style>"""


def bar(value: float, most: float, mark: str = "█", width: int = 60) -> str:
    """Marks for the terminal, `width` of them for `most`."""
    return mark * round(width * value / most)


def show_bars(rows: Sequence[tuple[str, float, str]], digits: int = 2) -> None:
    """Print a line with a bar for each (label, number, note)."""
    labels, numbers, notes = zip(*rows)
    width, most, space = max(map(len, labels)), max(numbers) or 1, max(map(len, notes))
    for label, number, note in rows:
        marks = bar(number, most, width=min(60, 85 - width - space))
        print(f"{label:{width}}{number:9.{digits}f}  {note:{space}}  {marks}")


def ticks(most: float) -> list[float]:
    """Five to ten round numbers from 0 to above `most`."""
    steps = (digit * 10.0**power for power in range(-3, 19) for digit in (1, 2, 5))
    step = next(step for step in steps if most <= 8 * step)
    return [i * step for i in range(int(most / step) + 2)]


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "label") -> str:
    return (f'<text class="{kind}" x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">'
            f"{escape(words)}</text>")


def stacked_bars(path: str | Path, title: str, kinds: Sequence[str],
                 bars: Sequence[tuple[str, Sequence[float], float | None]]) -> None:
    """Draw a bar for each (label, values of `kinds`, mark to compare with or None)."""
    left, right, top, bottom = 245, 720, 62, 62 + 24 * len(bars)  # of the field, in pixels
    marks = ticks(max(max(sum(values), mark or 0) for _, values, mark in bars))
    unit, x = (right - left) / marks[-1], left
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {bottom + 30}">', STYLE,
             text(10, 20, title, kind="title")]
    for i, kind in enumerate(kinds):
        parts += [f'<rect class="c{i}" x="{x:.0f}" y="35" width="10" height="10"/>',
                  text(x + 14, 44, kind)]
        x += 30 + 6.6 * len(kind)
    for value in marks:
        x = left + value * unit
        parts += [f'<path class="grid" d="M{x:.1f} {top} V{bottom}"/>',
                  text(x, bottom + 16, f"{value:g}", "middle")]
    for y, (label, values, mark) in zip(range(top, bottom, 24), bars):
        parts.append(text(left - 8, y + 16, label, "end"))
        x = left
        for i, value in enumerate(values):
            size = f'width="{value * unit:.1f}" height="16"'
            parts.append(f'<rect class="c{i}" x="{x:.1f}" y="{y + 4}" {size}/>')
            x += value * unit
        if mark is not None:
            x = left + mark * unit
            parts.append(f'<path class="mark" d="M{x:.1f} {y + 1} V{y + 23}"/>')
    Path(path).write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")

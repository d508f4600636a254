"""Stacked bars and curves as SVG, for light and dark pages."""
from collections.abc import Iterator, Sequence
from html import escape
from math import ceil
from pathlib import Path

STYLE = """<style>
text { fill: #424a53; font: 12px system-ui, sans-serif }
path { fill: none; stroke: currentColor; stroke-width: 1.5 } .bar { stroke-width: 16 }
.grid { color: #8b949e; stroke-width: .5 } .mark { color: #24292f; stroke-width: 2 }
.c0 { color: #7d8590 } .c1 { color: #bf8700 } .c2 { color: #a371f7 }
.c3 { color: #388bfd } .c4 { color: #2da44e }
@media (prefers-color-scheme: dark) { text { fill: #c9d1d9 } .mark { color: #f0f6fc } }
</style>"""
TOP, RIGHT = 62, 720  # of the field in a picture, in pixels


def ticks(most: float) -> list[float]:
    """At most nine round numbers, from 0 to `most` or above."""
    steps = (digit * 10.0**power for power in range(-3, 19) for digit in (1, 2, 5))
    step = next(step for step in steps if most <= 8 * step)
    return [i * step for i in range(max(1, ceil(most / step)) + 1)]


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{escape(words)}</text>'


def stroke(kind: str, path: str) -> str:
    return f'<path class="{kind}" d="{path}"/>'


def x_axis(marks: Sequence[float], left: int, unit: float, bottom: int) -> Iterator[str]:
    for mark in marks:
        x = left + mark * unit
        yield stroke("grid", f"M{x:.1f} {TOP} V{bottom}")
        yield text(x, bottom + 16, f"{mark:g}", "middle")


def save(file: str | Path, title: str, names: Sequence[str], parts: Sequence[str],
         height: int) -> None:
    """Write a picture: its title, a colour for each name, and the parts below."""
    head = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}">', STYLE,
            text(10, 20, title)]
    x = 10
    for i, name in enumerate(names):
        head += [stroke(f"bar c{i}", f"M{x:.0f} 40 h12"), text(x + 18, 44, name)]
        x += 36 + 6.6 * len(name)
    Path(file).write_text("\n".join([*head, *parts, "</svg>", ""]), encoding="utf-8")


def stacked_bars(file: str | Path, title: str, kinds: Sequence[str],
                 bars: Sequence[tuple[str, Sequence[float], float | None]]) -> None:
    """Draw a bar for each (label, values of `kinds`, mark to compare with or None)."""
    left = max(245, 16 + 7 * max(len(label) for label, _, _ in bars))
    bottom = TOP + 24 * len(bars)
    marks = ticks(max(max(sum(values), mark or 0) for _, values, mark in bars))
    unit = (RIGHT - left) / marks[-1]
    parts = [*x_axis(marks, left, unit, bottom)]
    for y, (label, values, mark) in zip(range(TOP + 12, bottom, 24), bars):
        parts.append(text(left - 8, y + 4, label, "end"))
        x = left
        for i, value in enumerate(values):
            parts.append(stroke(f"bar c{i}", f"M{x:.1f} {y} h{value * unit:.1f}"))
            x += value * unit
        if mark is not None:
            parts.append(stroke("mark", f"M{left + mark * unit:.1f} {y - 11} v22"))
    save(file, title, kinds, parts, bottom + 30)


def curve(file: str | Path, title: str, x_label: str,
          lines: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> None:
    """Draw a line for each (name, points (x, y)); no coordinate is below 0."""
    left, bottom = 60, 322
    x_marks, y_marks = (ticks(max(point[i] for _, points in lines for point in points))
                        for i in (0, 1))
    x_unit, y_unit = (RIGHT - left) / x_marks[-1], (bottom - TOP) / y_marks[-1]
    parts = [text((left + RIGHT) / 2, bottom + 34, x_label, "middle"),
             *x_axis(x_marks, left, x_unit, bottom)]
    for mark in y_marks:
        y = bottom - mark * y_unit
        parts += [stroke("grid", f"M{left} {y:.1f} H{RIGHT}"),
                  text(left - 8, y + 4, f"{mark:g}", "end")]
    for i, (_, points) in enumerate(lines):
        places = [f"{left + x * x_unit:.1f} {bottom - y * y_unit:.1f}" for x, y in points]
        parts.append(stroke(f"c{i}", f"M{' L'.join(places)}"))
    save(file, title, [name for name, _ in lines], parts, bottom + 44)

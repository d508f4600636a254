"""Bars on the terminal; pictures as SVG, for light and dark pages, without a library: stacked bars and lines."""
from collections.abc import Sequence
from html import escape
from pathlib import Path

LIGHT = "#57606a", "#b08800", "#8250df", "#0969da", "#1a7f37", "#cf222e"
DARK = "#9aa7b4", "#d29922", "#bc8cff", "#58a6ff", "#56d364", "#ff7b72"
STYLE = "text { fill: #424a53 } .faint { stroke: #8b949e; stroke-width: .5 } .line { fill: none; stroke-width: 2 } .mark { stroke: #24292f; stroke-width: 2 }" + "".join(
    f" .f{i} {{ fill: {color} }} .s{i} {{ stroke: {color} }}" for i, color in enumerate(LIGHT))
STYLE += " @media (prefers-color-scheme: dark) { text { fill: #c9d1d9 } .mark { stroke: #f0f6fc }" + "".join(
    f" .f{i} {{ fill: {color} }} .s{i} {{ stroke: {color} }}" for i, color in enumerate(DARK)) + " }"


def bar(value: float, most: float, mark: str = "█", width: int = 60) -> str:
    """Marks for the terminal, `width` of them for `most`."""
    return mark * round(width * value / most)


def ticks(most: float) -> list[float]:
    """Five to ten round numbers from 0 to above `most`."""
    step = next(step for power in range(-3, 19) for step in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if most <= 8 * step)
    return [i * step for i in range(int(most / step) + 2)]


def svg(path: str | Path, width: int, height: int, parts: Sequence[str]) -> None:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" font-size="12">'
    Path(path).write_text("\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>", ""]), encoding="utf-8")


def text(x: float, y: float, words: str, anchor: str = "start", extra: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}"{extra}>{escape(words)}</text>'


def legend(names: Sequence[str], x: float, y: float) -> list[str]:
    parts = []
    for i, name in enumerate(names):
        parts += [f'<rect class="f{i}" x="{x:.0f}" y="{y - 9:.0f}" width="10" height="10"/>', text(x + 14, y, name)]
        x += 30 + 6.6 * len(name)
    return parts


def stacked_bars(path: str | Path, title: str, kinds: Sequence[str], bars: Sequence[tuple[str, Sequence[float], float | None]]) -> None:
    """A horizontal bar for each (label, values of `kinds`, a mark to compare with or None)."""
    left, right, top, high = 245, 720, 62, 24
    marks = ticks(max(max(sum(values), mark or 0) for _, values, mark in bars))
    scale, bottom = (right - left) / marks[-1], top + high * len(bars)
    parts = [text(10, 20, title, extra=' font-size="14"'), *legend(kinds, left, 44)]
    for value in marks:
        x = left + value * scale
        parts += [f'<path class="faint" d="M{x:.1f} {top} V{bottom}"/>', text(x, bottom + 16, f"{value:g}", "middle")]
    for i, (label, values, mark) in enumerate(bars):
        x, y = left, top + high * i
        parts.append(text(left - 8, y + 16, label, "end"))
        for kind, value in enumerate(values):
            parts.append(f'<rect class="f{kind}" x="{x:.1f}" y="{y + 4}" width="{value * scale:.1f}" height="{high - 8}"/>')
            x += value * scale
        if mark is not None:
            parts.append(f'<path class="mark" d="M{left + mark * scale:.1f} {y + 1} V{y + high - 1}"/>')
    svg(path, 760, bottom + 30, parts)


def lines(path: str | Path, title: str, x_name: str, xs: Sequence[float], series: dict[str, Sequence[float]]) -> None:
    """A line for each of `series` over `xs`; both axes start at 0."""
    left, right, top, bottom = 50, 720, 62, 300
    x_marks, y_marks = ticks(max(xs)), ticks(max(max(ys) for ys in series.values()))
    across, up = (right - left) / max(xs), (bottom - top) / y_marks[-1]
    parts = [text(10, 20, title, extra=' font-size="14"'), *legend(list(series), left, 44)]
    for value in y_marks:
        parts += [f'<path class="faint" d="M{left} {bottom - value * up:.1f} H{right}"/>', text(left - 8, bottom - value * up + 4, f"{value:g}", "end")]
    parts += [text(left + value * across, bottom + 16, f"{value:g}", "middle") for value in x_marks if value <= max(xs)]
    parts.append(text((left + right) / 2, bottom + 34, x_name, "middle"))
    for i, ys in enumerate(series.values()):
        points = [(left + x * across, bottom - y * up) for x, y in zip(xs, ys)]
        parts.append(f'<polyline class="line s{i}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
        parts += [f'<circle class="f{i}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]
    svg(path, 760, 345, parts)

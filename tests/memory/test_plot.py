"""Pictures: what a reader measures on them is what was drawn."""
import re
from xml.etree import ElementTree

import pytest

from memory import plot


def drawn(path, kind):
    return list(ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}" + kind))


@pytest.mark.parametrize("most", [0, 1e-4, 0.5, 1, 7.99, 8, 8.01, 17.6, 100, 3.3e8])
def test_ticks_start_at_0_are_even_and_cover_the_maximum(most):
    marks = plot.ticks(most)
    assert marks[0] == 0 and marks[-1] >= most and marks[-2] <= most  # no empty field at the end
    step = marks[1]
    assert marks == pytest.approx([i * step for i in range(len(marks))]) and f"{step:e}"[0] in "125"
    assert len(marks) <= 10 and (most < 0.01 or len(marks) >= 5)


def test_bars_end_where_their_sums_are_and_words_are_shown_as_they_are(tmp_path):
    path, name = tmp_path / "bars.svg", "a < b & \"c\" > 'd' ü"
    bars = [(name, [1.0, 2.5, 0.25], None), ("b", [0, 0, 7.0], 11.5), ("c", [4.0, 0.5, 1.5], 0.75)]
    plot.stacked_bars(path, name, [name, "b", "c"], bars)
    assert [element.text for element in drawn(path, "text")].count(name) == 3
    axis = {float(label.text): float(label.get("x")) for label in drawn(path, "text")
            if label.get("text-anchor") == "middle"}
    zero, unit = axis[0.0], (axis[max(axis)] - axis[0.0]) / max(axis)
    rects = [rect for rect in drawn(path, "rect") if rect.get("height") == "16"]  # not the legend's
    assert len(rects) == 9
    for i, (_, values, _) in enumerate(bars):
        row, at = rects[3 * i : 3 * i + 3], zero
        assert len({rect.get("y") for rect in row}) == 1
        for rect, value in zip(row, values):
            assert float(rect.get("x")) == pytest.approx(at, abs=0.11)
            assert float(rect.get("width")) == pytest.approx(value * unit, abs=0.11)
            at += value * unit
        end = float(row[-1].get("x")) + float(row[-1].get("width"))
        assert end == pytest.approx(zero + sum(values) * unit, abs=0.2)
    _, _, width, height = map(float, ElementTree.parse(path).getroot().get("viewBox").split())
    for rect in drawn(path, "rect"):
        x, y, w, h = (float(rect.get(name)) for name in ("x", "y", "width", "height"))
        assert 0 <= x and x + w <= width and 0 <= y and y + h <= height
    marks = [float(re.match(r"M([\d.]+) ", path.get("d"))[1]) for path in drawn(path, "path")
             if path.get("class") == "mark"]
    assert marks == pytest.approx([zero + 11.5 * unit, zero + 0.75 * unit], abs=0.11)


def test_bars_of_the_terminal_fit_100_columns(capsys):
    plot.show_bars([("a long label" * 3, 0, ""), ("b", 17.5, "a note" * 3)])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100 and [line.count("█") > 0 for line in lines] == [False, True]

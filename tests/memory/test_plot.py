"""Pictures: what a reader measures on them is what was drawn."""
import re
from xml.etree import ElementTree

import pytest

from memory import plot


def drawn(file, kind):
    return list(ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}" + kind))


def paths(file, kind):
    """The numbers of each path of this class."""
    return [[float(number) for number in re.findall(r"[\d.]+", path.get("d"))]
            for path in drawn(file, "path") if path.get("class") == kind]


def axis(file, name="x", anchor="middle"):
    """Where 0 is, and the pixels of 1, as the labels of an axis say."""
    labels = [label for label in drawn(file, "text") if label.get("text-anchor") == anchor]
    marks = {float(label.text): float(label.get(name)) for label in labels
             if re.fullmatch(r"[\d.e+-]+", label.text)}
    return marks[0.0], (marks[max(marks)] - marks[0.0]) / max(marks)


@pytest.mark.parametrize("most", [0, 1e-4, 0.5, 1, 7.99, 8, 8.01, 17.6, 100, 3.3e8])
def test_ticks_start_at_0_are_even_and_cover_the_maximum(most):
    marks = plot.ticks(most)
    assert marks[0] == 0 and marks[-1] >= most and marks[-2] <= most  # no empty field at the end
    step = marks[1]
    assert marks == pytest.approx([i * step for i in range(len(marks))]) and f"{step:e}"[0] in "125"
    assert len(marks) <= 9 and (most < 0.01 or len(marks) >= 4)


def test_bars_end_where_their_sums_are_and_words_are_shown_as_they_are(tmp_path):
    file, name = tmp_path / "bars.svg", "a < b & \"c\" > 'd' ü"
    bars = [(name, [1.0, 2.5, 0.25], None), ("b", [0, 0, 7.0], 11.5), ("c", [4.0, 0.5, 1.5], 0.75)]
    plot.stacked_bars(file, name, [name, "b", "c"], bars)
    assert [element.text for element in drawn(file, "text")].count(name) == 3
    zero, unit = axis(file)
    columns = [paths(file, f"bar c{i}")[1:] for i in range(3)]  # the first is the legend's
    for row, (_, values, _) in zip(zip(*columns, strict=True), bars, strict=True):
        at = zero
        for (x, y, width), value in zip(row, values):
            assert x == pytest.approx(at, abs=0.11) and y == row[0][1]
            assert width == pytest.approx(value * unit, abs=0.11)
            at += value * unit
        assert at == pytest.approx(zero + sum(values) * unit, abs=0.2)
    assert [x for x, _, _ in paths(file, "mark")] == pytest.approx(
        [zero + 11.5 * unit, zero + 0.75 * unit], abs=0.11)


def test_a_curve_goes_through_its_points_and_stays_inside(tmp_path):
    file, name = tmp_path / "curve.svg", "loss & <mean>"
    lines = [(name, [(0, 2.5), (10, 0.125), (250, 1)]), ("one step", [(1, 0)])]
    plot.curve(file, "a run", "step", lines)
    assert {name, "one step", "a run", "step"} <= {label.text for label in drawn(file, "text")}
    (x_zero, x_unit), (y_zero, y_unit) = axis(file), axis(file, "y", "end")
    _, _, width, height = map(float, drawn(file, "svg")[0].get("viewBox").split())
    for i, (_, points) in enumerate(lines):
        line, = paths(file, f"c{i}")
        for x, y, (step, value) in zip(line[0::2], line[1::2], points, strict=True):
            assert x == pytest.approx(x_zero + step * x_unit, abs=1)
            assert y == pytest.approx(y_zero - 4 + value * y_unit, abs=1)  # a label's foot is lower
            assert 0 <= x <= width and 0 <= y <= height

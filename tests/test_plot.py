"""Pictures: what a reader measures on them is what was drawn."""

import re
from xml.etree import ElementTree

import pytest

import plot

SVG = "{http://www.w3.org/2000/svg}"


def drawn(path, kind):
    return [element for element in ElementTree.parse(path).iter(SVG + kind)]


def words(path):
    return [element.text for element in drawn(path, "text")]


def scale_of(path):
    """(pixels of 0, pixels of 1) along the axis, from its largest label: the axis is drawn with a label under each line."""
    labels = {float(element.text): float(element.get("x")) for element in drawn(path, "text") if element.get("text-anchor") == "middle"}
    return labels[0.0], (labels[max(labels)] - labels[0.0]) / max(labels)


@pytest.mark.parametrize("most", [0, 1e-4, 0.003, 0.5, 1, 4, 7.99, 8, 8.01, 17.6, 99.9, 100, 12345, 3.3e8, 8e12])
def test_ticks_start_at_0_are_even_and_cover_the_maximum(most):
    marks = plot.ticks(most)
    assert marks[0] == 0 and marks[-1] >= most and marks[-2] <= most  # no empty field at the end
    step = marks[1]
    assert marks == pytest.approx([i * step for i in range(len(marks))]) and f"{step:e}"[0] in "125"
    assert len(marks) <= 10 and (most < 0.01 or len(marks) >= 5)


def test_bars_end_where_their_sums_are(tmp_path):
    path, bars = tmp_path / "bars.svg", [("one", [1.0, 2.5, 0.25], None), ("two", [0, 0, 7.0], 11.5), ("three", [4.0, 0.5, 1.5], 0.75)]
    plot.stacked_bars(path, "title", ["a", "b", "c"], bars)
    zero, unit = scale_of(path)
    rects = [rect for rect in drawn(path, "rect") if rect.get("height") == "16"]  # the others are the legend's
    assert len(rects) == 9
    for i, (_, values, _) in enumerate(bars):
        row = rects[3 * i : 3 * i + 3]
        assert len({rect.get("y") for rect in row}) == 1
        at = zero
        for rect, value in zip(row, values):
            assert float(rect.get("x")) == pytest.approx(at, abs=0.11) and float(rect.get("width")) == pytest.approx(value * unit, abs=0.11)
            at += value * unit
        assert float(row[-1].get("x")) + float(row[-1].get("width")) == pytest.approx(zero + sum(values) * unit, abs=0.2)
    marks = [float(re.match(r"M([\d.]+) ", path.get("d"))[1]) for path in drawn(path, "path") if path.get("class") == "mark"]
    assert marks == pytest.approx([zero + 11.5 * unit, zero + 0.75 * unit], abs=0.11)


def test_nothing_is_drawn_outside_the_picture(tmp_path):
    path = tmp_path / "bars.svg"
    plot.stacked_bars(path, "title", ["a"], [(str(i), [i], 2.0 * i) for i in range(1, 12)])
    _, _, width, height = map(float, ElementTree.parse(path).getroot().get("viewBox").split())
    for rect in drawn(path, "rect"):
        assert 0 <= float(rect.get("x")) and float(rect.get("x")) + float(rect.get("width")) <= width
        assert 0 <= float(rect.get("y")) and float(rect.get("y")) + float(rect.get("height")) <= height


def test_lines_go_through_their_values(tmp_path):
    path, xs, series = tmp_path / "lines.svg", [2, 4, 8, 32], {"one": [1.0, 2.0, 4.0, 16.0], "two": [9.0, 3.0, 0.5, 12.0]}
    plot.lines(path, "title", "r", xs, series)
    left = min(float(text.get("x")) for text in drawn(path, "text") if text.get("text-anchor") == "middle" and text.text == "0")
    levels = {float(text.text): float(text.get("y")) - 4 for text in drawn(path, "text") if text.get("text-anchor") == "end"}
    up = (levels[0.0] - levels[max(levels)]) / max(levels)
    lines = drawn(path, "polyline")
    assert len(lines) == 2 and len(drawn(path, "circle")) == 8 and "r" in words(path)
    right = float(lines[0].get("points").split()[-1].split(",")[0])
    for line, ys in zip(lines, series.values()):
        points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        assert [x for x, _ in points] == pytest.approx([left + x * (right - left) / 32 for x in xs], abs=0.11)
        assert [y for _, y in points] == pytest.approx([levels[0.0] - y * up for y in ys], abs=1)


def test_a_single_point_is_a_picture_too(tmp_path):
    plot.lines(tmp_path / "one.svg", "title", "keep", [1], {"LST": [1.5]})
    assert "nan" not in (tmp_path / "one.svg").read_text() and len(drawn(tmp_path / "one.svg", "circle")) == 1


@pytest.mark.parametrize("draw", [
    lambda path, name: plot.stacked_bars(path, name, [name], [(name, [1.0], None)]),
    lambda path, name: plot.lines(path, name, name, [1, 2], {name: [1.0, 2.0]})], ids=["bars", "lines"])
def test_words_with_marks_of_xml_are_shown_as_they_are(tmp_path, draw):
    name = "a < b & \"c\" > 'd' ü"
    draw(tmp_path / "picture.svg", name)
    assert words(tmp_path / "picture.svg").count(name) == 3  # title, legend, label


def test_both_pages_have_a_color_for_each_kind():
    assert len(plot.LIGHT) == len(plot.DARK) >= 6 and "prefers-color-scheme: dark" in plot.STYLE

"""The pictures of the quality benchmark: the frontier, and that any label can be drawn."""

from __future__ import annotations

import random
from itertools import combinations
from xml.etree import ElementTree

import axes
import labels
import picture
import pytest
from hypothesis import given
from hypothesis import strategies as st
from picture import Point

HOSTILE = ["<script>alert(1)</script>", "a & b", '"quoted"', "\x00\x1b[31m", "]]>", "é" * 300, ""]
# Small whole numbers, so that some are equal.
POINTS = st.lists(
    st.builds(
        Point,
        st.just("name"),
        st.just("nearest"),
        st.integers(1, 6).map(float),
        st.integers(1, 6).map(float),
        st.booleans(),
    ),
    max_size=12,
)


def beats(one: Point, other: Point, rising: tuple[bool, bool]) -> bool:
    """The definition: no worse on both axes, and better on one."""
    signs = [-1 if each else 1 for each in rising]
    x, y = signs[0] * (one.x - other.x), signs[1] * (one.y - other.y)
    return x <= 0 and y <= 0 and (x, y) != (0, 0)


@given(POINTS, st.tuples(st.booleans(), st.booleans()))
def test_the_frontier_is_what_nobody_beats(points: list[Point], rising: tuple[bool, bool]) -> None:
    taking = [point for point in points if not point.own_grid]
    wanted = [p for p in taking if not any(beats(other, p, rising) for other in taking)]
    found = picture.frontier(points, rising)
    assert sorted(map(id, found)) == sorted(map(id, wanted))
    assert [point.x for point in found] == sorted(point.x for point in found)


def test_the_files_own_grid_is_on_no_frontier() -> None:
    best, other = Point("Q4_1", "llama.cpp", 1, 0.0, own_grid=True), Point("a", "nearest", 2, 1.0)
    assert picture.frontier([best, other]) == [other]


def crowd(count: int) -> list[Point]:
    rng = random.Random(0)
    families = list(picture.FAMILIES)
    return [
        Point(f"w4a8g32 number {i}", families[i % len(families)], rng.gauss(90, 9), rng.random())
        for i in range(count)
    ]


def drawn(points: list[Point], rising: tuple[bool, bool] = (False, False)) -> ElementTree.Element:
    x = axes.linear_axis("MB", [p.x for p in points], "{:.0f}".format, "MB")
    y = axes.loss_axis([p.y for p in points], 20.0)
    return ElementTree.fromstring(picture.draw("a & b", "<note>", points, x, y, rising))


NUMBERS = ("x", "y", "x1", "x2", "cx", "y1", "y2", "cy")


@pytest.mark.parametrize("rising", [(False, False), (True, False), (False, True)])
def test_everything_lies_in_the_picture(rising: tuple[bool, bool]) -> None:
    points = crowd(40)
    points += [Point("far", "sparse", 1e9, 1e9), Point("lossless", "nearest", 90, -0.01)]
    for element in drawn(points, rising).iter():
        for name in NUMBERS:
            limit = axes.WIDTH if "x" in name else axes.HEIGHT
            assert 0 <= float(element.get(name, 0)) <= limit
        for pair in (element.get("points") or "").split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= axes.WIDTH and 0 <= y <= axes.HEIGHT


@pytest.mark.parametrize("label", HOSTILE)
def test_hostile_labels_are_drawn_as_text(label: str) -> None:
    points = [Point(label, "nearest", 90, 0.1), Point("other", "healed", 80, 0.2, hint=label)]
    root = drawn(points)
    assert not [each for each in root.iter() if each.tag.endswith("script")]
    if label == "a & b":
        assert label in [each.text for each in root.iter()]


def test_what_lies_beyond_an_edge_says_where() -> None:
    points = [*crowd(9), Point("far", "sparse", 1000, 0.5), Point("lost", "nearest", 90, 99.0)]
    texts = [each.text or "" for each in drawn(points).iter()]
    assert "far → 1000 MB" in texts
    assert "lost ↑ 2000" in texts


def test_labels_neither_meet_nor_hide_marks() -> None:
    rng = random.Random(0)
    marks = [(rng.uniform(300, 700), rng.uniform(200, 500), 90.0) for _ in range(40)]
    boxes = [box for box in labels.place(marks) if box]
    assert len(boxes) == len(marks)
    assert not any(one.meets(other) for one, other in combinations(boxes, 2))
    assert all(box.inside(labels.PLOT) for box in boxes)
    for x, y, _ in marks:
        assert not any(box.x0 < x < box.x1 and box.y0 < y < box.y1 for box in boxes)


def test_a_label_without_room_is_left_out() -> None:
    width = axes.RIGHT - axes.LEFT
    assert labels.place([(500.0, 300.0, 2.0 * width)]) == [None]


@pytest.mark.parametrize("values", [[0.0], [5.0], [5.0, 5.0], [0.0, 1.0], [1e-3, 1e6]])
def test_axes_hold_few_or_odd_values(values: list[float]) -> None:
    axis = axes.linear_axis("x", values, str)
    assert axis.low < axis.high
    assert 2 <= len(axis.ticks) <= 20
    assert all(axes.LEFT <= axis(value) <= axes.RIGHT for value in values)
    assert all(axes.LEFT <= axis(tick) <= axes.RIGHT for tick in axis.ticks)


def test_a_loss_of_nothing_lies_on_the_lower_edge() -> None:
    axis = axes.loss_axis([-0.01, 0.0, 0.5], 20.0)
    assert axis(-0.01) == axis(0.0) == axis(1e-4) == axes.BOTTOM
    assert axes.TOP < axis(0.5) < axis(0.1) < axes.BOTTOM

"""The pictures of the quality benchmark: what a model loses, against bytes, speed or accuracy.

Points are rows of a record of quality.py. SVG is written by hand: no plotting library. Light and
dark are two sets of colours in one file, chosen by the viewer's `prefers-color-scheme`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis
from labels import BOLD, LETTER, SIZE, Box, R, place


@dataclass(frozen=True)
class Family:
    """What marks have in common: the legend's words, a shape, colours on white and on black."""

    words: str
    shape: str
    light: str
    dark: str


# Okabe and Ito's colours, which the colour-blind can tell apart, darker on white and lighter on
# black where they would be faint. Shapes tell the families apart without any.
FAMILIES = {
    "nearest": Family("dense, rounded to nearest", "circle", "#0072B2", "#4FA8DC"),
    "calibrated": Family("dense, calibrated", "square", "#009E73", "#2CC295"),
    "sparse": Family("sparse", "triangle", "#B8560B", "#E99A4D"),
    "healed": Family("healed", "diamond", "#B0508A", "#E08FC0"),
    "llama.cpp": Family("llama.cpp", "cross", "#333333", "#DDDDDD"),
}
Rising = tuple[bool, bool]
OWN_GRID = "the file's own grid: lossless here, not a merit"


@dataclass(frozen=True)
class Point:
    """One mark. label: what is written beside it, the name if empty; hint: what hovering shows."""

    name: str
    family: str
    x: float
    y: float
    own_grid: bool = False
    label: str = ""
    hint: str = ""


def frontier(points: Sequence[Point], rising: Rising = (False, False)) -> list[Point]:
    """The points that no other beats on one axis and equals on the other, from left to right.

    rising: of x and of y, whether one wants much of it (speed, accuracy) or little (bytes, loss).
    Of equal points all stay. The file's own grid takes no part.
    """
    best = math.inf
    kept: list[tuple[float, float]] = []
    found: list[Point] = []
    for point in sorted((p for p in points if not p.own_grid), key=lambda p: _costs(p, rising)):
        costs = _costs(point, rising)
        if costs[1] < best or costs in kept:
            kept.append(costs)
            found.append(point)
            best = costs[1]
    return sorted(found, key=lambda p: p.x)


def _costs(point: Point, rising: Rising) -> tuple[float, float]:
    return (-point.x if rising[0] else point.x, -point.y if rising[1] else point.y)


# -- drawing --------------------------------------------------------------------------------------


def draw(
    title: str,
    note: str,
    points: Sequence[Point],
    x: Axis,
    y: Axis,
    rising: Rising = (False, False),
) -> str:
    """The whole file. `rising`: as in `frontier`."""
    edge = frontier(points, rising)
    parts = [*_frame(title, note, x, y), *_steps(edge, x, y, rising[0])]
    parts += _marks(points, edge, x, y)
    families = [name for name in FAMILIES if any(p.family == name for p in points)]
    parts += _legend(families, any(p.own_grid for p in points))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="Helvetica, Arial, Liberation Sans, DejaVu Sans, '
        f'sans-serif" font-size="13">\n<title>{escape(title)}</title>\n<style>{style()}</style>\n'
        f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def style() -> str:
    dark = _rules("#14171a", "#e8e8e8", "#a5abb0", "#2c3136", [f.dark for f in FAMILIES.values()])
    light = _rules("#ffffff", "#1d2023", "#5c6166", "#e4e6e8", [f.light for f in FAMILIES.values()])
    return f"\n{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"


def _rules(paper: str, ink: str, faint: str, grid: str, families: list[str]) -> str:
    rules = [
        f".paper {{ fill: {paper} }} .halo {{ stroke: {paper} }}",
        f".ink {{ fill: {ink} }} .faint {{ fill: {faint} }}",
        f".grid {{ stroke: {grid} }} .rule {{ stroke: {faint} }}",
        *(
            f".f{i} {{ fill: {colour} }} .s{i} {{ stroke: {colour} }}"
            for i, colour in enumerate(families)
        ),
    ]
    return "\n".join(rules)


def _text(x: float, y: float, text: str, kind: str = "ink", **more: object) -> str:
    at = f'x="{x:.1f}" y="{y:.1f}"'
    return f'<text class="{kind}" {at}{_attributes(more)}>{_shown(text)}</text>'


def _attributes(more: dict[str, object]) -> str:
    return "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())


def _shown(text: str) -> str:
    """Escaped, and without what XML cannot hold."""
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def _line(x0: float, y0: float, x1: float, y1: float, kind: str, **more: object) -> str:
    ends = f'x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"'
    return f'<line class="{kind}" {ends}{_attributes(more)}/>'


def _frame(title: str, note: str, x: Axis, y: Axis) -> Iterator[str]:
    yield _text(LEFT, 32, title, font_size=18, font_weight="bold")
    yield _text(LEFT, 52, note, "faint")
    for value in x.ticks:
        at = x(value)
        yield _line(at, TOP, at, BOTTOM, "grid")
        for row, words in enumerate(x.words(value).split("|")):
            yield _text(at, BOTTOM + 19 + 16 * row, words, "faint", text_anchor="middle")
    for value in y.ticks:
        at = y(value)
        yield _line(LEFT, at, RIGHT, at, "grid")
        left, _, right = y.words(value).partition("|")
        yield _text(LEFT - 8, at + 4.5, left, "faint", text_anchor="end")
        if right:
            yield _text(RIGHT + 8, at + 4.5, right, "faint")
    yield (
        f'<rect class="rule" x="{LEFT}" y="{TOP}" width="{RIGHT - LEFT}" '
        f'height="{BOTTOM - TOP}" fill="none"/>'
    )
    yield _text((LEFT + RIGHT) / 2, BOTTOM + 62, x.title, text_anchor="middle")
    middle = (TOP + BOTTOM) / 2
    yield _text(22, middle, y.title, text_anchor="middle", transform=f"rotate(-90 22 {middle:.0f})")


def _steps(edge: Sequence[Point], x: Axis, y: Axis, rising: bool) -> Iterator[str]:
    """A staircase through the frontier: between two of its points one has the worse of both.
    `rising`: the left one is the worse in x."""
    corners: list[tuple[float, float]] = []
    for before, after in pairwise(edge):
        corners.append((x(before.x), y(before.y)))
        corners.append((x(before.x), y(after.y)) if rising else (x(after.x), y(before.y)))
    corners += [(x(point.x), y(point.y)) for point in edge[-1:]]
    path = " ".join(f"{u:.1f},{v:.1f}" for u, v in corners)
    yield (
        f'<polyline class="rule" points="{path}" fill="none" stroke-width="1.6" '
        'stroke-dasharray="6 4"/>'
    )


def _marks(points: Sequence[Point], edge: Sequence[Point], x: Axis, y: Axis) -> Iterator[str]:
    """Marks, then labels over them: those of the frontier are on top, and find their places first,
    in bold."""
    order = sorted(points, key=lambda p: (p not in edge, p.family != "llama.cpp", p.y))
    words = [_label(point, x, y) for point in order]
    at = [(x(point.x), y(point.y)) for point in order]
    widths = [len(w) * (BOLD if p in edge else LETTER) for p, w in zip(order, words, strict=True)]
    boxes = place([(u, v, width) for (u, v), width in zip(at, widths, strict=True)])
    for point, (u, v), box in zip(order, at, boxes, strict=True):
        if box:
            yield from _leader(u, v, box, _class(point))
    for point, (u, v) in reversed(list(zip(order, at, strict=True))):
        yield _symbol(point.family, u, v, point.own_grid, point.hint or point.name)
    for point, text, box in zip(order, words, boxes, strict=True):
        if box:
            weight = {"font_weight": "bold"} if point in edge else {}
            yield _text(
                (box.x0 + box.x1) / 2, box.y1 - 3, text, f"f{_class(point)} halo",
                text_anchor="middle", font_size=SIZE, paint_order="stroke", stroke_width=4,
                **weight,
            )  # fmt: skip


def _class(point: Point) -> int:
    return list(FAMILIES).index(point.family)


def _label(point: Point, x: Axis, y: Axis) -> str:
    """The label; with an arrow and the value where the mark is on an edge that it is beyond."""
    text = point.label or point.name
    if x.share(point.x) > 1:
        text += f" \N{RIGHTWARDS ARROW} {point.x:.0f} {x.unit}".rstrip()
    if y.log and y.share(point.y) > 1:
        text += f" \N{UPWARDS ARROW} {y.words(point.y).partition('|')[2]}"
    return text


def _leader(x: float, y: float, box: Box, family: int) -> Iterator[str]:
    """A line from a mark to a label that is not beside it."""
    near_x, near_y = min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)
    if math.hypot(near_x - x, near_y - y) > R + 8:
        yield _line(x, y, near_x, near_y, f"s{family}", stroke_opacity=0.55, stroke_width=0.9)


def _legend(families: Sequence[str], own_grid: bool) -> Iterator[str]:
    x = LEFT + 6.0
    for name in families:
        words = FAMILIES[name].words
        yield _symbol(name, x, 74, False, words)
        yield _text(x + 12, 78.5, words)
        x += 34 + 6.8 * len(words)
    if own_grid:
        yield _symbol("llama.cpp", x, 74, True, OWN_GRID)
        yield _text(x + 12, 78.5, OWN_GRID)
        x += 34 + 6.6 * len(OWN_GRID)
    yield _line(x - 8, 74, x + 16, 74, "rule", stroke_width=1.6, stroke_dasharray="6 4")
    yield _text(x + 22, 78.5, "frontier")


SHAPES = {
    "square": ((-5, -5), (5, -5), (5, 5), (-5, 5)),
    "triangle": ((0, -7), (6.5, 5), (-6.5, 5)),
    "diamond": ((0, -7), (7, 0), (0, 7), (-7, 0)),
    "cross": (
        (-2, -6), (2, -6), (2, -2), (6, -2), (6, 2), (2, 2),
        (2, 6), (-2, 6), (-2, 2), (-6, 2), (-6, -2), (-2, -2),
    ),
}  # fmt: skip


def _symbol(family: str, x: float, y: float, hollow: bool, hint: str) -> str:
    """A mark, outlined in the colour of the paper so that overlapping ones stay apart; that of the
    file's own grid is an outline of its own colour."""
    i = list(FAMILIES).index(family)
    kind = f's{i}" fill="none" stroke-width="1.5' if hollow else f'f{i} halo" stroke-width="1.2'
    inside = f"<title>{_shown(hint)}</title>"
    corners = SHAPES.get(FAMILIES[family].shape)
    if corners is None:
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{R}">{inside}</circle>'
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon class="{kind}" points="{path}">{inside}</polygon>'

"""A roofline plot (Williams, Waterman, Patterson 2009) as SVG, written by hand: the run time needs
no plotting library.

x: operations per byte of weights; y: GOP/s; both logarithmic. The slope is what memory can feed,
the flat lines are what the instructions can multiply: a mark is at its best on the roof above it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from lacewing.cli.kernelreport import Roofs
from lacewing.cli.kernels import KernelTime

WIDTH, HEIGHT = 960, 640
LEFT, RIGHT, TOP, BOTTOM = 78, 700, 64, 566  # of the plot itself; the legend is to its right

# Okabe and Ito's colours, which the colour-blind can tell apart; the yellow is darkened, for it
# must be seen on white. Shapes tell marks apart where colours come round again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#B8860B", "#000000", "#E69F00")
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "down")


@dataclass(frozen=True)
class Mark:
    """One format at one m: medians over shapes, and how far the shapes spread."""

    series: str
    m: int
    x: float
    y: float
    low: float
    high: float


def marks(found: Iterable[KernelTime]) -> list[Mark]:
    groups: dict[tuple[str, int], list[KernelTime]] = {}
    rows = list(found)
    several = len({row.isa for row in rows if row.isa}) > 1
    for row in rows:
        series = f"{row.name}, {row.isa}" if several and row.isa else row.name
        groups.setdefault((series, row.m), []).append(row)
    result = []
    for (series, m), same in groups.items():
        rates = [row.gop_s for row in same]
        intensity = statistics.median(16 * m / row.bits_per_weight for row in same)
        rate = statistics.median(rates)
        result.append(Mark(series, m, intensity, rate, min(rates), max(rates)))
    return sorted(result, key=lambda mark: mark.m)


@dataclass(frozen=True)
class Axes:
    """From values to points; every bound is a power of ten times 1, 2 or 5."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return LEFT + (RIGHT - LEFT) * math.log(value / self.x0) / math.log(self.x1 / self.x0)

    def y(self, value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * math.log(value / self.y0) / math.log(self.y1 / self.y0)


def draw(found: Sequence[KernelTime], roofs: Roofs, title: str) -> str:
    """The whole file."""
    points = marks(found)
    top = max([rate for rates in roofs.peaks.values() for rate in rates.values()]
              + [point.high for point in points])  # fmt: skip
    xs = [point.x for point in points]
    ys = [point.low for point in points]
    # As far right as the bend of the highest roof, so that the picture explains itself.
    axes = Axes(
        _below(min(xs) / 1.3),
        _above(max([*xs, top / roofs.bandwidth]) * 1.6),
        _below(min([*ys, roofs.bandwidth * min(xs)]) / 1.5),
        _above(top * 1.15),
    )
    parts = [*_frame(axes, title), _subtitle(points), *_roofs(axes, roofs), *_series(axes, points)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="Helvetica, Arial, DejaVu Sans, sans-serif"'
        ' font-size="13">\n'
        f"<title>{escape(title)}</title>\n"
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 3 else (1, 3) if last - first <= 4 else (1,)
    values = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    return [value for value in values if low * 0.999 <= value <= high * 1.001]


def _below(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return max(step * power for step in (1, 2, 5) if step * power <= value * 1.0001)


def _above(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return min(step * power for step in (1, 2, 5, 10) if step * power >= value * 0.9999)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _text(x: float, y: float, text: str, **more: object) -> str:
    attributes = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    return f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{escape(text)}</text>'


def _line(x0: float, y0: float, x1: float, y1: float, **more: object) -> str:
    attributes = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"{attributes}/>'


def _frame(axes: Axes, title: str) -> list[str]:
    parts = [_text(LEFT, 34, title, font_size=17, font_weight="bold", fill="#222222")]
    for value in _ticks(axes.x0, axes.x1):
        x = axes.x(value)
        parts.append(_line(x, TOP, x, BOTTOM, stroke="#e6e6e6"))
        parts.append(_text(x, BOTTOM + 20, _number(value), text_anchor="middle", fill="#444444"))
    for value in _ticks(axes.y0, axes.y1):
        y = axes.y(value)
        parts.append(_line(LEFT, y, RIGHT, y, stroke="#e6e6e6"))
        parts.append(_text(LEFT - 8, y + 4.5, _number(value), text_anchor="end", fill="#444444"))
    parts.append(
        f'<rect x="{LEFT}" y="{TOP}" width="{RIGHT - LEFT}" height="{BOTTOM - TOP}" fill="none"'
        ' stroke="#888888"/>'
    )
    middle, centre = (TOP + BOTTOM) / 2, (LEFT + RIGHT) / 2
    parts.append(_text(centre, BOTTOM + 48, "operations per byte of weights", text_anchor="middle"))
    turn = f"rotate(-90 22 {middle:.0f})"
    parts.append(_text(22, middle, "GOP/s", text_anchor="middle", transform=turn))
    return parts


def _subtitle(points: Sequence[Mark]) -> str:
    rows = ", ".join(str(m) for m in sorted({point.m for point in points}))
    text = f"a line per format; its marks, from left to right: m = {rows}"
    return _text(LEFT, 54, text, fill="#555555")


def _roofs(axes: Axes, roofs: Roofs) -> list[str]:
    top = max(rate for rates in roofs.peaks.values() for rate in rates.values())
    bend = top / roofs.bandwidth
    first = max(axes.x0, axes.y0 / roofs.bandwidth)
    x0, y0 = axes.x(first), axes.y(first * roofs.bandwidth)
    x1, y1 = axes.x(bend), axes.y(top)
    parts = [_line(x0, y0, x1, y1, stroke="#555555", stroke_width=2)]
    slope = math.degrees(math.atan2(y1 - y0, x1 - x0))
    x, y = x0 + (x1 - x0) * 0.72 - 10, y0 + (y1 - y0) * 0.72 - 9
    turn = f"rotate({slope:.1f} {x:.1f} {y:.1f})"
    parts.append(
        _text(x, y, f"memory reads {roofs.bandwidth:.1f} GB/s", text_anchor="middle",
              transform=turn, fill="#333333")
    )  # fmt: skip
    for isa, rates in roofs.peaks.items():
        for kind, rate in rates.items():
            y = axes.y(rate)
            start = axes.x(max(axes.x0, rate / roofs.bandwidth))
            dash = {} if rate == top else {"stroke_dasharray": "7 4"}
            parts.append(_line(start, y, RIGHT, y, stroke="#555555", stroke_width=2, **dash))
            label = f"{isa} {kind} {_number(rate)} GOP/s"
            parts.append(_text(RIGHT - 6, y - 6, label, text_anchor="end", fill="#333333"))
    return parts


def _series(axes: Axes, points: Sequence[Mark]) -> list[str]:
    names = list(dict.fromkeys(point.series for point in points))
    parts: list[str] = []
    symbols: list[str] = []
    for index, name in enumerate(names):
        colour = COLOURS[index % len(COLOURS)]
        shape = SHAPES[index % len(SHAPES)]
        own = [point for point in points if point.series == name]
        path = " ".join(f"{axes.x(point.x):.1f},{axes.y(point.y):.1f}" for point in own)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-opacity="0.45"/>'
        )
        for point in own:
            x, y = axes.x(point.x), axes.y(point.y)
            low, high = axes.y(point.low), axes.y(point.high)
            if low - high > 1:
                parts.append(_line(x, low, x, high, stroke=colour, stroke_opacity=0.6))
            hint = f"{name}, m={point.m}: {point.y:.0f} GOP/s"
            symbols.append(symbol(shape, x, y, colour, hint))
        symbols.append(symbol(shape, RIGHT + 24, TOP + 12 + 22 * index, colour, name))
        symbols.append(_text(RIGHT + 38, TOP + 16.5 + 22 * index, name, fill="#222222"))
    return [*parts, *symbols, *_row_labels(axes, points)]


def _row_labels(axes: Axes, points: Sequence[Mark]) -> list[str]:
    """`m=..` below the lowest mark of each number of rows, where there is room for it."""
    taken: list[tuple[float, float]] = [(axes.x(p.x), axes.y(p.y)) for p in points]
    parts = []
    for m in sorted({point.m for point in points}):
        low = max((p for p in points if p.m == m), key=lambda p: axes.y(p.y) - axes.x(p.x) / 8)
        x, y = axes.x(low.x) + 10, axes.y(low.y) + 20
        while (
            any(abs(x + 14 - u) < 30 and abs(y - 4 - v) < 13 for u, v in taken) and y < BOTTOM - 6
        ):
            y += 4
        taken.append((x + 14, y - 4))
        parts.append(_text(x, y, f"m={m}", fill="#222222", font_weight="bold"))
    return parts


def symbol(shape: str, x: float, y: float, colour: str, hint: str) -> str:
    """A mark around (x, y), outlined in white so that overlapping ones stay apart."""
    r = 6.0
    corners = {
        "square": ((-5.2, -5.2), (5.2, -5.2), (5.2, 5.2), (-5.2, 5.2)),
        "triangle": ((0, -r - 1), (r + 0.5, r - 1), (-r - 0.5, r - 1)),
        "down": ((0, r + 1), (r + 0.5, 1 - r), (-r - 0.5, 1 - r)),
        "diamond": ((0, -r - 1.5), (r + 1.5, 0), (0, r + 1.5), (-r - 1.5, 0)),
        "cross": (
            (-2, -r), (2, -r), (2, -2), (r, -2), (r, 2), (2, 2),
            (2, r), (-2, r), (-2, 2), (-r, 2), (-r, -2), (-2, -2),
        ),
    }  # fmt: skip
    style = f'fill="{colour}" stroke="#ffffff" stroke-width="1.2"'
    inside = f"<title>{escape(hint)}</title>"
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" {style}>{inside}</circle>'
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners[shape])
    return f'<polygon points="{path}" {style}>{inside}</polygon>'

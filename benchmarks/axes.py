"""The axes of a picture: from values to points, with ticks at round values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 1120, 720
LEFT, RIGHT, TOP, BOTTOM = 84, 1040, 92, 640  # of the plot itself
FAR = 1.8  # times the middle value of an axis


@dataclass(frozen=True)
class Axis:
    """From values to points of the picture; values outside are drawn on the edge."""

    title: str
    low: float
    high: float
    ticks: Sequence[float]
    words: Callable[[float], str]
    log: bool = False
    unit: str = ""
    start: float = 0.0
    end: float = 1.0

    def __call__(self, value: float) -> float:
        return self.start + (self.end - self.start) * min(max(self.share(value), 0.0), 1.0)

    def share(self, value: float) -> float:
        if not self.log:
            return (value - self.low) / (self.high - self.low)
        if value <= 0:
            return -math.inf
        return math.log(value / self.low) / math.log(self.high / self.low)


def linear_axis(
    title: str, values: Iterable[float], words: Callable[[float], str], unit: str = ""
) -> Axis:
    """From left to right, around the values, with round ticks. What is far beyond the middle one
    is drawn on the right edge, so that it does not press the others together."""
    found = list(values)
    least, most = min(found), min(max(found), FAR * statistics.median(found))
    room = 0.06 * (most - least) or 0.06 * most or 1.0
    low, high = max(least - room, 0.0), most + room
    step = _round((high - low) / 8)
    first = math.ceil(low / step)
    ticks = [i * step for i in range(first, int(high / step) + 1)]
    return Axis(title, low, high, ticks, words, unit=unit, start=LEFT, end=RIGHT)


def loss_axis(values: Iterable[float], dense: float, high: float = 5.0) -> Axis:
    """Of the perplexity that a model lost, as a share of the dense one's: logarithmic, upwards.

    What lost less than a thousandth (which the text cannot tell from nothing) is drawn on the
    lower edge, what lost more than `high` times on the upper one."""
    most = max((v for v in values if v > 0), default=0.01)
    high = min(high, _above(most * 1.1))
    low = 1e-3
    ticks = [
        step * 10.0**power
        for power in range(-3, 2)
        for step in (1, 2, 5)
        if low <= step * 10.0**power <= high * 1.001
    ]

    def words(value: float) -> str:
        share = f"{value:+.1%}" if value < 0.01 else f"{value:+.0%}"
        loss = dense * (1 + value)
        return f"{share}|{loss:.2f}" if loss < 100 else f"{share}|{loss:.0f}"

    title = "perplexity above the dense model's (right: perplexity)"
    return Axis(title, low, max(high, 0.01), ticks, words, log=True, start=BOTTOM, end=TOP)


def share_axis(title: str, values: Iterable[float]) -> Axis:
    """Of an accuracy, upwards and the best on top."""
    found = list(values)
    low, high = max(min(found) - 0.03, 0.0), min(max(found) + 0.03, 1.0)
    step = _round((high - low) / 8)
    ticks = [i * step for i in range(math.ceil(low / step), int(high / step) + 1)]
    return Axis(title, low, high, ticks, lambda v: f"{v:.0%}", start=BOTTOM, end=TOP)


def _round(value: float) -> float:
    """1, 2 or 5 times a power of ten, near the value."""
    power = 10.0 ** math.floor(math.log10(value))
    return min((step * power for step in (1, 2, 5, 10)), key=lambda each: abs(each - value))


def _above(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return min(step * power for step in (1, 2, 5, 10) if step * power >= value * 0.9999)

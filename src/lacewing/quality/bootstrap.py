"""How far a figure could be off by the choice of the text or the items: the bootstrap.

The units (windows, blocks of tokens, items) are drawn anew with replacement, as many as there are,
and the figure is computed from them, many times; the interval is what the middle of those figures
spans (the percentile method: Efron, "Bootstrap methods: another look at the jackknife", 1979).
Figures of two models on the same units are resampled together, so what is hard for both cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["CONFIDENCE", "RESAMPLES", "SETTINGS", "Interval", "Units", "as_list", "interval"]

CONFIDENCE = 0.95
RESAMPLES = 1000
SETTINGS = {"confidence": CONFIDENCE, "resamples": RESAMPLES}
_WINDOWS = 8  # fewer are too few to draw from
_BLOCK = 64  # tokens

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """What the middle 95 % of the resampled figures span."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"[{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class Units:
    """What is drawn when figures of tokens are resampled: windows, or blocks of tokens where there
    are fewer than 8 windows. Tokens next to each other depend on each other: a single one is no
    unit."""

    starts: NDArray[np.int64]
    """`[units]`, where each begins among all tokens."""
    sizes: Numbers
    """`[units]`, tokens of each."""
    name: str

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Units:
        """`lengths`: tokens of each window, together at least one."""
        total = sum(lengths)
        if len(lengths) >= _WINDOWS:
            return cls._cut(np.cumsum([0, *lengths[:-1]]), total, "windows")
        size = max(1, min(_BLOCK, total // _WINDOWS))
        return cls._cut(np.arange(0, total, size), total, f"blocks of {size} tokens")

    @classmethod
    def _cut(cls, starts: NDArray[np.int64], total: int, kind: str) -> Units:
        sizes = np.diff(starts, append=total).astype(np.float64)
        return cls(starts, sizes, f"{len(starts)} {kind}")

    def interval(
        self, values: Numbers, seed: int, figure: Callable[[float], float] = float
    ) -> Interval | None:
        """Of `figure(mean of values)`; `values` `[tokens]`."""
        return interval(np.add.reduceat(values, self.starts), self.sizes, seed, figure)


def interval(
    totals: Numbers, sizes: Numbers, seed: int, figure: Callable[[float], float] = float
) -> Interval | None:
    """Of `figure(sum of totals / sum of sizes)`, both `[units]`; `figure` never falls.

    None: there are fewer than two units.
    """
    count = len(totals)
    if count < 2:
        return None
    rng = np.random.Generator(np.random.PCG64(seed))
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = rng.integers(0, count, count)
        means[i] = totals[drawn].sum() / sizes[drawn].sum()
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(figure(float(low)), figure(float(high)))


def as_list(found: Interval | None) -> list[float] | None:
    """An interval in types that JSON knows."""
    return None if found is None else [found.low, found.high]

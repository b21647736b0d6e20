"""`lacewing bench kernels --tune`: up to how many rows gemv beats gemm, and whether its prefetching
pays for one row, per format and ISA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lacewing import tuning
from lacewing.cli.kernels import Packed
from lacewing.errors import FormatError
from lacewing.native import compiled

SHAPE = (2048, 4096)  # one that is packed fast; where the drivers meet depends little on it
SPARSITY = 0.5
# The default stays unless another switch saves so much over all rows: noise is not an opinion.
_WORTH = 0.03


@dataclass(frozen=True)
class Crossing:
    """Seconds of a product of 1, 2, .. rows by both drivers, and the switch that follows."""

    isa: str
    format: str
    default: int
    gemv: list[float]
    gemm: list[float]
    unprefetched: float | None = None  # one row by gemv, prefetching left to the CPU
    default_prefetch: int = 0

    @property
    def cpu_prefetch_rows(self) -> int:
        """1 if one row is faster without prefetching by software, the default if it is alike."""
        if self.unprefetched is None:
            return self.default_prefetch
        best, other = sorted((self.gemv[0], self.unprefetched))
        if other - best <= _WORTH * best:
            return self.default_prefetch
        return int(self.unprefetched < self.gemv[0])

    @property
    def rows(self) -> int:
        """gemv up to so many rows: the least total time over all rows, the default if it is as
        good."""
        totals = [sum(self.gemv[:r]) + sum(self.gemm[r:]) for r in range(len(self.gemv) + 1)]
        best = min(range(len(totals)), key=totals.__getitem__)
        near = totals[self.default] - totals[best] <= _WORTH * totals[best]
        return self.default if near else best


def measure(
    names: Sequence[str],
    isas: Sequence[str],
    threads: int,
    working_set: int,
    rounds: int,
    told: Callable[[float, float, str], None],
) -> list[Crossing]:
    """Both drivers in turn, every format, weights cold. Leaves the switches as it found them."""
    native = compiled()
    before = {isa: (native.gemv_rows(isa), native.cpu_prefetch_rows(isa)) for isa in isas}
    weights = _weights(names, working_set, threads)
    found = []
    try:
        for index, isa in enumerate(isas):
            told(index, len(isas), isa)
            found += _measure_isa(isa, *before[isa], weights, rounds)
    finally:
        for isa, (gemv, prefetch) in before.items():
            for format in gemv:
                native.set_gemv_rows(format, gemv[format]["rows"], isa)
                native.set_cpu_prefetch_rows(format, prefetch[format]["rows"], isa)
    return found


def _weights(names: Sequence[str], working_set: int, threads: int) -> list[Packed]:
    found = []
    for name in names:
        try:
            share = working_set // len(names)
            found.append(Packed.random(name, SPARSITY, *SHAPE, share, threads))
        except FormatError:  # a format that cannot hold the shape keeps its default
            continue
    return found


def _measure_isa(
    isa: str,
    switches: dict[str, Any],
    prefetch: dict[str, Any],
    weights: Sequence[Packed],
    rounds: int,
) -> list[Crossing]:
    native = compiled()
    times: dict[tuple[str, int, bool], list[float]] = {}
    unprefetched: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        for m in range(1, max(switches[weight.format]["most"] for weight in weights) + 1):
            for by_gemv in (True, False):
                for weight in weights:
                    most = switches[weight.format]["most"]
                    if m > most:
                        continue
                    native.set_gemv_rows(weight.format, most if by_gemv else 0, isa)
                    native.set_cpu_prefetch_rows(weight.format, 0, isa)
                    spent = weight.time(m, isa, 0)
                    if turn:  # the first round warms up
                        times.setdefault((weight.format, m, by_gemv), []).extend(spent)
        for weight in weights:
            if prefetch[weight.format]["most"]:
                native.set_gemv_rows(weight.format, switches[weight.format]["most"], isa)
                native.set_cpu_prefetch_rows(weight.format, 1, isa)
                spent = weight.time(1, isa, 0)
                if turn:
                    unprefetched.setdefault(weight.format, []).extend(spent)
    medians = {key: float(np.median(each)) for key, each in times.items()}
    alone = {name: float(np.median(each)) for name, each in unprefetched.items()}

    def row(name: str) -> Crossing:
        gemv, gemm = (
            [medians[name, m, by_gemv] for m in _rows(switches[name])] for by_gemv in (True, False)
        )
        return Crossing(
            isa, name, switches[name]["default"], gemv, gemm,
            alone.get(name), prefetch[name]["default"],
        )  # fmt: skip

    return [row(weight.format) for weight in weights]


def _rows(switch: dict[str, int]) -> range:
    return range(1, switch["most"] + 1)


def as_tuning(found: Sequence[Crossing]) -> tuning.Tuning:
    table: tuning.Tuning = {"gemv_rows": {}, "cpu_prefetch_rows": {}}
    for crossing in found:
        for switch, rows in (
            ("gemv_rows", crossing.rows),
            ("cpu_prefetch_rows", crossing.cpu_prefetch_rows),
        ):
            table[switch].setdefault(crossing.isa, {})[crossing.format] = rows
    return table

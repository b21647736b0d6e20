"""The measurement behind `lacewing bench kernels`: one linear layer at a time, from memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lacewing import formats
from lacewing.cli.probe import random_codes
from lacewing.formats.base import aligned_empty
from lacewing.native import compiled, tensor

# A weight is multiplied through enough copies of itself that no cache holds them all.
WORKING_SET = 640 << 20


@dataclass(frozen=True)
class KernelTime:
    """One row: a format at one shape. `seconds` is the median of one multiplication."""

    format: str
    n: int
    k: int
    m: int
    bytes: int
    bits_per_weight: float
    seconds: float

    @property
    def gb_s(self) -> float:
        return self.bytes / self.seconds / 1e9

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "gb_s": self.gb_s}


@dataclass(frozen=True)
class Conditions:
    """What is the same for every row of a run."""

    m: int
    threads: int
    isa: str
    seconds: float
    sparsity: float


def measure(
    names: list[str], shapes: list[tuple[int, int]], at: Conditions
) -> Iterator[KernelTime]:
    """Times every format at every shape `(n, k)`; yields a row as soon as it is known."""
    for n, k in shapes:
        x = np.random.default_rng(0).standard_normal((at.m, k), dtype=np.float32)
        for name in names:
            yield _measure_one(name, n, k, x, at)


def _measure_one(name: str, n: int, k: int, x: np.ndarray, at: Conditions) -> KernelTime:
    packed = formats.get_format(name).pack(random_codes(name, n, k, at.sparsity))
    weights = [tensor(copy) for copy in _copies(packed)]

    def multiply(turn: int) -> None:
        compiled().linear(x, weights[turn % len(weights)], isa=at.isa, threads=at.threads)

    seconds = median_time(multiply, len(weights), at.seconds)
    return KernelTime(name, n, k, at.m, packed.nbytes, packed.bits_per_weight, seconds)


def _copies(packed: formats.PackedTensor) -> Iterator[formats.PackedTensor]:
    yield packed
    for _ in range(min(64, WORKING_SET // packed.nbytes)):
        parts = {name: _copy(part) for name, part in packed.parts.items()}
        yield formats.PackedTensor(packed.format, packed.shape, parts)


def _copy(part: np.ndarray) -> np.ndarray:
    """A copy that is 64-byte aligned, as parts in a file are: `copy` aligns to 16 only."""
    out = aligned_empty(part.shape, part.dtype)
    out[...] = part
    return out


def median_time(run: Callable[[int], None], warm_up: int, seconds: float) -> float:
    """Median seconds of `run(turn)` over about `seconds`, at least 5 runs, after a warm-up."""
    for turn in range(warm_up):
        run(turn)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        run(len(times))
        times.append(time.perf_counter() - start)
    return float(np.median(times))

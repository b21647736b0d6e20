"""Packing a large matrix takes little more memory than its result."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import pytest

from lacewing.formats import FORMATS, Format

T = TypeVar("T")
BOUND = 16 << 20


def peak(work: Callable[[], T]) -> tuple[T, int]:
    """What `work` returns, and the most bytes it held at once."""
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    result = work()
    return result, tracemalloc.get_traced_memory()[1] - before


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_temporary_memory_is_bounded(fmt: Format) -> None:
    weight = np.random.default_rng(0).standard_normal((1024, 4096), np.float32)
    tracemalloc.start()
    try:
        codes, rounding = peak(lambda: fmt.round(weight, 0.5 if fmt.sparse else None))
        packed, packing = peak(lambda: fmt.pack(codes))
        _, unpacking = peak(lambda: fmt.unpack(packed))
    finally:
        tracemalloc.stop()
    size = codes.q.nbytes
    assert rounding < 1.2 * size + BOUND
    # A sparse stream grows strip by strip and is then joined: twice its size.
    assert packing < (2 if fmt.sparse else 1) * packed.nbytes + BOUND
    assert unpacking < 1.2 * size + BOUND

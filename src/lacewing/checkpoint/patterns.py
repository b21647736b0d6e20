"""Zeros that somebody else has left in a weight, and the sparse format that makes use of them.

Bits per weight, with a share d of the weights not zero, or b of the blocks (formats.md):

    bits   anywhere              two of every four   blocks of 16 outputs x 1 input
    16     bf16_sp     1 + 16 d
     8     w8a8g64_sp  1.25+8 d  w8a8g64_24  5.25    w8a8_b16x1  0.06 + 8 b
     4     w4a8g64_sp  1.25+4 d  w4a8g64_24  3.25

The smallest of those that pay (`breakeven.py`) is taken; a pattern even where zeros anywhere would
be up to a tenth smaller, since its kernels count no bits. `w8a8_b16x1` has one scale per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lacewing.checkpoint.breakeven import break_even, dense_twin
from lacewing.checkpoint.interrupts import uninterrupted
from lacewing.checkpoint.tensors import SourceTensor
from lacewing.formats import Format, get_format
from lacewing.formats.base import as_weight, row_chunks
from lacewing.formats.tiles import STRIP

__all__ = ["Pattern", "Sparser", "find_sparser", "pattern_of", "sparse_format"]

Array = npt.NDArray[Any]

_FORMATS = {
    16: ("bf16_sp",),
    8: ("w8a8g64_sp", "w8a8g64_24", "w8a8_b16x1"),
    4: ("w4a8g64_sp", "w4a8g64_24"),
}
_ANYWHERE = 1.1
"""How much larger than it is a format counts that takes zeros anywhere."""
_FEW = 0.05
"""Share of zeros in a sample below which a weight is not looked through."""


@dataclass(frozen=True)
class Pattern:
    """Where a weight `[n, k]` is zero."""

    weights: int
    nonzero: int
    in_blocks: int
    """Weights of blocks of 16 outputs x 1 input that are not all zeros."""
    most_of_four: int
    """The largest number of weights that are not zero in four consecutive inputs of an output."""

    @property
    def density(self) -> float:
        """Share of the weights that are not zero."""
        return self.nonzero / self.weights

    @property
    def block_density(self) -> float:
        return self.in_blocks / self.weights

    @property
    def two_of_four(self) -> bool:
        return self.most_of_four <= 2

    def __add__(self, other: Pattern) -> Pattern:
        """The pattern of the rows of both."""
        return Pattern(
            self.weights + other.weights,
            self.nonzero + other.nonzero,
            self.in_blocks + other.in_blocks,
            max(self.most_of_four, other.most_of_four),
        )

    def __str__(self) -> str:
        kinds = [f"{1 - self.density:.0%} zeros"]
        if self.two_of_four:
            kinds.append(f"{self.most_of_four}:4")
        if self.block_density < (1 + self.density) / 2:
            kinds.append(f"{1 - self.block_density:.0%} of the blocks")
        return ", ".join(kinds)


_NONE = Pattern(0, 0, 0, 0)


def pattern_of(weight: npt.ArrayLike) -> Pattern:
    """The zeros of a weight `[n, k]`, a numpy array or a torch tensor. Raises FormatError for
    something else."""
    rows = as_weight(weight)
    n, k = rows.shape
    return sum((_pattern(rows[begin:end]) for begin, end in row_chunks(n, k)), _NONE)


def _pattern(rows: Array) -> Pattern:
    """Of whole strips of rows `[r, k]`."""
    present = rows != 0
    r, k = present.shape
    first = np.arange(0, r, STRIP)
    blocks = np.logical_or.reduceat(present, first, axis=0).sum(axis=1)
    heights = np.minimum(STRIP, r - first)
    fours = np.add.reduceat(present, np.arange(0, k, 4), axis=1, dtype=np.uint8)
    return Pattern(r * k, int(present.sum()), int(heights @ blocks), int(fours.max()))


def sparse_format(
    pattern: Pattern, bits: int, machine: str | None = None, names: tuple[str, ...] | None = None
) -> str | None:
    """The smallest sparse format of `bits` (16, 8 or 4) per weight that is smaller and, on this
    class of machines, faster than the dense one of its width; None if there is none.

    machine: as in `convert`. names: the formats to choose from.
    """
    sizes = {}
    for name in _FORMATS.get(bits, ()) if names is None else names:
        kind = get_format(name)
        density, size = _size(kind, pattern)
        twin = dense_twin(kind)
        if density < break_even(kind, machine) and twin is not None and size < _dense_size(twin):
            sizes[name] = size * (_ANYWHERE if name.endswith("_sp") else 1)
    return min(sizes, key=lambda name: sizes[name]) if sizes else None


def _size(kind: Format, pattern: Pattern) -> tuple[float, float]:
    """Share of the weights that are stored, and bits per weight."""
    if kind.name.endswith("_b16x1"):
        return pattern.block_density, 1 / STRIP + kind.weight_bits * pattern.block_density
    scale = 16 / kind.group_size if kind.group_size else 0
    if kind.fixed_sparsity is not None:
        size = 1 + kind.weight_bits * (1 - kind.fixed_sparsity) + scale
        return (pattern.density, size) if pattern.two_of_four else (1.0, float("inf"))
    return pattern.density, 1 + kind.weight_bits * pattern.density + scale


def _dense_size(twin: Format) -> float:
    grouped = 0 < twin.group_size < 1 << 16
    return twin.weight_bits + (16 / twin.group_size if grouped else 0)


# -- tensors of files -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sparser:
    """A tensor that packs smaller without its zeros."""

    tensor: SourceTensor
    kind: Format
    pattern: Pattern


def find_sparser(
    tensor: SourceTensor, machine: str | None, pool: ThreadPoolExecutor
) -> Sparser | None:
    """The tensor in a sparse format, where it has the zeros for it; None where it has not.

    Floats are rounded to 8 bits; a tensor with a grid of its own keeps its codes. Reads three
    strips of rows, and all of them, a run at a time, where these have zeros.
    """
    names = _candidates(tensor)
    if not names or _sample(tensor).density > 1 - _FEW:
        return None
    n, k = tensor.shape
    with uninterrupted():
        runs = pool.map(lambda run: _pattern(tensor.dequantize(*run)), row_chunks(n, k))
    pattern = sum(runs, _NONE)
    tensor.release()
    name = sparse_format(pattern, 0, machine, names)
    if name is None:
        return None
    return Sparser(tensor.with_format(name), get_format(name), pattern)


def _candidates(tensor: SourceTensor) -> tuple[str, ...]:
    if tensor.own_format is None:
        return _FORMATS[8]
    names = _FORMATS.get(get_format(tensor.own_format).weight_bits, ())
    return tuple(name for name in names if tensor.with_format(name).own_format == name)


def _sample(tensor: SourceTensor) -> Pattern:
    return sum((_pattern(tensor.dequantize(*run)) for run in _strips(tensor.shape[0])), _NONE)


def _strips(n: int) -> Iterator[tuple[int, int]]:
    """The first strip of rows, one from the middle, and the last."""
    count = -(-n // STRIP)
    for strip in sorted({0, count // 2, count - 1}):
        yield strip * STRIP, min((strip + 1) * STRIP, n)

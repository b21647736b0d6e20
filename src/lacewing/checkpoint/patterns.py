"""Zeros that somebody else has left in a weight, and the sparse format that makes use of them.

Bits per weight, with a share d of the weights not zero, or b of the blocks (formats.md):

    bits   anywhere              two of every four   blocks of 16 outputs x 1 input
     8     w8a8g64_sp  1.25+8 d  w8a8g64_24  5.25    w8a8_b16x1  0.06 + 8 b
     4     w4a8g64_sp  1.25+4 d  w4a8g64_24  3.25

A weight with a grid of its own takes the formats of that width on whose grid its codes are, where
they are smaller than the dense format: not a weight changes. Floats are rounded to w8a8g32, and
take w8a8g64_sp or w8a8g64_24, a scale per 64 inputs instead of 32, only where that is less than
three quarters of the bytes. `w8a8_b16x1`, with one scale per row, is for weights that have no more.
Of those that pay (`breakeven.py`) the smallest is taken; a pattern even where zeros anywhere would
be up to a tenth smaller, since its kernels count no bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lacewing.checkpoint.breakeven import break_even
from lacewing.checkpoint.interrupts import uninterrupted
from lacewing.checkpoint.tensors import FLOATS_TO, TABLES, SourceTensor
from lacewing.formats import Format, PackedTensor, get_format
from lacewing.formats.base import ROW, as_weight, row_chunks
from lacewing.formats.tiles import STRIP

__all__ = ["Pattern", "Sparser", "find_sparser", "pattern_of", "sparse_format"]

Array = npt.NDArray[Any]

_FORMATS = {
    8: ("w8a8g64_sp", "w8a8g64_24", "w8a8_b16x1"),
    4: ("w4a8g64_sp", "w4a8g64_24"),
}
_OF_FLOATS = ("w8a8g64_sp", "w8a8g64_24")
_LESS = 0.75
"""Share of the bytes of the dense format below which floats take larger groups for their zeros."""
_ANYWHERE = 1.1
"""How much larger than it is a format counts that takes zeros anywhere."""
_MARGIN = 0.05
"""How much sparser a weight may be than three strips of its rows."""


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

    def with_more_zeros(self, share: float) -> Pattern:
        """With this share of all weights, and of all blocks, zero in addition."""
        fewer = round(share * self.weights)
        return replace(
            self,
            nonzero=max(self.nonzero - fewer, 0),
            in_blocks=max(self.in_blocks - fewer, 0),
        )

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
            kinds.append(f"{1 - self.block_density:.0%} of the 16x1 blocks")
        return ", ".join(kinds)


_NONE = Pattern(0, 0, 0, 0)


def pattern_of(weight: npt.ArrayLike) -> Pattern:
    """The zeros of a weight `[n, k]`, a numpy array or a torch tensor. Raises FormatError for
    something else."""
    rows = as_weight(weight)
    n, k = rows.shape
    return sum((_pattern(rows[begin:end] != 0) for begin, end in row_chunks(n, k)), _NONE)


def _pattern(present: Array) -> Pattern:
    """Of whole strips of rows `[r, k]`, true where a weight is not zero."""
    r, k = present.shape
    first = np.arange(0, r, STRIP)
    blocks = np.logical_or.reduceat(present, first, axis=0).sum(axis=1)
    heights = np.minimum(STRIP, r - first)
    fours = np.add.reduceat(present, np.arange(0, k, 4), axis=1, dtype=np.uint8)
    return Pattern(r * k, int(present.sum()), int(heights @ blocks), int(fours.max()))


def sparse_format(
    pattern: Pattern, own_format: str | None = None, machine: str | None = None
) -> str | None:
    """The sparse format that `auto` takes for a weight with these zeros: one that is smaller than
    the dense format that it would take otherwise, and on this class of machines faster than the
    dense one of its width. None if there is none.

    own_format: the format whose grid the weight's codes are on; None for floats. machine: as in
    `convert`.
    """
    sizes = {}
    for kind in _kinds(own_format):
        density, size = _size(kind, pattern)
        if density < break_even(kind, machine) and size < _most_bits(own_format):
            sizes[kind.name] = size * (_ANYWHERE if kind.name.endswith("_sp") else 1)
    return min(sizes, key=lambda name: sizes[name]) if sizes else None


def _kinds(own_format: str | None) -> list[Format]:
    """The sparse formats that a weight may be in."""
    if own_format is None:
        return [get_format(name) for name in _OF_FLOATS]
    own = get_format(own_format)
    if not own.holds_zero or own.sparse:
        return []
    kinds = [get_format(name) for name in _FORMATS.get(own.weight_bits, ())]
    return [kind for kind in kinds if own.group_size % kind.group_size == 0]


def _most_bits(own_format: str | None) -> float:
    """Bits per weight that a sparse format must stay below."""
    dense = get_format(own_format or FLOATS_TO)
    scale = 0 if dense.group_size == ROW else 16 / dense.group_size
    return (dense.weight_bits + scale) * _share(own_format)


def _share(own_format: str | None) -> float:
    return _LESS if own_format is None else 1.0


def _size(kind: Format, pattern: Pattern) -> tuple[float, float]:
    """Share of the weights that are stored, and bits per weight."""
    if kind.name.endswith("_b16x1"):
        return pattern.block_density, 1 / STRIP + kind.weight_bits * pattern.block_density
    scale = 16 / kind.group_size
    if kind.fixed_sparsity is not None:
        size = 1 + kind.weight_bits * (1 - kind.fixed_sparsity) + scale
        return (pattern.density, size) if pattern.two_of_four else (1.0, float("inf"))
    return pattern.density, 1 + kind.weight_bits * pattern.density + scale


# -- tensors of files -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sparser:
    """A tensor that packs smaller without its zeros."""

    tensor: SourceTensor
    kind: Format
    pattern: Pattern
    most_bytes: float
    """What it must stay below when it is packed."""

    def pays(self, packed: PackedTensor, density: float, machine: str | None) -> bool:
        """density: share of the weights that are stored."""
        return packed.nbytes < self.most_bytes and density < break_even(self.kind, machine)


def find_sparser(
    tensor: SourceTensor, machine: str | None, pool: ThreadPoolExecutor
) -> Sparser | None:
    """The tensor in the sparse format that `auto` takes, where it has the zeros for it; None where
    it has not, for a vector, and for embedding and head.

    Reads three strips of rows, and all of them, a run at a time, where these have nearly as many
    zeros as it takes.
    """
    if len(tensor.shape) != 2 or tensor.name in TABLES or not _can_be_sparse(tensor):
        return None
    own = tensor.own_format
    if sparse_format(_sample(tensor).with_more_zeros(_MARGIN), own, machine) is None:
        return None
    n, k = tensor.shape
    with uninterrupted():
        runs = pool.map(lambda run: _pattern(tensor.nonzero(*run)), row_chunks(n, k))
    pattern = sum(runs, _NONE)
    tensor.release()
    name = sparse_format(pattern, own, machine)
    if name is None:
        return None
    most = _share(own) * sum(
        size or 0 for size in get_format(own or FLOATS_TO).expected_part_bytes(n, k).values()
    )
    return Sparser(tensor.with_format(name), get_format(name), pattern, most)


def _can_be_sparse(tensor: SourceTensor) -> bool:
    """Whether it is of floats, or its codes can be had in a sparse format: not of packed ones."""
    kinds = _kinds(tensor.own_format)
    return tensor.own_format is None or any(
        tensor.with_format(kind.name).own_format == kind.name for kind in kinds
    )


def _sample(tensor: SourceTensor) -> Pattern:
    return sum((_pattern(tensor.nonzero(*run)) for run in _strips(tensor.shape[0])), _NONE)


def _strips(n: int) -> Iterator[tuple[int, int]]:
    """The first strip of rows, one from the middle, and the last."""
    count = -(-n // STRIP)
    for strip in sorted({0, count // 2, count - 1}):
        yield strip * STRIP, min((strip + 1) * STRIP, n)

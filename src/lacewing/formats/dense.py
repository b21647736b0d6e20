"""w8a8 and w4a8: dense symmetric integer weights, one f16 scale per output and group or row."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lacewing.formats.base import ROW, Codes, Format, PackedTensor, aligned_empty, row_chunks
from lacewing.formats.scales import check_scale_range, symmetric_grid
from lacewing.formats.tiles import (
    STRIP,
    from_nibbles,
    from_strips,
    from_tiles,
    strips,
    to_nibbles,
    to_strips,
    to_tiles,
)

__all__ = ["CODES_AND_SCALES", "W4", "W8", "Dense", "DenseSymmetric", "Symmetric", "grouped"]

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]

CODES_AND_SCALES: Mapping[str, np.dtype[Any]] = {
    "codes": np.dtype(np.uint8),
    "scales": np.dtype(np.float16),
}


def grouped(rows: F32, group: int) -> Iterator[tuple[slice, slice, F32]]:
    """The groups of `rows` `[r, k]`: the columns and groups of a row that a part covers, and its
    groups as `[r * count, size]`. A short last group comes on its own: what would fill it up must
    not weigh in its scale."""
    k = rows.shape[1]
    whole = k // group
    for begin, end, count in ((0, whole * group, whole), (whole * group, k, 1)):
        if begin < end:
            part = rows[:, begin:end].reshape(len(rows) * count, -1)
            yield slice(begin, end), slice(begin // group, begin // group + count), part


class Dense(Format):
    """A format whose parts are arrays with one entry per strip, so that strips are independent."""

    def pack(self, codes: Codes) -> PackedTensor:
        n, k = self.check_codes(codes)
        parts = {
            name: aligned_empty(shape, self.part_dtypes[name])
            for name, shape in self.part_shapes(n, k).items()
        }
        for begin, end in row_chunks(n, k):
            strip = slice(begin // STRIP, strips(end))
            for name, part in self._pack_rows(codes.rows(begin, end)).items():
                parts[name][strip] = part
        return PackedTensor(self.name, (n, k), parts)

    def unpack(self, packed: PackedTensor) -> Codes:
        self.validate(packed)
        n, k = packed.shape
        out = self.empty_codes(n, k)
        for begin, end in row_chunks(n, k):
            strip = slice(begin // STRIP, strips(end))
            views = {name: part[strip] for name, part in packed.parts.items()}
            self._unpack_rows(views, out.rows(begin, end))
        return out

    @abstractmethod
    def _pack_rows(self, codes: Codes) -> dict[str, Array]:
        """The parts of whole strips of outputs."""

    @abstractmethod
    def _unpack_rows(self, parts: Mapping[str, Array], out: Codes) -> None:
        """Fills `out` from the parts of its strips."""


class Symmetric(Format):
    """`weight = scale * (code - zero_point)`: what dense and sparse symmetric formats share."""

    def __init__(self, bits: int, group: int) -> None:
        self.weight_bits = bits
        self.group_size = group
        self.input_multiple = 64 if group == ROW else group
        self.zero_point = 1 << (bits - 1)
        self.name = f"w{bits}a8" if group == ROW else f"w{bits}a8g{group}"

    def _round_rows(self, rows: F32, out: Codes, first_row: int) -> None:
        assert out.scales is not None
        check_scale_range(self.name, np.abs(rows), (1 << (self.weight_bits - 1)) - 1, first_row)
        r, k = rows.shape
        for columns, groups, part in grouped(rows, self.group(k)):
            q, scale = symmetric_grid(part, self.weight_bits, odd=self.code_step == 2)
            out.q[:, columns] = q.reshape(r, -1)
            out.scales[:, groups] = scale.reshape(r, -1)


class DenseSymmetric(Symmetric, Dense):
    """Parts `codes` and `scales`, f16 `[S][groups][16]`; the order of codes is the formats' own."""

    part_dtypes = CODES_AND_SCALES

    def part_shapes(self, n: int, k: int) -> dict[str, tuple[int, ...]]:
        count = strips(n)
        return {
            "codes": (count, *self._codes_shape(k)),
            "scales": (count, self.groups(k), STRIP),
        }

    def _pack_rows(self, codes: Codes) -> dict[str, Array]:
        assert codes.scales is not None
        tiles = to_tiles(codes.q, self.k_pad(codes.shape[1]), self.padding)
        return {"codes": self._pack_tiles(tiles), "scales": to_strips(codes.scales)}

    def _unpack_rows(self, parts: Mapping[str, Array], out: Codes) -> None:
        assert out.scales is not None
        n, k = out.shape
        out.q[:] = from_tiles(self._unpack_tiles(parts["codes"]), n, k)
        out.scales[:] = from_strips(parts["scales"], n)

    @abstractmethod
    def _codes_shape(self, k: int) -> tuple[int, ...]:
        """Shape of the codes of one strip."""

    @abstractmethod
    def _pack_tiles(self, tiles: U8) -> U8:
        """Blocks of codes `[S, k_pad/4, 16, 4]` as they are stored."""

    @abstractmethod
    def _unpack_tiles(self, codes: U8) -> U8:
        """The inverse of `_pack_tiles`."""


class W8(DenseSymmetric):
    """Part `codes`: uint8 `[S][k_pad/4][16][4]`. Part `scales`: f16 `[S][k_pad/G][16]`, or
    `[S][1][16]` in w8a8."""

    def __init__(self, group: int) -> None:
        super().__init__(8, group)

    def _codes_shape(self, k: int) -> tuple[int, ...]:
        return (self.k_pad(k) // 4, STRIP, 4)

    def _pack_tiles(self, tiles: U8) -> U8:
        return tiles

    def _unpack_tiles(self, codes: U8) -> U8:
        return codes


class W4(DenseSymmetric):
    """Part `codes`: uint8 `[S][k_pad/8][16][4]`, byte `[o][i]` of block b holds the code of input
    `8b + i` in its low and of input `8b + 4 + i` in its high nibble. Part `scales`: f16
    `[S][k_pad/G][16]`."""

    def __init__(self, group: int) -> None:
        super().__init__(4, group)

    def _codes_shape(self, k: int) -> tuple[int, ...]:
        return (self.k_pad(k) // 8, STRIP, 4)

    def _pack_tiles(self, tiles: U8) -> U8:
        return to_nibbles(tiles)

    def _unpack_tiles(self, codes: U8) -> U8:
        return from_nibbles(codes)

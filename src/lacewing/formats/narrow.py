"""w3a8, w2a8 and w1.6a8: dense symmetric weights of three bits and less."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lacewing.formats.base import ROW, Codes
from lacewing.formats.dense import DenseSymmetric
from lacewing.formats.scales import check_scale_range, ternary_grid
from lacewing.formats.tiles import STRIP, from_fields, to_fields

__all__ = ["W2", "W3", "Ternary"]

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

TRITS = 5
"""Codes per byte of a ternary weight."""


class W3(DenseSymmetric):
    """Part `codes`: uint8 `[S][k_pad/G][3G/32][16][4]`. Per group first the third bits, byte
    `[o][i]` of vector v holding that of input `32v + 4j + i` in its bit j, then the lower two bits
    as in w2a8. Part `scales`: f16 `[S][k_pad/G][16]`."""

    def __init__(self, group: int) -> None:
        super().__init__(3, group)

    def _codes_shape(self, k: int) -> tuple[int, ...]:
        return (self.groups(k), 3 * self.group_size // 32, STRIP, 4)

    def _pack_tiles(self, tiles: U8) -> U8:
        count = len(tiles)
        groups = tiles.reshape(-1, self.group_size // 4, STRIP, 4)
        planes = [to_fields(groups >> np.uint8(2), 1), to_fields(groups & np.uint8(3), 2)]
        codes: U8 = np.concatenate(planes, axis=1)
        return codes.reshape(count, -1, *codes.shape[1:])

    def _unpack_tiles(self, codes: U8) -> U8:
        count = len(codes)
        groups = codes.reshape(-1, *codes.shape[2:])
        third = self.group_size // 32
        tiles = from_fields(groups[:, :third], 1) << np.uint8(2)
        tiles |= from_fields(groups[:, third:], 2)
        return tiles.reshape(count, -1, STRIP, 4)


class W2(DenseSymmetric):
    """`weight = scale * (2 * code - 3)`: the levels are -3, -1, 1 and 3.

    Part `codes`: uint8 `[S][k_pad/16][16][4]`, byte `[o][i]` of vector v holds the code of input
    `16v + 4j + i` in its bits 2j and 2j + 1. Part `scales`: f16 `[S][k_pad/G][16]`."""

    code_step = 2

    def __init__(self, group: int) -> None:
        super().__init__(2, group)
        self.zero_point = 3

    def _codes_shape(self, k: int) -> tuple[int, ...]:
        return (self.k_pad(k) // 16, STRIP, 4)

    def _pack_tiles(self, tiles: U8) -> U8:
        return to_fields(tiles, 2)

    def _unpack_tiles(self, codes: U8) -> U8:
        return from_fields(codes, 2)


class Ternary(DenseSymmetric):
    """`weight = scale * (code - 1)` with codes 0, 1, 2 and one scale per row.

    Part `codes`: uint8 `[S][k_pad/20][16][4]`, k_pad a multiple of 320. Byte `[o][i]` of vector v
    holds the codes c_j of the inputs `20v + 4j + i`, j = 0..4, as a fraction in base 3, rounded up:
    `ceil(256 / 243 * (81 c_0 + 27 c_1 + 9 c_2 + 3 c_3 + c_4))`. Three times the byte is c_0 in the
    upper, and the fraction of the others in the lower byte. Part `scales`: f16 `[S][1][16]`."""

    def __init__(self) -> None:
        super().__init__(2, ROW)
        self.name = "w1.6a8"
        self.zero_point = 1
        self.input_multiple = 320

    @property
    def max_code(self) -> int:
        return 2

    def _round_rows(self, rows: F32, out: Codes, first_row: int) -> None:
        assert out.scales is not None
        check_scale_range(self.name, np.abs(rows), 1, first_row)
        q, scale = ternary_grid(rows)
        out.q[:] = q
        out.scales[:, 0] = scale

    def _codes_shape(self, k: int) -> tuple[int, ...]:
        return (self.k_pad(k) // (4 * TRITS), STRIP, 4)

    def _pack_tiles(self, tiles: U8) -> U8:
        value: Any = np.zeros((len(tiles), tiles.shape[1] // TRITS, STRIP, 4), np.uint16)
        for j in range(TRITS):
            value *= np.uint16(3)
            value += tiles[:, j::TRITS]
        value *= np.uint16(256)
        value += np.uint16(242)
        value //= np.uint16(243)
        codes: U8 = value.astype(np.uint8)
        return codes

    def _unpack_tiles(self, codes: U8) -> U8:
        tiles = np.empty((len(codes), codes.shape[1] * TRITS, STRIP, 4), np.uint8)
        rest = codes.astype(np.uint16)
        for j in range(TRITS):
            rest *= np.uint16(3)
            tiles[:, j::TRITS] = rest >> np.uint16(8)
            rest &= np.uint16(255)
        return tiles

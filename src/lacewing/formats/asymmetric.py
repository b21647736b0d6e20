"""w4a8g32z and w5a8g32z: dense weights with a scale and a minimum per output and group of 32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lacewing.formats.base import Codes
from lacewing.formats.dense import CODES_AND_SCALES, Dense, grouped
from lacewing.formats.scales import asymmetric_grid, check_scale_range
from lacewing.formats.tiles import (
    STRIP,
    bits_from_words,
    bits_to_words,
    from_nibbles,
    from_strips,
    from_tiles,
    strips,
    to_nibbles,
    to_strips,
    to_tiles,
)

__all__ = ["W4z", "W5z"]

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]

BIT_BYTES = 64
GROUP_BYTES = 320
"""One group of 32 inputs of a strip in five bits: 64 bytes of fifth bits, 256 of nibbles."""


class Asymmetric(Dense):
    """`weight = scale * code + min`. Part `scales`: f16 `[S][k_pad/32][2][16]`, scales first."""

    group_size = 32
    input_multiple = 32
    zero_point = 0
    asymmetric = True
    part_dtypes = CODES_AND_SCALES

    def _round_rows(self, rows: F32, out: Codes, first_row: int) -> None:
        assert out.scales is not None
        assert out.mins is not None
        check_scale_range(self.name, np.abs(rows), 1, first_row)
        r = len(rows)
        for columns, groups, part in grouped(rows, self.group_size):
            q, scale, low = asymmetric_grid(part, self.weight_bits)
            out.q[:, columns] = q.reshape(r, -1)
            out.scales[:, groups] = scale.reshape(r, -1)
            out.mins[:, groups] = low.reshape(r, -1)

    def _scales_shape(self, n: int, k: int) -> tuple[int, ...]:
        return (strips(n), self.groups(k), 2, STRIP)

    def _pack_scales(self, codes: Codes) -> Array:
        assert codes.scales is not None
        assert codes.mins is not None
        return np.stack([to_strips(codes.scales), to_strips(codes.mins)], axis=2)

    def _unpack_scales(self, scales: Array, out: Codes) -> None:
        assert out.scales is not None
        assert out.mins is not None
        n = out.shape[0]
        out.scales[:] = from_strips(scales[:, :, 0], n)
        out.mins[:] = from_strips(scales[:, :, 1], n)


class W4z(Asymmetric):
    """Part `codes` as in w4a8g32."""

    name = "w4a8g32z"
    weight_bits = 4

    def part_shapes(self, n: int, k: int) -> dict[str, tuple[int, ...]]:
        return {
            "codes": (strips(n), self.k_pad(k) // 8, STRIP, 4),
            "scales": self._scales_shape(n, k),
        }

    def _pack_rows(self, codes: Codes) -> dict[str, Array]:
        tiles = to_tiles(codes.q, self.k_pad(codes.shape[1]), 0)
        return {"codes": to_nibbles(tiles), "scales": self._pack_scales(codes)}

    def _unpack_rows(self, parts: Mapping[str, Array], out: Codes) -> None:
        out.q[:] = from_tiles(from_nibbles(parts["codes"]), *out.shape)
        self._unpack_scales(parts["scales"], out)


class W5z(Asymmetric):
    """Part `codes`: uint8 `[S][k_pad/32][320]`. Per group 64 bytes of fifth bits (for each of its
    8 VNNI blocks a little-endian 64-bit word, bit `4 * o + i`), then 4 nibble blocks as in w4a8."""

    name = "w5a8g32z"
    weight_bits = 5

    def part_shapes(self, n: int, k: int) -> dict[str, tuple[int, ...]]:
        return {
            "codes": (strips(n), self.groups(k), GROUP_BYTES),
            "scales": self._scales_shape(n, k),
        }

    def _pack_rows(self, codes: Codes) -> dict[str, Array]:
        tiles = to_tiles(codes.q, self.k_pad(codes.shape[1]), 0)
        shape = (tiles.shape[0], self.groups(codes.shape[1]))
        out = np.empty((*shape, GROUP_BYTES), np.uint8)
        out[..., :BIT_BYTES] = bits_to_words(tiles >> np.uint8(4)).reshape(*shape, -1)
        out[..., BIT_BYTES:] = to_nibbles(tiles & np.uint8(15)).reshape(*shape, -1)
        return {"codes": out, "scales": self._pack_scales(codes)}

    def _unpack_rows(self, parts: Mapping[str, Array], out: Codes) -> None:
        groups = parts["codes"]
        count = groups.shape[0]
        words = groups[..., :BIT_BYTES].reshape(count, -1, 8)
        tiles = bits_from_words(words) << np.uint8(4)
        tiles |= from_nibbles(groups[..., BIT_BYTES:].reshape(count, -1, STRIP, 4))
        out.q[:] = from_tiles(tiles, *out.shape)
        self._unpack_scales(parts["scales"], out)

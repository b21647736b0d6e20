"""w8a8g64_24 and w4a8g64_24: of every four consecutive inputs of an output two weights are kept.

Part `records`: uint8 `[S][k_pad/64][672]` (4 bits: 416), one record per strip and group of 64:

    codes   w8: 512 B, two codes per output for each of the 16 VNNI blocks of the group
            w4: 256 B, those of blocks 0..7 in the low nibbles, of blocks 8..15 in the high ones
    128 B   bitmaps: for each of the 16 blocks a little-endian 64-bit word, whose bit 4*o + i is set
            where the weight of output o and input 4b + i is stored: two bits in every four
    32 B    f16 scales[16]

Where fewer than two of four weights are not zero, the first absent ones are stored as the zero
point: records of one size need no offsets, and a kernel no count of bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lacewing.errors import FormatError
from lacewing.formats.base import Codes, PackedTensor, row_chunks
from lacewing.formats.dense import Dense, Symmetric
from lacewing.formats.prune import largest_of
from lacewing.formats.tiles import (
    STRIP,
    ceil_to,
    from_strips,
    from_tiles,
    strips,
    to_strips,
    to_tiles,
)

__all__ = ["W4of24", "W8of24"]

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]
Array = npt.NDArray[Any]

RECORDS: Mapping[str, np.dtype[Any]] = {"records": np.dtype(np.uint8)}
KEPT, OF = 2, 4
GROUP = 64
BLOCKS = GROUP // OF
BITMAP_BYTES = STRIP * GROUP // 8
SCALE_BYTES = 2 * STRIP


class Of24(Symmetric, Dense):
    """What both widths share; how the codes of a record are stored is theirs."""

    sparse = True
    fixed_sparsity = 1 - KEPT / OF
    part_dtypes = RECORDS

    def __init__(self, bits: int) -> None:
        super().__init__(bits, GROUP)
        self.name += "_24"
        self.code_bytes = STRIP * GROUP * KEPT // OF * bits // 8
        self.record_bytes = self.code_bytes + BITMAP_BYTES + SCALE_BYTES

    def part_shapes(self, n: int, k: int) -> dict[str, tuple[int, ...]]:
        return {"records": (strips(n), self.groups(k), self.record_bytes)}

    def mask(self, rows: F32, sparsity: float | None) -> Bools:
        """The two of largest magnitude in every four; of equal ones the later stay."""
        if sparsity not in (None, self.fixed_sparsity):
            raise FormatError(
                f"{self.name} drops exactly half of the weights, got sparsity {sparsity:g}",
                hint=f"leave the sparsity out, or use `{self.name.removesuffix('_24')}_sp`",
            )
        return largest_of(rows, KEPT, OF)

    def pack(self, codes: Codes) -> PackedTensor:
        n, k = self.check_codes(codes)
        for begin, end in row_chunks(n, k):
            count = _fours(codes.q[begin:end] != self.zero_point).sum(axis=2, dtype=np.uint8)
            full = np.argwhere(count > KEPT)
            if full.size:
                row, four = full[0]
                raise FormatError(
                    f"{self.name} holds {KEPT} of {OF} consecutive weights, got {count[row, four]}"
                    f" in row {begin + row}, inputs {OF * four}..{min(OF * four + OF, k) - 1}",
                    hint="`Format.round` prunes to the pattern",
                )
        return super().pack(codes)

    def _pack_rows(self, codes: Codes) -> dict[str, Array]:
        assert codes.scales is not None
        tiles = to_tiles(codes.q, self.k_pad(codes.shape[1]), self.zero_point)
        shape = (tiles.shape[0], tiles.shape[1] // BLOCKS)
        present = _two_set(tiles != self.zero_point)
        kept = tiles[present].reshape(*shape, BLOCKS, -1)
        bitmaps = np.packbits(present.reshape(*shape, -1), axis=2, bitorder="little")
        scales = to_strips(codes.scales).view(np.uint8)
        return {"records": np.concatenate([self._store(kept), bitmaps, scales], axis=2)}

    def _unpack_rows(self, parts: Mapping[str, Array], out: Codes) -> None:
        assert out.scales is not None
        n, k = out.shape
        records = parts["records"]
        count, groups = records.shape[:2]
        bitmaps = records[..., self.code_bytes : self.code_bytes + BITMAP_BYTES]
        bits = np.unpackbits(bitmaps, axis=2, bitorder="little")
        present = bits.view(np.bool_).reshape(count, groups * BLOCKS, STRIP, OF)
        if (present.sum(axis=3) != KEPT).any():
            strip, block, o = np.argwhere(present.sum(axis=3) != KEPT)[0]
            raise FormatError(
                f"{self.name} bitmaps must have {KEPT} of every {OF} bits set, got"
                f" {int(present[strip, block, o].sum())} in block {block}, output {o} of a strip"
            )
        tiles = np.full(present.shape, self.zero_point, np.uint8)
        tiles[present] = self._load(records[..., : self.code_bytes]).reshape(-1)
        out.q[:] = from_tiles(tiles, n, k)
        scales = np.ascontiguousarray(records[..., -SCALE_BYTES:]).view(np.float16)
        out.scales[:] = from_strips(scales, n)

    def _store(self, kept: U8) -> U8:
        """Codes `[S, groups, 16, 32]` as bytes `[S, groups, code_bytes]`."""
        return kept.reshape(*kept.shape[:2], -1)

    def _load(self, stored: U8) -> U8:
        """The inverse of `_store`."""
        return stored


class W8of24(Of24):
    """Eight bits per weight that is kept."""

    def __init__(self) -> None:
        super().__init__(8)


class W4of24(Of24):
    """Four bits per weight that is kept."""

    def __init__(self) -> None:
        super().__init__(4)

    def _store(self, kept: U8) -> U8:
        half = BLOCKS // 2
        out: U8 = kept[:, :, :half] | kept[:, :, half:] << np.uint8(4)
        return out.reshape(*kept.shape[:2], -1)

    def _load(self, stored: U8) -> U8:
        return np.concatenate([stored & np.uint8(15), stored >> np.uint8(4)], axis=2)


def _fours(flags: Bools) -> Bools:
    """`[r, k]` as `[r, ceil(k / 4), 4]`, False past the end."""
    r, k = flags.shape
    out = np.zeros((r, ceil_to(k, OF)), np.bool_)
    out[:, :k] = flags
    return out.reshape(r, -1, OF)


def _two_set(present: Bools) -> Bools:
    """`present` `[..., 4]` with the first absent weights added until two of four are set."""
    missing = KEPT - present.sum(axis=-1, keepdims=True, dtype=np.int8)
    absent = ~present
    added = absent & (np.cumsum(absent, axis=-1, dtype=np.int8) <= missing)
    out: Bools = present | added
    return out

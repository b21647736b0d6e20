"""bf16_sp, w8a8g64_sp and w4a8g64_sp: unstructured sparse weights, one stream of records.

Part `stream`: a strip of 16 outputs is a run of records, one per 64 inputs, back to back:

    32 B    f16 scales[16] of the group (not in bf16_sp)
    128 B   bitmaps: for each of the 16 VNNI blocks of the group a little-endian 64-bit word, whose
            bit 4*o + i is set where the weight of output o and input 4b + i is not zero;
            bf16: for each of 32 blocks a 32-bit word, bit 2*o + i for input 2b + i
    values  bf16: two bytes per set bit, in block order, then ascending bit order
            w8: one byte per set bit, in the same order
            w4: two cursors over the same bytes: blocks 0..7 fill the low nibbles, blocks 8..15 the
            high nibbles; as many bytes as the longer of the two needs
    padded with a zero byte to an even length

Padding and part `offsets`: `stream.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from lacewing.errors import FormatError
from lacewing.formats.base import Codes
from lacewing.formats.bf16 import Bf16
from lacewing.formats.dense import Symmetric
from lacewing.formats.stream import STREAM_AND_OFFSETS, Stream
from lacewing.formats.tiles import STRIP, from_tiles, to_strips, to_tiles

__all__ = ["Bf16sp", "Records", "W4sp", "W8sp"]

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Array = npt.NDArray[Any]

RECORD_INPUTS = 64
RECORD_ITEMS = STRIP * RECORD_INPUTS
SCALE_BYTES = 2 * STRIP
BITMAP_BYTES = RECORD_ITEMS // 8
NEGATIVE_ZERO = 0x8000
"""-0.0 in bf16: rounding makes it +0.0, which is not stored."""


class Records(Stream):
    """What the unstructured formats share; how values are stored is theirs."""

    @property
    def _head_bytes(self) -> int:
        """Bytes of a record before its values."""
        return BITMAP_BYTES + (SCALE_BYTES if self.group_size else 0)

    def _records(self, k: int) -> int:
        """Records per strip."""
        return self.k_pad(k) // RECORD_INPUTS

    def _least_bytes(self, k: int) -> int:
        return self._records(k) * self._head_bytes

    # -- packing --------------------------------------------------------------------------------

    def _pack_strips(self, codes: Codes) -> tuple[U8, I64]:
        k = codes.shape[1]
        tiles = to_tiles(codes.q, self.k_pad(k), self.zero_point)
        count, records = tiles.shape[0], self._records(k)
        items = tiles.reshape(count * records, RECORD_ITEMS)
        present = items != self.zero_point
        length = self._head_bytes + self._value_bytes(present).reshape(count, records)
        sizes = _ceil_to_64(length.sum(axis=1))
        first = np.cumsum(sizes) - sizes
        starts = (first[:, None] + np.cumsum(length, axis=1) - length).reshape(-1)
        out = np.zeros(int(sizes.sum()), np.uint8)
        head = np.packbits(present, axis=1, bitorder="little")
        if codes.scales is not None:
            scales = to_strips(codes.scales).reshape(-1, STRIP).view(np.uint8)
            head = np.concatenate([scales, head], axis=1)
        out[starts[:, None] + np.arange(self._head_bytes)] = head
        self._store_values(out, starts + self._head_bytes, items, present)
        return out, sizes

    @abstractmethod
    def _value_bytes(self, present: Bools) -> I64:
        """Bytes of values of records `[r, 1024]`, padded to even."""

    @abstractmethod
    def _store_values(self, out: U8, at: I64, items: Array, present: Bools) -> None:
        """Writes the values of records `[r, 1024]` to `out`, record i from byte `at[i]`."""

    @abstractmethod
    def _load_values(self, stream: U8, at: I64, present: Bools) -> Array:
        """The items `[r, 1024]` of records whose values begin at bytes `at`."""

    # -- unpacking ------------------------------------------------------------------------------

    def _unpack_strips(self, stream: U8, offsets: I64, first_strip: int, out: Codes) -> None:
        n, k = out.shape
        count, records, head = len(offsets) - 1, self._records(k), self._head_bytes
        starts = np.empty((count, records), np.int64)
        at = offsets[:-1].copy()
        ends = offsets[1:]
        for j in range(records):  # records follow each other; strips are independent
            starts[:, j] = at
            self._check_inside(at + head, ends, first_strip, j)
            present = _bitmaps(stream, at + head - BITMAP_BYTES)
            at = at + head + self._value_bytes(present)
            self._check_inside(at, ends, first_strip, j)
        if (_ceil_to_64(at) != ends).any():
            strip = int(np.flatnonzero(_ceil_to_64(at) != ends)[0])
            raise FormatError(
                f"{self.name} strip {first_strip + strip} must end at byte"
                f" {_ceil_to_64(at)[strip]}, its offset says {ends[strip]}"
            )
        flat = starts.reshape(-1)
        if out.scales is not None:
            scales = stream[flat[:, None] + np.arange(SCALE_BYTES)].view(np.float16)
            rows = scales.reshape(count, records, STRIP).transpose(0, 2, 1)
            out.scales[:] = rows.reshape(count * STRIP, records)[:n]
        present = _bitmaps(stream, flat + head - BITMAP_BYTES)
        items = self._load_values(stream, flat + head, present)
        if (items[present] == self.zero_point).any():
            raise FormatError(
                f"{self.name} strips {first_strip}..{first_strip + count - 1} store zeros"
                " explicitly: absent weights must not be in the bitmap"
            )
        out.q[:] = from_tiles(items.reshape(count, -1, STRIP, 4 // items.itemsize), n, k)

    def _check_inside(self, at: I64, ends: I64, first_strip: int, record: int) -> None:
        beyond = np.flatnonzero(at > ends)
        if beyond.size:
            raise FormatError(
                f"{self.name} record {record} of strip {first_strip + beyond[0]} ends"
                f" {at[beyond[0]] - ends[beyond[0]]} bytes beyond its strip"
            )


class Bf16sp(Records, Bf16):
    """The two bytes of every non-zero bf16. Multiplied as bf16 with the zeros in their places."""

    name = "bf16_sp"
    part_dtypes = STREAM_AND_OFFSETS
    input_multiple = RECORD_INPUTS

    def _round_rows(self, rows: F32, out: Codes, first_row: int) -> None:
        super()._round_rows(rows, out, first_row)
        out.q[out.q == NEGATIVE_ZERO] = 0

    def _value_bytes(self, present: Bools) -> I64:
        count: I64 = present.sum(axis=1, dtype=np.int64)
        return 2 * count

    def _store_values(self, out: U8, at: I64, items: Array, present: Bools) -> None:
        out.view(np.uint16)[_places(at // 2, present)] = items[present]

    def _load_values(self, stream: U8, at: I64, present: Bools) -> Array:
        items = np.zeros(present.shape, np.uint16)
        values = stream[: len(stream) // 2 * 2].view(np.uint16)
        items[present] = values[_places(at // 2, present)]
        return items


class SparseCodes(Records, Symmetric):
    """The sparse integer formats: `weight = scale * (code - zero_point)`."""

    def __init__(self, bits: int, group: int) -> None:
        assert group == RECORD_INPUTS
        super().__init__(bits, group)
        self.name += "_sp"


class W8sp(SparseCodes):
    """Eight bits per non-zero weight."""

    def __init__(self, group: int) -> None:
        super().__init__(8, group)

    def _value_bytes(self, present: Bools) -> I64:
        return _even(present.sum(axis=1, dtype=np.int64))

    def _store_values(self, out: U8, at: I64, items: U8, present: Bools) -> None:
        out[_places(at, present)] = items[present]

    def _load_values(self, stream: U8, at: I64, present: Bools) -> U8:
        items = np.full(present.shape, self.zero_point, np.uint8)
        items[present] = stream[_places(at, present)]
        return items


class W4sp(SparseCodes):
    """Four bits per non-zero weight."""

    def __init__(self, group: int) -> None:
        super().__init__(4, group)
        self.half = RECORD_ITEMS // 2

    def _value_bytes(self, present: Bools) -> I64:
        low = present[:, : self.half].sum(axis=1, dtype=np.int64)
        high = present[:, self.half :].sum(axis=1, dtype=np.int64)
        return _even(np.maximum(low, high))

    def _store_values(self, out: U8, at: I64, items: U8, present: Bools) -> None:
        low, high = present[:, : self.half], present[:, self.half :]
        out[_places(at, low)] = items[:, : self.half][low]
        out[_places(at, high)] |= items[:, self.half :][high] << np.uint8(4)

    def _load_values(self, stream: U8, at: I64, present: Bools) -> U8:
        low, high = present[:, : self.half], present[:, self.half :]
        items = np.full(present.shape, self.zero_point, np.uint8)
        items[:, : self.half][low] = stream[_places(at, low)] & np.uint8(15)
        items[:, self.half :][high] = stream[_places(at, high)] >> np.uint8(4)
        return items


def _bitmaps(stream: U8, at: I64) -> Bools:
    """Which items `[r, 1024]` are present, of the records whose bitmaps begin at bytes `at`."""
    words = stream[at[:, None] + np.arange(BITMAP_BYTES)]
    return np.unpackbits(words, axis=1, bitorder="little").view(np.bool_)


def _places(at: I64, present: Bools) -> I64:
    """Where each present item of records `[r, items]` lies: consecutive places from `at[i]`."""
    count = present.sum(axis=1, dtype=np.int64)
    before = np.cumsum(count) - count
    places: I64 = np.repeat(at - before, count)
    places += np.arange(len(places))
    return places


def _even(count: I64) -> I64:
    out: I64 = count + (count & 1)
    return out


def _ceil_to_64(at: I64) -> I64:
    out: I64 = -(-at // 64) * 64
    return out

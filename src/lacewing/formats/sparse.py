"""w8a8g64_sp and w4a8g64_sp: unstructured sparse integer weights, one stream of records.

Part `stream`: a strip of 16 outputs is a run of records, one per group of 64 inputs, back to back:

    32 B    f16 scales[16]
    128 B   bitmaps: for each of the 16 VNNI blocks of the group a little-endian 64-bit word, whose
            bit 4*o + i is set where the weight of output o and input 4b + i is not zero
    values  w8: one byte per set bit, in block order, then ascending bit order
            w4: two cursors over the same bytes: blocks 0..7 fill the low nibbles, blocks 8..15 the
            high nibbles; as many bytes as the longer of the two needs
    padded with a zero byte to an even length

Part `offsets`: int64 `[S+1]`, where each strip begins, multiples of 64, and where the last ends.
Strips are padded with zeros to 64 bytes, and 64 zero bytes follow the last one, so that a kernel
may load 64 bytes wherever a value begins.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lacewing.errors import FormatError
from lacewing.formats.base import CHUNK, Codes, PackedTensor, aligned_empty
from lacewing.formats.dense import Symmetric
from lacewing.formats.tiles import (
    STRIP,
    bits_from_words,
    bits_to_words,
    ceil_to,
    from_tiles,
    strips,
    to_strips,
    to_tiles,
)

__all__ = ["Sparse", "W4sp", "W8sp"]

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Array = npt.NDArray[Any]

STREAM_AND_OFFSETS: Mapping[str, np.dtype[Any]] = {
    "stream": np.dtype(np.uint8),
    "offsets": np.dtype(np.int64),
}
SCALE_BYTES = 2 * STRIP
BITMAP_BYTES = 128
HEAD_BYTES = SCALE_BYTES + BITMAP_BYTES
TAIL_BYTES = 64
"""Zero bytes after the last strip."""


class Sparse(Symmetric):
    """What the sparse formats share; how values are stored is theirs."""

    sparse = True
    part_dtypes = STREAM_AND_OFFSETS

    def __init__(self, bits: int, group: int) -> None:
        super().__init__(bits, group)
        self.name += "_sp"
        self.record_items = STRIP * group

    def part_shapes(self, n: int, k: int) -> dict[str, tuple[int, ...]]:
        return {"stream": (-1,), "offsets": (strips(n) + 1,)}

    # -- packing --------------------------------------------------------------------------------

    def pack(self, codes: Codes) -> PackedTensor:
        n, k = self.check_codes(codes)
        pieces = []
        offsets = np.zeros(strips(n) + 1, np.int64)
        for begin, end in _strip_chunks(n, k):
            rows = codes.rows(begin * STRIP, min(end * STRIP, n))
            piece, sizes = self._pack_records(rows, k)
            pieces.append(piece)
            offsets[begin + 1 : end + 1] = offsets[begin] + np.cumsum(sizes)
        stream = aligned_empty((int(offsets[-1]) + TAIL_BYTES,), np.uint8)
        np.concatenate([*pieces, np.zeros(TAIL_BYTES, np.uint8)], out=stream)
        return PackedTensor(self.name, (n, k), {"stream": stream, "offsets": offsets})

    def _pack_records(self, codes: Codes, k: int) -> tuple[U8, I64]:
        """The bytes of whole strips, and the size of each strip."""
        assert codes.scales is not None
        tiles = to_tiles(codes.q, self.k_pad(k), self.zero_point)
        count, groups = tiles.shape[0], self.groups(k)
        items = tiles.reshape(count * groups, self.record_items)
        present = items != self.zero_point
        length = HEAD_BYTES + self._value_bytes(present).reshape(count, groups)
        sizes = _ceil_to_64(length.sum(axis=1))
        first = np.cumsum(sizes) - sizes
        starts = (first[:, None] + np.cumsum(length, axis=1) - length).reshape(-1)
        out = np.zeros(int(sizes.sum()), np.uint8)
        head = np.empty((count * groups, HEAD_BYTES), np.uint8)
        head[:, :SCALE_BYTES] = to_strips(codes.scales).reshape(-1, STRIP).view(np.uint8)
        bitmaps = bits_to_words(present.reshape(len(items), -1, STRIP, 4))
        head[:, SCALE_BYTES:] = bitmaps.reshape(len(items), BITMAP_BYTES)
        out[starts[:, None] + np.arange(HEAD_BYTES)] = head
        self._store_values(out, starts + HEAD_BYTES, items, present)
        return out, sizes

    @abstractmethod
    def _value_bytes(self, present: Bools) -> I64:
        """Bytes of values of records `[r, 1024]`, padded to even."""

    @abstractmethod
    def _store_values(self, out: U8, at: I64, items: U8, present: Bools) -> None:
        """Writes the values of records `[r, 1024]` to `out`, record i from byte `at[i]`."""

    @abstractmethod
    def _load_values(self, stream: U8, at: I64, present: Bools) -> U8:
        """The items `[r, 1024]` of records whose values begin at bytes `at`."""

    # -- unpacking ------------------------------------------------------------------------------

    def unpack(self, packed: PackedTensor) -> Codes:
        self.validate(packed)
        n, k = packed.shape
        stream, offsets = packed.parts["stream"], packed.parts["offsets"]
        groups = self.groups(k)
        self._check_room(groups, offsets)
        out = self.empty_codes(n, k)
        for begin, end in _strip_chunks(n, k):
            rows = out.rows(begin * STRIP, min(end * STRIP, n))
            self._unpack_records(stream, offsets[begin : end + 1], begin, rows)
        return out

    def validate(self, packed: PackedTensor) -> None:
        super().validate(packed)
        stream, offsets = packed.parts["stream"], packed.parts["offsets"]
        size = len(stream) - TAIL_BYTES
        if offsets[0] != 0 or (offsets[1:] < offsets[:-1]).any() or (offsets % 64 != 0).any():
            raise FormatError(
                f"{self.name} offsets must begin at 0, not decrease, and be multiples of 64"
            )
        if offsets[-1] != size:
            raise FormatError(
                f"{self.name} stream must have {int(offsets[-1]) + TAIL_BYTES} bytes"
                f" (end of the last strip + {TAIL_BYTES}), got {len(stream)}"
            )

    def _check_room(self, groups: int, offsets: I64) -> None:
        """Before memory for the codes is taken: every strip can hold the heads of its records."""
        short = np.flatnonzero(np.diff(offsets) < groups * HEAD_BYTES)
        if short.size:
            raise FormatError(
                f"{self.name} strip {short[0]} needs at least {groups * HEAD_BYTES} bytes for its"
                f" {groups} records, got {offsets[short[0] + 1] - offsets[short[0]]}"
            )

    def _unpack_records(self, stream: U8, offsets: I64, first_strip: int, out: Codes) -> None:
        """Fills `out`, whole strips, whose bytes lie between consecutive `offsets`."""
        assert out.scales is not None
        n, k = out.shape
        count, groups = len(offsets) - 1, self.groups(k)
        starts = np.empty((count, groups), np.int64)
        at = offsets[:-1].copy()
        ends = offsets[1:]
        for j in range(groups):  # records follow each other; strips are independent
            starts[:, j] = at
            self._check_inside(at + HEAD_BYTES, ends, first_strip, j)
            present = _bitmaps(stream, at)
            at = at + HEAD_BYTES + self._value_bytes(present)
            self._check_inside(at, ends, first_strip, j)
        if (_ceil_to_64(at) != ends).any():
            strip = int(np.flatnonzero(_ceil_to_64(at) != ends)[0])
            raise FormatError(
                f"{self.name} strip {first_strip + strip} must end at byte"
                f" {_ceil_to_64(at)[strip]}, its offset says {ends[strip]}"
            )
        flat = starts.reshape(-1)
        scales = stream[flat[:, None] + np.arange(SCALE_BYTES)].view(np.float16)
        rows = scales.reshape(count, groups, STRIP).transpose(0, 2, 1)
        out.scales[:] = rows.reshape(count * STRIP, groups)[:n]
        present = _bitmaps(stream, flat)
        items = self._load_values(stream, flat + HEAD_BYTES, present)
        if (items[present] == self.zero_point).any():
            raise FormatError(
                f"{self.name} strips {first_strip}..{first_strip + count - 1} store zeros"
                " explicitly: absent weights must not be in the bitmap"
            )
        out.q[:] = from_tiles(items.reshape(count, -1, STRIP, 4), n, k)

    def _check_inside(self, at: I64, ends: I64, first_strip: int, record: int) -> None:
        beyond = np.flatnonzero(at > ends)
        if beyond.size:
            raise FormatError(
                f"{self.name} record {record} of strip {first_strip + beyond[0]} ends"
                f" {at[beyond[0]] - ends[beyond[0]]} bytes beyond its strip"
            )


class W8sp(Sparse):
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


class W4sp(Sparse):
    """Four bits per non-zero weight."""

    def __init__(self, group: int) -> None:
        super().__init__(4, group)
        self.half = self.record_items // 2

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


def _bitmaps(stream: U8, starts: I64) -> Bools:
    """Which items `[r, 1024]` of the records that begin at `starts` are present."""
    words = stream[(starts + SCALE_BYTES)[:, None] + np.arange(BITMAP_BYTES)]
    bits = bits_from_words(words.reshape(len(starts), -1, 8))
    return bits.reshape(len(starts), -1).view(np.bool_)


def _places(at: I64, present: Bools) -> I64:
    """Where each present item of records `[r, items]` lies: consecutive bytes from `at[i]`."""
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


def _strip_chunks(n: int, k: int) -> Iterator[tuple[int, int]]:
    """Ranges of strips of about CHUNK weights."""
    count = strips(n)
    step = max(1, CHUNK // (STRIP * ceil_to(k, 64)))
    for begin in range(0, count, step):
        yield begin, min(begin + step, count)

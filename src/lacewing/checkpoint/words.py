"""Codes of a few bits in 32-bit words, little-endian, as other libraries lay them.

    stream   value i of a row has the bits [i * bits, (i + 1) * bits) of the row's words, across
             their borders: compressed-tensors from 0.18 on, GPTQ of 2, 3, 4 and 8 bits, auto-round
    padded   a word has floor(32 / bits) values from its lowest bit on, and what is left of it is
             zero: compressed-tensors before 0.18
    planar   every 32 values are `bits` words, cut into planes of 4, 2 and 1 bits, lowest first:
             GPTQModel's GPTQ of 5, 6 and 7 bits, and `gptq_p` of 3 bits

With 2, 4 and 8 bits the three are the same.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = ["Layout", "pack_words", "unpack_range", "unpack_words", "word_count"]

U8 = npt.NDArray[np.uint8]
Words = npt.NDArray[Any]
Layout = Literal["stream", "padded", "planar"]

WORD = 32
_PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


def word_count(count: int, bits: int, layout: Layout = "stream") -> int:
    """Words of a row of `count` values."""
    if layout == "padded":
        return -(-count // (WORD // bits))
    if layout == "planar" and bits in _PLANES:
        return -(-count // WORD) * bits
    return -(-count * bits // WORD)


def unpack_words(words: Words, bits: int, count: int, layout: Layout = "stream") -> U8:
    """The codes `[r, count]` of `words`, 32-bit `[r, word_count(count, bits, layout)]`."""
    raw = np.ascontiguousarray(words).view(np.uint8)
    if bits in (2, 4, 8):
        return _aligned(raw, bits)[:, :count]
    if layout == "padded":
        return _padded(raw.view("<u4"), bits)[:, :count]
    short = -raw.shape[1] % (4 * bits)
    blocks = np.pad(raw, ((0, 0), (0, short))).reshape(len(raw), -1, 4 * bits)
    codes = _planar(blocks, bits) if layout == "planar" else _stream(blocks.view("<u4"), bits)
    return codes.reshape(len(raw), -1)[:, :count]


def unpack_range(words: Words, bits: int, begin: int, end: int, layout: Layout = "stream") -> U8:
    """The codes `begin..end` of every row, of whose words only those that hold them are read."""
    unit, per_unit = (32, bits)
    if layout == "padded" and bits not in (2, 4, 8):
        unit, per_unit = (WORD // bits, 1)
    first, last = begin // unit, -(-end // unit)
    part = words[:, first * per_unit : last * per_unit]
    return unpack_words(part, bits, end - first * unit, layout)[:, begin - first * unit :]


def _aligned(raw: U8, bits: int) -> U8:
    """Values that never cross the border of a byte."""
    out = np.empty((*raw.shape, 8 // bits), np.uint8)
    for i in range(8 // bits):
        out[..., i] = (raw >> np.uint8(bits * i)) & np.uint8((1 << bits) - 1)
    return out.reshape(len(raw), -1)


def _padded(words: Words, bits: int) -> U8:
    out = np.empty((*words.shape, WORD // bits), np.uint8)
    for i in range(WORD // bits):
        out[..., i] = (words >> np.uint32(bits * i)) & np.uint32((1 << bits) - 1)
    return out.reshape(len(words), -1)


def _stream(words: Words, bits: int) -> U8:
    """`[r, blocks, bits]` words to `[r, blocks, 32]` codes."""
    out = np.empty((*words.shape[:2], WORD), np.uint8)
    mask = np.uint32((1 << bits) - 1)
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        code = words[..., word] >> np.uint32(shift)
        if shift + bits > WORD:
            code = code | words[..., word + 1] << np.uint32(WORD - shift)
        out[..., i] = code & mask
    return out


def _planar(blocks: U8, bits: int) -> U8:
    """`[r, blocks, 4 * bits]` bytes to `[r, blocks, 32]` codes."""
    out = np.zeros((*blocks.shape[:2], WORD), np.uint8)
    at = 0
    for width in _PLANES[bits]:
        plane = blocks[..., 4 * at : 4 * (at + width)]
        per_byte = 8 // width
        for i in range(per_byte):
            values = (plane >> np.uint8(width * i)) & np.uint8((1 << width) - 1)
            out[..., i::per_byte] |= values << np.uint8(at)
        at += width
    return out


def pack_words(codes: U8, bits: int) -> npt.NDArray[np.int32]:
    """`codes` `[r, count]` below 2^bits as a stream, int32 `[r, word_count(count, bits)]`."""
    r, count = codes.shape
    out = np.zeros((r, word_count(count, bits) * WORD // 8), np.uint8)
    step = max(1, (1 << 20) // max(count, 1))
    for begin in range(0, r, step):
        rows = codes[begin : begin + step, :, None]
        planes = (rows >> np.arange(bits, dtype=np.uint8)) & np.uint8(1)
        packed = np.packbits(planes.reshape(len(rows), -1), axis=1, bitorder="little")
        out[begin : begin + step, : packed.shape[1]] = packed
    return out.view("<i4")

"""The order of bytes in memory: strips of 16 outputs, inside them VNNI order.

A 64-byte block holds 16 outputs x 4 consecutive inputs, byte `[o][i]`:

    q [n, k]                          tiles [S][k_pad/4][16][4]
    out 0   a0 a1 a2 a3 a4 a5 ..      block 0: a0 a1 a2 a3 b0 b1 b2 b3 c0 ..
    out 1   b0 b1 b2 b3 b4 b5 ..      block 1: a4 a5 a6 a7 b4 b5 b6 b7 ..
    out 2   c0 c1 ..

Four inputs of one output are four adjacent bytes in both, so that the reordering is a transposition
of 32-bit words. The same holds for two bf16 values. Nothing here knows a format.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = [
    "STRIP",
    "bits_from_words",
    "bits_to_words",
    "ceil_to",
    "from_fields",
    "from_nibbles",
    "from_strips",
    "from_tiles",
    "strips",
    "to_fields",
    "to_nibbles",
    "to_strips",
    "to_tiles",
]

STRIP = 16
"""Outputs per strip."""

T = TypeVar("T", bound=np.generic)
U8 = npt.NDArray[np.uint8]


def ceil_to(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def strips(n: int) -> int:
    """Strips that hold n outputs; the last one may be padded."""
    return -(-n // STRIP)


def to_tiles(q: npt.NDArray[T], k_pad: int, fill: int) -> npt.NDArray[T]:
    """`q` `[n, k]` (uint8 or uint16) in VNNI order: `[S, k_pad/w, 16, w]` with w items in 4 bytes.

    Outputs and inputs past the end are `fill`.
    """
    n, k = q.shape
    rows = strips(n) * STRIP
    if (rows, k_pad) != (n, k) or not q.flags.c_contiguous:
        padded = np.full((rows, k_pad), fill, q.dtype)
        padded[:n, :k] = q
        q = padded
    words = q.view(np.uint32).reshape(rows // STRIP, STRIP, -1)
    tiles = np.ascontiguousarray(words.transpose(0, 2, 1))
    return tiles.view(q.dtype).reshape(rows // STRIP, -1, STRIP, 4 // q.itemsize)


def from_tiles(tiles: npt.NDArray[T], n: int, k: int) -> npt.NDArray[T]:
    """The inverse of `to_tiles`; the padding is dropped."""
    count, blocks = tiles.shape[:2]
    words = np.ascontiguousarray(tiles).view(np.uint32).reshape(count, blocks, STRIP)
    rows = np.ascontiguousarray(words.transpose(0, 2, 1)).view(tiles.dtype)
    return rows.reshape(count * STRIP, -1)[:n, :k]


def to_strips(values: npt.NDArray[T], fill: int = 0) -> npt.NDArray[T]:
    """Per-group values `[n, groups]` as `[S, groups, 16]`; outputs past the end are `fill`."""
    n, groups = values.shape
    count = strips(n)
    padded: Any = np.full((count * STRIP, groups), fill, values.dtype)
    padded[:n] = values
    return np.ascontiguousarray(padded.reshape(count, STRIP, groups).transpose(0, 2, 1))


def from_strips(values: npt.NDArray[T], n: int) -> npt.NDArray[T]:
    """The inverse of `to_strips`."""
    count, groups = values.shape[:2]
    rows = values.transpose(0, 2, 1).reshape(count * STRIP, groups)
    return np.ascontiguousarray(rows[:n])


def to_nibbles(tiles: U8) -> U8:
    """Blocks of 4-bit codes `[S, 2b, 16, 4]`, two to one: even blocks low, odd blocks high."""
    out: U8 = tiles[:, 1::2] << np.uint8(4)
    out |= tiles[:, 0::2]
    return out


def from_nibbles(blocks: U8) -> U8:
    """The inverse of `to_nibbles`: `[S, b, 16, 4]` to `[S, 2b, 16, 4]`."""
    count, half = blocks.shape[:2]
    out = np.empty((count, half, 2, STRIP, 4), np.uint8)
    np.bitwise_and(blocks, 15, out=out[:, :, 0])
    np.right_shift(blocks, 4, out=out[:, :, 1])
    return out.reshape(count, 2 * half, STRIP, 4)


def to_fields(tiles: U8, bits: int) -> U8:
    """Blocks of codes of `bits` bits `[S, b, 16, 4]`, `8 / bits` to one: block j of them takes the
    bits from `j * bits` on of every byte."""
    each = 8 // bits
    out: U8 = tiles[:, 0::each].copy()
    for j in range(1, each):
        out |= tiles[:, j::each] << np.uint8(j * bits)
    return out


def from_fields(vectors: U8, bits: int) -> U8:
    """The inverse of `to_fields`: `[S, b, 16, 4]` to `[S, 8 / bits * b, 16, 4]`."""
    each = 8 // bits
    count, length = vectors.shape[:2]
    out = np.empty((count, length, each, STRIP, 4), np.uint8)
    for j in range(each):
        np.right_shift(vectors, np.uint8(j * bits), out=out[:, :, j])
    out &= np.uint8((1 << bits) - 1)
    return out.reshape(count, each * length, STRIP, 4)


def bits_to_words(flags: npt.NDArray[Any]) -> U8:
    """One bit per item of blocks `[..., 16, 4]`: `[..., 8]` bytes, a little-endian 64-bit word
    whose bit `4 * o + i` is item `[o][i]`."""
    flat = flags.reshape(*flags.shape[:-2], 64)
    return np.packbits(flat, axis=-1, bitorder="little")


def bits_from_words(words: U8) -> U8:
    """The inverse of `bits_to_words`: bytes `[..., 8]` to 0 and 1, `[..., 16, 4]`."""
    flat = np.unpackbits(words, axis=-1, bitorder="little")
    return flat.reshape(*words.shape[:-1], STRIP, 4)

"""GGML's tensor types: the bytes of a block, and what they mean.

A row of `k` weights is a run of blocks. A block of 32 (legacy types) or 256 (K-quants) weights:

    Q8_0  d f16, q int8[32]                            w = d * q
    Q4_0  d f16, nibbles[16]                           w = d * (q - 8)
    Q4_1  d f16, m f16, nibbles[16]                    w = d * q + m
    Q5_0  d f16, fifth bits u32, nibbles[16]           w = d * (q - 16)
    Q5_1  d f16, m f16, fifth bits u32, nibbles[16]    w = d * q + m
    Q4_K  d, dmin f16, 6-bit pairs (s, m)[8], nibbles  w = (d * s) * q - (dmin * m), groups of 32
    Q5_K  the same with a fifth bit
    Q6_K  q of 4 + 2 bits, s int8[16], d f16           w = (d * s) * (q - 32), groups of 16

Every `*` and `-` is one f32 operation. In the legacy types low nibbles are the first 16 weights and
high nibbles the last 16. Source: `ggml-common.h` and `ggml-quants.c` of ggml.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lacewing.formats import Codes

__all__ = ["GGML_TYPES", "GgmlType", "codes", "dequantize", "near_codes"]

U8 = npt.NDArray[np.uint8]
F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
Blocks = npt.NDArray[np.void]


@dataclass(frozen=True)
class GgmlType:
    """One type: `block` weights take `nbytes` bytes. `layout` is None where it is only known by
    size, and cannot be read."""

    name: str
    block: int
    nbytes: int
    layout: np.dtype[np.void] | None = None
    grid: str | None = None
    """The weight format that holds this type without loss."""
    near: str | None = None
    """The weight format that comes closest to it."""

    @property
    def readable(self) -> bool:
        return self.layout is not None


def _type(
    name: str, block: int, fields: list[tuple[str, str, int]], grid: str = "", near: str = ""
) -> GgmlType:
    layout = np.dtype([(f, t, (c,)) if c > 1 else (f, t) for f, t, c in fields])
    return GgmlType(name, block, layout.itemsize, layout, grid or None, near or None)


_D = ("d", "<f2", 1)
_M = ("m", "<f2", 1)
_FIFTH = ("fifth", "u1", 4)
_NIBBLES = ("nibbles", "u1", 16)
_K_HEAD = [_D, _M, ("pairs", "u1", 12)]

GGML_TYPES: dict[int, GgmlType] = {
    0: _type("F32", 1, [("x", "<f4", 1)]),
    1: _type("F16", 1, [("x", "<f2", 1)]),
    2: _type("Q4_0", 32, [_D, _NIBBLES], grid="w4a8g32"),
    3: _type("Q4_1", 32, [_D, _M, _NIBBLES], grid="w4a8g32z"),
    6: _type("Q5_0", 32, [_D, _FIFTH, _NIBBLES], grid="w5a8g32z"),
    7: _type("Q5_1", 32, [_D, _M, _FIFTH, _NIBBLES], grid="w5a8g32z"),
    8: _type("Q8_0", 32, [_D, ("q", "i1", 32)], grid="w8a8g32"),
    9: GgmlType("Q8_1", 32, 36),
    10: GgmlType("Q2_K", 256, 84),
    11: GgmlType("Q3_K", 256, 110),
    12: _type("Q4_K", 256, [*_K_HEAD, ("nibbles", "u1", 128)], near="w4a8g32z"),
    13: _type(
        "Q5_K", 256, [*_K_HEAD, ("fifth", "u1", 32), ("nibbles", "u1", 128)], near="w5a8g32z"
    ),
    14: _type(
        "Q6_K",
        256,
        [("low", "u1", 128), ("high", "u1", 64), ("s", "i1", 16), _D],
        near="w8a8g32",
    ),
    15: GgmlType("Q8_K", 256, 292),
    16: GgmlType("IQ2_XXS", 256, 66),
    17: GgmlType("IQ2_XS", 256, 74),
    18: GgmlType("IQ3_XXS", 256, 98),
    19: GgmlType("IQ1_S", 256, 50),
    20: GgmlType("IQ4_NL", 32, 18),
    21: GgmlType("IQ3_S", 256, 110),
    22: GgmlType("IQ2_S", 256, 82),
    23: GgmlType("IQ4_XS", 256, 136),
    24: GgmlType("I8", 1, 1),
    25: GgmlType("I16", 1, 2),
    26: GgmlType("I32", 1, 4),
    27: GgmlType("I64", 1, 8),
    28: GgmlType("F64", 1, 8),
    29: GgmlType("IQ1_M", 256, 56),
    30: _type("BF16", 1, [("x", "<u2", 1)], grid="bf16"),
    34: GgmlType("TQ1_0", 256, 54),
    35: GgmlType("TQ2_0", 256, 66),
    39: GgmlType("MXFP4", 32, 17),
}


def dequantize(kind: GgmlType, rows: U8) -> F32:
    """The weights f32 `[r, k]` of the bytes `rows` `[r, row bytes]`, bit for bit GGML's."""
    blocks = _blocks(kind, rows)
    with np.errstate(over="ignore", invalid="ignore"):  # damaged scales; found by whoever rounds
        out = _DEQUANTIZE[kind.name](blocks)
    return out.reshape(len(rows), -1)


def codes(kind: GgmlType, rows: U8) -> Codes | None:
    """The same weights on the grid `kind.grid`, without loss; None if they do not fit on it."""
    if kind.name == "BF16":
        return Codes(rows.view(np.uint16))
    if kind.grid is None:
        return None
    blocks = _blocks(kind, rows)
    q = _QUANTS[kind.name](blocks).reshape(len(rows), -1)
    scales = np.ascontiguousarray(blocks["d"])
    if kind.name == "Q5_0":  # d * (q - 16) == d * q + (-16 d), exactly, wherever -16 d is finite
        with np.errstate(over="ignore", invalid="ignore"):
            mins = scales * np.float16(-16)
        lost = np.isinf(mins) & np.isfinite(scales)
        return None if lost.any() else Codes(q, scales, mins)
    mins_too = kind.name in ("Q4_1", "Q5_1")
    return Codes(q, scales, np.ascontiguousarray(blocks["m"]) if mins_too else None)


def near_codes(kind: GgmlType, rows: U8) -> Codes | None:
    """Q4_K and Q5_K on the grid `kind.near`: the same codes, products of scales rounded to f16.
    None for types that have to be rounded from floats."""
    if kind.name not in ("Q4_K", "Q5_K"):
        return None
    blocks = _blocks(kind, rows)
    q = _QUANTS[kind.name](blocks).reshape(len(rows), -1)
    with np.errstate(over="ignore", invalid="ignore"):
        scale, low = _pair_scales(blocks)
        scales, mins = scale.astype(np.float16), (-low).astype(np.float16)
    return Codes(q, scales.reshape(len(rows), -1), mins.reshape(len(rows), -1))


def _blocks(kind: GgmlType, rows: U8) -> Blocks:
    assert kind.layout is not None
    return np.ascontiguousarray(rows).view(kind.layout)


# -- codes, [..., block] --------------------------------------------------------------------------


def _q8_0(blocks: Blocks) -> U8:
    """int8 to the unsigned code q + 128: the same bits but for the sign."""
    out: U8 = blocks["q"].view(np.uint8) ^ np.uint8(0x80)
    return out


def _q4(blocks: Blocks) -> U8:
    return _halves(blocks["nibbles"])


def _halves(nibbles: U8) -> U8:
    """`[..., c]` bytes to `[..., 2, c]` codes: low nibbles, then high nibbles."""
    out = np.empty((*nibbles.shape[:-1], 2, nibbles.shape[-1]), np.uint8)
    np.bitwise_and(nibbles, 15, out=out[..., 0, :])
    np.right_shift(nibbles, 4, out=out[..., 1, :])
    return out


def _q5(blocks: Blocks) -> U8:
    low = _q4(blocks)
    fifth = np.unpackbits(np.ascontiguousarray(blocks["fifth"]), axis=-1, bitorder="little")
    fifth <<= np.uint8(4)
    low |= fifth.reshape(low.shape)
    return low


def _q4_k(blocks: Blocks) -> U8:
    """Groups 2j and 2j + 1 are the low and high nibbles of 32 bytes."""
    nibbles = blocks["nibbles"]
    return _halves(nibbles.reshape(*nibbles.shape[:-1], 4, 32))


def _q5_k(blocks: Blocks) -> U8:
    """Bit j of fifth[i] belongs to weight i of group j."""
    out = _q4_k(blocks)
    groups = out.reshape(*out.shape[:-3], 8, 32)
    fifth = blocks["fifth"]
    for j in range(8):
        groups[..., j, :] |= ((fifth >> np.uint8(j)) & np.uint8(1)) << np.uint8(4)
    return out


def _q6_k(blocks: Blocks) -> U8:
    """Each half of the block: 64 bytes of nibbles, 32 bytes with the 2 upper bits of 4 groups."""
    low = blocks["low"].reshape(*blocks.shape, 2, 64)
    high = blocks["high"].reshape(*blocks.shape, 2, 32)
    out = _halves(low).reshape(*blocks.shape, 2, 4, 32)
    for j in range(4):
        out[..., j, :] |= ((high >> np.uint8(2 * j)) & np.uint8(3)) << np.uint8(4)
    return out


_QUANTS: dict[str, Callable[[Blocks], U8]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4,
    "Q4_1": _q4,
    "Q5_0": _q5,
    "Q5_1": _q5,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


# -- weights --------------------------------------------------------------------------------------


def _signed(name: str, zero_point: int) -> Callable[[Blocks], F32]:
    """w = d * (code - zero_point)"""

    def weights(blocks: Blocks) -> F32:
        q = _QUANTS[name](blocks).reshape(*blocks.shape, -1)
        out = np.subtract(q, np.float32(zero_point), dtype=np.float32)
        out *= blocks["d"].astype(np.float32)[..., None]
        return out

    return weights


def _affine(name: str) -> Callable[[Blocks], F32]:
    """w = d * code + m"""

    def weights(blocks: Blocks) -> F32:
        out = _QUANTS[name](blocks).reshape(*blocks.shape, -1).astype(np.float32)
        out *= blocks["d"].astype(np.float32)[..., None]
        out += blocks["m"].astype(np.float32)[..., None]
        return out

    return weights


def _k_affine(name: str) -> Callable[[Blocks], F32]:
    """w = (d * s) * code - (dmin * m), per group of 32"""

    def weights(blocks: Blocks) -> F32:
        scale, low = _pair_scales(blocks)
        out = _QUANTS[name](blocks).reshape(*blocks.shape, 8, 32).astype(np.float32)
        out *= scale[..., None]
        out -= low[..., None]
        return out

    return weights


def _pair_scales(blocks: Blocks) -> tuple[F32, F32]:
    """d * s and dmin * m, `[..., 8]`. The 12 bytes of pairs hold s and m of 6 bits each: the first
    four groups in the low 6 bits of bytes 0-3 and 4-7, the others in the nibbles of bytes 8-11 and
    the top 2 bits of bytes 0-7."""
    s, m, rest = (blocks["pairs"][..., i : i + 4] for i in (0, 4, 8))
    scale = np.concatenate([s & 63, (rest & 15) | ((s >> 6) << 4)], axis=-1)
    low = np.concatenate([m & 63, (rest >> 4) | ((m >> 6) << 4)], axis=-1)
    d, dmin = (blocks[name].astype(np.float32)[..., None] for name in ("d", "m"))
    return d * scale.astype(np.float32), dmin * low.astype(np.float32)


def _q6_k_weights(blocks: Blocks) -> F32:
    scale = blocks["d"].astype(np.float32)[..., None] * blocks["s"].astype(np.float32)
    q = _q6_k(blocks).reshape(*blocks.shape, 16, 16)
    out = np.subtract(q, np.float32(32), dtype=np.float32)
    out *= scale[..., None]
    return out


def _bf16(blocks: Blocks) -> F32:
    out: F32 = (blocks["x"].astype(np.uint32) << np.uint32(16)).view(np.float32)
    return out


_DEQUANTIZE: dict[str, Callable[[Blocks], F32]] = {
    "F32": lambda blocks: blocks["x"].astype(np.float32),
    "F16": lambda blocks: blocks["x"].astype(np.float32),
    "BF16": _bf16,
    "Q8_0": _signed("Q8_0", 128),
    "Q4_0": _signed("Q4_0", 8),
    "Q5_0": _signed("Q5_0", 16),
    "Q4_1": _affine("Q4_1"),
    "Q5_1": _affine("Q5_1"),
    "Q4_K": _k_affine("Q4_K"),
    "Q5_K": _k_affine("Q5_K"),
    "Q6_K": _q6_k_weights,
}

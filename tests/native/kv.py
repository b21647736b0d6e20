"""KV cache formats in numpy, written to be read: what attention reads back of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


def round_bf16(x: Array) -> Array:
    """To the nearest bf16, ties to even."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (u + np.uint32(0x7FFF) + (u >> np.uint32(16) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def int8_scale(x: Array) -> Array:
    """[..., head_dim] to [..., 1]: max|x| / 127 as f16."""
    amax = np.abs(x).max(axis=-1, keepdims=True)
    scale = np.minimum(amax / np.float32(127), np.float32(65504)).astype(np.float16)
    return scale.astype(np.float32)


def int8_codes(x: Array) -> Array:
    """[..., head_dim]: integers -127..127 that stand for x when multiplied by the scale."""
    scale = int8_scale(x)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    return np.clip(np.rint(x * inverse), -127, 127)


def pruned(codes: Array, percent: int) -> Array:
    """[..., head_dim]: the ceil((1 - percent / 100) head_dim) codes of the largest magnitude, the
    first ones among equals, and zeros."""
    keep = -(-codes.shape[-1] * (100 - percent) // 100)
    kept = np.argsort(-np.abs(codes), axis=-1, kind="stable")[..., :keep]
    found = np.zeros_like(codes)
    np.put_along_axis(found, kept, np.take_along_axis(codes, kept, -1), -1)
    return found


def weight_step(weight: Array, scale: Array) -> Array:
    """[rows, tokens]: how far a softmax weight times the value's scale [tokens] may be from the
    code 0..128 that multiplies integer values: half a step, and a step is a 128th of the
    largest product among the row's 16 tokens of a block."""
    product = weight * scale
    largest = np.zeros_like(product)
    for begin in range(0, product.shape[1], 16):
        block = slice(begin, begin + 16)
        largest[:, block] = product[:, block].max(axis=1, keepdims=True)
    return np.where(weight > 0, largest / 256, 0)


class Affine(NamedTuple):
    """Numbers that are scale * code + minimum."""

    scale: Array
    code: Array
    minimum: Array

    @property
    def number(self) -> Array:
        return self.scale.astype(np.float64) * self.code + self.minimum


def inverse(scale: Array) -> Array:
    """1 / scale, or 0."""
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 2.0**-100)


def unit_of(largest: Array) -> Array:
    """The power of two that makes 2^14 to 2^15 of it."""
    return np.where(largest > 0, np.ldexp(np.float32(1), np.frexp(largest)[1] - 15), 0)


def int4_keys(k: Array) -> Affine:
    """[blocks, 16, ..., head_dim] of keys [tokens, ..., head_dim]: codes 0..15 per channel of a
    block, of what int8 makes of them. The block's largest scale is 2^14 to 2^15 units."""
    x = (int8_codes(k) * int8_scale(k)).reshape(-1, 16, *k.shape[1:])
    low = x.min(axis=1, keepdims=True)
    scale = (x.max(axis=1, keepdims=True) - low) / np.float32(15)
    unit = unit_of(scale.max(axis=-1, keepdims=True))
    scale = np.minimum(np.floor(scale * inverse(unit) + np.float32(0.5)), np.float32(32767)) * unit
    minimum = np.clip(low, -65504, 65504).astype(np.float16).astype(np.float32)
    return Affine(scale, np.clip(np.rint((x - minimum) * inverse(scale)), 0, 15), minimum)


def int4_values(v: Array) -> Affine:
    """[tokens, ..., head_dim]: codes 0..15 per token, of what int8 makes of the values; zero, which
    counts as one of them, in sixteenths of a code."""
    codes = int8_codes(v)
    low = np.minimum(codes.min(axis=-1, keepdims=True), 0)
    high = np.maximum(codes.max(axis=-1, keepdims=True), 0)
    wide = (high - low) * int8_scale(v) / np.float32(15)
    scale = np.minimum(wide, np.float32(65504)).astype(np.float16).astype(np.float32)
    ratio = inverse(scale) * int8_scale(v)
    zero = np.minimum(np.floor(-low * ratio * np.float32(16) + np.float32(0.5)), np.float32(240))
    zero /= np.float32(16)
    code = np.clip(np.rint(codes * ratio + zero), 0, 15)
    return Affine(scale, code, -scale * zero)


CODES: dict[str, Callable[[Array], Array]] = {
    "int8": int8_codes,
    "int8_sp50": lambda x: pruned(int8_codes(x), 50),
    "int8_sp70": lambda x: pruned(int8_codes(x), 70),
}
"""Of formats that are int8, or part of it: what is multiplied by `int8_scale`."""

FLOATS: dict[str, Callable[[Array], Array]] = {
    "f16": lambda x: x.astype(np.float16).astype(np.float32),
    "bf16": round_bf16,
    "f32": lambda x: x,
}

FORMATS = [*FLOATS, *CODES, "int4"]


def values(kv: str, v: Array) -> Affine:
    """[tokens, ..., head_dim]: values as they are stored; floats with codes of their own."""
    if kv == "int4":
        return int4_values(v)
    if kv in CODES:
        scale = int8_scale(v)
        return Affine(scale, CODES[kv](v), np.zeros_like(scale))
    scale = np.ones_like(v[..., :1])
    return Affine(scale, FLOATS[kv](v), np.zeros_like(scale))


def scores(kv: str, q: Array, k: Array, seen: Array) -> tuple[Array, Array]:
    """[rows, tokens] for q [rows, head_dim] and k [tokens, head_dim], in float64: q k^T of what is
    multiplied where it is seen, and the sums of magnitudes that float roundings are relative to."""
    if kv in FLOATS:
        keys, queries = FLOATS[kv](k).astype(np.float64), q.astype(np.float64)
        return queries @ keys.T, np.abs(queries) @ np.abs(keys).T
    if kv in CODES:
        keys = CODES[kv](k).astype(np.float64) * int8_scale(k)
        queries = round_query(q).astype(np.float64)
        return queries @ keys.T, np.abs(queries) @ np.abs(keys).T
    scale, code, minimum = int4_keys(k)
    blocks: Array = seen.reshape(len(q), -1, 16).any(axis=2)
    score, size = [], []
    for block in range(len(scale)):
        first = block // 8 * 8
        span = slice(first, first + 8)
        queries = np.stack(
            [
                round_block_query(row, scale[span, 0], attended[span], block - first)
                for row, attended in zip(q, blocks, strict=True)
            ]
        )
        codes, minima = code[block].T, minimum[block, 0].astype(np.float64)
        score.append(queries @ codes + (q.astype(np.float64) @ minima)[:, None])
        size.append(np.abs(queries) @ codes + (np.abs(q) @ np.abs(minima))[:, None])
    return np.concatenate(score, 1), np.concatenate(size, 1)


def round_block_query(q: Array, scale: Array, attended: Array, block: int) -> Array:
    """[head_dim] in float64: a query times the scales of the channels of one of a span's blocks
    [blocks, head_dim], as the codes of keys are multiplied by it: products of int16 become 8 bits
    by a power of two that suits the largest scales in all blocks of the span that are attended."""
    unit, amax = unit_of(scale.max(axis=1, keepdims=True)), np.abs(q).max()
    if not attended[block] or amax == 0 or unit[attended].max() == 0:
        return np.zeros(len(q))
    query = np.rint(q * (np.float32(32767) / amax))
    steps = np.rint(scale * inverse(unit))
    top = unit[attended].max()
    largest = times(steps[attended], np.rint(unit[attended] / top * 2**14)).max(axis=0)
    width = max(7, np.frexp(np.abs(times(query, largest)).max())[1])
    power = np.rint(unit[block] / top * 2.0 ** (21 - width))
    code = np.minimum(times(times(query, steps[block]), power), 127)
    return code * 2.0 ** (width + 9) * (amax / np.float64(32767) * top)


def times(a: Array, b: Array) -> Array:
    """Products in units of 2^15, halves rounded upwards."""
    return np.floor(a * b.astype(np.float64) / 2**15 + 0.5)


def round_query(x: Array) -> Array:
    """[..., head_dim]: what int8 keys are multiplied by, int8 with an f32 scale per query."""
    amax = np.abs(x).max(axis=-1, keepdims=True)
    inverse = np.divide(np.float32(127), amax, out=np.zeros_like(amax), where=amax > 0)
    return np.clip(np.rint(x * inverse), -127, 127) * (amax / np.float32(127))

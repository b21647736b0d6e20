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
    """[rows, tokens]: how far a softmax weight times the value's scale [tokens] may be from the code
    of 15 bits that multiplies integer values: half a step, and a step is at most 2^-14 of the largest
    product among the row's 128 tokens."""
    product = weight * scale
    largest = np.zeros_like(product)
    for begin in range(0, product.shape[1], 128):
        span = slice(begin, begin + 128)
        largest[:, span] = product[:, span].max(axis=1, keepdims=True)
    return np.where(weight > 0, largest * 2.0**-15, 0)


class Affine(NamedTuple):
    """Numbers that are scale * code + minimum."""

    scale: Array
    code: Array
    minimum: Array

    @property
    def number(self) -> Array:
        return self.scale.astype(np.float64) * self.code + self.minimum


def int4(x: Array, axis: int) -> Affine:
    """Codes 0..15 with f16 scales and minima along the axis."""
    low, high = x.min(axis=axis, keepdims=True), x.max(axis=axis, keepdims=True)
    scale = np.minimum((high - low) / np.float32(15), np.float32(65504)).astype(np.float16)
    minimum = np.clip(low, -65504, 65504).astype(np.float16).astype(np.float32)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(minimum), where=scale > 0)
    code = np.clip(np.rint((x - minimum) * inverse), 0, 15)
    return Affine(scale.astype(np.float32), code, minimum)


def int4_keys(k: Array) -> Affine:
    """[blocks, 16, ..., head_dim] of keys [tokens, ..., head_dim]: per channel of a block, of what
    int8 makes of them."""
    stored = int8_codes(k) * int8_scale(k)
    return int4(stored.reshape(-1, 16, *k.shape[1:]), 1)


def int4_values(v: Array) -> Affine:
    """[tokens, ..., head_dim]: per token, of what int8 makes of the values."""
    return int4(int8_codes(v) * int8_scale(v), -1)


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


def scores(kv: str, q: Array, k: Array) -> tuple[Array, Array]:
    """[rows, tokens] for q [rows, head_dim] and k [tokens, head_dim], in float64: q k^T of what is
    multiplied, and the sums of magnitudes that float roundings are relative to."""
    if kv in FLOATS:
        keys, queries = FLOATS[kv](k).astype(np.float64), q.astype(np.float64)
        return queries @ keys.T, np.abs(queries) @ np.abs(keys).T
    if kv in CODES:
        keys = CODES[kv](k).astype(np.float64) * int8_scale(k)
        queries = round_query(q).astype(np.float64)
        return queries @ keys.T, np.abs(queries) @ np.abs(keys).T
    scale, code, minimum = int4_keys(k)
    score, size = [], []
    for block in range(len(scale)):
        queries = round_query(q * scale[block]).astype(np.float64)
        middle = minimum[block, 0] + 8.0 * scale[block, 0]
        codes = code[block].T - 8
        score.append(queries @ codes + (q.astype(np.float64) @ middle)[:, None])
        size.append(np.abs(queries) @ np.abs(codes) + (np.abs(q) @ np.abs(middle))[:, None])
    return np.concatenate(score, 1), np.concatenate(size, 1)


def round_query(x: Array) -> Array:
    """[..., head_dim]: what int8 keys are multiplied by, int8 with an f32 scale per query."""
    amax = np.abs(x).max(axis=-1, keepdims=True)
    inverse = np.divide(np.float32(127), amax, out=np.zeros_like(amax), where=amax > 0)
    return np.clip(np.rint(x * inverse), -127, 127) * (amax / np.float32(127))

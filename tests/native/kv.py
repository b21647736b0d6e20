"""KV cache formats in numpy, written to be read: what attention reads back of keys and values."""

from __future__ import annotations

from typing import Any

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


def round_int8(x: Array) -> Array:
    """[..., head_dim]: int8 codes times an f16 scale per token and head."""
    return int8_codes(x) * int8_scale(x)


def weight_step(weight: Array, v: Array) -> Array:
    """[rows, tokens]: how far a softmax weight times the value's int8 scale may be from the code of
    15 bits that multiplies int8 values `v` [tokens, head_dim]: half a step, and a step is at most
    2^-14 of the largest product among the row's 128 tokens."""
    product = weight * int8_scale(v)[:, 0]
    largest = np.zeros_like(product)
    for begin in range(0, product.shape[1], 128):
        span = slice(begin, begin + 128)
        largest[:, span] = product[:, span].max(axis=1, keepdims=True)
    return np.where(weight > 0, largest * 2.0**-15, 0)


STORED = {
    "f16": lambda x: x.astype(np.float16).astype(np.float32),
    "bf16": round_bf16,
    "f32": lambda x: x,
    "int8": round_int8,
}


def round_query(x: Array) -> Array:
    """[..., head_dim]: what int8 keys are multiplied by, int8 with an f32 scale per query."""
    amax = np.abs(x).max(axis=-1, keepdims=True)
    inverse = np.divide(np.float32(127), amax, out=np.zeros_like(amax), where=amax > 0)
    return np.clip(np.rint(x * inverse), -127, 127) * (amax / np.float32(127))

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


def round_int8(x: Array) -> Array:
    """[..., head_dim]: int8 codes times an f16 scale per token and head, max|x| / 127."""
    amax = np.abs(x).max(axis=-1, keepdims=True)
    scale = np.minimum(amax / np.float32(127), np.float32(65504)).astype(np.float16)
    wide = scale.astype(np.float32)
    inverse = np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide > 0)
    return np.clip(np.rint(x * inverse), -127, 127) * wide


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

"""Choosing blocks by labels in numpy, written to be read (Double Sparsity, arXiv 2408.07092)."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

BLOCK = 16


def label_codes(k: Array, channels: Array, scales: Array) -> Array:
    """[tokens, head_dim] to [tokens, r]: integers -127..127."""
    return np.clip(np.rint(k[:, channels] / scales), -127, 127).astype(np.int64)


def query_codes(q: Array, channels: Array, scales: Array) -> tuple[Array, Array]:
    """[heads, head_dim] to integers [heads, r] and the scale [heads, 1] of each head's."""
    label = q[:, channels] * scales
    amax = np.abs(label).max(axis=1, keepdims=True)
    inverse = np.divide(np.float32(127), amax, out=np.zeros_like(amax), where=amax > 0)
    codes = np.clip(np.rint(label * inverse), -127, 127).astype(np.int64)
    return codes, amax / np.float32(127)


def block_scores(
    q: Array, k: Array, channels: Array, scales: Array, last: int
) -> tuple[Array, Array]:
    """Largest integer score of each block up to position `last`, [heads, blocks], and the scale of
    each head's scores, [heads, 1]."""
    codes, scale = query_codes(q, channels, scales)
    scores = codes @ label_codes(k[: last + 1], channels, scales).T
    blocks = range(0, last + 1, BLOCK)
    largest = [scores[:, b : b + BLOCK].max(axis=1) for b in blocks]
    return np.stack(largest, axis=1), scale


def block_importance(
    q: Array, k: Array, channels: Array, scales: Array, scale: float, last: int
) -> Array:
    """[blocks], in float64: over the heads, the sum of the softmax over block scores."""
    scores, step = block_scores(q, k, channels, scales, last)
    exponent = (scores - scores.max(axis=1, keepdims=True)) * (step.astype(np.float64) * scale)
    weight = np.exp(exponent)
    importance: Array = (weight / weight.sum(axis=1, keepdims=True)).sum(axis=0)
    return importance

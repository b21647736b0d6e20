"""Magnitude pruning: the data-free choice of which weights to drop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from lacewing.errors import FormatError

__all__ = ["largest_of", "magnitude_mask"]

F32 = npt.NDArray[np.float32]


def magnitude_mask(rows: npt.NDArray[np.floating[Any]], sparsity: float) -> npt.NDArray[np.bool_]:
    """True for the weights of `rows` `[n, k]` that stay.

    In every row exactly `floor(k * sparsity + 0.5)` weights go, those of smallest magnitude; of
    equal magnitudes the earlier inputs go first.
    """
    if not 0 <= sparsity < 1:
        raise FormatError(f"sparsity must be in [0, 1), got {sparsity}")
    n, k = rows.shape
    drop = math.floor(k * sparsity + 0.5)
    if drop == 0:
        return np.ones((n, k), np.bool_)
    size = np.abs(rows)
    threshold = np.partition(size, drop - 1, axis=1)[:, drop - 1, None]
    keep: npt.NDArray[np.bool_] = size > threshold
    spare = keep.sum(axis=1) - (k - drop)
    for row in np.flatnonzero(spare):  # ties at the threshold: -spare of them stay, the last ones
        ties = np.flatnonzero(size[row] == threshold[row])
        keep[row, ties[spare[row] :]] = True
    return keep


def largest_of(rows: F32, kept: int, of: int) -> npt.NDArray[np.bool_]:
    """True for the `kept` weights of largest magnitude in every `of` consecutive inputs of `rows`
    `[n, k]`; of equal magnitudes the earlier inputs go first. What a short last run lacks counts as
    smaller than any weight."""
    n, k = rows.shape
    size = np.full((n, -(-k // of) * of), -1, np.float32)
    np.abs(rows, out=size[:, :k])
    order = np.argsort(size.reshape(n, -1, of), axis=2, kind="stable")
    keep = np.zeros(order.shape, np.bool_)
    np.put_along_axis(keep, order[:, :, of - kept :], True, axis=2)
    return keep.reshape(n, -1)[:, :k]

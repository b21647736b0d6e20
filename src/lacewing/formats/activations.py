"""Activations as integer formats want them: int8 per token and group, symmetric."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lacewing.errors import FormatError

__all__ = ["quantize_rows"]

F32 = npt.NDArray[np.float32]


def quantize_rows(
    x: npt.ArrayLike, group: int
) -> tuple[npt.NDArray[np.int8], F32, npt.NDArray[np.int32]]:
    """Rounds activations `x` `[m, k]` to int8, one scale per row and group of `group` columns.

    Returns `q` int8 `[m, k_pad]` (columns past k are 0), `scale` f32 `[m, k_pad / group]` and
    `sum` int32 `[m, k_pad / group]`, the sum of q over the group. Bit for bit what the kernels
    compute: `scale = amax / 127`, `q = round_half_even(x * (127 / amax))`, each step rounded to
    f32. A group whose amax is so small that `127 / amax` overflows counts as zero.

    Raises FormatError if x is not two-dimensional, is empty, or holds NaN or infinities.
    """
    padded = _padded_groups(x, group)
    amax = np.abs(padded).max(axis=2)
    with np.errstate(divide="ignore", over="ignore"):
        inv = np.float32(127) / amax
    tiny = ~np.isfinite(inv)
    inv[tiny] = 0
    scale = amax / np.float32(127)
    scale[tiny] = 0
    q = np.rint(padded * inv[:, :, None])
    q8 = np.clip(q, -127, 127).astype(np.int8)
    total = q8.sum(axis=2, dtype=np.int32)
    return q8.reshape(q8.shape[0], -1), scale, total


def _padded_groups(x: npt.ArrayLike, group: int) -> F32:
    """`x` as f32 `[m, groups, group]`, zeros past the last column."""
    if group < 1:
        raise FormatError(f"quantize_rows: group must be positive, got {group}")
    rows: F32 = np.asarray(x, dtype=np.float32)
    if rows.ndim != 2 or 0 in rows.shape:
        raise FormatError(
            f"quantize_rows: activations must be a non-empty [m, k] array, got shape {rows.shape}"
        )
    if not np.isfinite(rows).all():
        raise FormatError("quantize_rows: activations must be finite, got NaN or infinity")
    m, k = rows.shape
    groups = -(-k // group)
    padded: Any = np.zeros((m, groups * group), np.float32)
    padded[:, :k] = rows
    out: F32 = padded.reshape(m, groups, group)
    return out

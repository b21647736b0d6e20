"""Round to nearest, data free: which scale (and minimum) holds a group of weights best.

Symmetric, 4 bits: the extreme of a group is sent to each of four codes, the scale is refitted by
least squares, and the candidate with the least squared error wins. Squared error by groups of 32,
as a share of that of `scale = max|w| / 7`:

                                           Gaussian   Laplace   SmolLM2 embedding   its ffn_down
    max|w| -> 7                            1          1         1                   1
    extreme -> -8 (so does GGUF's Q4_0)    0.785      0.778     0.775               0.739
    this search                            0.702      0.713     0.704               0.588
    eight candidates                       0.698      0.711     0.701               0.579

(0.702 for Gaussian weights is a relative error ‖w - w'‖ / ‖w‖ of 8.1 %, against 9.7 %. SmolLM2's
weights were on grids of 8 and 4 bits before. Groups of 64: 0.707, 0.707, 0.699, 0.658.)

8 bits: the best of five codes for the extreme, without a refit. Share of max|w| -> 127, Gaussian and
Laplace: 0.84 and 0.85 by groups of 32, 0.89 and 0.90 by 64 (127 and -128 alone: 0.91 and 0.92, 0.93
and 0.94). Weights on a symmetric grid whose extreme code is 7 or -8 (127 or -128) are found again
exactly.

Asymmetric: a range a little wider or narrower than max - min, then the least-squares scale and
minimum. Share of min/max: 0.83 (Gaussian, Laplace, and SmolLM2's embedding; 4 and 5 bits), with one
candidate 0.92, with seven 0.82.

Groups come as f32 `[count, group]`. Every group is rounded on its own, in an order of operations
that depends on nothing else: the result does not change with the chunks a matrix is cut into.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from lacewing.errors import FormatError

__all__ = ["asymmetric_grid", "check_scale_range", "symmetric_grid", "to_f16"]

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

F16_MAX = 65504.0
TINY = 2.0**-25
"""Half the smallest f16: groups that do not exceed it are zero."""
BLOCK = 1 << 15
"""Weights that are searched at once: three buffers of it stay in the second-level cache."""
EXTREME_4 = (7.0, -7.4, -8.0, -8.6)
"""What the extreme of a group is sent to, in codes of 4 bits. Beyond -8 it is clipped."""
EXTREME_8 = (127.0, -128.0, 124.0, -125.0, 121.0)
TOPS = (-1.0, 0.0, 0.5, 1.0)
"""How many steps wider than the largest code the range max - min is made."""


def check_scale_range(name: str, size: F32, steps: int, first_row: int) -> None:
    """Raises FormatError if a magnitude of `size` `[r, k]` over `steps` exceeds the largest f16."""
    limit = F16_MAX * steps
    if size.max() <= limit:
        return
    row, column = np.argwhere(size > limit)[0]
    raise FormatError(
        f"{name} keeps f16 scales and holds magnitudes up to {limit:g},"
        f" got {size[row, column]:g} at [{first_row + row}, {column}]",
        hint="use `bf16` for this tensor, or scale the layer down",
    )


def to_f16(scale: F32) -> F16:
    """`scale` in f16: nearest, but away from zero where f16 is subnormal, so that coarse scales do
    not clip the weights, and never infinite."""
    half = np.clip(scale, -F16_MAX, F16_MAX).astype(np.float16)
    low = (np.abs(scale) < 2.0**-14) & (np.abs(half.astype(np.float32)) < np.abs(scale))
    bits: Any = half.view(np.uint16)
    bits[low] += 1
    return half


def symmetric_grid(groups: F32, bits: int) -> tuple[U8, F16]:
    """Codes and scales of `weight = scale * (code - 2^(bits-1))`."""
    codes, scales = np.empty(groups.shape, np.uint8), np.empty(len(groups), np.float16)
    zero = 1 << (bits - 1)
    search = _search_refit if bits == 4 else _search
    for part, x in _blocks(groups):
        best = to_f16(search(x, zero))
        t = x * _inverse(best)
        q = _to_codes(t, -zero, zero - 1)
        q += np.float32(zero)
        _put(codes, scales, part, q, best)
    return codes, scales


def _search_refit(x: F32, zero: int) -> F32:
    """The scale of each column of `x` `[group, columns]`, least squares for the best codes."""
    extreme = _extreme(x)
    t, u = np.empty_like(x), np.empty_like(x)
    best, scale = np.zeros_like(extreme), np.zeros_like(extreme)
    for code in EXTREME_4:
        np.multiply(x, _divide(np.float32(code), extreme), out=t)
        _to_codes(t, -zero, zero - 1)
        weight = np.multiply(t, x, out=u).sum(axis=0)
        fit = _divide(weight, np.multiply(t, t, out=u).sum(axis=0))
        gain = fit * weight  # |x|^2 less the squared error
        better = gain > best
        np.copyto(best, gain, where=better)
        np.copyto(scale, fit, where=better)
    return scale


def _search(x: F32, zero: int) -> F32:
    """The scale of each column of `x` with the least error, as it is in f16, without a refit."""
    extreme = _extreme(x)
    t, u = np.empty_like(x), np.empty_like(x)
    least, scale = np.full_like(extreme, np.inf), np.zeros_like(extreme)
    for code in EXTREME_8:
        half = to_f16(extreme / np.float32(code)).astype(np.float32)
        np.multiply(x, _divide(np.float32(1), half), out=t)
        np.copyto(u, t)
        t -= _to_codes(u, -zero, zero - 1)
        error = np.multiply(t, t, out=t).sum(axis=0) * (half * half)
        better = error < least
        np.copyto(least, error, where=better)
        np.copyto(scale, half, where=better)
    return scale


def asymmetric_grid(groups: F32, bits: int) -> tuple[U8, F16, F16]:
    """Codes, scales and minima of `weight = scale * code + min`."""
    codes, scales = np.empty(groups.shape, np.uint8), np.empty(len(groups), np.float16)
    mins = np.empty(len(groups), np.float16)
    top = (1 << bits) - 1
    for part, x in _blocks(groups):
        scale, base = _fit_line(x, top)
        best, low = to_f16(scale), np.clip(base, -F16_MAX, F16_MAX).astype(np.float16)
        # The minimum itself may be off by more than a fraction of a step: many weights of nearly
        # the same value. Then the least weight, rounded down, and a scale that reaches the largest.
        off = np.abs(low.astype(np.float32) - base) > np.abs(scale) * np.float32(0.25)
        low = np.where(off, _floor_f16(x.min(axis=0)), low)
        reach = (x.max(axis=0) - low.astype(np.float32)) / np.float32(top)
        best = np.where(off, to_f16(reach), best)
        t = (x - low.astype(np.float32)) * _inverse(best)
        _put(codes, scales, part, _to_codes(t, 0, top), best)
        mins[part] = low[: part.stop - part.start]
    return codes, scales, mins


def _fit_line(x: F32, top: int) -> tuple[F32, F32]:
    """Scale and minimum of each column of `x` `[group, columns]`: least squares for the best of the
    ranges in TOPS."""
    low, mean = x.min(axis=0), x.mean(axis=0)
    spread = x.max(axis=0) - low
    spread[spread <= TINY] = 0
    above, centred = x - low, x - mean
    t, u = np.empty_like(x), np.empty_like(x)
    best, scale, base = np.zeros_like(low), spread / np.float32(top), low.copy()
    for wider in TOPS:
        np.multiply(above, _divide(np.float32(top + wider), spread), out=t)
        _to_codes(t, 0, top)
        code = t.mean(axis=0)
        weight = np.multiply(t, centred, out=u).sum(axis=0)
        t -= code
        fit = _divide(weight, np.multiply(t, t, out=u).sum(axis=0))
        gain = fit * weight
        better = gain > best
        np.copyto(best, gain, where=better)
        np.copyto(scale, fit, where=better)
        np.copyto(base, mean - fit * code, where=better)
    return scale, base


def _blocks(groups: F32) -> Iterator[tuple[slice, F32]]:
    """Runs of groups, transposed: `[group, columns]`, so that sums over a group are sums of long
    rows. The number of columns is always the same (zeros at the end): it decides numpy's order of
    summation."""
    count, size = groups.shape
    columns = BLOCK // size
    for begin in range(0, count, columns):
        part = slice(begin, min(begin + columns, count))
        x = np.zeros((size, columns), np.float32)
        x[:, : part.stop - begin] = groups[part].T
        yield part, x


def _put(codes: U8, scales: F16, part: slice, q: F32, scale: F16) -> None:
    filled = part.stop - part.start
    codes[part] = q.astype(np.uint8)[:, :filled].T
    scales[part] = scale[:filled]


def _extreme(x: F32) -> F32:
    """The weight of largest magnitude in each column, 0 where it is too small for any scale."""
    high, low = x.max(axis=0), x.min(axis=0)
    extreme: F32 = np.where(high >= -low, high, low)
    extreme[np.abs(extreme) <= TINY] = 0
    return extreme


def _to_codes(t: F32, low: int, high: int) -> F32:
    """Rounds `t` to integers from low to high, in place."""
    np.rint(t, out=t)
    np.maximum(t, np.float32(low), out=t)
    return np.minimum(t, np.float32(high), out=t)


def _inverse(scale: F16) -> F32:
    return _divide(np.float32(1), scale.astype(np.float32))


def _divide(a: F32 | np.float32, b: F32) -> F32:
    """`a / b`, 0 where b is 0."""
    out: F32 = np.divide(a, b, out=np.zeros_like(b), where=b != 0)
    return out


def _floor_f16(values: F32) -> F16:
    """The largest f16 that is not above `values`, which f16 can hold."""
    half = values.astype(np.float16)
    above = half.astype(np.float32) > values
    with np.errstate(over="ignore"):  # below -65504, where nothing is chosen
        lower = np.nextafter(half, np.float16(-np.inf))
    out: F16 = np.where(above, lower, half)
    return out

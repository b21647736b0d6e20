"""Merging a prompt's cache against float64, and the same bits on every ISA.

The anchors' means are held to the roundings of a sum and to the step of the cache's format. EPS is
half the distance of 1.0 to the next float.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lacewing import _C
from tests.native.kv import int8_scale, values

Array = np.ndarray[Any, Any]

EPS = 2.0**-24
FIRST, LAST = 4, 32
HALF_STEP = {"f16": 2.0**-11, "bf16": 2.0**-8, "f32": 0.0}  # relative

every_kv = pytest.mark.parametrize("kv", ["f16", "bf16", "f32", "int8"])


def stored(kv: str, x: Array) -> Array:
    """What is read back of keys or values."""
    return values(kv, x).number.astype(np.float32)


def case(rows: int, heads: int, tokens: int, d: int, keep: int) -> tuple[Array, ...]:
    """q, k, v and two block tables out of order with holes."""
    rng = np.random.default_rng([rows, heads, tokens, d])
    q, k, v = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((rows, heads, d), (tokens, d), (tokens, d))
    )
    blocks, out = -(-tokens // 16), -(-keep // 16)
    tables = (rng.permutation(n + 3)[:n].astype(np.int32) for n in (blocks, out))
    return (q, k, v, *tables)


def importance(q: Array, k: Array, scale: float) -> Array:
    """[tokens], in float64: softmax weights that the queries of the last rows give."""
    rows = len(q)
    tokens = len(k)
    seen = np.arange(tokens) <= np.arange(tokens - rows, tokens)[:, None, None]
    score = np.where(seen, q.astype(np.float64) @ k.T.astype(np.float64) * scale, -np.inf)
    weight = np.exp(score - score.max(axis=2, keepdims=True))
    total: Array = (weight / weight.sum(axis=2, keepdims=True)).sum(axis=(0, 1))
    return total


def anchors(total: Array, keep: int) -> Array:
    """Tokens that stay, ascending. f32 does not confuse the two on either side of the limit."""
    between = np.arange(FIRST, len(total) - LAST)
    order = between[np.argsort(-total[between], kind="stable")]
    chosen, left = order[: keep - FIRST - LAST], order[keep - FIRST - LAST :]
    assert not len(left) or total[chosen[-1]] > total[left[0]] * (1 + 1e-5)
    ends = np.r_[:FIRST, len(total) - LAST : len(total)]
    return np.sort(np.r_[ends, chosen])


def buckets(kept: Array, tokens: int) -> list[Array]:
    """For each token that stays: those it stands for."""
    free = kept[FIRST:-LAST]
    nearest = {t: free[np.abs(free - t).argmin()] for t in range(FIRST, tokens - LAST)}
    return [np.array([t for t in range(tokens) if nearest.get(t, t) == a]) for a in kept]


def check(kv: str, rows: int, heads: int, tokens: int, d: int, keep: int) -> None:
    arrays = case(rows, heads, tokens, d, keep)
    q, k, v = arrays[:3]
    scale = d**-0.5
    merged = [_C.merge(*arrays, scale, keep, kv, isa["name"]) for isa in _C.isas() if isa["usable"]]
    assert all((each == merged[0]).all() for each in merged)
    k, v = stored(kv, k), stored(kv, v)
    kept = anchors(importance(q, k, scale), keep)
    for found, given in zip(merged[0], (k, v), strict=True):
        for row, bucket in zip(found, buckets(kept, tokens), strict=True):
            taken = given[bucket].astype(np.float64)
            mean = taken.mean(axis=0)
            error = len(bucket) * EPS * np.abs(taken).mean(axis=0)
            if kv == "int8":
                error += int8_scale(mean.astype(np.float32)) * (0.5 + 2.0**-4)
            else:
                error += np.abs(mean) * HALF_STEP[kv] * (1 + 2.0**-7) + 2.0**-25
            assert (np.abs(row - mean) <= error).all()


@every_kv
@pytest.mark.parametrize(("tokens", "keep"), [(37, 37), (99, 37), (99, 98), (257, 64), (600, 120)])
def test_lengths(kv: str, tokens: int, keep: int) -> None:
    check(kv, 32, 2, tokens, 24, keep)


@every_kv
@pytest.mark.parametrize(("rows", "heads"), [(1, 1), (3, 5), (32, 8), (7, 7), (40, 1)])
def test_queries(kv: str, rows: int, heads: int) -> None:
    check(kv, rows, heads, 150, 40, 50)


@pytest.mark.parametrize("d", [1, 7, 16, 33, 64, 128])
def test_head_sizes(d: int) -> None:
    for kv in (*HALF_STEP, "int8"):
        check(kv, 8, 2, 120, d, 60)


@every_kv
def test_everything_stays(kv: str) -> None:
    arrays = case(4, 2, 77, 16, 77)
    k, v = _C.merge(*arrays, 0.25, 77, kv)
    assert (k == stored(kv, arrays[1])).all()
    assert (v == stored(kv, arrays[2])).all()


def test_queries_that_are_not_finite_say_nothing() -> None:
    q, *rest = case(3, 2, 90, 16, 50)
    bad = q.copy()
    bad[1, 1] = np.nan
    merged = [_C.merge(bad, *rest, 0.25, 50, "f32", i["name"]) for i in _C.isas() if i["usable"]]
    assert np.isfinite(merged[0]).all()
    assert all((each == merged[0]).all() for each in merged)


def test_wrong_arguments() -> None:
    q, k, v, table, out = case(4, 2, 77, 16, 40)
    with pytest.raises(ValueError, match=r"keep must be in 37\.\.77, got 36"):
        _C.merge(q, k, v, table, out, 0.25, 36)
    with pytest.raises(ValueError, match="block_table must have at least 5 values, got 1"):
        _C.merge(q, k, v, table[:1], out, 0.25, 40)
    with pytest.raises(ValueError, match="out_table must have at least 3 values, got 1"):
        _C.merge(q, k, v, table, out[:1], 0.25, 40)
    with pytest.raises(ValueError, match="merge: q must be"):
        _C.merge(q[:, :, :8].copy(), k, v, table, out, 0.25, 40)

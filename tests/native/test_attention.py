"""Attention against float64 for every KV cache format, and the same bits on every ISA, alone,
together, and in parts.

Tolerances count roundings: EPS is half the distance of 1.0 to the next float.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lacewing import _C
from tests.native.kv import CODES, FLOATS, FORMATS, scores, values, weight_step

Array = np.ndarray[Any, Any]

EPS = 2.0**-24
ISAS = [isa["name"] for isa in _C.isas() if isa["usable"]]

pytestmark = pytest.mark.parametrize("isa", ISAS)
every_kv = pytest.mark.parametrize("kv", FORMATS)


def normal(*shape: int, seed: int = 0) -> Array:
    rng = np.random.default_rng([seed, *shape])
    return rng.standard_normal(shape).astype(np.float32)


def case(
    rows: int, tokens: int, heads: int, kv_heads: int, d: int, kv: str = "f16"
) -> tuple[Array, ...]:
    """q, k, v and a block table out of order with holes; of a sealed format, whole blocks."""
    if kv in _C.KV_SEALED_FROM:
        tokens = -(-tokens // 16) * 16
    rng = np.random.default_rng([rows, tokens, d])
    blocks = -(-tokens // 16)
    table = rng.permutation(blocks + 3)[:blocks].astype(np.int32)
    return (
        normal(rows, heads, d, seed=1),
        normal(tokens, kv_heads, d, seed=2),
        normal(tokens, kv_heads, d, seed=3),
        table,
    )


def exact_attention(
    q: Array, k: Array, v: Array, scale: float, window: int, kv: str
) -> tuple[Array, Array]:
    """Attention in float64 over keys and values as stored, and how far f32 may be off."""
    rows, heads, d = q.shape
    tokens, kv_heads, _ = k.shape
    stored = values(kv, v)
    key_at, query_at = np.arange(tokens), np.arange(tokens - rows, tokens)[:, None]
    seen = key_at <= query_at
    if window:
        seen &= key_at > query_at - window
    exact, bound = np.empty(q.shape), np.empty(q.shape)
    for h in range(heads):
        g = h * kv_heads // heads
        numbers, size = stored.number[:, g], np.abs(stored.scale * stored.code)[:, g]
        size = size + np.abs(stored.minimum[:, g])
        score, score_error = (part * scale for part in scores(kv, q[:, h], k[:, g], seen))
        score_error *= (d + 4) * EPS
        score = np.where(seen, score, -np.inf)
        weight = np.exp(score - score.max(axis=1, keepdims=True))
        weight /= weight.sum(axis=1, keepdims=True)
        exact[:, h] = weight @ numbers
        # Of every weight: its exponent twice (score and maximum) and exp; the sums over tokens and
        # their rescaling, of numerator and denominator alike.
        relative = 2 * np.where(seen, score_error, 0).max(axis=1) + (2 * tokens + 30) * EPS
        bound[:, h] = relative[:, None] * (weight @ size) * 2
        if kv not in FLOATS:
            step = weight_step(weight, stored.scale[:, g, 0])
            bound[:, h] += step @ np.abs(stored.code[:, g])
    return exact, bound


def check(isa: str, kv: str, arrays: tuple[Array, ...], scale: float, window: int = 0) -> Array:
    """The result, right and the same on the portable ISA."""
    q, k, v, table = arrays
    y = _C.attention(q, k, v, table, scale, window, isa, kv)
    assert y.dtype == np.float32
    exact, bound = exact_attention(q, k, v, scale, window, kv)
    excess = np.abs(y.astype(np.float64) - exact) - bound
    assert excess.max() <= 0, f"off by {excess.max():g} more than {bound.flat[excess.argmax()]:g}"
    assert (y == _C.attention(q, k, v, table, scale, window, "scalar", kv)).all()
    return y


@every_kv
@pytest.mark.parametrize("d", [8, 16, 24, 32, 64, 80, 100, 128, 256])
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (2, 1), (9, 3), (8, 2), (5, 1), (6, 1), (7, 1), (8, 1)]
)
def test_shapes(isa: str, kv: str, d: int, heads: int, kv_heads: int) -> None:
    for rows in (1, 4):  # few queries read the cache as it is, many widen it first
        check(isa, kv, case(rows, 37, heads, kv_heads, d, kv), d**-0.5)


@every_kv
@pytest.mark.parametrize("window", [0, 1, 7, 16, 100, 513, 2000])
@pytest.mark.parametrize("tokens", [1, 16, 17, 128, 129, 513, 1100])
def test_long_contexts_and_windows(isa: str, kv: str, tokens: int, window: int) -> None:
    check(isa, kv, case(min(tokens, 21), tokens, 3, 1, 16, kv), 0.25, window)


@every_kv
def test_more_queries_than_a_tile_holds(isa: str, kv: str) -> None:
    check(isa, kv, case(150, 200, 4, 1, 32, kv), 0.2)
    check(isa, kv, case(40, 40, 3, 1, 512, kv), 512**-0.5)


@every_kv
@pytest.mark.parametrize("window", [0, 5, 40, 600])
def test_a_row_does_not_depend_on_the_others(isa: str, kv: str, window: int) -> None:
    rows, tokens = 30, 620  # row by row the segments, spans and blocks begin and end elsewhere
    q, k, v, table = case(rows, tokens, 4, 2, 32, kv)
    tokens = len(k)
    together = _C.attention(q, k, v, table, 0.2, window, isa, kv)
    for r in range(rows):
        fewer = _C.attention(q[r:].copy(), k, v, table, 0.2, window, isa, kv)
        assert (fewer == together[r:]).all(), f"from row {r}"
    for r in range(rows):
        if kv in _C.KV_SEALED_FROM and (tokens - rows + r + 1) % 16:
            continue
        seen = tokens - rows + r + 1
        alone = _C.attention(q[r : r + 1], k[:seen], v[:seen], table, 0.2, window, isa, kv)
        assert (alone[0] == together[r]).all(), f"row {r}"


@every_kv
@pytest.mark.parametrize("window", [0, 5, 600])
@pytest.mark.parametrize(("rows", "heads"), [(1, 1), (1, 4), (1, 8), (2, 5), (1, 13), (4, 4)])
def test_parts_make_the_whole(isa: str, kv: str, rows: int, heads: int, window: int) -> None:
    for tokens in (40, 512, 513, 1700):
        q, k, v, table = case(rows, tokens, heads, 1, 40, kv)
        whole = _C.attention(q, k, v, table, 0.2, window, isa, kv)
        parts = _C.attention(q, k, v, table, 0.2, window, isa, kv, True)
        assert (parts == whole).all(), f"{tokens} tokens"


@every_kv
def test_many_small_weights_beside_a_large_one(isa: str, kv: str) -> None:
    """As in models whose first token draws most of the attention."""
    q, k, v, table = case(3, 700, 2, 1, 16, kv)
    q[:] = k[0] = 1
    k[1:] *= np.float32(0.05)  # scores of 10 for the first token, about 0 for the others
    v[1:] += 4
    v[0] = 1
    check(isa, kv, (q, k, v, table), 10 / 16)


@every_kv
def test_extreme_scores(isa: str, kv: str) -> None:
    q, k, v, table = case(3, 40, 2, 1, 16, kv)
    q, k = q * np.float32(100), k * np.float32(1000)
    y = _C.attention(q, k, v, table, 1.0, 0, isa, kv)
    assert np.isfinite(y).all()
    assert (y == _C.attention(q, k, v, table, 1.0, 0, "scalar", kv)).all()


@every_kv
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e6, 1e38])
def test_the_cache_stays_finite(isa: str, kv: str, bad: float) -> None:
    """What does not fit must not spoil rows that do not see it."""
    q, k, v, table = case(4, 20, 1, 1, 16, kv)
    clean = _C.attention(q, k, v, table, 0.25, 3, isa, kv)
    spoilt = 16 if kv == "int4" else -4  # keys of a block share their scales there
    k[:spoilt] = v[:spoilt] = bad  # row 3 sees the last three tokens
    assert (_C.attention(q, k, v, table, 0.25, 3, isa, kv)[3] == clean[3]).all()


@pytest.mark.parametrize("kv", [*CODES, "int4"])
def test_tiny_and_zero_numbers_in_integers(isa: str, kv: str) -> None:
    """Below f16's range a scale is zero, and so is what it stands for."""
    q, k, v, table = case(2, 20, 1, 1, 16, kv)
    v[:], k[3] = 1e-9, 0
    assert (_C.attention(q, k, v, table, 0.25, 0, isa, kv) == 0).all()
    v[:] = 127
    expected = values(kv, v[:1]).number[0, 0]
    assert (_C.attention(q * 0, k, v, table, 0.25, 0, isa, kv) == expected).all()


@pytest.mark.parametrize("kv", ["int8_sp50", "int8_sp70"])
@pytest.mark.parametrize("d", [1, 8, 24, 64, 80, 100, 128, 256, 512])
def test_the_first_of_equals_are_kept(isa: str, kv: str, d: int) -> None:
    """Every token pays attention to one of 16 alone and so gives back its values: of numbers of
    three magnitudes, some negative, the largest, then the first ones."""
    rng = np.random.default_rng(d)
    v = rng.choice(np.array([127, -127, 60, -60, 1], np.float32), (16, 1, d))
    v[:, 0, 0] = 127  # the scale is 1
    for token in range(16):
        keys = np.zeros((16, 1, d), np.float32)
        keys[token, 0, 0] = 1
        q = np.zeros((1, 1, d), np.float32)
        q[0, 0, 0] = 1
        y = _C.attention(q, keys, v, np.array([0], np.int32), 1e4, 0, isa, kv)
        assert (y[0, 0] == CODES[kv](v)[token, 0]).all(), f"token {token}"


@settings(deadline=None, max_examples=25, derandomize=True, database=None)
@given(
    kv=st.sampled_from(FORMATS),
    d=st.sampled_from([8, 24, 80, 100, 128, 256]),
    blocks=st.integers(1, 70),
    more=st.integers(-2, 2),
    rows=st.integers(1, 20),
    groups=st.sampled_from([(1, 1), (4, 1), (6, 2), (7, 1)]),
    window=st.sampled_from([0, 0, 1, 15, 16, 17, 130]),
)
def test_lengths_around_block_borders(
    isa: str,
    kv: str,
    d: int,
    blocks: int,
    more: int,
    rows: int,
    groups: tuple[int, int],
    window: int,
) -> None:
    tokens = max(1, blocks * 16 + more)
    arrays = case(min(rows, tokens), tokens, *groups, d, kv)
    y = check(isa, kv, arrays, d**-0.5, window)
    q, k, v, table = arrays
    if len(q) * groups[0] // groups[1] <= 16:
        parts = _C.attention(q, k, v, table, d**-0.5, window, isa, kv, True)
        assert (parts == y).all()


def test_block_bytes(isa: str) -> None:
    sizes = {kv: _C.kv_block_bytes(kv, 64) for kv in _C.KV_FORMATS}
    assert sizes == {
        "f16": 4096,
        "bf16": 4096,
        "f32": 8192,
        "int8": 2112,
        "int4": 1344,
        "int8_sp50": 1344,
        "int8_sp70": 960,
    }
    assert all(_C.kv_block_bytes(kv, d) % 64 == 0 for kv in sizes for d in range(1, 100))


def test_wrong_arguments(isa: str) -> None:
    q, k, v, table = case(2, 20, 2, 1, 8)
    with pytest.raises(ValueError, match="block_table must have at least 2 values, got 1"):
        _C.attention(q, k, v, table[:1], 1.0, 0, isa)
    with pytest.raises(ValueError, match=r"block_table must be in 0\.\.65536, got -1"):
        _C.attention(q, k, v, table * 0 - 1, 1.0, 0, isa)
    with pytest.raises(ValueError, match="attention: q must be"):
        _C.attention(q[:, :, :4].copy(), k, v, table, 1.0, 0, isa)
    with pytest.raises(ValueError, match=r"attention: kv must be one of `f16`, .*, got `int9`"):
        _C.attention(q, k, v, table, 1.0, 0, isa, "int9")
    with pytest.raises(ValueError, match="parts are for at most 16 queries, got 18"):
        _C.attention(normal(9, 2, 8), k, v, table, 1.0, 0, isa, "f16", True)
    with pytest.raises(ValueError, match="`int8_sp70` needs whole blocks of 16 tokens, got 20"):
        _C.attention(q, k, v, table, 1.0, 0, isa, "int8_sp70")

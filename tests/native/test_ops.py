"""The decoder's float steps against float64, and the same bits on every ISA.

Tolerances count roundings: EPS is half the distance of 1.0 to the next float, the most that one
rounding can be off.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lacewing import _C
from tests.isas import USABLE

Array = np.ndarray[Any, Any]

EPS = 2.0**-24
SIZES = [1, 2, 15, 16, 17, 33, 100, 576]

pytestmark = pytest.mark.parametrize("isa", USABLE)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    rng = np.random.default_rng([seed, *shape])
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def assert_within(actual: Array, exact: Array, bound: Array) -> None:
    assert actual.dtype == np.float32
    excess = np.abs(actual.astype(np.float64) - exact) - bound
    assert excess.max() <= 0, f"off by {excess.max():g} more than {bound.flat[excess.argmax()]:g}"


# ---- norm


@pytest.mark.parametrize("k", SIZES)
def test_rms_norm(isa: str, k: int) -> None:
    x, weight = normal(3, k, scale=5), normal(k, seed=1)
    y = _C.rms_norm(x, weight, 1e-5, isa)
    wide = x.astype(np.float64)
    exact = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    # Half of the sum's roundings survive the root; then eps, mean, root, division, two products.
    assert_within(y, exact, np.abs(exact) * (k / 16 / 2 + 3 + 6) * EPS)
    assert (y == _C.rms_norm(x, weight, 1e-5, "scalar")).all()


def test_rms_norm_of_nothing_and_of_much(isa: str) -> None:
    x = np.stack([np.zeros(40), np.full(40, 1e18)]).astype(np.float32)
    y = _C.rms_norm(x, np.ones(40, np.float32), 1e-6, isa)
    assert (y[0] == 0).all()
    assert np.abs(y[1] - 1).max() < 1e-6


# ---- activations


def activations(n: int) -> Array:
    spread = np.linspace(-100, 100, n)
    return np.concatenate([spread, normal(n), [0.0, -0.0, 1e-30, -1e-30]])[None].astype(np.float32)


@pytest.mark.parametrize("n", SIZES)
def test_silu(isa: str, n: int) -> None:
    gate, up = activations(n), activations(n)[:, ::-1].copy()
    y = _C.act_mul("silu", gate, up, isa)
    wide = gate.astype(np.float64)
    exact = wide / (1 + np.exp(-wide)) * up
    # The argument of exp is exact; exp is within 4 roundings; then sum, division, product. Where
    # e^-x is beyond 88.3 it is cut there: the result is less than 1e-36 times `up`.
    assert_within(y, exact, np.abs(exact) * 7 * EPS + 1e-36 * np.abs(up) + 1e-44)
    assert (y == _C.act_mul("silu", gate, up, "scalar")).all()


@pytest.mark.parametrize("n", SIZES)
def test_gelu_tanh(isa: str, n: int) -> None:
    gate, up = activations(n), activations(n)[:, ::-1].copy()
    y = _C.act_mul("gelu_tanh", gate, up, isa)
    wide = gate.astype(np.float64)
    u = np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
    sigmoid = np.where(
        u > 0, 1 / (1 + np.exp(-2 * np.abs(u))), 1 - 1 / (1 + np.exp(-2 * np.abs(u)))
    )
    with np.errstate(over="ignore"):
        exact = wide / (1 + np.exp(-2 * u)) * up
    # 2u is off by 5 roundings of itself (two constants, three steps); e^-2u by as many times |2u|,
    # of which the share 1 - sigmoid(2u) reaches the result.
    relative = 7 + np.minimum(np.abs(2 * u), 90) * 5 * (1 - sigmoid)
    assert_within(y, exact, np.abs(exact) * relative * EPS + 1e-36 * np.abs(up) + 1e-44)
    assert (y == _C.act_mul("gelu_tanh", gate, up, "scalar")).all()


# ---- rope


@pytest.mark.parametrize("d", [2, 8, 30, 64, 80, 256])
def test_rope(isa: str, d: int) -> None:
    x = normal(5, d)
    angles = np.arange(5)[:, None] * 0.7 ** np.arange(d // 2)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    y = _C.rope(x, cos, sin, isa)
    first, second = x[:, : d // 2], x[:, d // 2 :]
    # Two products and a sum, each rounded: numpy's own f32 gives the same bits.
    assert (y == np.concatenate([first * cos - second * sin, second * cos + first * sin], 1)).all()


# ---- attention


def attention_case(
    rows: int, tokens: int, heads: int, kv_heads: int, d: int, seed: int = 0
) -> tuple[Array, Array, Array, Array]:
    """q, k, v and a block table out of order with holes."""
    rng = np.random.default_rng([seed, rows, tokens, d])
    blocks = -(-tokens // 16)
    table = rng.permutation(blocks + 3)[:blocks].astype(np.int32)
    return (
        normal(rows, heads, d, seed=1),
        normal(tokens, kv_heads, d, seed=2),
        normal(tokens, kv_heads, d, seed=3),
        table,
    )


def exact_attention(q: Array, k: Array, v: Array, scale: float, window: int) -> tuple[Array, Array]:
    """Attention in float64 over keys and values rounded to f16, and how far f32 may be off."""
    rows, heads, d = q.shape
    tokens, kv_heads, _ = k.shape
    k, v = (part.astype(np.float16).astype(np.float64) for part in (k, v))
    key_at, query_at = np.arange(tokens), np.arange(tokens - rows, tokens)[:, None]
    seen = key_at <= query_at
    if window:
        seen &= key_at > query_at - window
    exact, bound = np.empty(q.shape), np.empty(q.shape)
    for h in range(heads):
        keys, values = k[:, h * kv_heads // heads], v[:, h * kv_heads // heads]
        score = q[:, h].astype(np.float64) @ keys.T * scale
        score_error = np.abs(q[:, h]).astype(np.float64) @ np.abs(keys).T * scale * (d + 4) * EPS
        score = np.where(seen, score, -np.inf)
        weight = np.exp(score - score.max(axis=1, keepdims=True))
        weight /= weight.sum(axis=1, keepdims=True)
        exact[:, h] = weight @ values
        # Of every weight: its exponent twice (score and maximum) and exp; the sums over tokens and
        # their rescaling, of numerator and denominator alike.
        relative = 2 * np.where(seen, score_error, 0).max(axis=1) + (2 * tokens + 30) * EPS
        bound[:, h] = relative[:, None] * (weight @ np.abs(values)) * 2
    return exact, bound


@pytest.mark.parametrize("d", [8, 16, 24, 64, 80, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 1), (9, 3), (8, 2), (5, 1), (7, 1)])
def test_attention(isa: str, d: int, heads: int, kv_heads: int) -> None:
    q, k, v, table = attention_case(4, 37, heads, kv_heads, d)
    y = _C.attention(q, k, v, table, d**-0.5, 0, isa)
    assert_within(y, *exact_attention(q, k, v, d**-0.5, 0))
    assert (y == _C.attention(q, k, v, table, d**-0.5, 0, "scalar")).all()


@pytest.mark.parametrize("window", [0, 1, 7, 16, 100, 513, 2000])
@pytest.mark.parametrize("tokens", [1, 16, 17, 128, 129, 513, 1100])
def test_attention_over_long_contexts_and_windows(isa: str, tokens: int, window: int) -> None:
    rows = min(tokens, 21)
    q, k, v, table = attention_case(rows, tokens, 3, 1, 16)
    y = _C.attention(q, k, v, table, 0.25, window, isa)
    assert_within(y, *exact_attention(q, k, v, 0.25, window))
    assert (y == _C.attention(q, k, v, table, 0.25, window, "scalar")).all()


@pytest.mark.parametrize("window", [0, 5, 40, 600])
def test_attention_of_a_row_does_not_depend_on_the_others(isa: str, window: int) -> None:
    rows, tokens = 30, 620  # row by row the segments, spans and blocks begin and end elsewhere
    q, k, v, table = attention_case(rows, tokens, 4, 2, 32)
    together = _C.attention(q, k, v, table, 0.2, window, isa)
    for r in range(rows):
        seen = tokens - rows + r + 1
        alone = _C.attention(q[r : r + 1], k[:seen], v[:seen], table, 0.2, window, isa)
        assert (alone[0] == together[r]).all(), f"row {r}"


def test_attention_survives_extreme_scores(isa: str) -> None:
    q, k, v, table = attention_case(3, 40, 2, 1, 16)
    q, k = q * np.float32(100), k * np.float32(1000)
    y = _C.attention(q, k, v, table, 1.0, 0, isa)
    assert np.isfinite(y).all()
    assert (y == _C.attention(q, k, v, table, 1.0, 0, "scalar")).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e6])
def test_the_cache_stays_finite(isa: str, bad: float) -> None:
    """What does not fit into f16 must not spoil rows that do not see it."""
    q, k, v, table = attention_case(4, 20, 1, 1, 16)
    clean = _C.attention(q, k, v, table, 0.25, 3, isa)
    k[:16] = v[:16] = bad  # the rows see tokens from 14 on, row 3 only those from 17 on
    assert (_C.attention(q, k, v, table, 0.25, 3, isa)[3] == clean[3]).all()


# ---- arguments


def test_wrong_arguments(isa: str) -> None:
    x = normal(2, 16)
    with pytest.raises(ValueError, match=r"rms_norm: weight must be \[16\], got \[15\]"):
        _C.rms_norm(x, normal(15), 1e-5, isa)
    with pytest.raises(ValueError, match="act_mul: name must be `silu` or `gelu_tanh`, got `relu`"):
        _C.act_mul("relu", x, x, isa)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="same shape"):
        _C.act_mul("silu", x, normal(2, 17), isa)
    with pytest.raises(ValueError, match=r"cos and sin must be \[2, 8\], got \[2, 7\]"):
        _C.rope(x, normal(2, 7), normal(2, 8), isa)
    q, k, v, table = attention_case(2, 20, 2, 1, 8)
    with pytest.raises(ValueError, match="block_table must have at least 2 values, got 1"):
        _C.attention(q, k, v, table[:1], 1.0, 0, isa)
    with pytest.raises(ValueError, match=r"block_table must be in 0\.\.65536, got -1"):
        _C.attention(q, k, v, table * 0 - 1, 1.0, 0, isa)
    with pytest.raises(ValueError, match="attention: q must be"):
        _C.attention(q[:, :, :4].copy(), k, v, table, 1.0, 0, isa)

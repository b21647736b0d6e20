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


# ---- floats of 16 bits


def bf16_bits(x: Array) -> Array:
    """To nearest even; a NaN stays one."""
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), bits >> 16 | 0x40, rounded).astype(np.uint16)


def test_widen_every_value(isa: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = _C.widen(bits, "bf16", isa)
    assert (wide.view(np.uint32) == bits.astype(np.uint32) << 16).all()
    wide, exact = _C.widen(bits, "f16", isa), bits.view(np.float16).astype(np.float32)
    assert ((wide == exact) | (np.isnan(wide) & np.isnan(exact))).all()
    assert (np.signbit(wide) == np.signbit(exact)).all()


@pytest.mark.parametrize("n", [0, *SIZES])
def test_widen_and_narrow_any_length(isa: str, n: int) -> None:
    x = normal(n)
    for name, bits in (("f16", x.astype(np.float16).view(np.uint16)), ("bf16", bf16_bits(x))):
        narrow = _C.narrow(x, name, isa)
        assert (narrow == bits).all()
        assert (_C.narrow(_C.widen(narrow, name, isa), name, isa) == bits).all()


def test_narrow_ties_limits_and_no_numbers(isa: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    x[::2] = x[::2] >> 12 << 12  # halfway between two of f16, or one of them
    x[1::4] = x[1::4] >> 15 << 15  # the same for bf16
    floats = x.view(np.float32)
    numbers = floats[~np.isnan(floats)]
    with np.errstate(over="ignore"):
        exact = numbers.astype(np.float16).view(np.uint16)
    assert (_C.narrow(numbers, "f16", isa) == exact).all()
    assert (_C.narrow(numbers, "bf16", isa) == bf16_bits(numbers)).all()
    strange = floats[np.isnan(floats)]
    for name in ("f16", "bf16"):
        assert np.isnan(_C.widen(_C.narrow(strange, name, isa), name, isa)).all()


def test_narrow_to_what_there_is_not(isa: str) -> None:
    with pytest.raises(ValueError, match="type must be f16 or bf16, got `f8`"):
        _C.narrow(np.ones(1, np.float32), "f8", isa)
    with pytest.raises(ValueError, match="type must be f16 or bf16"):
        _C.widen(np.ones(1, np.uint16), "f32", isa)

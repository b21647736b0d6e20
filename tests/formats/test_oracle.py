"""`reference_linear` against one operation after the other, and against what it stands for."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from lacewing.errors import FormatError
from lacewing.formats import FORMATS, Codes, Format, get_format
from lacewing.formats.base import ROW
from lacewing.formats.bf16 import Bf16, _fma
from tests.formats import naive

INTEGER = [f for f in FORMATS.values() if f.group_size]
f32 = np.float32


def rows(m: int, k: int, seed: int = 0) -> Any:
    x = np.random.default_rng([seed, m, k]).standard_normal((m, k), np.float32)
    x[:, :: max(1, k // 3)] *= f32(50)
    if m > 1:
        x[1] = 0
    if m > 2:
        x[2, : k // 2] = 1e-40
    return x


@pytest.mark.parametrize("fmt", INTEGER, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 33), (2, 5, 64), (4, 3, 200)], ids=str)
def test_every_step_is_the_stated_one(fmt: Format, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    codes = naive.random_codes(fmt, n, k)
    x = rows(m, k)
    bias = np.linspace(-2, 2, n, dtype=np.float32)
    packed = fmt.pack(codes)
    want = naive.linear(fmt, x, codes)
    assert np.array_equal(fmt.reference_linear(x, packed), want)
    assert np.array_equal(fmt.reference_linear(x, codes), want)
    biased = naive.linear(fmt, x, codes, bias)
    assert np.array_equal(fmt.reference_linear(x, packed, bias), biased)


@pytest.mark.parametrize("fmt", INTEGER, ids=str)
def test_extreme_codes_stay_exact(fmt: Format) -> None:
    """The largest dot products there are: float multiplication must still be exact."""
    k = min(2 * fmt.group_size, ROW)
    for code in (0, fmt.max_code):
        q = np.full((2, k), code, np.uint8)
        scales = np.full((2, fmt.groups(k)), 1 / 3, np.float16)
        codes = Codes(q, scales, scales if fmt.asymmetric else None)
        for sign in (1, -1):
            x = np.full((1, k), sign * 7.3, np.float32)
            assert np.array_equal(fmt.reference_linear(x, codes), naive.linear(fmt, x, codes))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_it_multiplies_by_the_dequantized_weight(fmt: Format) -> None:
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((24, 320), np.float32)
    x = rng.standard_normal((7, 320), np.float32)
    packed = fmt.pack(fmt.round(weight))
    want = x.astype(np.float64) @ fmt.dequantize(packed).T
    error = np.abs(fmt.reference_linear(x, packed) - want)
    # Activations in int8: each is off by 1/254 of its group's largest, evenly spread.
    assert error.max() < 0.03 * np.abs(want).max()
    assert np.linalg.norm(error) < 0.01 * np.linalg.norm(want)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_dequantize_is_the_formula(fmt: Format) -> None:
    codes = naive.random_codes(fmt, 19, 77)
    weight = fmt.dequantize(fmt.pack(codes))
    assert np.array_equal(weight, fmt.dequantize(codes))
    for o, i in [(0, 0), (18, 76), (7, 33), (16, 64)]:
        q = codes.q[o, i]
        if codes.scales is None:
            bits = np.array([q], np.uint32) << np.uint32(16)
            assert weight[o, i] == bits.view(np.float32)[0]
            continue
        scale = f32(codes.scales[o, i // fmt.group_size])
        want = f32(scale * f32(fmt.code_step * int(q) - fmt.zero_point))
        if codes.mins is not None:
            want = f32(want + f32(codes.mins[o, i // fmt.group_size]))
        assert weight[o, i] == want


# -- bf16 ---------------------------------------------------------------------------------------


def nearest_f32(value: Fraction) -> np.float32:
    """The f32 nearest to an exact value, ties to even, for normal results."""
    if value == 0:
        return f32(0)
    exponent = math.floor(math.log2(abs(value)))
    exponent = min(max(exponent, -126), 127)
    for e in (exponent + 1, exponent, exponent - 1):  # log2 may be off by one
        scaled = value / Fraction(2) ** (e - 23)
        if e == -126 or (1 << 23) <= abs(scaled) < (1 << 24):
            break
    return f32(math.ldexp(round(scaled), e - 23))  # round() of a Fraction is half to even


def test_fma_rounds_once() -> None:
    rng = np.random.default_rng(1)
    count = 3000
    a = rng.standard_normal(count).astype(np.float32)
    b = (rng.standard_normal(count).astype(np.float32).view(np.uint32) >> 16 << 16).view(np.float32)
    c = rng.standard_normal(count).astype(np.float32)
    # Sums that nearly cancel, sums of very different size, and ties of f32 that a first rounding
    # to float64 would decide wrongly.
    c[:1000] = -(a * b)[:1000] * (1 + rng.integers(-2, 3, 1000) * 2.0**-23)
    c[1000:2000] *= f32(2.0) ** rng.integers(-40, 60, 1000).astype(np.float32)
    a[2000:2100], b[2000:2100] = f32(1 + 2.0**-23), f32(2.0**-30)
    c[2000:2100] = 1 + 2.0**-23 * np.arange(100)
    a[2100], b[2100], c[2100] = f32(2.0**-24 + 2.0**-47), f32(1), f32(1)
    a[2101], b[2101], c[2101] = f32(2.0**-24), f32(1), f32(1)
    got = _fma(a, b, c)
    for i in range(count):
        want = nearest_f32(Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i])))
        assert got[i] == want, i


def test_bf16_chains_are_the_stated_order() -> None:
    fmt = get_format("bf16")
    assert isinstance(fmt, Bf16)
    for k in (1, 2, 7, 64):
        codes = naive.random_codes(fmt, 3, k)
        w, x = fmt.dequantize(codes), rows(2, k)
        bias = np.array([0.5, -3, 1e-8], np.float32)
        got = fmt.chain_linear(x, fmt.pack(codes), bias)
        for r in range(2):
            for o in range(3):
                chain = [f32(0), f32(0)]
                for i in range(k):
                    product = Fraction(float(x[r, i])) * Fraction(float(w[o, i]))
                    chain[i % 2] = nearest_f32(product + Fraction(float(chain[i % 2])))
                assert got[r, o] == f32(f32(chain[0] + chain[1]) + bias[o])


def test_bf16_chains_are_within_the_tolerance() -> None:
    fmt = get_format("bf16")
    assert isinstance(fmt, Bf16)
    codes = naive.random_codes(fmt, 16, 700)
    x = rows(5, 700)
    exact = x.astype(np.float64) @ fmt.dequantize(codes).astype(np.float64).T
    tolerance = fmt.tolerance(x, codes)
    chains = fmt.chain_linear(x, codes)
    assert (np.abs(chains - exact) <= tolerance).all()
    assert (np.abs(fmt.reference_linear(x, codes) - exact) <= tolerance).all()
    # The rule for bf16: error at most twice that of the naive computation, which rounds x to bf16.
    rounded = fmt.dequantize(fmt.round(x))
    naive_error = rounded.astype(np.float64) @ fmt.dequantize(codes).astype(np.float64).T - exact
    assert np.linalg.norm(chains - exact) < np.linalg.norm(naive_error)


# -- wrong arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_wrong_activations_and_bias(fmt: Format) -> None:
    codes = naive.random_codes(fmt, 4, 32)
    with pytest.raises(FormatError, match=r"shape \[m, 32\], got \[2, 31\]"):
        fmt.reference_linear(np.zeros((2, 31)), codes)
    with pytest.raises(FormatError, match=r"shape \[m, 32\], got \[32\]"):
        fmt.reference_linear(np.zeros(32), codes)
    with pytest.raises(FormatError, match=r"bias must have shape \[4\], got \[5\]"):
        fmt.reference_linear(np.zeros((2, 32)), codes, np.zeros(5))

"""Magnitude pruning: how many weights go, and which."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lacewing.errors import FormatError
from lacewing.formats import FORMATS, get_format, pack
from lacewing.formats.prune import largest_of, magnitude_mask

f32 = np.float32


@pytest.mark.parametrize("k", [1, 2, 7, 64, 1001])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.5, 0.7, 0.95, 0.9999])
def test_the_number_per_row_is_exact(k: int, sparsity: float) -> None:
    rows = np.random.default_rng(k).standard_normal((5, k), f32)
    dropped = (~magnitude_mask(rows, sparsity)).sum(axis=1)
    assert dropped.tolist() == [math.floor(k * sparsity + 0.5)] * 5


def test_the_smallest_go() -> None:
    rows = np.array([[3, -1, 0.5, -4], [0, 2, -2.5, 1]], f32)
    kept = np.where(magnitude_mask(rows, 0.5), rows, f32(0))
    assert kept.tolist() == [[3, 0, 0, -4], [0, 2, -2.5, 0]]


def test_of_equal_magnitudes_the_earlier_go() -> None:
    rows = np.array([[2, -2, 2, -2], [1, 1, 1, 5], [0, 0, 0, 0]], f32)
    keep = magnitude_mask(rows, 0.5)
    assert keep.tolist() == [
        [False, False, True, True],
        [False, False, True, True],
        [False, False, True, True],
    ]


def test_ties_match_a_stable_sort() -> None:
    rows = np.random.default_rng(1).integers(-3, 4, (50, 77)).astype(f32)
    for sparsity in (0.1, 0.33, 0.5, 0.9):
        keep = np.ones(rows.shape, bool)
        order = np.argsort(np.abs(rows), axis=1, kind="stable")
        np.put_along_axis(keep, order[:, : math.floor(77 * sparsity + 0.5)], False, axis=1)
        assert np.array_equal(magnitude_mask(rows, sparsity), keep)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 2, math.nan, math.inf])
def test_sparsity_out_of_range(sparsity: float) -> None:
    with pytest.raises(FormatError, match=r"sparsity must be in \[0, 1\)"):
        pack(np.ones((4, 4)), "w8a8g64_sp", sparsity)


@pytest.mark.parametrize(
    "name", [f.name for f in FORMATS.values() if f.holds_zero and not f.fixed_sparsity]
)
def test_pruned_weights_are_zero_in_every_format_that_can_hold_them(name: str) -> None:
    fmt = get_format(name)
    weight = np.random.default_rng(2).standard_normal((6, 100), f32)
    rounded = fmt.dequantize(pack(weight, name, 0.6))
    keep = fmt.mask(weight, 0.6)
    assert keep is not None
    assert not rounded[~keep].any()


@pytest.mark.parametrize("name", ["w4a8g32z", "w5a8g32z", "w2a8g64"])
def test_formats_without_zero_cannot_hold_pruned_weights(name: str) -> None:
    with pytest.raises(FormatError, match="zero is not on its grid") as caught:
        pack(np.ones((4, 4)), name, 0.5)
    assert "w4a8g64_sp" in str(caught.value.hint)


def test_without_sparsity_only_zeros_are_absent() -> None:
    weight = np.random.default_rng(3).standard_normal((8, 128), f32)
    weight[:, ::2] = 0
    codes = get_format("w8a8g64_sp").round(weight)
    assert ((codes.q == 128) == (np.abs(weight) < 0.01)).mean() > 0.98
    assert (codes.q[:, ::2] == 128).all()


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9])
def test_blocks_of_smallest_norm_go(sparsity: float) -> None:
    """In every strip the same number of inputs, all 16 weights (in the last strip 3) or none."""
    weight = np.random.default_rng(2).laplace(size=(35, 77)).astype(np.float32)
    weight[:16] *= 100  # a choice over the whole matrix would keep these
    fmt = get_format("w8a8_b16x1")
    keep = fmt.mask(weight, sparsity)
    assert keep is not None
    dropped = math.floor(77 * sparsity + 0.5)
    for begin in (0, 16, 32):
        strip = keep[begin : begin + 16]
        assert (strip == strip[0]).all()
        norms = np.sqrt((weight[begin : begin + 16].astype(np.float64) ** 2).sum(axis=0))
        want = np.ones(77, np.bool_)
        want[np.argsort(norms, kind="stable")[:dropped]] = False
        assert np.array_equal(strip[0], want)
    codes = fmt.round(weight, sparsity)
    assert (codes.q[~keep] == fmt.zero_point).all()
    assert fmt.stored(codes) == 35 * (77 - dropped)


def test_equal_blocks_go_from_the_first_on() -> None:
    keep = get_format("w8a8_b16x1").mask(np.ones((16, 8), np.float32), 0.375)
    assert keep is not None
    assert np.array_equal(keep[0], np.arange(8) >= 3)


@pytest.mark.parametrize("name", ["w8a8g64_24", "w4a8g64_24"])
@pytest.mark.parametrize("k", [1, 3, 64, 70])
def test_two_of_four_are_the_largest(name: str, k: int) -> None:
    fmt = get_format(name)
    weight = np.random.default_rng(4).standard_normal((9, k), f32)
    kept = fmt.dequantize(fmt.round(weight)) != 0
    for row, there in zip(weight, kept, strict=True):
        for i in range(0, k, 4):
            largest = sorted(range(i, min(i + 4, k)), key=lambda at: -abs(row[at]))[:2]
            assert set(np.flatnonzero(there[i : i + 4]) + i) <= set(largest)
    assert kept.mean() > 0.4  # 4 bits round some of them to zero


def test_ties_of_four() -> None:
    rows = np.array([[1, -1, 1, 1, 0, 0, 0, 2, 5, 5, 5]], f32)
    want = [[0, 0, 1, 1, 0, 0, 1, 1, 0, 1, 1]]
    assert largest_of(rows, 2, 4).astype(int).tolist() == want


def test_a_weight_that_fits_the_pattern_is_not_pruned() -> None:
    weight = np.random.default_rng(5).standard_normal((8, 128), f32)
    weight[:, 0::4] = weight[:, 2::4] = 0
    sparse, dense = get_format("w8a8g64_24"), get_format("w8a8g64")
    assert np.array_equal(sparse.round(weight).q, dense.round(weight).q)

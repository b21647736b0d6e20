"""Intervals: what they resample, that they cover, that a seed gives the same one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lacewing.quality.bootstrap import Interval, Units, as_list, interval


def test_a_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(0).standard_normal(50)
    ones = np.ones(50)
    assert interval(values, ones, 3) == interval(values, ones, 3)
    assert interval(values, ones, 3) != interval(values, ones, 4)


def test_the_interval_of_a_mean_is_that_of_the_normal_law() -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_normal(400)
    found = interval(values, np.ones(400), 0)
    assert found is not None
    error = 1.96 * values.std() / 20
    # Each end is a quantile of 1000 figures: its own spread is some 8 % of `error`, six of them.
    assert found.low == pytest.approx(values.mean() - error, abs=0.5 * error)
    assert found.high == pytest.approx(values.mean() + error, abs=0.5 * error)


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(100):
        found = interval((rng.random(60) < 0.4).astype(float), np.ones(60), 0)
        assert found is not None
        hits += found.low <= 0.4 <= found.high
    assert 86 <= hits <= 100  # 95 expected, four standard deviations of sqrt(100 * 0.95 * 0.05)


def test_larger_units_weigh_more() -> None:
    totals, sizes = np.array([0.0, 300.0]), np.array([100.0, 100.0])
    assert interval(totals, sizes, 0) == Interval(0.0, 3.0)
    totals, sizes = np.array([0.0, 3.0]), np.array([299.0, 1.0])
    found = interval(totals, sizes, 0)
    assert found == Interval(0.0, 3.0)
    both = interval(np.repeat(totals, 50), np.repeat(sizes, 50), 0)
    assert both is not None
    assert both.high < 0.03  # not near 1.5, the mean of both means


def test_the_figure_is_applied_to_both_ends() -> None:
    values = np.random.default_rng(0).random(20)
    plain, found = (interval(values, np.ones(20), 0, f) for f in (float, math.exp))
    assert plain is not None and found is not None
    assert found == Interval(math.exp(plain.low), math.exp(plain.high))


def test_one_unit_has_no_interval() -> None:
    assert interval(np.ones(1), np.ones(1), 0) is None
    assert as_list(None) is None
    assert as_list(Interval(1.0, 2.0)) == [1.0, 2.0]


def test_windows_are_drawn_where_there_are_eight() -> None:
    units = Units.of([10] * 7 + [4])
    assert units.name == "8 windows"
    assert units.starts.tolist() == [0, 10, 20, 30, 40, 50, 60, 70]
    assert units.sizes.tolist() == [10] * 7 + [4]


@pytest.mark.parametrize(
    ("lengths", "name"),
    [
        ([2047] * 7, "224 blocks of 64 tokens"),
        ([100], "9 blocks of 12 tokens"),
        ([3], "3 blocks of 1 tokens"),
        ([1], "1 blocks of 1 tokens"),
    ],
)
def test_blocks_of_tokens_are_drawn_where_there_are_not(lengths: list[int], name: str) -> None:
    units = Units.of(lengths)
    assert units.name == name
    assert units.sizes.sum() == sum(lengths)


def test_tokens_are_added_up_by_unit() -> None:
    units = Units.of([2] * 8)
    values = np.arange(16.0)
    expected = interval(values.reshape(8, 2).sum(axis=1), np.full(8, 2.0), 5)
    assert units.interval(values, 5) == expected

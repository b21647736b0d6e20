"""Ratios of layers under a total."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from lacewing.compress.ratios import (  # noqa: E402
    curve_ratios,
    error_curve,
    outlier_share,
    owl_ratios,
)
from lacewing.errors import RecipeError  # noqa: E402
from lacewing.formats import get_format  # noqa: E402
from tests.compress import naive  # noqa: E402

COUNTS = {"a": 1000, "b": 4000, "c": 2500, "d": 1000}


def total(ratios, counts=COUNTS):
    return sum(counts[name] * ratio for name, ratio in ratios.items())


def test_outlier_share():
    p = naive.problem(6, 40)
    p.weight[2, 3] = 30.0
    size = [
        abs(p.weight[i, j].item()) * p.diagonal[j].item() ** 0.5
        for i, j in itertools.product(range(6), range(40))
    ]
    expected = sum(a > 5.0 * np.mean(size) for a in size) / 240
    assert 0 < expected < 1
    assert outlier_share(p.weight, p.diagonal) == expected


def naive_owl(shares, sparsity, spread):
    """The paper's code, for layers of one size: densities from shares, then put to the mean."""
    d = np.array(list(shares.values()))
    density = (d - d.min()) / (d.max() - d.min()) * spread * 2
    density = density - density.mean() + (1 - sparsity)
    return dict(zip(shares, 1 - density, strict=True))


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_owl(sparsity):
    shares = {"a": 0.01, "b": 0.05, "c": 0.002, "d": 0.03}
    found = owl_ratios(shares, dict.fromkeys(shares, 5000), sparsity)
    assert found == pytest.approx(naive_owl(shares, sparsity, 0.08), abs=1e-9)


@pytest.mark.parametrize("sparsity", [0.0, 0.02, 0.5, 0.9, 0.999])
def test_owl_keeps_to_the_budget(sparsity):
    shares = {"a": 0.01, "b": 0.05, "c": 0.002, "d": 0.03}
    found = owl_ratios(shares, COUNTS, sparsity)
    dropped = [round(COUNTS[name] * ratio) for name, ratio in found.items()]
    assert abs(sum(dropped) - sparsity * sum(COUNTS.values())) <= len(COUNTS)
    assert all(0 <= ratio < 1 for ratio in found.values())
    ordered = sorted(shares, key=lambda name: shares[name])
    assert all(found[x] >= found[y] for x, y in itertools.pairwise(ordered))
    assert max(found.values()) - min(found.values()) <= 0.16 + 1e-9


def test_owl_is_uniform_where_outliers_are():
    found = owl_ratios(dict.fromkeys(COUNTS, 0.01), COUNTS, 0.4)
    assert found == pytest.approx(dict.fromkeys(COUNTS, 0.4))


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_shares_out_of_range_are_refused(value):
    shares = dict.fromkeys(COUNTS, 0.01)
    with pytest.raises(RecipeError, match="sparsity must be"):
        owl_ratios(shares, COUNTS, value)
    with pytest.raises(RecipeError, match="sparsity must be"):
        curve_ratios({}, [0, 0.9], {}, value)


SPARSITIES = [0.0, 0.25, 0.5, 0.75]


def interpolated(curves, ratios):
    return sum(np.interp(ratios[name], SPARSITIES, curve) for name, curve in curves.items())


def test_curves_give_the_least_sum_of_errors():
    """No choice on a fine mesh with the same budget is better."""
    curves = {"a": [0, 0.01, 0.1, 0.5], "b": [0, 0.02, 0.05, 0.1], "c": [0, 0.1, 0.2, 0.35]}
    counts = {"a": 400, "b": 800, "c": 400}
    found = curve_ratios(curves, SPARSITIES, counts, 0.5)
    assert total(found, counts) == pytest.approx(0.5 * 1600)
    mesh = np.linspace(0, 0.75, 61)
    tried = [
        interpolated(curves, {"a": a, "b": b, "c": 0.5 * 4 - a - 2 * b})
        for a, b in itertools.product(mesh, mesh)
        if 0 <= 0.5 * 4 - a - 2 * b <= 0.75
    ]
    assert interpolated(curves, found) <= min(tried) + 1e-9
    assert interpolated(curves, found) < interpolated(curves, dict.fromkeys(curves, 0.5))


def test_curves_that_are_not_convex_are_replaced_by_their_hulls():
    curves = {"a": [0, 0.3, 0.31, 0.7], "b": [0, 0.1, 0.2, 0.5]}
    found = curve_ratios(curves, SPARSITIES, {"a": 100, "b": 100}, 0.25)
    # On the hull a weight of `a` costs 0.31 / 50 up to a half, of `b` 0.1 / 25.
    assert found == pytest.approx({"a": 0.0, "b": 0.5})


def test_what_counts_is_the_error_of_a_weight():
    curves = {"a": [0, 0.1, 0.2, 0.3], "b": [0, 0.15, 0.3, 0.45]}
    found = curve_ratios(curves, SPARSITIES, {"a": 100, "b": 400}, 0.3)
    assert found == pytest.approx({"a": 0.0, "b": 150 / 400})


def test_curves_that_do_not_reach_the_budget_are_refused():
    with pytest.raises(RecipeError, match=r"known up to a sparsity of 0\.75, got 0\.8"):
        curve_ratios({"a": [0, 1, 2, 3]}, SPARSITIES, {"a": 10}, 0.8)


def test_error_curves_ascend_from_nothing():
    p = naive.problem(16, 64)
    curve = error_curve(p, get_format("w4a8g64_sp"), SPARSITIES)
    assert curve[0] == 0
    assert sorted(curve) == curve
    w = p.weight.double().numpy()
    metric = np.abs(w) * np.sqrt(np.diag(naive.damped(p)))
    kept = np.ones(w.shape, bool)
    np.put_along_axis(kept, np.argsort(metric, axis=1)[:, :32], False, axis=1)
    expected = naive.error(p, w * kept) / naive.error(p, 0 * w)
    assert curve[2] == pytest.approx(expected, rel=1e-4)

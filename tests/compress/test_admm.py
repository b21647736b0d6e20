"""Masks by ADMM: as many as asked for, better than greedy ones; the weights that are left are those
of least squares."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from lacewing.compress import admm  # noqa: E402
from lacewing.compress.admm import fit_kept, prune_admm, solve_admm  # noqa: E402
from lacewing.compress.columns import solve_columns  # noqa: E402
from lacewing.compress.grid import Grid  # noqa: E402
from lacewing.compress.masks import Choice, choose_mask, magnitude, wanda  # noqa: E402
from lacewing.errors import RecipeError  # noqa: E402
from lacewing.formats import get_format  # noqa: E402
from tests.compress import naive  # noqa: E402


def naive_admm(p, format, sparsity):
    """ALPS as the paper has it, solving for W anew in every step, in float64."""
    h = naive.damped(p)
    size = np.sqrt(np.diag(h))
    h = h / np.outer(size, size)
    w0 = p.weight.double().numpy() * size

    def largest(w):
        return choose_mask(torch.from_numpy(w * w), format, sparsity, "layer").numpy()

    mask, rho, v = largest(w0), admm._FIRST, np.zeros_like(w0)
    d, before = w0 * mask, mask
    for step in range(1, admm.STEPS + 1):
        w = np.linalg.solve(h + rho * np.eye(len(h)), (w0 @ h - v + rho * d).T).T
        mask = largest(w + v / rho)
        d = (w + v / rho) * mask
        v += rho * (w - d)
        if step % admm._EVERY == 0:
            changed = (mask != before).mean()
            if changed == 0:
                break
            before = mask
            rho *= next(factor for share, factor in admm._FACTORS if changed > share)
    return mask


@pytest.mark.parametrize(("name", "sparsity"), [("bf16_sp", 0.6), ("w4a8g64_24", 0.5)])
def test_the_papers_steps(name, sparsity):
    p = naive.problem(12, 40, seed=1)
    mask = prune_admm(p, get_format(name), sparsity)
    assert (mask.numpy() == naive_admm(p, get_format(name), sparsity)).all()


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.87])
def test_the_count_of_a_layer(sparsity):
    p = naive.problem(21, 50)
    mask = prune_admm(p, get_format("w4a8g64_sp"), sparsity)
    assert (~mask).sum() == math.floor(21 * 50 * sparsity + 0.5)
    rows = mask.sum(1)
    assert rows.min() < rows.max()  # rows share the budget


def test_the_pattern_of_four():
    mask = prune_admm(naive.problem(21, 50), get_format("w4a8g64_24"), 0.5)
    assert (mask[:, :48].reshape(21, 12, 4).sum(2) == 2).all()
    assert mask[:, 48:].all()  # the two that are left of a four that is not whole


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_the_pattern_of_blocks(sparsity):
    mask = prune_admm(naive.problem(37, 50), get_format("w8a8_b16x1"), sparsity)
    for strip in mask.split(16):
        assert (strip == strip[0]).all()
        assert (~strip[0]).sum() == math.floor(50 * sparsity + 0.5)


@pytest.mark.parametrize("name", ["bf16_sp", "w8a8g64_24", "w8a8_b16x1"])
def test_the_weights_that_are_left_are_least_squares(name):
    p = naive.problem(18, 40, tokens=400)
    mask = choose_mask(wanda(p.weight, p.diagonal), get_format(name), 0.5, "layer")
    found = fit_kept(p, mask, 200)
    h, w = naive.damped(p), p.weight.double().numpy()
    for row, kept, wanted in zip(found, mask.numpy(), w, strict=True):
        best = np.linalg.solve(h[np.ix_(kept, kept)], h[kept] @ wanted)
        np.testing.assert_allclose(row[kept], best, atol=1e-4 * np.abs(w).max())
        assert (row.numpy()[~kept] == 0).all()


def test_every_step_of_the_fit_helps():
    p = naive.problem(18, 40)
    mask = choose_mask(magnitude(p.weight), get_format("bf16_sp"), 0.5)
    errors = [p.error(fit_kept(p, mask, steps)) for steps in (0, 1, 3, 10)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == p.error(p.weight * mask)


@pytest.mark.parametrize(
    ("name", "sparsity"), [("bf16_sp", 0.5), ("bf16_sp", 0.7), ("w8a8g64_24", 0.5)]
)
def test_better_than_choosing_column_by_column(name, sparsity):
    p = naive.problem(24, 96, seed=5)
    format = get_format(name)
    grid = Grid(format)
    swept = solve_columns(p, grid, Choice(format, sparsity)).values()
    found = solve_admm(p, grid, sparsity).values()
    assert naive.error(p, found) < 0.97 * naive.error(p, swept)
    # And the choice itself is: with the best weights for either.
    choices = [prune_admm(p, format, sparsity), swept != 0]
    best = [naive.error(p, fit_kept(p, mask, 100)) for mask in choices]
    assert best[0] < best[1]


@pytest.mark.parametrize("act_order", [False, True])
def test_without_a_sparsity_it_is_the_column_solver(act_order):
    p, grid = naive.problem(9, 40), Grid(get_format("w4a8g32"))
    found = solve_admm(p, grid, 0.0, act_order)
    assert (found.levels == solve_columns(p, grid, None, act_order).levels).all()


@pytest.mark.parametrize("name", ["w4a8g64_sp", "w8a8g64_24", "w8a8_b16x1"])
@pytest.mark.parametrize(
    "x",
    [np.zeros((4, 40)), naive.inputs(6, 40), naive.inputs(99, 40) * (np.arange(40) != 5)],
    ids=["all dead", "few tokens", "dead input"],
)
def test_poor_calibration(name, x):
    p = naive.problem(17, 40, x=x)
    p.weight[3] = 0
    solution = solve_admm(p, Grid(get_format(name)), 0.5)
    assert solution.values().isfinite().all()
    assert (solution.values()[3] == 0).all()
    assert (solution.levels == 0).sum() >= (340 if name != "w8a8_b16x1" else 320)


def test_all_weights_are_zero():
    p = naive.problem(17, 40)
    p.weight[:] = 0
    for name in ("w4a8g64_sp", "w8a8g64_24", "w8a8_b16x1"):
        assert (solve_admm(p, Grid(get_format(name)), 0.5).values() == 0).all()


@pytest.mark.parametrize("name", ["w4a8g64_sp", "w8a8_b16x1"])
def test_nothing_or_nearly_everything_goes(name):
    p = naive.problem(17, 40)
    format = get_format(name)
    assert prune_admm(p, format, 0.0).all()
    assert prune_admm(p, format, 1e-4).all()  # less than half a weight
    nearly = prune_admm(p, format, 0.9999)
    assert not nearly.any()
    assert (fit_kept(p, nearly) == 0).all()
    assert (solve_admm(p, Grid(format), 0.9999).values() == 0).all()


def test_a_sparsity_that_is_none():
    with pytest.raises(RecipeError, match="sparsity must be"):
        solve_admm(naive.problem(9, 40), Grid(get_format("bf16_sp")), 1.0)


def test_neither_weight_nor_hessian_is_changed():
    p = naive.problem(16, 40)
    before = p.weight.clone(), p.hessian.clone()
    solve_admm(p, Grid(get_format("w4a8g64_sp")), 0.5)
    assert (p.weight == before[0]).all()
    assert (p.hessian == before[1]).all()

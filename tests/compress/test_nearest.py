"""Solvers in which nothing makes up for an error."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from lacewing.compress.grid import Grid  # noqa: E402
from lacewing.compress.nearest import round_nearest  # noqa: E402
from lacewing.compress.solvers import SOLVERS, solve  # noqa: E402
from lacewing.errors import RecipeError  # noqa: E402
from lacewing.formats import FORMATS, get_format  # noqa: E402
from tests.compress import naive  # noqa: E402

PRUNABLE = [name for name in FORMATS if FORMATS[name].holds_zero]


def solved(solver, p, name, sparsity=0.0):
    return solve(solver, p, Grid(get_format(name)), sparsity)


@pytest.mark.parametrize("name", FORMATS)
def test_every_level_is_the_nearest_of_its_scale(name):
    p = naive.problem(19, 100)
    format = get_format(name)
    solution = solved("nearest", p, name)
    values = solution.values()
    size = solution.grid.group_size(100)
    kept = p.weight
    if format.fixed_sparsity:
        kept = p.weight * torch.from_numpy(format.mask(p.weight.numpy(), None))
    for g, begin in enumerate(range(0, 100, size)):
        part = slice(begin, begin + size)
        assert (solution.grid.nearest(kept[:, part], solution.scales[g]) == values[:, part]).all()


@pytest.mark.parametrize("name", PRUNABLE)
def test_wanda(name):
    """Algorithm 1 of the paper: |W| * ||X||, sorted in every row (or by the pattern)."""
    x = naive.inputs(400, 96)
    p = naive.problem(32, 96, x=x)
    sparsity = 0.5
    h = naive.damped(p)
    metric = np.abs(p.weight.double().numpy()) * np.sqrt(np.diag(h))
    expected = np.ones(metric.shape, bool)
    for i in range(32):
        if name.endswith("_24"):
            for at in range(0, 96, 4):
                expected[i, at + np.argsort(metric[i, at : at + 4])[:2]] = False
        elif not name.endswith("_b16x1"):
            expected[i, np.argsort(metric[i])[: math.floor(96 * sparsity + 0.5)]] = False
    if name.endswith("_b16x1"):
        for at in (0, 16):
            lowest = np.argsort((metric[at : at + 16] ** 2).sum(0))[:48]
            expected[at : at + 16, lowest] = False
    values = solved("wanda", p, name, sparsity).values()
    assert (values.numpy()[~expected] == 0).all()
    nearest = round_nearest(
        p.weight, Grid(get_format(name)), torch.from_numpy(expected), p.diagonal
    )
    assert (nearest.values() == values).all()


@pytest.mark.parametrize("name", PRUNABLE)
def test_weights_that_go_have_no_say(name):
    """However large they are: the scales are those of the others."""
    p = naive.problem(19, 72)
    mask = torch.rand(19, 72, generator=torch.Generator().manual_seed(0)) < 0.5
    spoilt = torch.where(mask, p.weight, 50.0)
    expected = round_nearest(p.weight * mask, Grid(get_format(name)), mask).values()
    found = round_nearest(spoilt, Grid(get_format(name)), mask).values()
    assert (found == expected).all()
    assert (found[~mask] == 0).all()


@pytest.mark.parametrize("name", ["w4a8g64_sp", "w8a8_b16x1", "w4a8g64_24", "w4a8g32"])
@pytest.mark.parametrize("solver", ["nearest", "magnitude"])
def test_the_smallest_weights_go(name, solver):
    p = naive.problem(32, 96)
    format = get_format(name)
    kept = format.mask(p.weight.numpy(), format.fixed_sparsity or 0.25)
    values = solved(solver, p, name, format.fixed_sparsity or 0.25).values().numpy()
    assert (values[~kept] == 0).all()
    assert (values != 0).mean() > 0.85 * kept.mean()


@pytest.mark.parametrize("name", FORMATS)
def test_importance_lowers_the_weighted_error(name):
    p = naive.problem(48, 128)

    def error(solution):
        return (p.diagonal * (p.weight - solution.values()).square()).sum().item()

    grid = Grid(get_format(name))
    informed = round_nearest(p.weight, grid, importance=p.diagonal)
    plain = round_nearest(p.weight, grid)
    if name.startswith("bf16"):
        assert error(informed) == error(plain)
    else:
        assert error(informed) < error(plain)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_solver_packs_in_every_format(solver, name):
    p = naive.problem(19, 72)
    p.weight[4] = 0
    format = get_format(name)
    sparsity = 0.3 if format.holds_zero and format.fixed_sparsity is None else 0.0
    if solver == "blocks" and format.fixed_sparsity:
        with pytest.raises(RecipeError):
            solved(solver, p, name)
        return
    solution = solved(solver, p, name, sparsity)
    packed = format.pack(solution.grid.codes(solution.levels, solution.scales))
    assert (format.dequantize(packed) == solution.values().numpy()).all()
    if sparsity:
        assert (solution.levels == 0).float().mean() >= 0.29


def test_better_solvers_lose_less():
    p = naive.problem(32, 128)
    errors = {
        solver: naive.error(p, solved(solver, p, "w4a8g64_sp", 0.5).values())
        for solver in ("nearest", "wanda", "columns")
    }
    assert errors["columns"] < errors["wanda"] < errors["nearest"]

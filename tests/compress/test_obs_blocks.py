"""Second-order block pruning against exhaustive least squares."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from lacewing.compress import obs_blocks  # noqa: E402
from lacewing.compress.columns import solve_columns  # noqa: E402
from lacewing.compress.grid import Grid  # noqa: E402
from lacewing.compress.masks import Choice  # noqa: E402
from lacewing.compress.obs_blocks import prune_blocks, solve_blocks  # noqa: E402
from lacewing.errors import RecipeError  # noqa: E402
from lacewing.formats import get_format  # noqa: E402
from tests.compress import naive  # noqa: E402


def best_weights(w, h, kept):
    """The weights of inputs `kept` whose outputs are nearest to those of `w`, by the normal
    equations, and what they lose."""
    out = np.zeros_like(w)
    out[:, kept] = w @ h[:, kept] @ np.linalg.inv(h[np.ix_(kept, kept)])
    return out, np.trace((out - w) @ h @ (out - w).T)


def greedy(w, h, sparsity):
    """Tries every input that is left, and drops the one that costs least, one after the other."""
    kept = list(range(len(h)))
    for _ in range(math.floor(len(h) * sparsity + 0.5)):
        losses = [best_weights(w, h, kept[:i] + kept[i + 1 :])[1] for i in range(len(kept))]
        kept.pop(int(np.argmin(losses)))
    return kept, best_weights(w, h, kept)[0]


@pytest.mark.parametrize("n", [19, 32, 5])
def test_the_cheapest_blocks_go(n):
    p = naive.problem(n, 22, seed=3)
    mask, weight = prune_blocks(p, 0.4)  # fewer than there are steps: one by one
    w, h = p.weight.double().numpy(), naive.damped(p)
    for at in range(0, n, 16):
        kept, expected = greedy(w[at : at + 16], h, 0.4)
        for row in mask[at : at + 16]:
            assert row.nonzero().flatten().tolist() == kept
        np.testing.assert_allclose(weight[at : at + 16], expected, rtol=1e-3, atol=1e-5)


def test_steps_of_several_blocks_are_nearly_as_good(monkeypatch):
    p = naive.problem(32, 96)
    several = prune_blocks(p, 0.9)[1]
    monkeypatch.setattr(obs_blocks, "_STEPS", 96)
    one = prune_blocks(p, 0.9)[1]
    assert naive.error(p, one) <= naive.error(p, several) < 1.1 * naive.error(p, one)


def test_better_than_choosing_column_by_column():
    p = naive.problem(32, 128)
    grid = Grid(get_format("w8a8_b16x1"))
    swept = solve_columns(p, grid, Choice(grid.format, 0.5)).values()
    solution = solve_blocks(p, grid, 0.5)
    values = solution.values()
    assert naive.error(p, values) < naive.error(p, swept)
    kept = (solution.levels.reshape(2, 16, 128) != 0).any(1)
    assert kept.sum(1).tolist() == [64, 64]
    # 8 bits cost little beside the mask.
    pruned = prune_blocks(p, 0.5)[1]
    assert naive.error(p, values) < 1.01 * naive.error(p, pruned)


def test_few_tokens():
    p = naive.problem(20, 48, x=naive.inputs(10, 48))
    p.weight[3] = 0
    mask, weight = prune_blocks(p, 0.5)
    assert weight.isfinite().all()
    assert (weight[~mask] == 0).all()
    assert (weight[3] == 0).all()


def test_dead_inputs_go_first():
    x = naive.inputs(200, 48)
    x[:, [7, 9]] = 0
    p = naive.problem(20, 48, x=x)
    mask, _ = prune_blocks(p, 0.2)
    assert not mask[:, [7, 9]].any()


def test_a_pattern_of_four_has_no_blocks():
    p = naive.problem(20, 48)
    with pytest.raises(RecipeError, match="w4a8g64_24 holds two of every four inputs"):
        solve_blocks(p, Grid(get_format("w4a8g64_24")), 0.5)


def test_nothing_goes_at_no_sparsity():
    p = naive.problem(20, 48)
    mask, weight = prune_blocks(p, 0.0)
    assert mask.all()
    assert (weight == p.weight).all()

"""Second-order block pruning against exhaustive least squares."""

from __future__ import annotations

import math
from itertools import chain

import numpy as np
import pytest

torch = pytest.importorskip("torch")

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


def greedy(w, h, width, sparsity):
    """Tries every block that is left, and drops the one that costs least, one after the other."""
    blocks = [list(range(at, min(at + width, len(h)))) for at in range(0, len(h), width)]
    for _ in range(math.floor(len(blocks) * sparsity + 0.5)):
        losses = [
            best_weights(w, h, list(chain(*blocks[:i], *blocks[i + 1 :])))[1]
            for i in range(len(blocks))
        ]
        blocks.pop(int(np.argmin(losses)))
    kept = list(chain(*blocks))
    return kept, best_weights(w, h, kept)[0]


@pytest.mark.parametrize(
    ("n", "outputs", "inputs"), [(9, 4, 1), (8, 4, 3), (5, 1, 1), (4, 1, 4), (6, 16, 2)]
)
def test_the_cheapest_blocks_go(n, outputs, inputs):
    p = naive.problem(n, 22, seed=3)
    mask, weight = prune_blocks(p, outputs, inputs, 0.4, steps=22)
    w, h = p.weight.double().numpy(), naive.damped(p)
    for at in range(0, n, outputs):
        kept, expected = greedy(w[at : at + outputs], h, inputs, 0.4)
        for row in mask[at : at + outputs]:
            assert row.nonzero().flatten().tolist() == kept
        np.testing.assert_allclose(weight[at : at + outputs], expected, rtol=1e-3, atol=1e-5)


def test_steps_of_several_blocks_are_nearly_as_good():
    p = naive.problem(32, 96)
    one, several = (naive.error(p, prune_blocks(p, 16, 1, 0.5, steps)[1]) for steps in (96, 12))
    assert one <= several < 1.1 * one


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
    pruned = prune_blocks(p, 16, 1, 0.5)[1]
    assert naive.error(p, values) < 1.01 * naive.error(p, pruned)


@pytest.mark.parametrize("inputs", [1, 4, 5])
def test_dead_inputs_and_few_tokens(inputs):
    x = naive.inputs(10, 48)
    x[:, 7] = 0
    p = naive.problem(20, 48, x=x)
    p.weight[3] = 0
    mask, weight = prune_blocks(p, 16, inputs, 0.5)
    assert weight.isfinite().all()
    assert (weight[~mask] == 0).all()
    assert (weight[3] == 0).all()
    if inputs == 1:
        assert not mask[:, 7].any()


def test_nothing_goes_at_no_sparsity():
    p = naive.problem(20, 48)
    mask, weight = prune_blocks(p, 16, 1, 0.0)
    assert mask.all()
    assert (weight == p.weight).all()


def test_bad_sparsities_are_refused():
    p = naive.problem(20, 48)
    with pytest.raises(RecipeError, match="sparsity must be"):
        solve_blocks(p, Grid(get_format("w8a8_b16x1")), 1.0)

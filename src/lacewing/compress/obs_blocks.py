"""Second-order block pruning (LPViT, arXiv:2407.02068).

A block is 16 outputs times one input q. With H the Hessian of the inputs that the outputs still
have, dropping it costs, if the other weights make up for it,

    |w_q|^2 / [H^-1]_qq

The cheapest blocks of every strip of outputs go, step by step; dropping inputs Q moves the other
weights by `-w_Q ([H^-1]_QQ)^-1 [H^-1]_Q,:` (optimal brain surgeon for a group of weights), and Q is
eliminated from H^-1, which every strip has its own of. What is left are the best weights for the
mask.

A layer takes about `0.6 k^3` multiplications for every strip: minutes for k of some thousands,
where `solve_columns` with a `Choice` decides the same in one sweep, less well.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lacewing.compress.columns import Solution, solve_columns
from lacewing.compress.grid import Grid
from lacewing.compress.masks import of_four
from lacewing.compress.problem import Problem
from lacewing.errors import RecipeError
from lacewing.formats.tiles import STRIP

__all__ = ["prune_blocks", "solve_blocks"]

_STEPS = 32
"""In how many steps blocks are dropped; those of one step are chosen at once."""


def solve_blocks(
    problem: Problem, grid: Grid, sparsity: float, act_order: bool = False
) -> Solution:
    """Blocks of 16 outputs x 1 input go, and what is left is rounded by the column solver.

    Raises RecipeError for a format that holds two of every four inputs.
    """
    if of_four(grid.format):
        raise RecipeError(
            f"{grid.format.name} holds two of every four inputs, not blocks of {STRIP} outputs",
            hint="use the solver `columns`, or the format `w8a8_b16x1`",
        )
    mask, weight = prune_blocks(problem, sparsity)
    return solve_columns(problem.aiming(weight), grid, mask, act_order)


def prune_blocks(problem: Problem, sparsity: float) -> tuple[Tensor, Tensor]:
    """Drops `floor(k * sparsity + 0.5)` inputs of every strip of outputs. The last strip may be
    short.

    Returns the mask, bool `[n, k]`, True for what stays, and the weights with all others moved to
    where they make up for the loss, f32 `[n, k]`.
    """
    upper = problem.inverse_factor.double()
    inverse = upper.T @ upper
    strips = problem.weight.split(STRIP)
    found = [_prune_strip(w.double(), inverse, sparsity) for w in strips]
    mask = torch.cat([kept.expand_as(w) for kept, w in found])
    return mask, torch.cat([w for _, w in found]).float()


def _prune_strip(w: Tensor, inverse: Tensor, sparsity: float) -> tuple[Tensor, Tensor]:
    """Of `w` `[outputs, k]`: bool `[k]`, and the weights that are left in their places."""
    k = w.shape[1]
    drop = math.floor(k * sparsity + 0.5)
    left = torch.arange(k)
    out = torch.zeros_like(w)
    for step in range(_STEPS):
        count = drop * (step + 1) // _STEPS - drop * step // _STEPS
        if count:
            costs = w.square().sum(0) / inverse.diagonal()
            gone = torch.zeros(len(left), dtype=torch.bool)
            gone[costs.argsort(stable=True)[:count]] = True
            w, inverse = _eliminate(w, inverse, gone)
            left = left[~gone]
    out[:, left] = w
    kept = torch.zeros(k, dtype=torch.bool)
    kept[left] = True
    return kept, out


def _eliminate(w: Tensor, inverse: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """The weights and the inverse Hessian of the inputs that stay."""
    stay = ~gone
    rows = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, stay])
    return w[:, stay] - w[:, gone] @ rows, inverse[stay][:, stay] - inverse[stay][:, gone] @ rows

"""Second-order block pruning (LPViT, arXiv:2407.02068).

A block is some outputs times some inputs Q. With H the Hessian of the inputs that the outputs
still have, dropping it costs, if the other weights make up for it,

    tr(w_Q ([H^-1]_QQ)^-1 w_Q^T)

and moves them by `-w_Q ([H^-1]_QQ)^-1 [H^-1]_Q,:` (optimal brain surgeon for a group of weights).
The cheapest blocks of every strip of outputs go, step by step; inputs that went are eliminated
from H^-1, which every strip has its own of. What is left are the best weights for the mask.

A layer takes about `0.6 k^3` multiplications for every strip: minutes for k of some thousands,
where `solve_columns` with a `Choice` decides the same in one sweep, less well.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lacewing.compress.columns import Solution, solve_columns
from lacewing.compress.grid import Grid
from lacewing.compress.masks import check_sparsity
from lacewing.compress.problem import Problem
from lacewing.formats.tiles import STRIP

__all__ = ["prune_blocks", "solve_blocks"]

_STEPS = 32
"""In how many steps blocks are dropped; those of one step are chosen at once."""


def solve_blocks(
    problem: Problem, grid: Grid, sparsity: float, act_order: bool = False
) -> Solution:
    """Blocks of 16 outputs x 1 input go, and what is left is rounded by the column solver."""
    check_sparsity(grid.format, sparsity)
    mask, weight = prune_blocks(problem, STRIP, 1, sparsity)
    return solve_columns(replace(problem, weight=weight), grid, mask, act_order)


def prune_blocks(
    problem: Problem, outputs: int, inputs: int, sparsity: float, steps: int = _STEPS
) -> tuple[Tensor, Tensor]:
    """Drops `floor(blocks * sparsity + 0.5)` of the blocks of every strip of `outputs`, a block
    being `inputs` wide. The last strip and the last block of a strip may be short.

    Returns the mask, bool `[n, k]`, True for what stays, and the weights with all others moved to
    where they make up for the loss, f32 `[n, k]`.
    """
    upper = problem.inverse_factor.double()
    inverse = _padded(upper.T @ upper, inputs)
    strips = problem.weight.split(outputs)
    found = [_prune_strip(w.double(), inverse, inputs, sparsity, steps) for w in strips]
    mask = torch.cat([kept.expand_as(w) for kept, w in found])
    return mask, torch.cat([w for _, w in found]).float()


def _padded(inverse: Tensor, width: int) -> Tensor:
    """With inputs that nothing depends on, up to a multiple of `width`."""
    k = len(inverse)
    out = torch.eye(-(-k // width) * width, dtype=inverse.dtype)
    out[:k, :k] = inverse
    return out


def _prune_strip(
    w: Tensor, inverse: Tensor, width: int, sparsity: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Of `w` `[outputs, k]`: bool `[k]`, and the weights that are left in their places."""
    k = w.shape[1]
    drop = math.floor(len(inverse) // width * sparsity + 0.5)
    left = torch.arange(len(inverse))
    w = torch.nn.functional.pad(w, (0, len(inverse) - k))
    for step in range(steps):
        count = drop * (step + 1) // steps - drop * step // steps
        if count:
            stay = torch.ones(len(left) // width, dtype=torch.bool)
            stay[_costs(w, inverse, width).argsort(stable=True)[:count]] = False
            stay = stay.repeat_interleave(width)
            w, inverse = _eliminate(w, inverse, ~stay)
            left = left[stay]
    left = left[left < k]
    out = torch.zeros(len(w), k, dtype=w.dtype)
    out[:, left] = w[:, : len(left)]
    kept = torch.zeros(k, dtype=torch.bool)
    kept[left] = True
    return kept, out


def _costs(w: Tensor, inverse: Tensor, width: int) -> Tensor:
    """What dropping each block costs, `[blocks]`."""
    count = len(inverse) // width
    own = inverse.view(count, width, count, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    parts = w.view(len(w), count, width).permute(1, 2, 0)
    return (parts * torch.linalg.solve(own, parts)).sum((1, 2))


def _eliminate(w: Tensor, inverse: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """The weights and the inverse Hessian of the inputs that stay."""
    stay = ~gone
    rows = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, stay])
    return w[:, stay] - w[:, gone] @ rows, inverse[stay][:, stay] - inverse[stay][:, gone] @ rows

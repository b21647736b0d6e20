"""Round to nearest: nothing makes up for an error, but scales are searched."""

from __future__ import annotations

import torch
from torch import Tensor

from lacewing.compress.columns import Solution
from lacewing.compress.grid import Grid
from lacewing.compress.masks import choose_mask, magnitude
from lacewing.compress.problem import Problem

__all__ = ["round_nearest", "solve_nearest"]


def solve_nearest(problem: Problem, grid: Grid, sparsity: float = 0.0) -> Solution:
    """Without data: the smallest weights go, and scales leave the least squared error."""
    mask = None
    if sparsity or grid.format.fixed_sparsity is not None:
        mask = choose_mask(magnitude(problem.weight), grid.format, sparsity)
    return round_nearest(problem.weight, grid, mask)


def round_nearest(
    weight: Tensor, grid: Grid, mask: Tensor | None = None, importance: Tensor | None = None
) -> Solution:
    """weight: `[n, k]`. mask: bool `[n, k]`, True for the weights that stay. importance: `[k]`,
    what a squared error in each input counts; the diagonal of a Hessian, for instance."""
    n, k = weight.shape
    size = grid.group_size(k)
    if importance is None:
        importance = torch.ones(k)
    kept = torch.ones(n, k, dtype=torch.bool) if mask is None else mask
    levels, scales = torch.empty_like(weight), []
    for begin in range(0, k, size):
        part = slice(begin, begin + size)
        w = weight[:, part] * kept[:, part]
        scales.append(grid.fit(w, importance[part] * kept[:, part]))
        levels[:, part] = grid.levels(w, scales[-1])
    return Solution(grid, levels, scales)

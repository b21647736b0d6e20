"""Prune and round column by column, and make up for each error in the columns that follow.

One solver for SparseGPT (arXiv:2301.00774) and GPTQ (arXiv:2210.17323): with U upper triangular and
U^T U = H^-1, column j becomes its nearest value on the grid, or 0 where the mask says, and

    w[:, j+1:] -= (w[:, j] - w'[:, j]) / U[j, j] * U[j, j+1:]

Columns are taken in blocks, so that most of the work is a matrix product. With activation order the
columns of large inputs come first, and scales are those of the weights before the first step.

A mask may be given, or chosen block by block from weights that know of all errors before them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lacewing.compress.grid import Grid, Scales
from lacewing.compress.masks import Choice, of_four
from lacewing.compress.problem import Problem
from lacewing.formats.nm import OF

__all__ = ["Solution", "solve_columns"]

_BLOCK = 128
"""Columns whose updates to later ones are made together: whole groups of every format, so that the
scales of a group are fitted to weights that know of all errors before it."""


class Solution:
    """Levels `[n, k]` on a grid, with the scales of every group."""

    def __init__(self, grid: Grid, levels: Tensor, scales: list[Scales]) -> None:
        self.grid, self.levels, self.scales = grid, levels, scales

    def values(self) -> Tensor:
        """The weights `[n, k]` that it stands for."""
        size = self.grid.group_size(self.levels.shape[1])
        parts = self.levels.split(size, dim=1)
        return torch.cat(
            [self.grid.values(part, s) for part, s in zip(parts, self.scales, strict=True)], dim=1
        )


def solve_columns(
    problem: Problem, grid: Grid, mask: Tensor | Choice | None = None, act_order: bool = False
) -> Solution:
    """mask: bool `[n, k]`, True for the weights that stay; or how to choose it; None: all."""
    w = problem.weight
    k = w.shape[1]
    if act_order:
        order = torch.argsort(problem.diagonal, descending=True, stable=True)
        upper = problem.ordered_factor(order)
        if isinstance(mask, Choice) and of_four(mask.format):  # neighbours are so in one order only
            mask = mask.choose(w, problem.inverse_factor)
    else:
        order, upper = torch.arange(k), problem.inverse_factor
    inverse = torch.argsort(order)
    choice = mask if isinstance(mask, Choice) else None
    fours = choice if choice is not None and of_four(choice.format) else None
    w = w[:, order]
    kept = _first_mask(mask, w, upper, order)
    size = grid.group_size(k)
    importance = problem.diagonal
    scales: list[Scales | None] = [None] * -(-k // size)
    if act_order or size == k:
        natural = None if kept is None else kept[:, inverse]
        scales = [
            _fit(grid, problem.weight, natural, importance, g, size) for g in range(len(scales))
        ]
    groups = (order // size).tolist()
    levels = torch.empty_like(w)
    for begin in range(0, k, _BLOCK):
        end = min(begin + _BLOCK, k)
        block, u = w[:, begin:end], upper[begin:end, begin:end]
        errors = torch.empty_like(block)
        if choice is not None and kept is not None:
            kept[:, begin:end] = choice.choose(block, u, begin)
        for j in range(end - begin):
            if fours and kept is not None and j % OF == 0:
                four = slice(j, j + OF)
                kept[:, begin:end][:, four] = fours.choose(block[:, four], u[four, four])
            g = groups[begin + j]
            if scales[g] is None:
                scales[g] = _fit(grid, w, kept, importance, g, size)
            found = scales[g]
            assert found is not None
            column = block[:, j]
            level = grid.levels(column, found)
            value = grid.values(level, found)
            if kept is not None:
                level, value = level * kept[:, begin + j], value * kept[:, begin + j]
            levels[:, begin + j] = level
            error = (column - value) / u[j, j]
            errors[:, j] = error
            if j + 1 < end - begin:
                block[:, j + 1 :].addr_(error, u[j, j + 1 :], alpha=-1)
        if end < k:
            w[:, end:].addmm_(errors, upper[begin:end, end:], alpha=-1)
    return Solution(grid, levels[:, inverse], [_known(s) for s in scales])


def _first_mask(
    mask: Tensor | Choice | None, w: Tensor, upper: Tensor, order: Tensor
) -> Tensor | None:
    """Of the columns in `order`: the mask, or what would be chosen of the weights as they are."""
    if isinstance(mask, Choice):
        return mask.choose(w, upper)
    return None if mask is None else mask[:, order]


def _fit(
    grid: Grid, w: Tensor, mask: Tensor | None, importance: Tensor, g: int, size: int
) -> Scales:
    part = slice(g * size, (g + 1) * size)
    weight = importance[part]
    if mask is None:
        return grid.fit(w[:, part], weight)
    return grid.fit(w[:, part] * mask[:, part], weight * mask[:, part])


def _known(scales: Scales | None) -> Scales:
    assert scales is not None
    return scales

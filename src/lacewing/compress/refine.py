"""Coordinate descent: every level, and every scale, where the error is least given all others.

The column solver decides each weight once, and never looks back. Here the objective itself goes
down, tr((W' - W) H (W' - W)^T): with G = (W' - W) H, the best value of weight j of a row is
w'_j - G_j / H_jj, which is rounded to the grid (0 where the mask says), and G follows. A group's
scale has a best value in closed form too. No step raises the error, apart from the rounding of
scales to f16, after which the old one is kept where the new one is not better. As in QuantEase
(arXiv:2309.01885), with scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lacewing.compress.columns import Solution
from lacewing.compress.grid import Grid, Scales, half
from lacewing.compress.problem import Problem

__all__ = ["refine"]

_BLOCK = 128
"""Columns whose effect on all others is a matrix product."""


def refine(
    problem: Problem, solution: Solution, mask: Tensor | None = None, sweeps: int = 4
) -> Solution:
    """A solution of no larger error (with the damped Hessian), on the same grid and mask.

    mask: bool `[n, k]`, True for weights that stay; None: all. sweeps: over all columns.
    """
    state = _State(problem, solution, mask)
    for _ in range(sweeps):
        state.fit_scales()
        state.round_columns()
    return Solution(state.grid, state.levels.t().contiguous(), state.scales)


class _State:
    """Levels, values and gradient as `[k, n]`: a column is a run of memory."""

    def __init__(self, problem: Problem, solution: Solution, mask: Tensor | None) -> None:
        self.grid: Grid = solution.grid
        self.h = problem.damped
        self.scales = list(solution.scales)
        self.size = self.grid.group_size(problem.shape[1])
        self.levels = solution.levels.t().clone(memory_format=torch.contiguous_format)
        self.mask = None if mask is None else mask.t().contiguous()
        values = solution.values() if mask is None else solution.values() * mask
        self.values = values.t().clone(memory_format=torch.contiguous_format)
        self.gradient = self.h @ (self.values - problem.weight.t())

    def fit_scales(self) -> None:
        """Group by group, the scale (and base) of least error for the levels as they are."""
        for g, scales in enumerate(self.scales):
            if scales.scale is None:
                return
            part = slice(g * self.size, (g + 1) * self.size)
            levels, h = self.levels[part], self.h[part, part]
            best = _best(scales.scale, levels, self.gradient[part], h)
            self._try(part, g, Scales(best, scales.base))
            if scales.base is not None:
                ones = torch.ones_like(levels)
                base = _best(scales.base, ones, self.gradient[part], h)
                self._try(part, g, Scales(self.scales[g].scale, base))

    def _try(self, part: slice, g: int, scales: Scales) -> None:
        """Takes the scales for the outputs that gain by them."""
        old = self.scales[g]
        assert old.scale is not None and scales.scale is not None
        delta = self._values(part, self.levels[part], scales) - self.values[part]
        change = 2 * (delta * self.gradient[part]).sum(0)
        change += (delta * (self.h[part, part] @ delta)).sum(0)
        better = change < 0
        delta = torch.where(better, delta, 0)
        self.values[part] += delta
        self.gradient += self.h[:, part] @ delta
        base = old.base
        if base is not None and scales.base is not None:
            base = torch.where(better, scales.base, base)
        self.scales[g] = Scales(torch.where(better, scales.scale, old.scale), base)

    def _values(self, part: slice, levels: Tensor, scales: Scales) -> Tensor:
        values = self.grid.values(levels.t(), scales).t()
        return values if self.mask is None else values * self.mask[part]

    def round_columns(self) -> None:
        k = len(self.values)
        for begin in range(0, k, _BLOCK):
            part = slice(begin, min(begin + _BLOCK, k))
            before = self.values[part].clone()
            self._round_block(part, self.gradient[part].clone())
            self.gradient.addmm_(self.h[:, part], self.values[part] - before)

    def _round_block(self, part: slice, gradient: Tensor) -> None:
        """The columns of `part` in turn; `gradient` `[columns, n]` follows within it."""
        h = self.h[part, part]
        for j in range(len(gradient)):
            column = part.start + j
            scales = self.scales[column // self.size]
            old = self.values[column]
            level = self.grid.levels(old - gradient[j] / h[j, j], scales)
            value = self.grid.values(level, scales)
            if self.mask is not None:
                level, value = level * self.mask[column], value * self.mask[column]
            delta = value - old
            self.levels[column], self.values[column] = level, value
            gradient[j:].addr_(h[j:, j], delta)


def _best(value: Tensor, levels: Tensor, gradient: Tensor, h: Tensor) -> Tensor:
    """`value` `[n]` plus the step along `levels` `[g, n]` that lowers the error most, as f16."""
    slope = (gradient * levels).sum(0)
    curve = (levels * (h @ levels)).sum(0)
    return half(torch.where(curve > 0, value - slope / curve, value))

"""Wanda: drop the weights whose products with their inputs are small (arXiv:2306.11695)."""

from __future__ import annotations

from lacewing.compress.columns import Solution
from lacewing.compress.grid import Grid
from lacewing.compress.masks import choose_mask, wanda
from lacewing.compress.nearest import round_nearest
from lacewing.compress.problem import Problem

__all__ = ["solve_wanda"]


def solve_wanda(problem: Problem, grid: Grid, sparsity: float) -> Solution:
    """The lowest `|w_j| * sqrt(E[x_j^2])` of every row go; the others are rounded to nearest, with
    scales that leave the least error weighted by E[x_j^2]."""
    mask = choose_mask(wanda(problem.weight, problem.diagonal), grid.format, sparsity)
    return round_nearest(problem.weight, grid, mask, problem.diagonal)

"""The solvers by the names that recipes call them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lacewing.compress.admm import solve_admm
from lacewing.compress.columns import Solution, solve_columns
from lacewing.compress.grid import Grid
from lacewing.compress.masks import Choice, check_sparsity
from lacewing.compress.nearest import solve_nearest
from lacewing.compress.obs_blocks import solve_blocks
from lacewing.compress.problem import Problem
from lacewing.compress.wanda import solve_wanda

__all__ = ["SOLVERS", "solve"]

Solver = Callable[[Problem, Grid, float, bool], Solution]


def solve(
    solver: str, problem: Problem, grid: Grid, sparsity: float = 0.0, act_order: bool = False
) -> Solution:
    """Prunes and rounds one layer with a solver of SOLVERS. `act_order` only means something to
    those that take columns one after the other.

    Raises RecipeError for a sparsity that the format cannot hold, and for a Hessian that damping
    does not mend.
    """
    check_sparsity(grid.format, sparsity)
    return SOLVERS[solver](problem, grid, sparsity, act_order)


def _columns(problem: Problem, grid: Grid, sparsity: float, act_order: bool) -> Solution:
    prunes = sparsity > 0 or grid.format.fixed_sparsity is not None
    return solve_columns(
        problem, grid, Choice(grid.format, sparsity) if prunes else None, act_order
    )


SOLVERS: Mapping[str, Solver] = {
    "nearest": lambda problem, grid, sparsity, _: solve_nearest(problem, grid, sparsity),
    "magnitude": lambda problem, grid, sparsity, _: solve_nearest(problem, grid, sparsity),
    "wanda": lambda problem, grid, sparsity, _: solve_wanda(problem, grid, sparsity),
    "columns": _columns,
    "admm": solve_admm,
    "blocks": solve_blocks,
}

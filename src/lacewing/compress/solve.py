"""Which solver a rule asks for, and what it is given.

    nearest     rounds to nearest, without data
    magnitude   drops the smallest weights, rounds to nearest
    wanda       drops the smallest |w| * |x|, rounds to nearest
    columns     drops and rounds column by column, making up for each error in the next (SparseGPT,
                GPTQ)
    admm        chooses what to drop for the whole layer, then rounds by columns (ALPS)
    blocks      drops blocks of a format by second order, then rounds by columns (LPViT)

All but the first three may be followed by coordinate descent (`refine`).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lacewing.compress.admm import prune_admm
from lacewing.compress.columns import Solution, solve_columns
from lacewing.compress.grid import Grid
from lacewing.compress.masks import Choice
from lacewing.compress.nearest import solve_magnitude, solve_nearest
from lacewing.compress.obs_blocks import prune_blocks
from lacewing.compress.problem import Problem
from lacewing.compress.recipe import Rule
from lacewing.compress.refine import refine
from lacewing.compress.wanda import solve_wanda
from lacewing.formats import Format, get_format
from lacewing.formats.tiles import STRIP

__all__ = ["JOINT", "solve"]

JOINT: dict[str, Callable[[Problem, Format, float], tuple[Tensor, Problem]] | None] = {
    "columns": None,
    "admm": prune_admm,
    "blocks": lambda problem, _, sparsity: _blocks(problem, sparsity),
}
"""Solvers that end in the column solver, and how each chooses a mask before it; None: as it goes."""
_ALONE: dict[str, Callable[[Problem, Grid, float], Solution]] = {
    "nearest": lambda problem, grid, _: solve_nearest(problem, grid),
    "magnitude": solve_magnitude,
    "wanda": solve_wanda,
}


def solve(problem: Problem, rule: Rule, sparsity: float) -> Solution:
    """Levels for `problem` as `rule` has it; `sparsity` takes the place of the rule's.

    Raises RecipeError, naming the layer, for a Hessian that cannot be inverted.
    """
    kind = get_format(rule.format)
    grid = Grid(kind)
    if rule.solver in _ALONE:
        return _ALONE[rule.solver](problem, grid, sparsity)
    mask: Tensor | Choice | None = None
    prune = JOINT[rule.solver]
    goal = problem
    if rule.prunes:
        mask = Choice(kind, sparsity)
        if prune is not None:
            mask, goal = prune(problem, kind, sparsity)
    solution = solve_columns(goal, grid, mask, rule.act_order)
    if not rule.refine:
        return solution
    return refine(problem, solution, solution.values() != 0 if rule.prunes else None, rule.refine)


def _blocks(problem: Problem, sparsity: float) -> tuple[Tensor, Problem]:
    mask, weight = prune_blocks(problem, STRIP, 1, sparsity)
    return mask, problem.aiming(weight)

"""The weights that stay, chosen for the whole layer at once, by ADMM (ALPS, arXiv:2406.07831).

SparseGPT decides a column when it comes to it. Here a dense W and a sparse D, with as many weights
as may stay, minimise tr((W - W0) H (W - W0)^T) under W = D:

    W <- (W0 H - V + rho D) (H + rho I)^-1      D <- W + V / rho, its largest weights
    V <- V + rho (W - D)

with rho growing until the choice settles. Inputs are scaled to a mean square of 1 first. Conjugate
gradients then find the best values for the choice; both take matrix products alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lacewing.compress.columns import Solution, solve_columns
from lacewing.compress.grid import Grid
from lacewing.compress.masks import choose_mask
from lacewing.compress.problem import Problem
from lacewing.formats import Format

__all__ = ["REFITS", "STEPS", "fit_kept", "prune_admm", "solve_admm"]

STEPS = 60
_FIRST = 0.1
"""rho of the first step, where H has a diagonal of 1."""
_EVERY = 3
"""Steps between two looks at how much the choice still changes."""
_SETTLED = 0.0005
"""Share of the weights: with fewer of them changed between two looks the choice is made."""
_FACTORS = ((0.005, 1.3), (_SETTLED, 1.2))
"""Above which share of changed weights rho grows by which factor."""
REFITS = 20


def solve_admm(problem: Problem, grid: Grid, sparsity: float, act_order: bool = False) -> Solution:
    """What stays is chosen by ADMM, and rounded by the column solver."""
    if not sparsity and grid.format.fixed_sparsity is None:
        return solve_columns(problem, grid, None, act_order)
    mask = prune_admm(problem, grid.format, sparsity)
    return solve_columns(problem.aiming(fit_kept(problem, mask)), grid, mask, act_order)


def prune_admm(problem: Problem, format: Format, sparsity: float) -> Tensor:
    """The mask, bool `[n, k]`, True for what stays. The pattern is the format's; without one
    weights are chosen over the whole layer."""
    size = problem.diagonal.sqrt()
    h = problem.damped / size[:, None] / size[None, :]
    values, vectors = problem.eigen
    w0 = problem.weight * size
    goal = w0 @ h
    mask = choose_mask(w0.square(), format, sparsity, "layer")
    d, v, rho = w0 * mask, torch.zeros_like(w0), _FIRST
    before = mask
    for step in range(STEPS):
        w = ((goal - v + rho * d) @ vectors / (values + rho)) @ vectors.t()
        pulled = w + v / rho
        mask = choose_mask(pulled.square(), format, sparsity, "layer")
        d = pulled * mask
        v = v + rho * (w - d)
        if step % _EVERY == _EVERY - 1:
            changed = (mask != before).float().mean().item()
            if changed <= _SETTLED:
                break
            before = mask
            rho *= next(factor for share, factor in _FACTORS if changed > share)
    return mask


def fit_kept(problem: Problem, mask: Tensor, steps: int = REFITS) -> Tensor:
    """The weights of least error that are zero where `mask` is False: conjugate gradients for all
    rows together, preconditioned by the diagonal (arXiv:2406.07831, algorithm 2). A row that has
    converged to f32 takes no more steps: what is left of its residual is noise, and grows."""
    h, diagonal = problem.damped, problem.diagonal
    x = problem.weight * mask
    residual = ((problem.weight - x) @ h) * mask
    z = residual / diagonal
    direction, size = z.clone(), (residual * z).sum(1)
    least = torch.finfo(size.dtype).eps ** 2 * size
    for _ in range(steps):
        ahead = (direction @ h) * mask
        curve = (direction * ahead).sum(1)
        step = torch.where((size > least) & (curve > 0), size / curve, 0)[:, None]
        x += step * direction
        residual -= step * ahead
        z = residual / diagonal
        before, size = size, (residual * z).sum(1)
        direction = z + torch.where(before > 0, size / before, 0)[:, None] * direction
    return x

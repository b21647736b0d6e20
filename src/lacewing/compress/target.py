"""What a layer should aim at, when what it reads is no longer what the dense model reads.

Layers before it are compressed already: it is given x' in place of x. The outputs it should have
are W x, and for a layer that writes to the residual stream also what that has lost, r - r'. So

    minimise  |W* x' - W x - (r - r')|^2   =>   W* = W + (W C + R) H^-1

with H = mean x' x'^T, C = mean (x - x') x'^T, R = mean (r - r') x'^T, all over the calibration
tokens; then W* takes the place of W. The first part is the asymmetric calibration of GPTAQ
(arXiv:2504.02692); the second lets o and down make up for errors of the stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lacewing.compress.problem import Problem, not_positive

__all__ = ["corrected"]

_RIDGE = 0.3
"""Damping of the correction, a share of the Hessian's mean diagonal: directions in which there was
little to see keep their weights."""


def corrected(
    problem: Problem, lost: Tensor, stream: Tensor | None = None, share: float = 1.0
) -> Problem:
    """The problem with W + share * (W* - W) in place of W.

    lost: C, f32 `[k, k]`. stream: R, f32 `[n, k]`, or None for a layer within the block. share:
    all of the correction fits the calibration text best, and others less.

    Raises RecipeError, naming the layer, for a Hessian that is not positive even so.
    """
    moved = problem.weight @ lost
    if stream is not None:
        moved = moved + stream
    h = problem.damped.clone()
    h.diagonal().add_(_RIDGE * h.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(h)
    if info != 0:
        raise not_positive(problem.name)
    step = torch.cholesky_solve(moved.t(), factor).t()
    return problem.aiming(problem.weight + share * step)

"""How many of the weights of each layer go, if a total is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import Tensor

from lacewing.compress.masks import choose_mask, wanda
from lacewing.compress.problem import Problem
from lacewing.errors import RecipeError
from lacewing.formats import Format

__all__ = ["curve_ratios", "error_curve", "outlier_share", "owl_ratios"]

_OUTLIER = 5.0
"""How many times the mean of a layer its outliers exceed."""
_SPREAD = 0.08
"""Half of what the ratios of OWL differ by at most."""


def outlier_share(weight: Tensor, diagonal: Tensor) -> float:
    """The share of the weights `[n, k]` for which `|w_j| * sqrt(E[x_j^2])` exceeds five times its
    mean over the layer: the layer outlier distribution of OWL (arXiv:2310.05175).
    diagonal: `[k]`, E[x_j^2]."""
    size = weight.abs() * diagonal.sqrt()
    return float((size > _OUTLIER * size.mean()).sum()) / size.numel()


def owl_ratios(
    outlier_shares: Mapping[str, float], weights: Mapping[str, int], sparsity: float
) -> dict[str, float]:
    """The ratio of every layer, in [0, 1): the more outliers, the lower (OWL, arXiv:2310.05175).
    They differ by at most 0.16, and are `sparsity` on average over all weights.

    weights: how many each layer has. Raises RecipeError for a sparsity out of range.
    """
    _check(sparsity)
    low, high = min(outlier_shares.values()), max(outlier_shares.values())
    reach = high - low or 1.0
    wanted = {name: -2 * _SPREAD * (d - low) / reach for name, d in outlier_shares.items()}
    return _shifted(wanted, weights, sparsity)


def error_curve(problem: Problem, format: Format, sparsities: Sequence[float]) -> list[float]:
    """The relative error of the layer's outputs if Wanda drops each of these shares, and nothing
    is rounded."""
    score = wanda(problem.weight, problem.diagonal)
    masks = (choose_mask(score, format, sparsity) for sparsity in sparsities)
    return [problem.error(problem.weight * mask) for mask in masks]


def curve_ratios(
    curves: Mapping[str, Sequence[float]],
    sparsities: Sequence[float],
    weights: Mapping[str, int],
    sparsity: float,
) -> dict[str, float]:
    """The ratios with the least sum of errors, `sparsity` on average over all weights.

    curves: the error of each layer at each of `sparsities`, which ascend from 0. Between them
    errors are taken to lie on the lower convex hull; then the best is to drop whatever costs least
    per weight, piece after piece.

    Raises RecipeError if even the largest of `sparsities` in all layers is less than `sparsity`.
    """
    _check(sparsity)
    if sparsity > sparsities[-1]:
        raise RecipeError(
            f"ratios: the errors are known up to a sparsity of {sparsities[-1]:g}, got {sparsity:g}"
        )
    pieces = []
    for name, curve in curves.items():
        hull = _lower_hull(list(zip(sparsities, curve, strict=True)))
        for (s, e), (t, f) in pairwise(hull):
            pieces.append(((f - e) / ((t - s) * weights[name]), s, name, t - s))
    ratios = dict.fromkeys(curves, 0.0)
    budget = sparsity * sum(weights[name] for name in curves)
    for _, _, name, width in sorted(pieces):
        taken = min(width * weights[name], budget)
        ratios[name] += taken / weights[name]
        budget -= taken
    return ratios


def _lower_hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points with ascending abscissae (Andrew's monotone chain)."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1 and _above(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return hull


def _above(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b is not below the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def _shifted(
    wanted: Mapping[str, float], weights: Mapping[str, int], sparsity: float
) -> dict[str, float]:
    """`wanted` plus one number, cut off at 0 and one weight below 1, whose mean is `sparsity`."""

    def ratios(shift: float) -> dict[str, float]:
        return {
            name: min(max(value + shift, 0.0), 1 - 1 / weights[name])
            for name, value in wanted.items()
        }

    def dropped(shift: float) -> float:
        return sum(weights[name] * ratio for name, ratio in ratios(shift).items())

    budget = sparsity * sum(weights[name] for name in wanted)
    low, high = -max(wanted.values()), 1 - min(wanted.values())
    for _ in range(60):  # the sum grows with the shift: halve the interval down to rounding
        middle = (low + high) / 2
        low, high = (middle, high) if dropped(middle) < budget else (low, middle)
    return ratios(high)


def _check(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise RecipeError(f"ratios: sparsity must be in [0, 1), got {sparsity:g}")

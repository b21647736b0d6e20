"""What a solver is given: one linear layer, and what calibration knows of its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from lacewing.errors import RecipeError

__all__ = ["DAMPING", "Problem", "check_hessian", "not_positive"]

DAMPING = 0.01
"""Share of the mean diagonal that is added to a Hessian's diagonal (GPTQ, arXiv:2210.17323)."""

_Made = TypeVar("_Made")


@dataclass(eq=False)
class Problem:
    """Find weights W' on a grid, under a mask, that minimise tr((W' - W) H (W' - W)^T), which is
    the mean squared error of the layer's outputs over the calibration tokens.

    weight: the target W, f32 `[n, k]`. hessian: H, the mean over tokens of x x^T, f32 `[k, k]`,
    of the inputs as the compressed model has them. What is computed of H is computed when it is
    first asked for, once for all problems of the same inputs (`aiming`).
    """

    name: str
    weight: Tensor
    hessian: Tensor
    tokens: int
    _known: dict[str, Any] = field(default_factory=dict, repr=False)
    """What has been computed of the Hessian."""

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.weight.shape
        return n, k

    @property
    def damping(self) -> float:
        """The share of the mean diagonal that it took to invert H, once it has been inverted."""
        found: float = self._known.get("damping", DAMPING)
        return found

    @property
    def damped(self) -> Tensor:
        """H + lambda I. Inputs that were always zero have lambda on the diagonal, so that they
        weigh little; 1 if all were."""
        return self._once("damped", self._damped)

    @property
    def diagonal(self) -> Tensor:
        """f32 `[k]`: mean square of every input, damped."""
        return self._once("diagonal", self._damped_diagonal)

    @property
    def inverse_factor(self) -> Tensor:
        """Upper triangular U, f32 `[k, k]`, with U^T U = (H + lambda I)^-1: what the column solver
        walks along. Computed in float64. Damping grows tenfold at most three times until the
        Cholesky decomposition exists.

        Raises RecipeError, naming the layer, if it does not exist even then.
        """
        return self._once("inverse_factor", lambda: self._factor(self.damped))

    @property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues `[k]` and eigenvectors, the columns of `[k, k]`, of H + lambda I after its
        inputs are scaled to a mean square of 1."""
        return self._once("eigen", self._eigen)

    @cached_property
    def size(self) -> float:
        """tr(W H W^T): the mean square of the layer's outputs."""
        return _form(self.weight, self.hessian)

    def aiming(self, weight: Tensor, name: str | None = None) -> Problem:
        """The problem of another weight that reads the same inputs; what is known of them, or will
        be, is shared."""
        return Problem(name or self.name, weight, self.hessian, self.tokens, self._known)

    def ordered_factor(self, order: Tensor) -> Tensor:
        """`inverse_factor` of the inputs in `order`, `[k]` indices."""
        return self._factor(self.damped[order][:, order])

    def error(self, weight: Tensor) -> float:
        """tr((W' - W) H (W' - W)^T) of a candidate W', over the same of W' = 0."""
        return _form(self.weight - weight, self.hessian) / self.size if self.size else 0.0

    def _once(self, key: str, make: Callable[[], _Made]) -> _Made:
        if key not in self._known:
            self._known[key] = make()
        found: _Made = self._known[key]
        return found

    def _damped(self) -> Tensor:
        h = self.hessian.clone()
        diagonal = h.diagonal()
        diagonal += DAMPING * diagonal.mean() if diagonal.any() else 1.0
        return h

    def _damped_diagonal(self) -> Tensor:
        """Without `damped`, of which it is the diagonal: many solvers need no more."""
        diagonal = self.hessian.diagonal().clone()
        diagonal += DAMPING * diagonal.mean() if diagonal.any() else 1.0
        return diagonal

    def _eigen(self) -> tuple[Tensor, Tensor]:
        size = self.diagonal.sqrt()
        values, vectors = torch.linalg.eigh(self.damped / size[:, None] / size[None, :])
        return values, vectors

    def _factor(self, damped: Tensor) -> Tensor:
        """At most two matrices in float64 are there at a time."""
        mean, added = damped.diagonal().mean(dtype=torch.float64), 0.0
        for extra in (0.0, 0.1, 1.0, 10.0):
            added += extra
            h = damped.double()
            h.diagonal().add_(added * mean)
            factor, info = torch.linalg.cholesky_ex(h)
            del h
            if info == 0:
                inverse = torch.cholesky_inverse(factor)
                del factor
                upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
                del inverse
                if info == 0:
                    self._known["damping"] = max(self.damping, DAMPING + added)
                    return upper.float()
        raise not_positive(self.name)


def _form(w: Tensor, h: Tensor) -> float:
    return ((w @ h) * w).sum(dtype=torch.float64).item()


def not_positive(name: str) -> RecipeError:
    """What is wrong with the Hessian of a layer that cannot be inverted."""
    return RecipeError(
        f"`{name}`: needs a positive definite Hessian, got one that damping does not mend",
        hint="calibrate on more and more varied text",
    )


def check_hessian(name: str, hessian: Tensor) -> None:
    """Raises RecipeError, naming the layer and the first input, for NaN or infinite activations."""
    bad = ~hessian.diagonal().isfinite()
    if bad.any():
        raise RecipeError(
            f"`{name}`: needs finite activations, got NaN or infinity in input"
            f" {int(bad.nonzero()[0])}",
            hint="the model overflows on the calibration text: is it damaged?",
        )

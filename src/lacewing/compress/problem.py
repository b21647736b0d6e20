"""What a solver is given: one linear layer, and what calibration knows of its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lacewing.errors import RecipeError

__all__ = ["DAMPING", "Problem", "check_hessian", "not_positive"]

DAMPING = 0.01
"""Share of the mean diagonal that is added to a Hessian's diagonal (GPTQ, arXiv:2210.17323)."""


@dataclass(eq=False)
class Problem:
    """Find weights W' on a grid, under a mask, that minimise tr((W' - W) H (W' - W)^T), which is
    the mean squared error of the layer's outputs over the calibration tokens.

    weight: the target W, f32 `[n, k]`. hessian: H, the mean over tokens of x x^T, f32 `[k, k]`,
    of the inputs as the compressed model has them. damping: the share of the mean diagonal that it
    took to invert H, once it has been inverted.
    """

    name: str
    weight: Tensor
    hessian: Tensor
    tokens: int
    damping: float = DAMPING

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.weight.shape
        return n, k

    @cached_property
    def damped(self) -> Tensor:
        """H + lambda I. Inputs that were always zero have lambda on the diagonal, so that they
        weigh little; 1 if all were."""
        h = self.hessian.clone()
        diagonal = h.diagonal()
        diagonal += DAMPING * diagonal.mean() if diagonal.any() else 1.0
        return h

    @cached_property
    def diagonal(self) -> Tensor:
        """f32 `[k]`: mean square of every input, damped."""
        return self.damped.diagonal().clone()

    @cached_property
    def inverse_factor(self) -> Tensor:
        """Upper triangular U, f32 `[k, k]`, with U^T U = (H + lambda I)^-1: what the column solver
        walks along. Computed in float64. Damping grows tenfold at most three times until the
        Cholesky decomposition exists.

        Raises RecipeError, naming the layer, if it does not exist even then.
        """
        return self._factor(self.damped)

    def aiming(self, weight: Tensor, name: str | None = None) -> Problem:
        """The problem of another weight that reads the same inputs; what is known of them goes
        along."""
        other = Problem(name or self.name, weight, self.hessian, self.tokens, self.damping)
        for key in ("damped", "diagonal", "inverse_factor"):
            if key in self.__dict__:
                other.__dict__[key] = self.__dict__[key]
        return other

    def ordered_factor(self, order: Tensor) -> Tensor:
        """`inverse_factor` of the inputs in `order`, `[k]` indices."""
        return self._factor(self.damped[order][:, order])

    def _factor(self, damped: Tensor) -> Tensor:
        h = damped.double()
        mean, total = h.diagonal().mean(), DAMPING
        for extra in (0.0, 0.1, 1.0, 10.0):
            h.diagonal().add_(extra * mean)
            total += extra
            factor, info = torch.linalg.cholesky_ex(h)
            if info == 0:
                inverse = torch.cholesky_inverse(factor)
                upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
                if info == 0:
                    self.damping = max(self.damping, total)
                    return upper.float()
        raise not_positive(self.name)

    def error(self, weight: Tensor) -> float:
        """tr((W' - W) H (W' - W)^T) of a candidate W', over the same of W' = 0."""
        lost = self.weight - weight
        whole = _form(self.weight, self.hessian)
        return _form(lost, self.hessian) / whole if whole else 0.0


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

"""What rounding to nearest costs a set of layers that read the same input: the judge of smoothing
and reordering. No forward pass: the weights' part is a form of the Hessian, the activations' part
is measured on a sample of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lacewing.compress.grid import Grid
from lacewing.compress.problem import Problem
from lacewing.formats import Format

__all__ = [
    "Inputs",
    "conditional_variance",
    "error",
    "nearest",
    "round_activations",
    "sample",
    "scale_hessian",
]


@dataclass(frozen=True, eq=False)
class Inputs:
    """What calibration knows of the input x of a stage.

    hessian: mean over tokens of x x^T, f32 `[k, k]`. absmax: the largest |x| of every channel,
    `[k]`. rows: a sample of tokens, f32 `[m, k]`; some hundreds are enough. conditional: what
    `conditional_variance` makes of the Hessian, `[k]`, where the column solver will round; None:
    weights are rounded to nearest.
    """

    hessian: Tensor
    absmax: Tensor
    rows: Tensor
    conditional: Tensor | None = None

    def divided(self, scales: Tensor) -> Inputs:
        """Those of x / scales, `[k]`."""
        known = self.conditional
        return Inputs(
            scale_hessian(self.hessian, scales),
            self.absmax / scales,
            self.rows / scales,
            None if known is None else known / scales.square(),
        )

    def ordered(self, order: Tensor) -> Inputs:
        """Those of x[order], without `conditional`, which depends on the order."""
        return Inputs(
            self.hessian[order][:, order], self.absmax[order], self.rows[:, order].contiguous()
        )


def scale_hessian(hessian: Tensor, scales: Tensor) -> Tensor:
    """The Hessian of inputs x / scales, given that of x."""
    inverse = 1 / scales
    return hessian * inverse[:, None] * inverse[None, :]


def conditional_variance(problem: Problem) -> Tensor:
    """1 / U_jj^2, `[k]`, of the inverse factor U: the mean square of input j that the inputs after
    it do not explain. The column solver leaves sum_j (w_j - w'_j)^2 / U_jj^2, with w as it has been
    corrected (arXiv:2210.17323), which the same sum over W itself foretells."""
    return 1 / problem.inverse_factor.diagonal().square()


def nearest(weight: Tensor, format: Format, importance: Tensor) -> Tensor:
    """`weight` `[n, k]` rounded to the nearest values of `format`, with scales that are fitted to
    `importance` `[k]`."""
    grid = Grid(format)
    size = grid.group_size(weight.shape[1])
    pairs = zip(weight.split(size, dim=1), importance.split(size), strict=True)
    return torch.cat([grid.nearest(w, grid.fit(w, part)) for w, part in pairs], dim=1)


def round_activations(x: Tensor, format: Format) -> Tensor:
    """Rows `x` f32 `[m, k]` as `format` reads them: int8 per row and group, as `quantize_rows` of
    `lacewing.formats` has it, times its scale. Float formats read them as they are."""
    if not format.group_size:
        return x
    m, k = x.shape
    group = format.group(k)
    groups = F.pad(x, (0, -k % group)).view(m, -1, group)
    amax = groups.abs().amax(dim=2, keepdim=True)
    inverse = 127 / amax
    inverse[inverse.isinf()] = 0
    q = (groups * inverse).round_().clamp_(-127, 127)
    return (q * (amax / 127)).view(m, -1)[:, :k]


def sample(weights: Sequence[Tensor], rows: int) -> list[Tensor]:
    """At most `rows` outputs of every layer, evenly spaced."""
    return [w[torch.linspace(0, len(w) - 1, min(len(w), rows)).long()] for w in weights]


def error(weights: Sequence[Tensor], formats: Sequence[Format], inputs: Inputs) -> float:
    """The mean over layers, each `[n, k]` in its format, of the squared error of the outputs over
    the outputs' square, where W' is W rounded to nearest and x' is x as the format reads it:

        (tr((W' - W) H (W' - W)^T) + mean over rows of |W' (x' - x)|^2) / tr(W H W^T)

    With `conditional` D in the place of the first H, of a column solver's result without solving.
    The roundings of weights and of activations are taken to be independent. A layer that returns
    nothing but 0 counts as exact; an error that is not finite is infinite.
    """
    total = 0.0
    rounded: dict[int, Tensor] = {}
    for weight, format in zip(weights, formats, strict=True):
        group = format.group_size
        if group not in rounded:
            rounded[group] = round_activations(inputs.rows, format) - inputs.rows
        total += _layer_error(weight, format, inputs, rounded[group])
    mean = total / len(weights)
    return mean if mean < float("inf") else float("inf")


def _layer_error(weight: Tensor, format: Format, inputs: Inputs, lost: Tensor) -> float:
    hessian = inputs.hessian
    whole = _form(weight, hessian)
    if whole == 0:
        return 0.0
    values = nearest(weight, format, hessian.diagonal())
    outputs = float(F.linear(lost, values).square().sum(dtype=torch.float64)) / len(lost)
    return (_weights_part(values - weight, inputs) + outputs) / whole


def _weights_part(lost: Tensor, inputs: Inputs) -> float:
    if inputs.conditional is None:
        return _form(lost, inputs.hessian)
    return float((lost.square() * inputs.conditional).sum(dtype=torch.float64))


def _form(w: Tensor, h: Tensor) -> float:
    return float(((w @ h) * w).sum(dtype=torch.float64))

"""Smoothing: a scale per input channel that is folded into its neighbours, so that the weights, or
the activations, are rounded with less loss and nothing is computed that was not before.

    awq          s = mean|x|^a / mean|w|^(1-a)      arXiv:2306.00978: large where inputs are large
    smoothquant  s = max|x|^a / max|w|^(1-a)        arXiv:2211.10438: divides outliers of x by s

Both exponents a are searched, and both are judged by all that a format rounds, weights and
activations (`rounding.py`); leaving a stage as it is is always among the candidates.

Stage 1 divides rows of v and stage 3 rows of up, so that a block is smoothed before any layer of it
is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lacewing.compress.decoder import STAGES, Block
from lacewing.compress.folds import channels, divided_by, expand, merge, scale_inputs
from lacewing.compress.rounding import Inputs, error, sample
from lacewing.errors import RecipeError
from lacewing.formats import Format
from lacewing.models import DecoderSpec

__all__ = ["ALPHAS", "METHODS", "Smoothing", "candidate", "smooth_stage"]

METHODS = ("awq", "smoothquant")
ALPHAS = tuple(i / 10 for i in range(11))
_REACH = 1024.0
"""Scales lie within this factor of their median: in the range of f16 on both sides of a fold."""
_OUTPUTS = 256
"""Outputs of a layer that the search looks at; what it finds is confirmed on all of them."""
_F16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True, eq=False)
class Smoothing:
    """What was done to a stage. alpha: the exponent chosen, None where the stage was left as it is.
    before, after: `rounding.error` of rounding to nearest. scales: f32 `[channels]`."""

    method: str
    stage: int
    alpha: float | None
    before: float
    after: float
    scales: Tensor


def smooth_stage(
    block: Block, stage: int, formats: Sequence[Format], inputs: Inputs, method: str = "awq"
) -> Smoothing:
    """Chooses scales for the input of `STAGES[stage]` and folds them into `block`, in place; the
    stage then reads `inputs.divided(expand(block.spec, stage, scales))`.

    formats: of the stage's layers in order. Raises RecipeError for an unknown method.
    """
    if method not in METHODS:
        raise RecipeError(f"smooth: needs one of {', '.join(METHODS)}, got `{method}`")
    weights = [block.linear(name).weight.detach() for name in STAGES[stage]]
    x, w = _magnitudes(block.spec, stage, weights, inputs, method)
    part = sample(weights, _OUTPUTS)
    best, alpha = _error(block.spec, stage, part, formats, inputs, None), None
    scales = torch.ones(channels(block.spec, stage))
    for a in ALPHAS:
        found = candidate(x, w, a)
        if not _holds(block, stage, weights, inputs, found):
            continue
        loss = _error(block.spec, stage, part, formats, inputs, found)
        if loss < best:
            best, alpha, scales = loss, a, found
    before = after = _error(block.spec, stage, weights, formats, inputs, None)
    if alpha is not None:
        after = _error(block.spec, stage, weights, formats, inputs, scales)
        if after >= before:
            alpha, after, scales = None, before, torch.ones_like(scales)
    if alpha is not None:
        scale_inputs(block, stage, scales)
    return Smoothing(method, stage, alpha, before, after, scales)


def candidate(x: Tensor, w: Tensor, alpha: float) -> Tensor:
    """`x^alpha / w^(1 - alpha)` over its median, for magnitudes `[channels]` of inputs and weights.
    Channels in which either is 0 get 1: rounding cannot hurt them."""
    scales = alpha * x.log() - (1 - alpha) * w.log()
    live = (x > 0) & (w > 0)
    if not live.any():
        return torch.ones_like(x)
    scales = (scales - scales[live].median()).exp().clamp(1 / _REACH, _REACH)
    return torch.where(live, scales, 1.0)


def _magnitudes(
    spec: DecoderSpec, stage: int, weights: Sequence[Tensor], inputs: Inputs, method: str
) -> tuple[Tensor, Tensor]:
    """Of inputs and weights, `[channels]` each."""
    w = torch.cat(list(weights)).abs()
    if method == "awq":
        found = inputs.rows.abs().mean(0), w.mean(0)
    else:
        found = inputs.absmax, w.amax(0)
    x, w = (merge(spec, stage, values, method == "smoothquant") for values in found)
    return x, w


def _error(
    spec: DecoderSpec,
    stage: int,
    weights: Sequence[Tensor],
    formats: Sequence[Format],
    inputs: Inputs,
    scales: Tensor | None,
) -> float:
    if scales is None:
        return error(weights, formats, inputs)
    wide = expand(spec, stage, scales)
    return error([w * wide for w in weights], formats, inputs.divided(wide))


def _holds(
    block: Block, stage: int, weights: Sequence[Tensor], inputs: Inputs, scales: Tensor
) -> bool:
    """Whether f16, which holds the weights' scales and the value cache, has room for the result."""
    wide = expand(block.spec, stage, scales)
    parts = [divided_by(block, stage, scales), inputs.absmax / wide, *(w * wide for w in weights)]
    return all(bool(part.abs().amax() <= _F16_MAX) for part in parts)

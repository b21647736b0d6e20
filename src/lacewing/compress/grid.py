"""A format's grid in torch: scales for groups of weights, weights to levels, levels to values.

A level is `code_step * code - zero_point` in the symmetric formats (`weight = scale * level`) and
the code itself in the asymmetric ones (`weight = scale * level + base`). Scales and bases are held
in f32, at values f16 has. bf16 has no scale: a level is the value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lacewing.errors import RecipeError
from lacewing.formats import Codes, Format
from lacewing.formats.base import ROW
from lacewing.formats.scales import F16_MAX, to_f16

__all__ = ["Grid", "Scales"]

_RATIOS = {1: (0.25, 1.0), 2: (0.5, 1.1), 3: (0.6, 1.1), 4: (0.65, 1.1), 8: (0.97, 1.05)}
"""By bits (1: ternary), the range of scales searched, over the one that sends the extreme to the
last level. That one itself is a candidate too: weights that are on a grid are found again."""
_CANDIDATES = 12
_ENDS = (
    *((0, 0), (0, -1), (1, 0), (1, -1), (0, 0.5), (-0.5, 0), (-0.5, 0.5), (0, 1), (-1, 0)),
    *((-1, 1), (-1.5, 1.5), (-2, 2)),
)
"""Asymmetric: the levels to which the least and the largest weight are sent, from the first and
from the last level. (0, 0) is one of them, for the same reason."""


@dataclass(frozen=True)
class Scales:
    """Of one group of inputs for n outputs: f32 `[n]` each; base is None in symmetric formats, and
    scale in formats without scales."""

    scale: Tensor | None = None
    base: Tensor | None = None


class Grid:
    """The levels of `format` and the arithmetic on them."""

    def __init__(self, format: Format) -> None:
        self.format = format
        self.step = format.code_step
        zero = 0 if format.asymmetric else format.zero_point
        self.low = -zero
        self.high = self.step * format.max_code - zero
        if format.weight_bits == 16:
            self.low, self.high = 0, 0

    @property
    def scaled(self) -> bool:
        """Whether weights have scales; False in bf16."""
        return self.format.group_size != 0

    def group_size(self, k: int) -> int:
        """Inputs of one scale in rows of k; k where there is none."""
        size = self.format.group_size
        return k if size in (0, ROW) else size

    def check(self, name: str, w: Tensor) -> None:
        """Raises RecipeError, naming the layer, for weights `[n, k]` that are not finite, or too
        large for scales in f16."""
        largest, kind = w.abs().max().item(), self.format
        if not math.isfinite(largest):
            raise RecipeError(
                f"`{name}`: needs finite weights, got NaN or infinity", hint="is the model damaged?"
            )
        limit = F16_MAX * (1 if kind.asymmetric else max(-self.low, self.high))
        if self.scaled and largest > limit:
            raise RecipeError(
                f"`{name}`: {kind.name} has scales in f16 and holds magnitudes up to {limit:g},"
                f" got {largest:g}",
                hint="use `bf16` for this layer",
            )

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Scales:
        """Scales for one group `[n, g]` that leave the least error `sum importance * (w - w')^2`
        among some dozen candidates, each refitted by least squares. importance: `[g]` or `[n, g]`,
        not negative."""
        if not self.scaled:
            return Scales()
        weight = torch.ones_like(w) if importance is None else importance.expand_as(w)
        return self._fit_line(w, weight) if self.format.asymmetric else self._fit_scale(w, weight)

    def levels(self, w: Tensor, scales: Scales) -> Tensor:
        """The nearest levels of weights `[n, ..]` of one group, as f32."""
        if scales.scale is None:
            return w.to(torch.bfloat16).to(w.dtype)
        shape = (-1, *[1] * (w.dim() - 1))
        scale = scales.scale.view(shape)
        if scales.base is not None:
            w = w - scales.base.view(shape)
        t = torch.where(scale == 0, 0, w / scale)
        if self.step == 1:
            return t.round_().clamp_(self.low, self.high)
        return t.mul_(0.5).floor_().mul_(2).add_(1).clamp_(self.low, self.high)

    def values(self, levels: Tensor, scales: Scales) -> Tensor:
        """What levels `[n, ..]` of one group stand for."""
        if scales.scale is None:
            return levels
        shape = (-1, *[1] * (levels.dim() - 1))
        out = levels * scales.scale.view(shape)
        return out if scales.base is None else out + scales.base.view(shape)

    def nearest(self, w: Tensor, scales: Scales) -> Tensor:
        """The nearest values on the grid."""
        return self.values(self.levels(w, scales), scales)

    def codes(self, levels: Tensor, scales: list[Scales]) -> Codes:
        """Codes of the format, of levels `[n, k]` and the scales of every group in order."""
        if not self.scaled:
            bits = levels.to(torch.bfloat16).view(torch.uint16).numpy()
            return Codes(np.where(bits == 0x8000, np.uint16(0), bits))
        q = ((levels - self.low) / self.step).to(torch.uint8).numpy()
        scale = torch.stack([_of(s.scale) for s in scales], 1).numpy().astype(np.float16)
        if not self.format.asymmetric:
            return Codes(q, scale)
        base = torch.stack([_of(s.base) for s in scales], 1).numpy().astype(np.float16)
        return Codes(q, scale, base)

    # -- the search -------------------------------------------------------------------------------

    def _fit_scale(self, w: Tensor, weight: Tensor) -> Scales:
        """The extreme of the group goes to the lowest level, or to the highest, or beyond them."""
        high, low = w.amax(1), w.amin(1)
        extreme = torch.where(high >= -low, high, low)
        least = torch.full_like(extreme, torch.inf)
        best = torch.zeros_like(extreme)
        first, last = _RATIOS[1 if self.high == 1 else self.format.weight_bits]
        for end in {self.low, self.high}:
            for ratio in (1.0, *torch.linspace(first, last, _CANDIDATES // 2).tolist()):
                scale = half(extreme / end * ratio)
                level = self.levels(w, Scales(scale))
                weighted = weight * level
                fit = (weighted * w).sum(1) / (weighted * level).sum(1)
                scale = half(torch.where(fit.isfinite(), fit, scale))
                error = (weight * (w - scale[:, None] * level).square()).sum(1)
                better = error < least
                least = torch.where(better, error, least)
                best = torch.where(better, scale, best)
        return Scales(best)

    def _fit_line(self, w: Tensor, weight: Tensor) -> Scales:
        """A range a little wider or narrower than max - min, then the least-squares line.

        A base in f16 may be off by many steps, where weights are large and nearly equal: it is
        rounded down, and the scale reaches from there."""
        low, high = w.amin(1), w.amax(1)
        least = torch.full_like(low, torch.inf)
        best, base = torch.zeros_like(low), torch.zeros_like(low)
        for first, beyond in _ENDS:
            step = (high - low) / (self.high + beyond - first)
            start = _floor_half(low - first * step)
            found = Scales(half((high - beyond * step - start) / self.high), start)
            level = self.levels(w, found)
            found = _line(w, level, weight, found)
            error = (weight * (w - self.values(level, found)).square()).sum(1)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, _of(found.scale), best)
            base = torch.where(better, _of(found.base), base)
        return Scales(best, base)


def half(values: Tensor) -> Tensor:
    """`values` as f16 holds them, rounded as the formats do it; f32."""
    return torch.from_numpy(to_f16(values.numpy()).astype(np.float32))


def _floor_half(values: Tensor) -> Tensor:
    """The largest f16 not above `values`; f32."""
    near = values.half()
    below = torch.nextafter(near, torch.full_like(near, -torch.inf))
    return torch.where(near.float() > values, below, near).float()


def _line(w: Tensor, level: Tensor, weight: Tensor, start: Scales) -> Scales:
    """Least squares for scale and base of given levels, `start` where all are the same; then for
    the scale given the base as f16 has it."""
    total = weight.sum(1)
    x, y = (weight * level).sum(1) / total, (weight * w).sum(1) / total
    centred = level - x[:, None]
    spread = (weight * centred * centred).sum(1)
    scale = (weight * centred * w).sum(1) / spread
    base = torch.where(spread > 1e-9 * total, half(y - scale * x), _of(start.base))
    above = weight * level
    fit = (above * (w - base[:, None])).sum(1) / (above * level).sum(1)
    return Scales(half(torch.where(fit.isfinite(), fit, _of(start.scale))), base)


def _of(values: Tensor | None) -> Tensor:
    assert values is not None
    return values

"""Compressed weights that can be trained: a float master behind every weight on a grid.

The forward pass sees `W' = scale * level + base`, with `level` the grid's nearest to the master
under the scales it began with; the gradient of W' goes to the master as if nothing had been rounded
(straight-through, arXiv:1308.3432), and absent weights have none, so that masks stay as they are.
Scales, where they are learned, have the gradient of W' with levels held fixed (arXiv:2305.14152):

    d/d master = d/d W'      d/d scale = sum over the group of d/d W' * level

A master may begin anywhere in the cell of its level. Where the original weight is known it begins
at the point next to it: the model is the same one, but weights near the edge of a cell change
levels after few small steps, as they would if their levels had never been rounded.

W' is made once per step, not once per token: a model in training holds W' in plain linear layers,
and the masters beside them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lacewing.compress.columns import Solution
from lacewing.compress.grid import Grid, Scales, half
from lacewing.formats import PackedTensor, get_format

__all__ = ["LowRank", "Master", "Trainer", "solution_of"]

_BETAS = (0.9, 0.95)
_EPSILON = 1e-12
"""Below any gradient that matters: of a mean over thousands of tokens a weight gets 1e-7."""
_EDGE = 0.49
"""How far from its level, in steps, a master may begin: 0.5 would leave the choice to rounding."""


def solution_of(packed: PackedTensor) -> Solution:
    """The levels and scales of a packed weight, without loss. Raises FormatError (damaged)."""
    grid = Grid(get_format(packed.format))
    codes = grid.format.unpack(packed)
    if codes.scales is None:
        levels = torch.from_numpy(codes.q).view(torch.bfloat16).float()
        return Solution(grid, levels, [Scales()])
    levels = torch.from_numpy(codes.q).float() * grid.step + grid.low
    columns = torch.from_numpy(codes.scales).float().unbind(1)
    if codes.mins is None:
        return Solution(grid, levels, [Scales(s) for s in columns])
    bases = torch.from_numpy(codes.mins).float().unbind(1)
    return Solution(grid, levels, [Scales(s, b) for s, b in zip(columns, bases, strict=True)])


class Master:
    """A weight `[n, k]` in training; `parameters` are what an optimizer moves.

    mask: bool `[n, k]`, True for the weights that may differ from zero; None: those that are not
    zero in a sparse format, all in a dense one. near: the original weights `[n, k]`, or None.
    learn_scales: whether scales (and bases) are parameters too, as factors that begin at 1 (and
    offsets in units of the scale that begin at 0).
    """

    def __init__(
        self,
        solution: Solution,
        mask: Tensor | None = None,
        near: Tensor | None = None,
        learn_scales: bool = False,
    ) -> None:
        self.grid = solution.grid
        n, self.k = solution.levels.shape
        self._size = self.grid.group_size(self.k)
        if mask is None and self.grid.format.sparse:
            mask = solution.levels != 0
        self.mask = None if mask is None else self._grouped(mask)
        self._start = _stacked(solution.scales)
        start = self._grouped(solution.levels)
        start = self.grid.values(start, self._start) if self.grid.scaled else start
        if near is not None:
            start = self._towards(start, self._grouped(near.float()))
        self.weight = self._masked(start)
        self.gain = self.offset = None
        if learn_scales and self._start.scale is not None:
            self.gain = torch.ones_like(self._start.scale)
            if self._start.base is not None:
                self.offset = torch.zeros_like(self._start.base)
        self._shape = (n, -(-self.k // self._size))

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained, f32; always in this order."""
        scales = [p for p in (self.gain, self.offset) if p is not None]
        return [*self._weights(), *scales]

    def _weights(self) -> list[Tensor]:
        return [self.weight]

    def master(self) -> Tensor:
        """f32 `[n * groups, g]`: the weights before rounding; zero where the mask says so."""
        return self.weight

    def rates(self) -> list[float]:
        """How large a step of 1 is, parameter by parameter: the root mean square of the weight, so
        that steps are equally large for every layer (arXiv:1804.04235); 1 for scales."""
        rms = self.weight.square().mean().sqrt().item()
        return [rms] + [1.0] * (len(self.parameters) - 1)

    # -- forward and backward ---------------------------------------------------------------------

    def write(self, out: Tensor) -> None:
        """Fills `out` `[n, k]`, f32 or bf16, with W'."""
        values = self.grid.values(self._levels(), self._scales())
        out.copy_(self._rows(values))

    def take(self, gradient: Tensor) -> None:
        """Adds the gradients of a loss, given its gradient `[n, k]` by W', to the parameters."""
        grouped = self._grouped(gradient.float())
        if self.gain is not None:
            self._take_scales(grouped)
        self._take_weight(self._masked(grouped))

    def _take_weight(self, gradient: Tensor) -> None:
        _add(self.weight, gradient)

    def _take_scales(self, gradient: Tensor) -> None:
        assert self.gain is not None
        scale = _known(self._start.scale)
        _add(self.gain, (gradient * self._levels()).sum(1) * scale)
        if self.offset is not None:
            _add(self.offset, gradient.sum(1) * scale)

    def solution(self) -> Solution:
        """Levels and scales as they are now."""
        levels = self._rows(self._levels()).clone()
        return Solution(self.grid, levels, _unstacked(self._scales(), self._shape))

    # -- parts ------------------------------------------------------------------------------------

    def _levels(self) -> Tensor:
        return self.grid.levels(self.master(), self._start)

    def _scales(self) -> Scales:
        """As the format holds them, in f16."""
        if self.gain is None:
            return self._start
        scale, base = _known(self._start.scale), self._start.base
        if self.offset is not None:
            base = half(_known(base) + self.offset * scale)
        return Scales(half(scale * self.gain), base)

    def _towards(self, values: Tensor, near: Tensor) -> Tensor:
        """The point next to `near` in the cell of each of `values`; of no use in bf16, whose cells
        are too small to matter."""
        if self._start.scale is None:
            return values
        reach = (self._start.scale.abs() * (_EDGE * self.grid.step))[:, None]
        return values + (near - values).clamp(-reach, reach)

    def _masked(self, grouped: Tensor) -> Tensor:
        return grouped if self.mask is None else grouped * self.mask

    def _grouped(self, rows: Tensor) -> Tensor:
        """`[n, k]` as `[n * groups, g]`, zeros past the last input of a row."""
        short = -self.k % self._size
        return (F.pad(rows, (0, short)) if short else rows).reshape(-1, self._size)

    def _rows(self, grouped: Tensor) -> Tensor:
        """The inverse of `_grouped`."""
        return grouped.view(self._shape[0], -1)[:, : self.k]


class LowRank(Master):
    """A master `W + B A` that may be merged at any time (LoRA, arXiv:2106.09685): W stays, B
    `[n, r]` and A `[r, k]` are trained, and `W' = round(mask * (W + B A))` is on the grid and under
    the mask at every step. Gradients and an optimizer's states are those of B and A alone.

    B begins at zero and A at random, with a variance of 1 / r: a step of B is one of W.
    """

    def __init__(
        self,
        solution: Solution,
        rank: int,
        seed: int,
        mask: Tensor | None = None,
        near: Tensor | None = None,
        learn_scales: bool = False,
    ) -> None:
        super().__init__(solution, mask, near, learn_scales)
        n, k = solution.levels.shape
        generator = torch.Generator().manual_seed(seed)
        self.a = torch.randn(rank, k, generator=generator) / rank**0.5
        self.b = torch.zeros(n, rank)

    def _weights(self) -> list[Tensor]:
        return [self.b, self.a]

    def master(self) -> Tensor:
        return self._masked(self.weight + self._grouped(self.b @ self.a))

    def rates(self) -> list[float]:
        rms, *scales = super().rates()
        return [rms, self.a.shape[0] ** -0.5, *scales[1:]]

    def _take_weight(self, gradient: Tensor) -> None:
        rows = self._rows(gradient)
        _add(self.b, rows @ self.a.T)
        _add(self.a, self.b.T @ rows)


class Trainer:
    """Adam (arXiv:1412.6980) over masters and plain tensors, with clipped gradients.

    masters: by the names of their layers. plain: tensors that are trained as they are (norms). rate
    is in shares of the root mean square of each tensor.
    """

    def __init__(self, masters: Mapping[str, Master], plain: Iterable[Tensor] = ()) -> None:
        self.masters = dict(masters)
        self.plain = list(plain)
        groups = []
        for master in self.masters.values():
            pairs = zip(master.parameters, master.rates(), strict=True)
            groups += [{"params": [p], "size": size} for p, size in pairs]
        groups += [{"params": [p], "size": p.square().mean().sqrt().item()} for p in self.plain]
        self.optimizer = torch.optim.Adam(groups, lr=0.0, betas=_BETAS, eps=_EPSILON, fused=True)

    @property
    def parameters(self) -> list[Tensor]:
        """Everything that is trained, in the order of the optimizer's states."""
        return [group["params"][0] for group in self.optimizer.param_groups]

    def moments(self) -> list[Tensor]:
        """Both of Adam's running means of every parameter, which with the parameters and `count`
        are all that a later step depends on."""
        states = [self._states(p) for p in self.parameters]
        return [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")]

    def count(self, steps: int) -> None:
        """Says how many steps the means have seen."""
        for p in self.parameters:
            self._states(p)["step"].fill_(steps)

    def _states(self, p: Tensor) -> dict[str, Tensor]:
        states: dict[str, Tensor] = self.optimizer.state[p]
        if not states:
            states["step"] = torch.zeros(())
            states["exp_avg"], states["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        return states

    def step(self, rate: float, clip: float = 1.0) -> float:
        """One step along the gradients gathered, which it clears; returns their norm. Where that is
        not finite nothing is changed."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = float(torch.stack([g.norm() for g in gradients]).norm())
        if math.isfinite(norm):
            for gradient in gradients if norm > clip else ():
                gradient *= clip / norm
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["size"]
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


def _stacked(scales: list[Scales]) -> Scales:
    """Scales of every group as one, `[n * groups]`, rows first."""
    if scales[0].scale is None:
        return Scales()
    scale = torch.stack([_known(s.scale) for s in scales], 1).flatten()
    if scales[0].base is None:
        return Scales(scale)
    return Scales(scale, torch.stack([_known(s.base) for s in scales], 1).flatten())


def _unstacked(scales: Scales, shape: tuple[int, int]) -> list[Scales]:
    if scales.scale is None:
        return [Scales()]
    columns = scales.scale.view(shape).unbind(1)
    if scales.base is None:
        return [Scales(s) for s in columns]
    return [Scales(s, b) for s, b in zip(columns, scales.base.view(shape).unbind(1), strict=True)]


def _add(parameter: Tensor, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient.clone()
    else:
        parameter.grad += gradient


def _known(values: Tensor | None) -> Tensor:
    assert values is not None
    return values

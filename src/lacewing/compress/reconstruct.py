"""Reconstruction: gradient descent on the output of one block, after its layers were compressed.

What a solver minimises layer by layer is minimised here for the seven layers of a block together,
with masks and grids kept (`master.py`), as in BRECQ (arXiv:2102.05426):

    loss = mean over tokens of |block(x) - y|^2 / |y|^2

x is what the block reads in the compressed model, y what it returns in the dense one. The error of
a token counts relative to its length because the next layer's norm divides by it; without that, a
handful of tokens a hundred times as long as the others would be all that is learned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lacewing.compress.columns import Solution
from lacewing.compress.decoder import Block
from lacewing.compress.master import Master, Trainer
from lacewing.errors import RecipeError

__all__ = ["Reconstruction", "reconstruct"]

_HELD_OUT = 8
"""One of so many windows is not trained on, and judges."""
_BATCH = 2
"""Windows of one step."""
_LOOKS = 8
"""How often the held-out windows are looked at."""


@dataclass(frozen=True)
class Reconstruction:
    """What became of a block. before and after: the loss on the held-out windows; equal, with the
    solutions as they were, where descent did not help."""

    solutions: dict[str, Solution]
    before: float
    after: float


def reconstruct(
    block: Block,
    solutions: Mapping[str, Solution],
    inputs: Tensor,
    targets: Tensor,
    *,
    steps: int,
    rate: float,
    seed: int,
    masks: Mapping[str, Tensor | None],
    near: Mapping[str, Tensor],
) -> Reconstruction:
    """Solutions of the layers of `block`, with the same masks and grids, of a smaller error; never
    of a larger one, judged on held-out windows. Leaves them in the weights of the block.

    solutions: by name, such as `mlp.down_proj`; layers without one stay as they are. inputs,
    targets: f32 `[windows, tokens, hidden_size]`, x and y above. rate: of Adam, in shares of the
    root mean square of each weight, falling to zero along a cosine. masks, near: see
    `Master`; without the original weights a grid of 4 bits is hardly moved.

    Bit-reproducible for one number of threads. Raises RecipeError for fewer than two windows, for x
    or y that are not finite, and if descent diverges.
    """
    if len(inputs) < 2:
        raise RecipeError(
            f"block {block.index}: reconstruction needs at least 2 windows, got {len(inputs)}",
            hint="calibrate on more text, or in shorter windows",
        )
    for what, values in (("inputs", inputs), ("targets", targets)):
        if not values.isfinite().all():
            raise RecipeError(
                f"block {block.index}: reconstruction needs finite {what}, got NaN or infinity",
                hint="is the model damaged?",
            )
    masters = {
        name: Master(solution, masks.get(name), near.get(name), learn_scales=True)
        for name, solution in solutions.items()
    }
    run = _Descent(block, masters, inputs, targets)
    run.descend(steps, rate, seed)
    return run.finish(solutions)


class _Descent:
    def __init__(
        self, block: Block, masters: dict[str, Master], inputs: Tensor, targets: Tensor
    ) -> None:
        self.block, self.masters = block, masters
        self.inputs, self.targets = inputs, targets
        self.trained = len(inputs) - max(1, len(inputs) // _HELD_OUT)
        block.requires_grad_(False)
        self.trainer = Trainer(masters)
        self._write()
        self.before = self.after = self._judge()
        self.best: dict[str, Solution] = {}

    def descend(self, steps: int, rate: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        looks = {-(-steps * i // _LOOKS) for i in range(1, _LOOKS + 1)}
        for step in range(steps):
            picked = torch.randperm(self.trained, generator=generator)[:_BATCH]
            self._accumulate(picked)
            warm = min(1.0, (step + 1) / max(1, steps // 10))
            fall = 0.5 * (1 + math.cos(math.pi * step / steps))
            norm = self.trainer.step(rate * warm * fall)
            if not math.isfinite(norm):
                raise _diverged(self.block.index, step, rate)
            self._write()
            if step + 1 in looks:
                self._look()

    def finish(self, solutions: Mapping[str, Solution]) -> Reconstruction:
        found = self.best or dict(solutions)
        for name, solution in found.items():
            self.block.linear(name).weight.data = solution.values()
        return Reconstruction(found, self.before, self.after)

    def _accumulate(self, picked: Tensor) -> None:
        """Gradients of the loss of the windows `picked`."""
        weights = {name: self.block.linear(name).weight for name in self.masters}
        for weight in weights.values():
            weight.requires_grad_(True)
        self._loss(self.inputs[picked], self.targets[picked]).backward()
        for name, weight in weights.items():
            assert weight.grad is not None
            self.masters[name].take(weight.grad)
            weight.grad = None
            weight.requires_grad_(False)

    def _write(self) -> None:
        for name, master in self.masters.items():
            master.write(self.block.linear(name).weight.data)

    def _look(self) -> None:
        loss = self._judge()
        if loss < self.after:
            self.after = loss
            self.best = {name: master.solution() for name, master in self.masters.items()}

    def _judge(self) -> float:
        """The loss on the held-out windows, one by one."""
        held = range(self.trained, len(self.inputs))
        with torch.no_grad():
            losses = [self._loss(self.inputs[i : i + 1], self.targets[i : i + 1]) for i in held]
        return float(torch.stack(losses).mean())

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        lost = (self.block(x) - y).square().sum(-1)
        length: Tensor = y.square().sum(-1)
        return (lost / (length + 1e-6 * length.mean())).mean()


def _diverged(index: int, step: int, rate: float) -> RecipeError:
    return RecipeError(
        f"block {index}: reconstruction needs a finite gradient, got none in step {step} at rate"
        f" {rate:g}",
        hint="lower the rate of `reconstruct`",
    )

"""What calibration knows of a stage's inputs: sums over tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lacewing.compress.decoder import STAGES
from lacewing.compress.path import Path, tokens_at_once
from lacewing.compress.problem import check_hessian
from lacewing.errors import RecipeError

__all__ = ["Moments"]

_WRITE_STREAM = (1, 3)
"""Stages whose layer writes to the residual stream: o and down. Where a norm lies between (Gemma),
their outputs are not in its units, and what it has lost says nothing."""


@dataclass(eq=False)
class Moments:
    """Sums over tokens of one stage's inputs x', and of what they have lost: see `target.py`."""

    hessian: Tensor
    lost: Tensor | None
    stream: Tensor | None
    tokens: int

    @staticmethod
    def measure(stage: int, path: Path, dense: Path | None) -> Moments:
        """Means of x' x'^T, (x - x') x'^T and, where the stage writes to the stream,
        (r - r') x'^T.

        Raises RecipeError, naming the first layer, for activations that are not finite.
        """
        k = path.block.linear(STAGES[stage][0]).in_features
        hidden = path.x.shape[2]
        found = Moments(torch.zeros(k, k), None, None, 0)
        if dense is not None:
            found.lost = torch.zeros(k, k)
            if stage in _WRITE_STREAM and not path.block.spec.sandwich_norm:
                found.stream = torch.zeros(hidden, k)
        for part in tokens_at_once(*path.x.shape[:2]):
            found._add(stage, part, path, dense)
        found.hessian /= found.tokens
        for each in (found.lost, found.stream):
            if each is not None:
                each /= found.tokens
        found._check(f"model.layers.{path.block.index}.{STAGES[stage][0]}")
        return found

    def _check(self, name: str) -> None:
        check_hessian(name, self.hessian)
        for each in (self.lost, self.stream):
            if each is not None and not each.isfinite().all():
                raise RecipeError(
                    f"`{name}`: needs finite activations, got NaN or infinity in the dense model",
                    hint="the model overflows on the calibration text: is it damaged?",
                )

    def _add(self, stage: int, part: slice, path: Path, dense: Path | None) -> None:
        x, stream = path.inputs(stage, part)
        x = x.flatten(0, 1)
        self.hessian.addmm_(x.t(), x)
        self.tokens += len(x)
        if dense is None or self.lost is None:
            return
        goal, goal_stream = dense.inputs(stage, part)
        self.lost.addmm_((goal.flatten(0, 1) - x).t(), x)
        if self.stream is not None:
            self.stream.addmm_((goal_stream - stream).flatten(0, 1).t(), x)

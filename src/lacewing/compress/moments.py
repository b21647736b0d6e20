"""What calibration knows of a stage's inputs: sums over tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lacewing.compress.decoder import STAGES
from lacewing.compress.path import Path, tokens_at_once

__all__ = ["Moments"]

_WRITE_STREAM = (1, 3)
"""Stages whose layer writes to the residual stream: o and down."""


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
        (r - r') x'^T."""
        k = path.block.linear(STAGES[stage][0]).in_features
        hidden = path.x.shape[2]
        found = Moments(torch.zeros(k, k), None, None, 0)
        if dense is not None:
            found.lost = torch.zeros(k, k)
            found.stream = torch.zeros(hidden, k) if stage in _WRITE_STREAM else None
        for part in tokens_at_once(*path.x.shape[:2]):
            found._add(stage, part, path, dense)
        found.hessian /= found.tokens
        for each in (found.lost, found.stream):
            if each is not None:
                each /= found.tokens
        return found

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

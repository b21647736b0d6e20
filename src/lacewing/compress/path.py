"""The two paths that calibration sends side by side through a model, one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lacewing.compress.decoder import Block

__all__ = ["Path", "fast_products", "tokens_at_once"]

_AT_ONCE = 4096
"""Tokens that go through a stage together."""


def fast_products() -> AbstractContextManager[object]:
    """bf16 products where the CPU has them: twice as fast, and 2^-9 is far below what rounding
    weights to 8 bits and less does."""
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.autocast("cpu", dtype=torch.bfloat16)
    return nullcontext()


def tokens_at_once(windows: int, tokens: int) -> Iterator[slice]:
    """Runs of windows of some thousand tokens."""
    step = max(1, _AT_ONCE // tokens)
    for begin in range(0, windows, step):
        yield slice(begin, min(begin + step, windows))


class Path:
    """One block on one of the two paths: x is what it reads, y (all windows too) what it writes,
    which after the attention stages holds the stream between attention and MLP."""

    def __init__(self, block: Block, x: Tensor, y: Tensor) -> None:
        self.block, self.x, self.y = block, x, y

    def inputs(self, stage: int, part: slice) -> tuple[Tensor, Tensor]:
        """Of some windows: what the layers of the stage read, and the stream they add to; f32."""
        block = self.block
        with fast_products():
            if stage < 2:
                x = self.x[part]
                h = block.attention_input(x)
                return (h if stage == 0 else block.attend(h)).float(), x
            x = self.y[part]
            h = block.mlp_input(x)
            return (h if stage == 2 else block.gate(h)).float(), x

    def pass_attention(self) -> None:
        """Fills y with the stream after attention."""
        self._pass(1, self.block.add_attention)

    def pass_mlp(self) -> None:
        """Fills y with the stream after the block."""
        self._pass(3, self.block.add_mlp)

    def _pass(self, stage: int, add: Callable[[Tensor, Tensor], Tensor]) -> None:
        for part in tokens_at_once(*self.x.shape[:2]):
            h, x = self.inputs(stage, part)
            with fast_products():
                self.y[part] = add(x, h)

"""The two paths that calibration sends side by side through a model, one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lacewing.compress.decoder import Block

__all__ = ["Path", "fast_products", "has_fast_products", "tokens_at_once"]

_AT_ONCE = 4096
"""Tokens that go through a stage together."""


def has_fast_products() -> bool:
    """Whether the CPU multiplies bf16. The names are private to PyTorch, and have changed."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def fast_products() -> AbstractContextManager[object]:
    """bf16 products where the CPU has them, which are twice as fast. They are off by 2^-9 in each
    factor, as a weight in 8 bits is: for what is rounded to fewer bits that is little."""
    if has_fast_products():
        return torch.autocast("cpu", dtype=torch.bfloat16)
    return nullcontext()


def tokens_at_once(windows: int, tokens: int) -> Iterator[slice]:
    """Runs of windows of some thousand tokens."""
    step = max(1, _AT_ONCE // tokens)
    for begin in range(0, windows, step):
        yield slice(begin, min(begin + step, windows))


class Path:
    """One block on one of the two paths: x is what it reads, y (all windows too) what it writes,
    which after the attention stages holds the stream between attention and MLP. fast: with
    `fast_products`."""

    def __init__(self, block: Block, x: Tensor, y: Tensor, fast: bool = True) -> None:
        self.block, self.x, self.y = block, x, y
        self.fast = fast

    def inputs(self, stage: int, part: slice) -> tuple[Tensor, Tensor]:
        """Of some windows: what the layers of the stage read, and the stream they add to; f32."""
        block = self.block
        with self._products():
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

    def _products(self) -> AbstractContextManager[object]:
        return fast_products() if self.fast else nullcontext()

    def _pass(self, stage: int, add: Callable[[Tensor, Tensor], Tensor]) -> None:
        for part in tokens_at_once(*self.x.shape[:2]):
            h, x = self.inputs(stage, part)
            with self._products():
                self.y[part] = add(x, h)

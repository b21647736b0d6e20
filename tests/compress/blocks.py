"""Tiny decoders as torch blocks, and inputs of a stage to measure on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lacewing.compress.decoder import STAGES, Block, rms_norm
from lacewing.compress.rounding import Inputs
from tests.tiny import tiny_spec, tiny_tokens, tiny_weights


class Tiny:
    """A whole tiny model in float64: logits of 24 tokens."""

    def __init__(self, name: str) -> None:
        self.spec = tiny_spec(name)
        weights = {k: torch.from_numpy(v).double() for k, v in tiny_weights(name).items()}
        self.embedding = weights["model.embed_tokens.weight"]
        self.norm = weights["model.norm.weight"]
        self.head = self.embedding if self.spec.tie_embeddings else weights["lm_head.weight"]
        self.blocks = []
        for i in range(self.spec.n_layers):
            start = f"model.layers.{i}."
            part = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
            self.blocks.append(Block(self.spec, i, part).requires_grad_(False))

    def logits(self) -> Tensor:
        x = F.embedding(torch.tensor([tiny_tokens(24)]), self.embedding)
        x = x * self.spec.embedding_scale
        for block in self.blocks:
            x = block(x)
        return F.linear(rms_norm(x, self.norm, self.spec.norm_eps), self.head)


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest value of a."""
    return float((a - b).abs().max() / a.abs().max())


def tiny_block(name: str) -> Block:
    """The first block of a tiny model in f32."""
    start = "model.layers.0."
    weights = {
        k.removeprefix(start): torch.from_numpy(v)
        for k, v in tiny_weights(name).items()
        if k.startswith(start)
    }
    return Block(tiny_spec(name), 0, weights)


def inputs_of(x: Tensor, rows: int = 128) -> Inputs:
    """Statistics of tokens `[m, k]`."""
    return Inputs(x.T @ x / len(x), x.abs().amax(0), x[:rows].contiguous())


def outliers(tokens: int, k: int, every: int, size: float, seed: int = 0) -> Tensor:
    """Normal inputs `[tokens, k]`, `size` times larger in one channel of `every`."""
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(seed))
    x[:, ::every] *= size
    return x


def input_width(block: Block, stage: int) -> int:
    return block.linear(STAGES[stage][0]).in_features

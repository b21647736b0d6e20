"""Qwen 2 and 2.5: Llama with a bias on q, k and v, and optional windows on the upper layers."""

from __future__ import annotations

from lacewing.models.config import Config, build_spec, head_dim, window_layers
from lacewing.models.rope import read_rope
from lacewing.models.spec import DecoderSpec

__all__ = ["spec"]


def spec(config: Config) -> DecoderSpec:
    """The bias is part of the architecture: its configs do not mention it."""
    return build_spec(
        config,
        layers=window_layers(config),
        ropes=(read_rope(config, head_dim(config)),),
        attention_bias=True,
        default_context=32768,
    )

"""Llama 1 to 3 and those of the same shape (SmolLM2, TinyLlama): the plain decoder."""

from __future__ import annotations

from lacewing.models.config import Config, build_spec, flag, head_dim, refuse, same_layers
from lacewing.models.rope import read_rope
from lacewing.models.spec import DecoderSpec

__all__ = ["spec"]


def spec(config: Config) -> DecoderSpec:
    """`attention_bias` puts a bias on q, k, v and o; rope may be scaled (linear, llama3, yarn)."""
    refuse(config, "mlp_bias")
    bias = flag(config, "attention_bias", False)
    return build_spec(
        config,
        layers=same_layers(config),
        ropes=(read_rope(config, head_dim(config)),),
        attention_bias=bias,
        output_bias=bias,
    )

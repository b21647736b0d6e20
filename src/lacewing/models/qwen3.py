"""Qwen 3: no bias, but an RMSNorm on every head of q and k before rope."""

from __future__ import annotations

from lacewing.models.config import Config, build_spec, flag, head_dim, window_layers
from lacewing.models.rope import read_rope
from lacewing.models.spec import DecoderSpec

__all__ = ["spec"]


def spec(config: Config) -> DecoderSpec:
    """Heads are 128 wide unless stated, whatever hidden_size / num_attention_heads is."""
    bias = flag(config, "attention_bias", False)
    return build_spec(
        config,
        layers=window_layers(config),
        ropes=(read_rope(config, head_dim(config, default=128)),),
        attention_bias=bias,
        output_bias=bias,
        qk_norm=True,
        default_context=32768,
    )

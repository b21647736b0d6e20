"""Gemma 3, text: five layers with a window to one that sees everything, each kind with its own
rope; norms on both sides of attention and MLP; GeGLU; the embedding is scaled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lacewing.errors import UnsupportedModelError
from lacewing.models.config import (
    FULL,
    SLIDING,
    Config,
    build_spec,
    flag,
    head_dim,
    integer,
    layer_types,
    n_layers,
    number,
    refuse,
)
from lacewing.models.rope import rope_from
from lacewing.models.spec import DecoderSpec, LayerSpec, RopeSpec

__all__ = ["spec"]

_KINDS = (SLIDING, FULL)  # the order of DecoderSpec.ropes


def spec(config: Config) -> DecoderSpec:
    """Layers from `layer_types`, or every `sliding_window_pattern`th (6th) is a full one."""
    if "text_config" in config:
        raise UnsupportedModelError(
            "config `text_config`: needs a text model, got Gemma 3 with vision",
            hint="use the text-only checkpoint (model_type gemma3_text)",
        )
    refuse(
        config,
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "use_bidirectional_attention",
    )
    bias = flag(config, "attention_bias", False)
    return build_spec(
        config,
        layers=_layers(config),
        ropes=_ropes(config, head_dim(config, default=256)),
        attention_bias=bias,
        output_bias=bias,
        qk_norm=True,
        sandwich_norm=True,
        embedding_scale=integer(config, "hidden_size") ** 0.5,
        attention_scale=number(config, "query_pre_attn_scalar", 256) ** -0.5,
        activation_key="hidden_activation",
        default_activation="gelu_pytorch_tanh",
        default_tie=True,
        default_context=131072,
    )


def _layers(config: Config) -> tuple[LayerSpec, ...]:
    pattern = integer(config, "sliding_window_pattern", 6)
    default = [FULL if (i + 1) % pattern == 0 else SLIDING for i in range(n_layers(config))]
    windows = {SLIDING: integer(config, "sliding_window", 4096), FULL: 0}
    return tuple(
        LayerSpec(rope=_KINDS.index(kind), window=windows[kind])
        for kind in layer_types(config, default)
    )


def _ropes(config: Config, dim: int) -> tuple[RopeSpec, ...]:
    """Scaling (`rope_scaling` in the older spelling) is for the layers that see everything."""
    thetas = {
        SLIDING: number(config, "rope_local_base_freq", 10000.0),
        FULL: number(config, "rope_theta", 1e6),
    }
    found: Any = config.get("rope_parameters")
    if not isinstance(found, Mapping) or not any(kind in found for kind in _KINDS):
        found = {FULL: found or config.get("rope_scaling")}
    return tuple(rope_from(config, found.get(kind) or {}, dim, thetas[kind]) for kind in _KINDS)

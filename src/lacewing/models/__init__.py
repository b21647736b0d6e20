"""What an architecture is: a Hugging Face style config in, a `DecoderSpec` out. numpy only.

One file per `model_type`, one line of registration here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lacewing.errors import UnsupportedModelError
from lacewing.models import gemma3, llama, qwen2, qwen3
from lacewing.models.config import shown
from lacewing.models.spec import AttentionShape, DecoderSpec, LayerSpec, RopeSpec

__all__ = ["MODELS", "AttentionShape", "DecoderSpec", "LayerSpec", "RopeSpec", "get_spec"]

MODELS: dict[str, Callable[[Mapping[str, Any]], DecoderSpec]] = {
    "llama": llama.spec,
    "qwen2": qwen2.spec,
    "qwen3": qwen3.spec,
    "gemma3": gemma3.spec,
    "gemma3_text": gemma3.spec,
}


def get_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The decoder that `config` (the content of a config.json) describes.

    Raises `UnsupportedModelError` for an architecture, rope type or feature that is not
    implemented, `CheckpointError` for a config that misses a field or contradicts itself.
    """
    model_type = config.get("model_type")
    build = MODELS.get(model_type) if isinstance(model_type, str) else None
    if build is None:
        raise UnsupportedModelError(
            f"config `model_type`: needs one of {', '.join(MODELS)}, got {shown(model_type)}",
            hint="docs/guides/add-an-architecture.md tells how to add one",
        )
    return build(config)

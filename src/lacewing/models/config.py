"""Reading a Hugging Face style config: every value is checked before anything is sized by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lacewing.errors import CheckpointError, UnsupportedModelError
from lacewing.models.spec import DecoderSpec, LayerSpec, RopeSpec

__all__ = [
    "FULL",
    "SLIDING",
    "Config",
    "build_spec",
    "flag",
    "head_dim",
    "integer",
    "layer_types",
    "n_layers",
    "number",
    "refuse",
    "same_layers",
    "shown",
    "window_layers",
]

Config = Mapping[str, Any]


def shown(value: object) -> str:
    """A value of a config for a message: it may be anything, of any length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


_MOST = 1 << 24  # of anything counted in a config: larger is a damaged file, not a model


def integer(config: Config, key: str, default: int | None = None, least: int = 1) -> int:
    """A count from the config, `least` to 2^24. `default` None: the key is required."""
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST:
        raise CheckpointError(
            f"config `{key}`: needs an integer from {least} to {_MOST}, got {shown(value)}"
        )
    return value


def number(config: Config, key: str, default: float | None = None) -> float:
    """A positive finite number from the config. `default` None: the key is required."""
    value = config.get(key)
    if value is None:
        value = default
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits or not 0 < value < float("inf"):  # type: ignore[operator]
        raise CheckpointError(f"config `{key}`: needs a positive number, got {shown(value)}")
    return float(value)  # type: ignore[arg-type]


def flag(config: Config, key: str, default: bool) -> bool:
    """A boolean from the config."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"config `{key}`: needs true or false, got {shown(value)}")
    return value


def refuse(config: Config, *keys: str) -> None:
    """Raise `UnsupportedModelError` where a feature that is not implemented is switched on."""
    for key in keys:
        if config.get(key):
            raise UnsupportedModelError(
                f"config `{key}`: needs to be off, got {shown(config[key])}: not implemented"
            )


_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def build_spec(
    config: Config,
    *,
    layers: tuple[LayerSpec, ...],
    ropes: tuple[RopeSpec, ...],
    attention_bias: bool = False,
    output_bias: bool = False,
    qk_norm: bool = False,
    sandwich_norm: bool = False,
    embedding_scale: float = 1.0,
    attention_scale: float | None = None,
    activation_key: str = "hidden_act",
    default_activation: str = "silu",
    default_tie: bool = False,
    default_context: int = 2048,
) -> DecoderSpec:
    """The fields every architecture reads in the same way, around those it decides itself."""
    activation = config.get(activation_key, default_activation)
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"config `{activation_key}`: needs one of {', '.join(_ACTIVATIONS)}, "
            f"got {shown(activation)}"
        )
    dim = 2 * len(ropes[0].inv_freq)
    return DecoderSpec(
        model_type=str(config["model_type"]),
        vocab_size=integer(config, "vocab_size"),
        hidden_size=integer(config, "hidden_size"),
        n_layers=len(layers),
        n_heads=integer(config, "num_attention_heads"),
        n_kv_heads=kv_heads(config),
        head_dim=dim,
        intermediate_size=integer(config, "intermediate_size"),
        norm_eps=number(config, "rms_norm_eps", 1e-6),
        activation=_ACTIVATIONS[activation],
        attention_scale=dim**-0.5 if attention_scale is None else attention_scale,
        embedding_scale=embedding_scale,
        attention_bias=attention_bias,
        output_bias=output_bias,
        qk_norm=qk_norm,
        sandwich_norm=sandwich_norm,
        tie_embeddings=flag(config, "tie_word_embeddings", default_tie),
        max_context=integer(config, "max_position_embeddings", default_context),
        layers=layers,
        ropes=ropes,
    )


def kv_heads(config: Config) -> int:
    """Key/value heads; every one serves the same number of query heads."""
    n_heads = integer(config, "num_attention_heads")
    n_kv_heads = integer(config, "num_key_value_heads", n_heads)
    if n_heads % n_kv_heads:
        raise CheckpointError(
            f"config `num_key_value_heads`: needs a divisor of num_attention_heads {n_heads}, "
            f"got {n_kv_heads}"
        )
    return n_kv_heads


def head_dim(config: Config, default: int | None = None) -> int:
    """Width of a head; even, because rope turns pairs."""
    hidden, n_heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
    stated = config.get("head_dim") is not None or default is not None
    if not stated and hidden % n_heads:
        raise CheckpointError(
            f"config `hidden_size`: needs a multiple of num_attention_heads {n_heads} where "
            f"head_dim is not stated, got {hidden}"
        )
    dim = integer(config, "head_dim", hidden // n_heads if default is None else default)
    if dim % 2:
        raise CheckpointError(f"config `head_dim`: needs an even number, got {dim}")
    return dim


def n_layers(config: Config) -> int:
    """Number of blocks, at most 4096 so that a lying config costs nothing."""
    count = integer(config, "num_hidden_layers")
    if count > 4096:
        raise CheckpointError(f"config `num_hidden_layers`: needs at most 4096, got {count}")
    return count


SLIDING, FULL = "sliding_attention", "full_attention"


def layer_types(config: Config, default: list[str]) -> list[str]:
    """`layer_types` of the config, checked, or `default` where it has none."""
    types = config.get("layer_types")
    if types is None:
        return default
    if not isinstance(types, (list, tuple)) or len(types) != n_layers(config):
        raise CheckpointError(
            f"config `layer_types`: needs a list of {n_layers(config)} names, one per layer, "
            f"got {shown(types)}"
        )
    for kind in types:
        if kind not in (SLIDING, FULL):
            raise UnsupportedModelError(
                f"config `layer_types`: needs {SLIDING} or {FULL}, got {shown(kind)}"
            )
    return list(types)


def same_layers(config: Config) -> tuple[LayerSpec, ...]:
    """Layers that all see the whole context and share the one rotary embedding."""
    return (LayerSpec(rope=0, window=0),) * n_layers(config)


def window_layers(config: Config) -> tuple[LayerSpec, ...]:
    """Qwen's layers: windows only with `use_sliding_window`, and from `max_window_layers` on."""
    count = n_layers(config)
    sliding = flag(config, "use_sliding_window", False) and config.get("sliding_window") is not None
    if not sliding:
        return same_layers(config)
    first = integer(config, "max_window_layers", 28, least=0)
    types = layer_types(config, [SLIDING if i >= first else FULL for i in range(count)])
    window = integer(config, "sliding_window")
    return tuple(LayerSpec(rope=0, window=window if kind == SLIDING else 0) for kind in types)

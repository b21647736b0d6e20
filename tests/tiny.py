"""Random models of every architecture, small enough to check by hand: configs in Hugging Face's
words, and weights of the shapes that the spec expects."""

from __future__ import annotations

from typing import Any

import numpy as np

from lacewing.models import DecoderSpec, get_spec

Config = dict[str, Any]

VOCAB = 131  # no multiple of 16: the last strip of the head is padded

_COMMON: Config = {
    "vocab_size": VOCAB,
    "hidden_size": 96,  # one and a half groups of 64
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_LINEAR = {"rope_type": "linear", "factor": 2.0}

CONFIGS: dict[str, Config] = {
    "llama": _COMMON | {"model_type": "llama"},
    "llama-bias": _COMMON | {"model_type": "llama", "attention_bias": True},
    "llama-linear": _COMMON | {"model_type": "llama", "rope_scaling": _LINEAR},
    "llama-llama3": _COMMON
    | {"model_type": "llama", "rope_scaling": _LLAMA3, "tie_word_embeddings": True},
    "llama-yarn": _COMMON | {"model_type": "llama", "rope_scaling": _YARN},
    "qwen2": _COMMON | {"model_type": "qwen2", "rope_theta": 1e6},
    "qwen2-window": _COMMON
    | {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
    },
    "qwen3": _COMMON | {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "gemma3": _COMMON
    | {
        "model_type": "gemma3_text",
        "head_dim": 32,
        "num_key_value_heads": 1,
        "num_attention_heads": 4,
        "num_hidden_layers": 7,
        "sliding_window": 7,
        "query_pre_attn_scalar": 24,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": _LINEAR,
        "tie_word_embeddings": True,
    },
}


def tiny_spec(name: str) -> DecoderSpec:
    return get_spec(CONFIGS[name])


def tiny_weights(name: str, seed: int = 7) -> dict[str, np.ndarray]:
    """f32 weights that keep activations near 1, so that no part of the model fades away."""
    rng = np.random.Generator(np.random.PCG64(seed))
    weights = {}
    for tensor, shape in tiny_spec(name).tensor_shapes().items():
        values = rng.standard_normal(shape)
        if tensor.endswith("norm.weight"):
            values = 1 + 0.2 * values
        elif tensor.endswith("bias"):
            values = 0.3 * values
        elif tensor != "model.embed_tokens.weight":
            values = values / np.sqrt(shape[1])
        else:
            values = 0.3 * values
        weights[tensor] = values.astype(np.float32)
    return weights


def tiny_tokens(count: int, seed: int = 11) -> list[int]:
    rng = np.random.Generator(np.random.PCG64(seed))
    return [int(token) for token in rng.integers(0, VOCAB, count)]

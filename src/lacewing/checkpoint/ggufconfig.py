"""GGUF metadata in the words of a Hugging Face config.json."""

from __future__ import annotations

from typing import Any

import numpy as np

from lacewing.checkpoint.files import fail, shown
from lacewing.checkpoint.gguf import GgufFile
from lacewing.checkpoint.tensors import F32
from lacewing.errors import UnsupportedModelError

__all__ = ["ARCHITECTURES", "gguf_config"]

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
"""GGUF architecture -> model_type."""


class _Reader:
    """Metadata of one architecture, each value checked for its type."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file = file
        self.architecture = architecture

    def get(self, key: str) -> Any:
        return self.file.metadata.get(f"{self.architecture}.{key}")

    def fail(self, key: str, requirement: str, actual: object) -> Any:
        fail(f"{self.file.path}: metadata `{self.architecture}.{key}`", requirement, shown(actual))

    def integer(self, key: str, default: int | None = None) -> int:
        """A count; the same for every layer, where the file has one per layer."""
        value = self.get(key)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size:
            if (value != value[0]).any():
                raise UnsupportedModelError(
                    f"{self.file.path}: metadata `{self.architecture}.{key}`:"
                    " needs one value for all layers, got different ones"
                )
            value = int(value[0])
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
            self.fail(key, "an integer from 0 to 2^31", value)
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """A number; f32 in the file, so the shortest decimal that stands for it."""
        value = self.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.fail(key, "a number", value)
        with np.errstate(over="ignore"):
            short = float(str(np.float32(value)))
        if not np.isfinite(short):
            self.fail(key, "a finite number", value)
        return short


def gguf_config(architecture: str, file: GgufFile, factors: F32 | None) -> dict[str, Any]:
    """The config.json that metadata stands for. `factors`: the content of `rope_freqs`."""
    read = _Reader(file, architecture)
    if read.get("expert_count"):
        raise UnsupportedModelError(
            f"{file.path}: needs a model without experts, got {read.integer('expert_count')}"
        )
    hidden, heads = read.integer("embedding_length"), read.integer("attention.head_count")
    config: dict[str, Any] = {
        "model_type": ARCHITECTURES[architecture],
        "vocab_size": _vocab_size(file),
        "hidden_size": hidden,
        "num_hidden_layers": read.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": read.integer("attention.head_count_kv", heads),
        "head_dim": _head_dim(read, hidden, heads),
        "intermediate_size": read.integer("feed_forward_length"),
        "max_position_embeddings": read.integer("context_length"),
        "rms_norm_eps": read.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": read.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    rotary = read.integer("rope.dimension_count", config["head_dim"])
    if rotary != config["head_dim"]:
        config["partial_rotary_factor"] = rotary / max(config["head_dim"], 1)
    scaling = _rope_scaling(read, factors)
    if scaling is not None:
        config["rope_scaling"] = scaling
    if architecture in ("llama", "qwen3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if architecture == "gemma3":
        config |= _gemma3(read, config)
    else:
        config["hidden_act"] = "silu"
    return config


def _vocab_size(file: GgufFile) -> int:
    """Rows of the embedding."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        found = "none" if embedding is None else list(embedding.shape)
        fail(f"{file.path}: tensor `token_embd.weight`", "an embedding [vocabulary, hidden]", found)
    return embedding.shape[0]


def _head_dim(read: _Reader, hidden: int, heads: int) -> int:
    if heads < 1:
        read.fail("attention.head_count", "at least 1", heads)
    dim = read.integer("attention.key_length", hidden // heads)
    value = read.integer("attention.value_length", dim)
    if value != dim:
        raise UnsupportedModelError(
            f"{read.file.path}: needs keys and values of one width, got {dim} and {value}"
        )
    return dim


def _rope_scaling(read: _Reader, factors: F32 | None) -> dict[str, Any] | None:
    kind = read.get("rope.scaling.type")
    if kind is not None and not isinstance(kind, str):
        read.fail("rope.scaling.type", "a name", kind)
    if factors is not None:
        if kind not in (None, "none"):
            raise UnsupportedModelError(
                f"{read.file.path}: needs `rope_freqs` or rope scaling, got both ({shown(kind)})"
            )
        return {"rope_type": "factors", "factors": factors.tolist()}
    if kind in (None, "none"):
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": read.number("rope.scaling.factor", 1.0)}
    if read.get("rope.scaling.original_context_length") is not None:
        context = read.integer("rope.scaling.original_context_length")
        scaling["original_max_position_embeddings"] = context
    if read.get("rope.scaling.attn_factor") is not None:
        scaling["attention_factor"] = read.number("rope.scaling.attn_factor")
    return scaling


def _gemma3(read: _Reader, config: dict[str, Any]) -> dict[str, Any]:
    """What the metadata leaves to the reader: five windowed layers to one that sees everything,
    rope base 10000 in those, attention scaled by the head's width (27B: by hidden / heads)."""
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    scalar = config["hidden_size"] // heads if layers == 62 else config["head_dim"]
    scale = read.number("attention.scale", 0.0)
    found: dict[str, Any] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": read.integer("attention.sliding_window", 4096),
        "query_pre_attn_scalar": scale**-2 if scale > 0 else scalar,
        "rope_local_base_freq": read.number("rope.freq_base_swa", 10000.0),
        "rope_theta": read.number("rope.freq_base", 1e6),
    }
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        if read.get(key):
            found[key] = read.number(key)
    pattern = read.get("attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):
        kinds = ("full_attention", "sliding_attention")
        found["layer_types"] = [kinds[bool(windowed)] for windowed in pattern[: 1 << 13]]
    else:
        found["sliding_window_pattern"] = read.integer("attention.sliding_window_pattern", 6)
    return found

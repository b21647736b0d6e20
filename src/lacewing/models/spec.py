"""The declarative description of a decoder: what the engine runs, whatever the model's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lacewing.errors import CheckpointError

__all__ = ["AttentionShape", "DecoderSpec", "LayerSpec", "RopeSpec"]

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class RopeSpec:
    """One rotary embedding: position p turns pair i by the angle p * inv_freq[i], and cosine and
    sine are multiplied by `attention_factor` (1 but for yarn).

    Pair i of a head is (x[i], x[i + head_dim/2]): the rotate-half order of Hugging Face.
    """

    inv_freq: npt.NDArray[np.float64]  # [head_dim / 2], radians per position
    attention_factor: float = 1.0

    def tables(self, n_positions: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """(cos, sin), f32 [n_positions, head_dim / 2], computed in float64 and rounded once."""
        angles = np.arange(n_positions, dtype=np.float64)[:, None] * self.inv_freq
        cos = np.cos(angles) * self.attention_factor
        sin = np.sin(angles) * self.attention_factor
        return cos.astype(np.float32), sin.astype(np.float32)


class AttentionShape(Protocol):
    """What the KV cache has to know of a decoder."""

    @property
    def model_type(self) -> str: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def n_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def windows(self) -> tuple[int, ...]:
        """Of every layer, in tokens; 0: it reads everything."""


@dataclass(frozen=True)
class LayerSpec:
    """What may differ from layer to layer."""

    rope: int  # index into DecoderSpec.ropes
    window: int  # a token sees itself and the window - 1 tokens before it; 0: all of them


@dataclass(frozen=True, eq=False)
class DecoderSpec:
    """A decoder-only transformer with grouped-query attention, RMSNorm and a gated MLP.

    One block, x of shape [tokens, hidden_size]:
        h = rms_norm(x, input_layernorm)
        q, k, v = h Wq (+ bq), h Wk (+ bk), h Wv (+ bv);  if qk_norm: rms_norm of every head of q, k
        q, k = rope(q), rope(k);  a = softmax(q k^T * attention_scale, causal, window) v Wo (+ bo)
        plain:          x = x + a;        h = rms_norm(x, post_attention_layernorm)
        sandwich_norm:  x = x + rms_norm(a, post_attention_layernorm)
                        h = rms_norm(x, pre_feedforward_layernorm)
        m = (activation(h Wgate) * (h Wup)) Wdown
        plain:          x = x + m
        sandwich_norm:  x = x + rms_norm(m, post_feedforward_layernorm)
    before the first block x = embedding[token] * embedding_scale; after the last one
    logits = rms_norm(x, model.norm) lm_head^T, with the embedding as lm_head where tied.
    rms_norm(x, w) = x / sqrt(mean(x^2) + norm_eps) * w  (gemma's 1 + w is folded in on reading).
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    activation: str  # "silu" or "gelu_tanh"
    attention_scale: float
    embedding_scale: float
    attention_bias: bool  # on q, k and v
    output_bias: bool  # on o
    qk_norm: bool
    sandwich_norm: bool
    tie_embeddings: bool
    max_context: int  # tokens
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    logit_softcap: float = 0.0  # 0: none

    @property
    def windows(self) -> tuple[int, ...]:
        """Of every layer, see `LayerSpec`."""
        return tuple(layer.window for layer in self.layers)

    def tensor_shapes(self) -> dict[str, Shape]:
        """Name -> shape of every tensor of the model; matrices are [outputs, inputs]."""
        hidden = self.hidden_size
        shapes: dict[str, Shape] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for i in range(self.n_layers):
            block = self._block_shapes()
            shapes.update({f"model.layers.{i}.{name}": shape for name, shape in block.items()})
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def _block_shapes(self) -> dict[str, Shape]:
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        shapes: dict[str, Shape] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (q, hidden),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.o_proj.weight": (hidden, q),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        if self.attention_bias:
            shapes |= {
                f"self_attn.{p}_proj.bias": (n,) for p, n in (("q", q), ("k", kv), ("v", kv))
            }
        if self.output_bias:
            shapes["self_attn.o_proj.bias"] = (hidden,)
        if self.qk_norm:
            shapes |= {f"self_attn.{part}_norm.weight": (self.head_dim,) for part in "qk"}
        if self.sandwich_norm:
            shapes["pre_feedforward_layernorm.weight"] = (hidden,)
            shapes["post_feedforward_layernorm.weight"] = (hidden,)
        return shapes

    def check_shapes(self, found: Mapping[str, Shape]) -> None:
        """Raise `CheckpointError` unless the tensors `found` are exactly those of this decoder.

        A head beside a tied embedding is let through (some files repeat it), so are rotary tables.
        """
        expected = self.tensor_shapes()
        for name, shape in expected.items():
            if name not in found:
                raise CheckpointError(
                    f"`{name}`: needs a tensor of shape {list(shape)}, the model has none",
                    hint="the file is incomplete, or its config describes another model",
                )
            if tuple(found[name]) != shape:
                raise CheckpointError(
                    f"`{name}`: the config needs shape {list(shape)}, got {list(found[name])}",
                    hint="the weights and the config (or vocabulary) are of different models",
                )
        for name in found:
            if name not in expected and name != "lm_head.weight" and "rotary_emb" not in name:
                raise CheckpointError(
                    f"`{name}`: a {self.model_type} of this config has no such tensor",
                    hint="leaving it out would change the model's answers",
                )

"""The torch twin of the engine: a decoder of a `DecoderSpec` in f32, one block at a time.

Written for calibration. A block is cut into four stages; the layers of a stage read the same input,
so that one Hessian serves all of them, and a stage can be compressed before the next one is fed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lacewing.checkpoint import Source
from lacewing.formats.base import row_chunks
from lacewing.models import DecoderSpec

__all__ = ["EMBEDDING", "LAYERS", "STAGES", "Block", "Decoder", "rms_norm"]

STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""The linear layers of a block by their Hugging Face names, in the order in which they are fed."""

LAYERS = tuple(layer for stage in STAGES for layer in stage)
EMBEDDING, _HEAD, _NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension (arXiv:1910.07467), in the type
    of `weight`."""
    return F.rms_norm(x.to(weight.dtype), (x.shape[-1],), weight, eps)


class Block(nn.Module):
    """One decoder block, as `DecoderSpec` states it. Its weights are parameters named as in the
    model, less the prefix `model.layers.<i>.`; its layers are `nn.Linear`s.

    x is `[windows, tokens, hidden_size]` f32; every window begins at position 0.
    """

    def __init__(self, spec: DecoderSpec, index: int, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.spec, self.index = spec, index
        self.layers = nn.ModuleDict()
        self.norms = nn.ParameterDict()
        for name in LAYERS:
            weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
            self.layers[_key(name)] = _linear(weight, bias)
        for name, weight in weights.items():
            if name.endswith("norm.weight"):
                self.norms[_key(name.removesuffix(".weight"))] = nn.Parameter(weight)
        rope = spec.ropes[spec.layers[index].rope]
        self._rope = rope
        self._tables: tuple[Tensor, Tensor] | None = None

    def linear(self, name: str) -> nn.Linear:
        """The layer called `name`, such as `mlp.down_proj`."""
        layer = self.layers[_key(name)]
        assert isinstance(layer, nn.Linear)
        return layer

    def norm(self, name: str) -> nn.Parameter:
        """The weight of the norm called `name`, such as `input_layernorm`."""
        return self.norms[_key(name)]

    # -- the stages: each returns what the layers of STAGES[i] read -------------------------------

    def attention_input(self, x: Tensor) -> Tensor:
        """`[.., hidden_size]`: what q, k and v read."""
        return self._norm(x, "input_layernorm")

    def project(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[windows, heads, tokens, head_dim]`, as the cache has them:
        after norms and RoPE. Of what q, k and v read."""
        q, k, v = (self._heads(f"self_attn.{p}_proj", h) for p in "qkv")
        if self.spec.qk_norm:
            q, k = self._norm(q, "self_attn.q_norm"), self._norm(k, "self_attn.k_norm")
        return self._rotate(q), self._rotate(k), v

    def attend(self, h: Tensor) -> Tensor:
        """`[.., n_heads * head_dim]`: what o reads, given what q, k and v read."""
        return self.mix(*self.project(h))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[.., n_heads * head_dim]`: what o reads, given queries, keys and values."""
        window, scale = self.spec.layers[self.index].window, self.spec.attention_scale
        if 0 < window < q.shape[2]:
            out = _windowed(q, k, v, window, scale)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=True
            )
        return out.transpose(1, 2).flatten(2)

    def add_attention(self, x: Tensor, a: Tensor) -> Tensor:
        """The residual stream after attention, given it before and what o reads."""
        out = self.linear("self_attn.o_proj")(a)
        if self.spec.sandwich_norm:
            out = self._norm(out, "post_attention_layernorm")
        return x + out

    def mlp_input(self, x: Tensor) -> Tensor:
        """`[.., hidden_size]`: what gate and up read."""
        sandwich = self.spec.sandwich_norm
        return self._norm(
            x, "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"
        )

    def gate(self, h: Tensor) -> Tensor:
        """`[.., intermediate_size]`: what down reads, given what gate and up read."""
        g = self.linear("mlp.gate_proj")(h)
        act = F.silu(g) if self.spec.activation == "silu" else F.gelu(g, approximate="tanh")
        return act * self.linear("mlp.up_proj")(h)

    def add_mlp(self, x: Tensor, m: Tensor) -> Tensor:
        """The residual stream after the block, given it after attention and what down reads."""
        out = self.linear("mlp.down_proj")(m)
        if self.spec.sandwich_norm:
            out = self._norm(out, "post_feedforward_layernorm")
        return x + out

    def forward(self, x: Tensor) -> Tensor:
        x = self.add_attention(x, self.attend(self.attention_input(x)))
        return self.add_mlp(x, self.gate(self.mlp_input(x)))

    # -- parts ------------------------------------------------------------------------------------

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self.norm(name), self.spec.norm_eps)

    def _heads(self, name: str, h: Tensor) -> Tensor:
        """`[windows, heads, tokens, head_dim]`"""
        y = self.linear(name)(h)
        return y.unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2)

    def _rotate(self, x: Tensor) -> Tensor:
        n = x.shape[2]
        if self._tables is None or len(self._tables[0]) < n:
            cos, sin = self._rope.tables(n)
            self._tables = torch.from_numpy(cos), torch.from_numpy(sin)
        cos, sin = (table[:n].to(x.dtype) for table in self._tables)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Decoder:
    """A model file as torch sees it: embedding, blocks and head, read when they are asked for."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.spec = source.spec

    def block(self, index: int) -> Block:
        """Block `index`, in f32: memory of one block."""
        return Block(self.spec, index, self.block_weights(index))

    def block_weights(self, index: int) -> dict[str, Tensor]:
        """The tensors of a block by their names without `model.layers.<index>.`."""
        prefix = f"model.layers.{index}."
        names = [name for name in self.spec.tensor_shapes() if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.tensor(name) for name in names}

    def tensor(self, name: str) -> Tensor:
        """One tensor in f32, in memory of its own."""
        found = self.source.tensors[name]
        values = torch.empty(found.shape)
        rows = row_chunks(*found.shape) if len(found.shape) == 2 else [(0, found.shape[0])]
        for begin, end in rows:
            values.numpy()[begin:end] = found.dequantize(begin, end)
        found.release()
        return values

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        """`[.., hidden_size]`: what the first block reads, of token ids and the embedding."""
        return F.embedding(ids, table) * self.spec.embedding_scale

    def embedding(self) -> Tensor:
        """f32 `[vocab_size, hidden_size]`"""
        return self.tensor(EMBEDDING)

    def head(self) -> tuple[Tensor, Tensor]:
        """The weight of the last norm, and f32 `[vocab_size, hidden_size]`."""
        return self.tensor(_NORM), self.tensor(EMBEDDING if self.spec.tie_embeddings else _HEAD)

    def logits(self, x: Tensor, norm: Tensor, head: Tensor) -> Tensor:
        """`[.., vocab_size]` of what the last block returns."""
        y = F.linear(rms_norm(x, norm, self.spec.norm_eps), head)
        cap = self.spec.logit_softcap
        return torch.tanh(y / cap) * cap if cap else y


def _key(name: str) -> str:
    """Names of modules have no dots in them."""
    return name.replace(".", "/")


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    n, k = weight.shape
    layer = nn.Linear(k, n, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """Attention in which every token sees itself and the window - 1 before it. Rows go `window` at
    a time: work and memory grow with the tokens, not with their square."""
    parts = []
    for begin in range(0, q.shape[2], window):
        rows, first = q[:, :, begin : begin + window], max(0, begin - window + 1)
        end = begin + rows.shape[2]
        i = torch.arange(begin, end, device=q.device)
        back = i[:, None] - torch.arange(first, end, device=q.device)
        parts.append(
            F.scaled_dot_product_attention(
                rows,
                k[:, :, first:end],
                v[:, :, first:end],
                attn_mask=(back >= 0) & (back < window),
                scale=scale,
                enable_gqa=True,
            )
        )
    return torch.cat(parts, dim=2)

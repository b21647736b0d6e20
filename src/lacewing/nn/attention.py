"""`MultiheadAttention` with packed projections."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import Module, Parameter
from torch.nn import functional as F

from lacewing.errors import RequestError
from lacewing.nn.linear import Linear

__all__ = ["MultiheadAttention"]

_OPTIONS = (
    "embed_dim",
    "num_heads",
    "head_dim",
    "kdim",
    "vdim",
    "dropout",
    "batch_first",
    "add_zero_attn",
)


class MultiheadAttention(torch.nn.MultiheadAttention):
    """A `torch.nn.MultiheadAttention` whose projections `q_proj`, `k_proj`, `v_proj` and `out_proj`
    are packed. Arguments and results of `forward` are those of the dense class.

    PyTorch's fused path of attention reads dense weights and is never taken.
    """

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    out_proj: Any
    bias_k: Parameter | None
    bias_v: Parameter | None

    def __init__(
        self,
        dense: torch.nn.MultiheadAttention,
        q_proj: Linear,
        k_proj: Linear,
        v_proj: Linear,
        out_proj: Linear,
    ) -> None:
        """dense: whose options, `bias_k` and `bias_v` it takes over."""
        Module.__init__(self)
        for name in _OPTIONS:
            setattr(self, name, getattr(dense, name))
        # What the encoder of PyTorch looks at before it takes its fused path.
        self._qkv_same_embed_dim = False
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = q_proj, k_proj, v_proj, out_proj
        self.register_parameter("bias_k", dense.bias_k)
        self.register_parameter("bias_v", dense.bias_v)

    @property
    def in_proj_weight(self) -> None:
        """None, as in a dense layer with three separate weights, which these are."""
        return None

    @property
    def in_proj_bias(self) -> torch.Tensor | None:
        """`[3 embed_dim]` or None."""
        biases = [proj.bias for proj in (self.q_proj, self.k_proj, self.v_proj)]
        return None if biases[0] is None else torch.cat([b for b in biases if b is not None])

    @property
    def q_proj_weight(self) -> torch.Tensor:
        return self.q_proj.weight

    @property
    def k_proj_weight(self) -> torch.Tensor:
        return self.k_proj.weight

    @property
    def v_proj_weight(self) -> torch.Tensor:
        return self.v_proj.weight

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if is_causal and attn_mask is None:
            raise RequestError(
                "MultiheadAttention: `is_causal` says what kind of mask `attn_mask` is, got none",
                hint="torch.nn.Transformer.generate_square_subsequent_mask makes one",
            )
        batched = query.dim() == 3
        if is_causal and key_padding_mask is None and not need_weights:
            attn_mask = None  # the fused product makes its own
        else:
            is_causal = False
        q, k, v = self._heads(query, key, value, batched)
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            weights = _softmax(q, k, mask)
            weights = F.dropout(weights, dropout) if dropout else weights
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        y = self.out_proj(y.transpose(1, 2).flatten(2))  # [N, L, E]
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1), weights

    def _heads(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batched: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values `[N, heads, L or S, head_dim]`, extra keys at the end."""
        q = self.q_proj(self._batch_first(query, batched))
        k = self.k_proj(self._batch_first(key, batched))
        v = self.v_proj(self._batch_first(value, batched))
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(len(v), 1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        return q, k, v

    def _batch_first(self, x: torch.Tensor, batched: bool) -> torch.Tensor:
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _mask(
        self,
        attn_mask: torch.Tensor | None,
        key_padding_mask: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor,
    ) -> torch.Tensor | None:
        """What is added to the scores: floats that broadcast to `[N, heads, L, S]`, or None. Extra
        keys are never masked."""
        total = None
        if attn_mask is not None:
            total = self._padded(attn_mask, q, k)
            if attn_mask.dim() == 3:
                total = total.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            padding = self._padded(key_padding_mask, q, k)
            padding = padding.reshape(-1, 1, 1, padding.shape[-1])
            total = padding if total is None else total + padding
        return total

    def _padded(self, mask: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -math.inf)
        added = (self.bias_k is not None) + self.add_zero_attn
        if mask.shape[-1] != k.shape[2] - added:
            raise RequestError(
                f"MultiheadAttention: a mask must have one column per key, {k.shape[2] - added},"
                f" got {list(mask.shape)}"
            )
        return F.pad(mask.to(q.dtype), (0, added))


def _softmax(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    scores = q * math.sqrt(1 / q.shape[-1]) @ k.transpose(2, 3)
    return torch.softmax(scores if mask is None else scores + mask, -1)

"""Norms of queries and keys, so that keys lose less in 8 bits.

A key's codes share one scale, which its largest channel sets: where `k_norm` makes some channels
far larger than others, the others are rounded coarsely. What a channel of the keys is divided by,
that of the queries is multiplied by, and scores stay what they are (the balance of SmoothQuant,
arXiv 2211.10438, equation 4, at alpha 1/2, between two activations). It commutes with rotary
embedding if the channels of a pair share it. The norms' weights say how large channels are; nothing
is calibrated, and no file changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lacewing.models import DecoderSpec

__all__ = ["balance_heads", "balance_of"]

Floats = NDArray[np.float32]

_MOST = 256.0  # beyond, a weight says more of its channel than of its size


def balance_of(q_norm: Floats, k_norm: Floats) -> Floats:
    """By what queries are multiplied and keys divided: f32 `[head_dim]`, the same for channels i
    and i + head_dim / 2; 1 where a weight is 0. q_norm, k_norm: f32 `[head_dim]`."""
    q, k = (np.hypot(*each.astype(np.float64).reshape(2, -1)) for each in (q_norm, k_norm))
    usable = (q > 0) & (k > 0)
    ratio = np.divide(k, q, out=np.ones_like(k), where=usable)
    return np.tile(np.clip(np.sqrt(ratio), 1 / _MOST, _MOST), 2).astype(np.float32)


def balance_heads(spec: DecoderSpec, tensors: Mapping[str, Any], kv: dict[str, Any]) -> None:
    """Balances the norms of every layer in `tensors`, in place, and with them the labels' scales of
    `kv`, what `_C.Model` is told of the cache. Without `qk_norm` nothing changes."""
    if not spec.qk_norm:
        return
    balances = []
    for i in range(spec.n_layers):
        at = f"model.layers.{i}.self_attn."
        q_norm, k_norm = tensors[f"{at}q_norm.weight"], tensors[f"{at}k_norm.weight"]
        balances.append(balance_of(q_norm, k_norm))
        q_norm *= balances[-1]
        k_norm /= balances[-1]
    if "scales" in kv:
        of_heads = np.repeat(np.stack(balances), spec.n_kv_heads, axis=0)
        kv["scales"] = kv["scales"] / np.take_along_axis(of_heads, kv["channels"], axis=1)

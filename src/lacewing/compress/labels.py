"""Label channels: those of a head's keys from which its scores are guessed best.

Double Sparsity (arXiv:2408.07092): most of a score q k^T comes from few channels, always the same
ones, which a pass over some text finds. Of each KV head those channels c are taken whose part
|q[c] k[c]| is largest, on average over tokens and over the query heads of its group.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lacewing.checkpoint.kvplan import Labels
from lacewing.compress.decoder import Block, Decoder
from lacewing.compress.path import tokens_at_once
from lacewing.errors import RecipeError

__all__ = ["Progress", "channel_scores", "check_finite", "find_labels"]

Progress = Callable[[str, float], None]
"""Called with what was done, and how much work it was: in windows sent through a block."""

_CODES = 127
"""The largest code of a label."""


def find_labels(decoder: Decoder, windows: Tensor, r: int, progress: Progress) -> Labels:
    """The r channels of every head, ascending, and their scales: max |k[c]| / 127. (int8 has levels
    to spare: percentiles below the largest value make the error of the scores larger.)

    windows: token ids, int64 `[windows, tokens]`. Raises RecipeError, naming the layer, for keys or
    queries that are not finite.
    """
    channels, scales = [], []
    x = decoder.embed(windows, decoder.embedding())
    for index in range(decoder.spec.n_layers):
        with torch.no_grad():
            score, largest = _measure(decoder.block(index), x)
        chosen = score.topk(r).indices.sort().values
        channels.append(chosen)
        scales.append(largest.gather(1, chosen) / _CODES)
        progress(f"labels of layer {index}", len(windows))
    found = np.ascontiguousarray(torch.stack(channels).numpy(), np.int32)
    # A channel that was zero on all of the text has labels of zero under any scale.
    tiny = torch.finfo(torch.float32).tiny
    return Labels(found, torch.stack(scales).clamp(min=tiny).numpy())


def _measure(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and largest magnitudes `[kv_heads, head_dim]` of the keys; sends x on."""
    scores, largest = [], []
    for part in tokens_at_once(*x.shape[:2]):
        h = block.attention_input(x[part])
        q, k, v = block.project(h)
        check_finite(f"model.layers.{block.index}.self_attn", q, k, v)
        scores.append(channel_scores(q, k) * len(k))
        largest.append(k.abs().amax((0, 2)))
        y = block.add_attention(x[part], block.mix(q, k, v))
        x[part] = block.add_mlp(y, block.gate(block.mlp_input(y)))
    return torch.stack(scores).sum(0) / len(x), torch.stack(largest).amax(0)


def channel_scores(q: Tensor, k: Tensor) -> Tensor:
    """`[kv_heads, head_dim]`: the mean of |q[c] k[c]| over windows, tokens and query heads of the
    group. q, k: `[windows, heads, tokens, head_dim]`."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    return (grouped * k[:, :, None]).abs().mean((0, 2, 3))


def check_finite(where: str, *tensors: Tensor) -> None:
    """Raises RecipeError, naming the part of the model, unless all that it gave is finite."""
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise RecipeError(
            f"`{where}`: needs finite activations, got NaN or infinity",
            hint="the model overflows on the calibration text: is it damaged?",
        )

"""What it costs to let a head read less: influence of spans, measured on text.

MoA (arXiv:2406.14909) profiles the influence of attention values by the gradient of the loss. Here
a KV head with its group of query heads is restricted to a span, on its own, and the change of what
`o_proj` reads, d[t] for token t, is weighed by the gradient g[t] of the loss by it:

    loss of a span = 1/2 * mean over tokens of (g[t] . d[t])^2

The loss of the gradient is that of tokens drawn from the model's own predictions, so that the
square is a sample of the Fisher information: to second order this is the divergence of the
predictions from the dense model's, in nats per token, but for what changes at different tokens have
to do with each other. (The first order, g . d itself, is zero on average for such tokens; on those
of the text it has either sign, and says little.)

Memory: one block, and the stream before every block: layers * window * hidden_size * 4 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lacewing.checkpoint.kvplan import BLOCK
from lacewing.compress.decoder import Decoder, rms_norm
from lacewing.compress.divergence import Head
from lacewing.compress.labels import Progress, check_finite

__all__ = ["INFLUENCE_WORK", "SINKS", "restricted", "span_losses"]

F64 = npt.NDArray[np.float64]

SINKS = BLOCK
"""Tokens at the beginning that every head reads."""
INFLUENCE_WORK = 5
"""How much longer the influence of a layer takes than sending a window through it: there is the way
back, and attention over every span."""
_LOGITS = 6_000_000
"""Logits that live at once: 24 MB."""


def span_losses(
    decoder: Decoder,
    windows: Tensor,
    lengths: Sequence[int],
    seed: int,
    progress: Progress,
) -> F64:
    """`[layers, kv_heads, lengths]`: the loss above of sinks and a window of each of `lengths`,
    tokens, ascending multiples of 16. Zero in layers that have a window of their own.

    windows: token ids, int64 `[windows, tokens]`, tokens a multiple of 16. Raises RecipeError,
    naming the layer, for activations that are not finite.
    """
    spec = decoder.spec
    losses = np.zeros((spec.n_layers, spec.n_kv_heads, len(lengths)))
    generator = torch.Generator().manual_seed(seed)
    for number, ids in enumerate(windows):
        told = f"window {number + 1} of {len(windows)}"
        stream = _stream(decoder, ids[None], partial(progress, f"{told}, forward", 1))
        gradient = _head_gradient(decoder, stream.pop(), generator)
        for index in reversed(range(spec.n_layers)):
            gradient, found = _block_losses(decoder, index, stream.pop(), gradient, lengths)
            losses[index] += found
            progress(f"{told}, influence of layer {index}", INFLUENCE_WORK)
    return losses / (2 * windows.numel())


def _stream(decoder: Decoder, ids: Tensor, advance: Callable[[], None]) -> list[Tensor]:
    """What each block reads, and what the last one returns, `[1, tokens, hidden_size]`."""
    stream = [decoder.embed(ids, decoder.embedding())]
    for index in range(decoder.spec.n_layers):
        with torch.no_grad():
            stream.append(decoder.block(index)(stream[-1]))
        advance()
    return stream


def _head_gradient(decoder: Decoder, x: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient by x, `[1, tokens, hidden_size]`, of the sum of -log p of a token drawn at each
    position from the model's prediction."""
    norm, weight = decoder.head()
    head = Head(weight, decoder.spec.logit_softcap)
    x.requires_grad_(True)
    hidden = rms_norm(x, norm, decoder.spec.norm_eps)
    check_finite("model.norm", hidden)
    slope = torch.empty_like(hidden)
    rows = max(1, _LOGITS // len(weight))
    with torch.no_grad():
        for part, out in zip(hidden[0].split(rows), slope[0].split(rows), strict=True):
            logits = head.logits(part)
            p = logits.softmax(1)
            drawn = p.multinomial(1, generator=generator)
            out.copy_(head.pull(p.scatter_add_(1, drawn, -torch.ones(drawn.shape)), logits))
    return torch.autograd.grad(hidden, x, slope)[0]


def _block_losses(
    decoder: Decoder, index: int, x: Tensor, gradient: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, F64]:
    """The gradient by what block `index` reads, x, given that by what it returns; and twice the sum
    over tokens of the losses, `[kv_heads, lengths]`."""
    block = decoder.block(index).requires_grad_(False)
    x.requires_grad_(True)
    q, k, v = block.project(block.attention_input(x))
    a = block.mix(q, k, v)
    y = block.add_attention(x, a)
    y = block.add_mlp(y, block.gate(block.mlp_input(y)))
    before, slope = torch.autograd.grad(y, (x, a), gradient)
    check_finite(f"model.layers.{index}", before, slope)
    losses = np.zeros((k.shape[1], len(lengths)))
    if decoder.spec.layers[index].window == 0:
        with torch.no_grad():
            heads = slope[0].unflatten(-1, (q.shape[1], -1)).transpose(0, 1)
            scaled = q[0] * decoder.spec.attention_scale
            losses[:] = _squares(scaled, k[0], v[0], heads, lengths)
    return before, losses


def _squares(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, lengths: Sequence[int]) -> F64:
    """`[kv_heads, lengths]`: the sum over tokens of (g . d)^2. q, scaled, and slope: `[heads,
    tokens, head_dim]`; k, v: `[kv_heads, tokens, head_dim]`."""
    total = torch.zeros(len(k), len(lengths), dtype=torch.float64)
    slopes = slope.unflatten(0, (len(k), -1)).split(BLOCK, 2)
    for (outs, whole), g in zip(restricted(q, k, v, lengths), slopes, strict=True):
        for number, out in enumerate(outs):
            total[:, number] += ((out - whole) * g).sum((1, 3)).double().square().sum(1)
    return total.numpy()


# -- attention over parts of the keys --------------------------------------------------------------


def restricted(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Of each block of 16 queries: what attention gives over the sinks and a window of each of
    `lengths` that does not reach all keys anyway, and over all; `[kv_heads, group, 16, head_dim]`
    each.

    Windows lie in each other: keys are read once, from the near ones to the far ones, and what is
    gathered up to the edge of a window, with the sinks, is the output over that window.
    """
    blocks = q.shape[1] // BLOCK
    grouped = q.unflatten(0, (len(k), -1))
    for i in range(blocks):
        rows = grouped[:, :, i * BLOCK : (i + 1) * BLOCK].flatten(1, 2)
        edges = [i + 1 - length // BLOCK for length in lengths if i + 1 - length // BLOCK > 1]
        gathered, end, outs = _partial(rows, k, v, 0, 1, own=i == 0), i + 1, []
        for edge in (*edges, 1):
            if edge < end:
                part = _partial(rows, k, v, edge, end, own=end == i + 1)
                gathered = _merged(gathered, part)
            outs.append((gathered[2] / gathered[1]).unflatten(1, (-1, BLOCK)))
            end = edge
        yield outs[:-1], outs[-1]


_Partial = tuple[Tensor, Tensor, Tensor]
"""Of rows of queries over some of the keys: the largest score, the sum of exp(score - largest), and
that of the values with these weights."""


def _partial(rows: Tensor, k: Tensor, v: Tensor, begin: int, end: int, own: bool) -> _Partial:
    """Over key blocks begin..end. rows: `[kv_heads, group * 16, head_dim]`, the queries of a block;
    own: it is the last of these, in which queries see the keys that are not after them."""
    part = slice(begin * BLOCK, end * BLOCK)
    scores = rows @ k[:, part].transpose(1, 2)
    if own:
        last = scores[:, :, -BLOCK:].unflatten(1, (-1, BLOCK))
        last.masked_fill_(torch.ones(BLOCK, BLOCK, dtype=torch.bool).triu(1), -torch.inf)
    largest = scores.amax(2, keepdim=True)
    weights = (scores - largest).exp_()
    return largest, weights.sum(2, keepdim=True), weights @ v[:, part]


def _merged(a: _Partial, b: _Partial) -> _Partial:
    largest = torch.maximum(a[0], b[0])
    p, q = (a[0] - largest).exp_(), (b[0] - largest).exp_()
    return largest, a[1] * p + b[1] * q, a[2] * p + b[2] * q

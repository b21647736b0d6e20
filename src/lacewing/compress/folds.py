"""Changes of a block's weights that leave its function as it is, up to the rounding of floats.

Scales: what a stage's layers read is divided by s, and their weights are multiplied by it.

    stage  layers      divided by s                                  channels
    0      q, k, v     input_layernorm                               hidden_size
    1      o           v (rows and bias)                             n_kv_heads * head_dim
    2      gate, up    post_attention_layernorm, or                  hidden_size
                       pre_feedforward_layernorm under sandwich_norm
    3      down        up (rows)                                     intermediate_size

A value channel is read by all query heads of its group, so that their columns of o share one
factor. Of gate and up only up can be divided: gate goes through the activation. q and k may
exchange a factor per pair of channels that rope turns together.

Orders: the channels of a stage's input are rearranged, and what makes them with them. The inner
channels of the MLP go in any order, value channels stay within their head, and the residual stream
has one order for the whole model.

A fold is made in place, on weights that are not rounded yet: the rows of v and up that are divided
are themselves compressed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lacewing.compress.decoder import STAGES, Block
from lacewing.errors import RecipeError
from lacewing.models import DecoderSpec

__all__ = [
    "channels",
    "check_order",
    "divided_by",
    "expand",
    "input_order",
    "merge",
    "permute_ends",
    "permute_hidden",
    "permute_inputs",
    "scale_inputs",
    "scale_queries",
]

_READ_HIDDEN = (*STAGES[0], *STAGES[2])
_WRITE_HIDDEN = (*STAGES[1], *STAGES[3])


def channels(spec: DecoderSpec, stage: int) -> int:
    """How many channels of the input of `STAGES[stage]` have a scale of their own."""
    sizes = (spec.hidden_size, _values(spec), spec.hidden_size, spec.intermediate_size)
    return sizes[stage]


def expand(spec: DecoderSpec, stage: int, values: Tensor) -> Tensor:
    """Of values `[channels]` those of all inputs `[k]` of the stage's layers: in stage 1 the query
    heads of a group repeat those of their KV head."""
    if stage != 1:
        return values
    heads = values.view(spec.n_kv_heads, spec.head_dim)
    return heads.repeat_interleave(spec.n_heads // spec.n_kv_heads, dim=0).flatten()


def merge(spec: DecoderSpec, stage: int, values: Tensor, largest: bool = False) -> Tensor:
    """Of values `[k]`, one per input of the stage's layers, those `[channels]`: in stage 1 the mean
    over the query heads of a group, or the largest."""
    if stage != 1:
        return values
    heads = values.view(spec.n_kv_heads, -1, spec.head_dim)
    return (heads.amax(1) if largest else heads.mean(1)).flatten()


def input_order(spec: DecoderSpec, stage: int, order: Tensor) -> Tensor:
    """The order of the inputs `[k]` of the stage's layers, given that of the channels."""
    if stage != 1:
        return order
    within = (order % spec.head_dim).view(spec.n_kv_heads, spec.head_dim)
    heads = within.repeat_interleave(spec.n_heads // spec.n_kv_heads, dim=0)
    return (heads + spec.head_dim * torch.arange(spec.n_heads)[:, None]).flatten()


def scale_inputs(block: Block, stage: int, scales: Tensor) -> None:
    """Divides the input of `STAGES[stage]` by `scales` `[channels]` and multiplies its layers.

    Raises RecipeError for scales that are not as many, positive and finite.
    """
    where = _where(block, stage)
    _check_scales(where, scales, channels(block.spec, stage))
    inputs = expand(block.spec, stage, scales)
    for name in STAGES[stage]:
        weight = _weight(block, name)
        weight.mul_(inputs.to(weight.dtype))
    if stage in (0, 2):
        norm = _norm(block, _norm_before(block.spec, stage))
        norm.div_(scales.to(norm.dtype))
    else:
        _scale_rows(block, _maker(stage), 1 / scales)


def divided_by(block: Block, stage: int, scales: Tensor) -> Tensor:
    """What `scale_inputs` would leave of the norm `[hidden_size]`, or of the rows of v or up."""
    if stage in (0, 2):
        return _norm(block, _norm_before(block.spec, stage)) / scales
    return _weight(block, _maker(stage)) / scales[:, None]


def scale_queries(block: Block, scales: Tensor) -> None:
    """Multiplies queries by `scales` and divides keys by them: `[n_kv_heads, head_dim / 2]`, or
    `[1, head_dim / 2]` for all heads. The two halves of a pair that rope turns share a factor, and
    so do the query heads of a group. With `qk_norm` it goes into the weights of those norms, which
    all heads share.

    Raises RecipeError for scales of other shapes, one per head under `qk_norm`, and scales that
    are not positive and finite.
    """
    spec = block.spec
    where = f"block {block.index}, scales of q and k"
    heads = 1 if spec.qk_norm else spec.n_kv_heads
    if scales.dim() != 2 or scales.shape[0] not in (1, heads):
        why = ", since qk_norm has one weight for all heads" if spec.qk_norm else ""
        raise RecipeError(
            f"{where}: needs shape [1, {spec.head_dim // 2}]"
            f"{'' if heads == 1 else f' or [{heads}, {spec.head_dim // 2}]'}{why},"
            f" got {list(scales.shape)}"
        )
    _check_scales(where, scales.flatten(), scales.shape[0] * spec.head_dim // 2)
    pairs = torch.cat([scales, scales], dim=1)  # channel i turns with i + head_dim / 2
    if spec.qk_norm:
        q, k = _norm(block, "self_attn.q_norm"), _norm(block, "self_attn.k_norm")
        q.mul_(pairs[0].to(q.dtype))
        k.div_(pairs[0].to(k.dtype))
        return
    keys = pairs.expand(spec.n_kv_heads, -1)
    queries = keys.repeat_interleave(spec.n_heads // spec.n_kv_heads, dim=0)
    _scale_rows(block, "self_attn.q_proj", queries.flatten())
    _scale_rows(block, "self_attn.k_proj", 1 / keys.flatten())


def permute_inputs(block: Block, stage: int, order: Tensor) -> None:
    """Channel i of the input of `STAGES[stage]` becomes what channel `order[i]` was.

    Raises RecipeError for what is not a permutation of the channels, for value channels that leave
    their head, and for stages that read the residual stream, whose order is that of the model.
    """
    where = _where(block, stage)
    if stage in (0, 2):
        raise RecipeError(
            f"{where}: reads the residual stream, needs one order in the whole model",
            hint="use permute_hidden on every block and permute_ends on embedding and head",
        )
    check_order(where, order, channels(block.spec, stage))
    if stage == 1:
        _check_heads(where, order, block.spec.head_dim)
    makers = (_maker(stage),) if stage == 1 else STAGES[2]
    for name in makers:
        _take_rows(block, name, order)
    inputs = input_order(block.spec, stage, order)
    for name in STAGES[stage]:
        _take_columns(block, name, inputs)


def permute_hidden(block: Block, order: Tensor) -> None:
    """Channel i of the residual stream becomes what channel `order[i]` was, in this block. The
    other blocks and `permute_ends` need the same order.

    Raises RecipeError for what is not a permutation of the channels.
    """
    hidden = block.spec.hidden_size
    check_order(f"block {block.index}, residual stream", order, hidden)
    for name in _READ_HIDDEN:
        _take_columns(block, name, order)
    for name in _WRITE_HIDDEN:
        _take_rows(block, name, order)
    names = ["input_layernorm", "post_attention_layernorm"]
    if block.spec.sandwich_norm:
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for name in names:
        norm = _norm(block, name)
        norm.copy_(norm[order])


def permute_ends(
    embedding: Tensor, norm: Tensor, head: Tensor, order: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Embedding `[vocab_size, hidden_size]`, last norm and head of a model whose blocks have gone
    through `permute_hidden`. A tied head is the embedding, and stays it."""
    check_order("embedding", order, embedding.shape[1])
    table = embedding[:, order]
    return table, norm[order], table if head is embedding else head[:, order]


def check_order(where: str, order: Tensor, size: int) -> None:
    """Raises RecipeError unless `order` is a permutation of 0 .. size - 1."""
    if order.dtype != torch.int64 or order.shape != (size,):
        raise RecipeError(
            f"{where}: needs an order of {size} integers, got {order.dtype} {list(order.shape)}"
        )
    wrong = order.sort().values != torch.arange(size)
    if wrong.any():
        raise RecipeError(f"{where}: needs every channel once, got an order that is none")


def _check_heads(where: str, order: Tensor, head_dim: int) -> None:
    head = torch.arange(len(order)) // head_dim
    moved = order // head_dim != head
    if moved.any():
        i = int(moved.nonzero()[0])
        raise RecipeError(
            f"{where}: needs value channels to stay in their head,"
            f" got channel {int(order[i])} at {i} with head_dim {head_dim}"
        )


def _check_scales(where: str, scales: Tensor, size: int) -> None:
    if scales.shape != (size,):
        raise RecipeError(f"{where}: needs {size} scales, got shape {list(scales.shape)}")
    bad = ~(scales.isfinite() & (scales > 0))
    if bad.any():
        i = int(bad.nonzero()[0])
        raise RecipeError(
            f"{where}: needs positive finite scales, got {scales[i].item()} for channel {i}"
        )


def _maker(stage: int) -> str:
    """The layer that makes the input of stage 1 or 3, channel for channel."""
    return "self_attn.v_proj" if stage == 1 else "mlp.up_proj"


def _norm_before(spec: DecoderSpec, stage: int) -> str:
    if stage == 0:
        return "input_layernorm"
    return "pre_feedforward_layernorm" if spec.sandwich_norm else "post_attention_layernorm"


def _scale_rows(block: Block, name: str, factors: Tensor) -> None:
    weight, bias = _weight(block, name), block.linear(name).bias
    factors = factors.to(weight.dtype)
    weight.mul_(factors[:, None])
    if bias is not None:
        bias.detach().mul_(factors)


def _take_rows(block: Block, name: str, order: Tensor) -> None:
    weight, bias = _weight(block, name), block.linear(name).bias
    weight.copy_(weight[order])
    if bias is not None:
        bias.detach().copy_(bias.detach()[order])


def _take_columns(block: Block, name: str, order: Tensor) -> None:
    weight = _weight(block, name)
    weight.copy_(weight[:, order])


def _weight(block: Block, name: str) -> Tensor:
    """The parameter's values, which may be changed in place."""
    return block.linear(name).weight.detach()


def _norm(block: Block, name: str) -> Tensor:
    return block.norm(name).detach()


def _values(spec: DecoderSpec) -> int:
    return spec.n_kv_heads * spec.head_dim


def _where(block: Block, stage: int) -> str:
    return f"block {block.index}, input of `{STAGES[stage][0]}`"

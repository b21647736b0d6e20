"""Changes of a block's weights that leave its function as it is, up to the rounding of floats.

Scales: what a stage's layers read is divided by s, and their weights are multiplied by it.

    stage  layers      divided by s                                  channels
    0      q, k, v     input_layernorm                               hidden_size
    1      o           v (rows and bias)                             n_kv_heads * head_dim
    2      gate, up    post_attention_layernorm, or                  hidden_size
                       pre_feedforward_layernorm under sandwich_norm
    3      down        up (rows)                                     intermediate_size

A value channel is read by all query heads of its group, so that their columns of o share one
factor. Of gate and up only up can be divided: gate goes through the activation.

Orders: the channels of a stage's input are rearranged, and what makes them with them. The inner
channels of the MLP go in any order, value channels stay within their head.

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
    "divided_by",
    "expand",
    "input_order",
    "merge",
    "permute_inputs",
    "scale_inputs",
]


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


def permute_inputs(block: Block, stage: int, order: Tensor) -> None:
    """Channel i of the input of `STAGES[stage]`, 1 or 3, becomes what channel `order[i]` was; value
    channels stay in their head. The other stages read the residual stream."""
    makers = (_maker(stage),) if stage == 1 else STAGES[2]
    for name in makers:
        _take_rows(block, name, order)
    inputs = input_order(block.spec, stage, order)
    for name in STAGES[stage]:
        _take_columns(block, name, inputs)


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

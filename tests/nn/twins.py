"""Dense twins of packed models: the same modules with the dequantized weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import lacewing.nn as packed_nn


def twin_of(dense: nn.Module, packed: nn.Module) -> nn.Module:
    """A copy of `dense` that has the weights which the layers of `packed`, the same model after
    `replace_linear`, stand for."""
    twin = copy.deepcopy(dense)
    with torch.no_grad():
        for name, module in packed.named_modules():
            if isinstance(module, packed_nn.PackedExperts):
                twin.get_parameter(name).copy_(module.dequantized())
            elif isinstance(module, packed_nn.MultiheadAttention):
                _fill_attention(twin.get_submodule(name), module)
            elif isinstance(module, (packed_nn.Linear, packed_nn.Conv1d, packed_nn.Conv2d)):
                _fill(twin, name, module)
    return twin


def _fill(twin: nn.Module, name: str, module: Any) -> None:
    try:
        dense = twin.get_submodule(name)
    except AttributeError:
        return  # part of a convolution or of attention
    untied = nn.Parameter(torch.empty_like(dense.weight))
    weight = module.weight
    transposed = type(dense).__name__ == "Conv1D"
    untied.copy_(weight.dequantized().T if transposed else weight.reshape(dense.weight.shape))
    dense.weight = untied


def _fill_attention(dense: Any, module: Any) -> None:
    weights = [proj.weight.dequantized() for proj in (module.q_proj, module.k_proj, module.v_proj)]
    if dense.in_proj_weight is not None:
        dense.in_proj_weight.copy_(torch.cat(weights))
    else:
        for name, weight in zip("qkv", weights, strict=True):
            getattr(dense, f"{name}_proj_weight").copy_(weight)


def reference(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What a packed Linear means for x `[m, k]`, by the format's oracle."""
    from lacewing.formats import get_format

    bias = None if layer.bias is None else layer.bias.detach().float().numpy()
    y = get_format(layer.format).reference_linear(x.detach().float().numpy(), layer.packed, bias)
    return torch.from_numpy(y)

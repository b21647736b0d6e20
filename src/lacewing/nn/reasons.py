"""Why a layer cannot be packed, in words for the report; None where it can."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Module, Parameter
from torch.nn.parameter import UninitializedParameter

__all__ = ["not_pointwise", "own_forward", "unreadable", "unreadable_any"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def own_forward(module: Module, dense: type[Any]) -> str | None:
    """Why calling the module is more than what its class `dense` does."""
    if "forward" in vars(module):
        return "its forward has been replaced on the instance (by accelerate, or a tracer)"
    for name in ("forward", "_conv_forward"):
        if getattr(type(module), name, None) is not getattr(dense, name, None):
            return f"{type(module).__name__} has a {name} of its own"
    lazy = any(isinstance(p, UninitializedParameter) for p in module._parameters.values())
    if not lazy and any(getattr(module, name, None) for name in _STATE_HOOKS):
        return "it has hooks on its state_dict"
    return None


def unreadable(module: Module, name: str) -> str | None:
    """Why the weight cannot be read as floats, or not only from the parameter of that name."""
    weight = module._parameters.get(name)
    if weight is None:
        return f"its {name} is computed from others (weight_norm, pruning, parametrization)"
    if isinstance(weight, UninitializedParameter):
        return None  # is an error, unless the layer is excluded
    if type(weight) is not Parameter or type(weight.data) is not torch.Tensor:
        return f"its {name} is a {type(weight).__name__}: quantized or distributed already"
    if weight.dtype not in _FLOATS:
        return f"its {name} is {weight.dtype}, not float32, bfloat16 or float16"
    if weight.layout != torch.strided:
        return f"its {name} is laid out as {weight.layout}"
    return "it has no weights" if weight.numel() == 0 else None


def unreadable_any(module: Any) -> str | None:
    """Of weight and bias."""
    reason = unreadable(module, "weight")
    return reason if reason or module.bias is None else unreadable(module, "bias")


def not_pointwise(conv: Any) -> str | None:
    size = "x".join(str(length) for length in conv.kernel_size)
    if any(length != 1 for length in conv.kernel_size):
        return f"a convolution with kernel {size}: only 1x1 ones are a product for every pixel"
    if conv.groups != 1:
        return f"a convolution in {conv.groups} groups"
    padded = conv.padding if isinstance(conv.padding, tuple) else ()
    if any(length != 0 for length in padded):
        return f"a 1x1 convolution with padding {conv.padding}"
    return None

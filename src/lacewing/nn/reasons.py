"""Why a layer cannot be packed, in words for the report; None where it can."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.nn import Module, Parameter
from torch.nn.parameter import UninitializedParameter

from lacewing.nn.ops import FLOATS

__all__ = ["COMPILED", "more_than", "not_pointwise", "unreadable", "unreadable_any"]

_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
COMPILED = "it is compiled: replace first, then compile"
"""What it was compiled to would go on to run the dense layer."""
_STATE_METHODS = ("_save_to_state_dict", "_load_from_state_dict")
_ABOUT_DENSE = ("extra_repr", "reset_parameters")
"""What a subclass may say anew: packed weights are shown in another way, and never reset."""


def more_than(dense: type[Any], module: Module, holds: Collection[str]) -> str | None:
    """Why the module is, or does, more than its class `dense`, whose parameters and modules are
    called as in `holds`."""
    if "forward" in vars(module):
        return "its forward has been replaced on the instance (by accelerate, or a tracer)"
    if any(isinstance(p, UninitializedParameter) for p in module._parameters.values()):
        return None  # a class of its own until it has a shape
    if module._compiled_call_impl is not None:
        return COMPILED
    if any(getattr(module, name, None) for name in _STATE_HOOKS):
        return "it has hooks on its state_dict"
    return _own_method(dense, module) or _own_part(module, holds)


def _own_method(dense: type[Any], module: Module) -> str | None:
    kind = type(module)
    for name in ("forward", "_conv_forward", *_STATE_METHODS):
        if getattr(kind, name, None) is not getattr(dense, name, None):
            return f"{kind.__name__} has a {name} of its own"
    classes = kind.__mro__[: kind.__mro__.index(dense)]
    for name in (name for each in classes for name in vars(each)):
        if not name.startswith("_") and name not in _ABOUT_DENSE:
            return f"{kind.__name__} has `{name}`, which the packed layer would not have"
    return None


def _own_part(module: Module, holds: Collection[str]) -> str | None:
    kinds = {"buffer": module._buffers, "parameter": module._parameters, "module": module._modules}
    for kind, parts in kinds.items():
        for name in parts.keys() - set(holds):
            return f"it has a {kind} `{name}` of its own"
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
    if weight.dtype not in FLOATS:
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

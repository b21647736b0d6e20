"""Which modules have a weight that can be packed, what takes their place, and why others have
none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import Module, Parameter
from torch.nn.parameter import UninitializedParameter

from lacewing.formats import PackedTensor
from lacewing.nn.attention import MultiheadAttention
from lacewing.nn.conv import Conv1d, Conv2d
from lacewing.nn.experts import PackedExperts, join
from lacewing.nn.linear import Linear
from lacewing.nn.matrices import Cut, Matrix
from lacewing.nn.reasons import more_than, not_pointwise, unreadable, unreadable_any

__all__ = ["WHOLE", "Built", "Candidate", "LeftAlone", "candidates_of"]

_PACKED = (Linear, Conv1d, Conv2d, MultiheadAttention, PackedExperts)
WHOLE = (*_PACKED, nn.MultiheadAttention)
"""What lies inside these is part of them."""
_STACK_NAMES = ("gate_up_proj", "up_proj", "gate_proj", "down_proj", "weight")
_STACKS = {"Llama4TextExperts": True, "JetMoeParallelExperts": False}
"""Classes of transformers that do not say themselves whether their stacks are transposed."""
_HOLDS = ("weight", "bias")
_ATTENTION_HOLDS = (
    *(f"{each}_proj_weight" for each in ("in", "q", "k", "v")),
    "in_proj_bias",
    "bias_k",
    "bias_v",
    "out_proj",
)
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
Built = tuple[Module, list[Any]]
"""A new layer, and in it what holds each of the packed tensors."""


@dataclass(frozen=True)
class LeftAlone:
    """A layer that cannot be packed."""

    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Candidate:
    """A layer that can be packed."""

    shape: tuple[int, ...]
    """Of its weight, `[n, k]`, before them the experts."""
    matrices: tuple[Matrix, ...]
    build: Callable[[Sequence[PackedTensor]], Built]
    """Makes the new layer of what `assemble` gives."""
    assemble: Callable[[Sequence[PackedTensor]], Sequence[PackedTensor]] = tuple
    """From the packed matrices to what the new layer holds."""
    parameter: str | None = None
    """The parameter of the module that is replaced; None: the module itself."""
    keeps: tuple[torch.Tensor, ...] = ()
    """Other parameters that the new layer takes over."""
    notes: tuple[str, ...] = field(default=())


def candidates_of(module: Module) -> dict[str, Candidate | LeftAlone]:
    """What can be packed in a module: under "" the module itself, else its parameters by name.
    Empty for what has no weight to multiply by."""
    if isinstance(module, _PACKED):
        shape = tuple(module.weight.shape) if isinstance(module, Linear) else ()
        return {"": LeftAlone(shape, f"packed already{_format_of(module)}")}
    for kind, find in _KINDS:
        if kind(module):
            return find(module)
    return _other(module)


# -- one kind of layer each -----------------------------------------------------------------------


def _is_conv1d(module: Module) -> bool:
    return type(module).__qualname__ == "Conv1D" and hasattr(module, "nf")


def _is_stack(module: Module) -> bool:
    return _transposed(module) is not None and any(
        _dims(p) == 3 for p in module._parameters.values() if p is not None
    )


def _linear(module: Any) -> dict[str, Candidate | LeftAlone]:
    reason = unreadable_any(module) or more_than(nn.Linear, module, _HOLDS)
    if reason is not None:
        return {"": LeftAlone(_shape(module), reason)}
    return {"": _linear_like(module, Cut(), ())}


def _conv1d(module: Any) -> dict[str, Candidate | LeftAlone]:
    reason = unreadable_any(module) or more_than(type(module), module, _HOLDS)
    if reason is not None:
        return {"": LeftAlone(_shape(module), reason)}
    note = "a Conv1D is a Linear now: its weight is [outputs, inputs]"
    return {"": _linear_like(module, Cut(transposed=True), (note,))}


def _linear_like(module: Any, cut: Cut, notes: tuple[str, ...]) -> Candidate:
    matrix = Matrix("weight", module.weight, cut)

    def build(packed: Sequence[PackedTensor]) -> Built:
        new = Linear(packed[0], module.bias, dtype=module.weight.dtype)
        return _take_over(new, module), [new]

    return Candidate(_lazy_shape(matrix), (matrix,), build, keeps=_biases(module), notes=notes)


def _conv(module: Any) -> dict[str, Candidate | LeftAlone]:
    packed_class: Any = Conv1d if isinstance(module, nn.Conv1d) else Conv2d
    dense_class = nn.Conv1d if isinstance(module, nn.Conv1d) else nn.Conv2d
    reason = not_pointwise(module) or unreadable_any(module)
    reason = reason or more_than(dense_class, module, _HOLDS)
    if reason is not None:
        return {"": LeftAlone(_shape(module), reason)}
    matrix = Matrix("weight", module.weight)

    def build(packed: Sequence[PackedTensor]) -> Built:
        linear = Linear(packed[0], module.bias, dtype=module.weight.dtype)
        return _take_over(packed_class(module, linear), module), [linear]

    return {"": Candidate(_lazy_shape(matrix), (matrix,), build, keeps=_biases(module))}


def _attention(module: Any) -> dict[str, Candidate | LeftAlone]:
    keys = ["in_proj_weight"]
    if not module._qkv_same_embed_dim:
        keys = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    out = module.out_proj
    reason = more_than(nn.MultiheadAttention, module, _ATTENTION_HOLDS)
    if reason is None and not isinstance(out, nn.Linear):
        reason = f"its out_proj is a {type(out).__name__}"
    elif reason is None and (own := more_than(nn.Linear, out, _HOLDS)) is not None:
        reason = f"its out_proj: {own}"
    for owner, key in [*((module, key) for key in keys), (out, "weight")]:
        reason = reason or unreadable(owner, key)
    if reason is not None:
        return {"": LeftAlone((), reason)}
    e = module.embed_dim
    if len(keys) == 1:
        rows = [Cut(rows=(i * e, (i + 1) * e)) for i in range(3)]
        inner = [Matrix(keys[0], module.in_proj_weight, cut) for cut in rows]
    else:
        inner = [Matrix(key, getattr(module, key)) for key in keys]
    matrices = (*inner, Matrix("out_proj.weight", out.weight))
    shape = (4 * e, e) if len(keys) == 1 else ()

    def build(packed: Sequence[PackedTensor]) -> Built:
        bias = module.in_proj_bias
        biases = [*(bias.chunk(3) if bias is not None else [None] * 3), out.bias]
        dtype = out.weight.dtype
        linears = [Linear(p, b, dtype=dtype) for p, b in zip(packed, biases, strict=True)]
        _take_over(linears[3], out)
        return _take_over(MultiheadAttention(module, *linears), module), linears

    others = (module.in_proj_bias, module.bias_k, module.bias_v, out.bias)
    keeps = tuple(each for each in others if each is not None)
    return {"": Candidate(shape, matrices, build, keeps=keeps)}


def _stacks(module: Any) -> dict[str, Candidate | LeftAlone]:
    found: dict[str, Candidate | LeftAlone] = {}
    transposed = bool(_transposed(module))
    for name, parameter in module._parameters.items():
        if parameter is None or _dims(parameter) != 3:
            continue
        reason = unreadable(module, name)
        if name not in _STACK_NAMES:
            reason = "three dimensions, but not called like a projection of experts"
        if reason is not None:
            found[name] = LeftAlone(tuple(parameter.shape), reason)
        else:
            found[name] = _stack(name, parameter, transposed)
    return found


def _stack(name: str, parameter: Parameter, transposed: bool) -> Candidate:
    cuts = [Cut(expert=i, transposed=transposed) for i in range(len(parameter))]
    matrices = tuple(Matrix(name, parameter, cut) for cut in cuts)
    dtype = parameter.dtype

    def build(packed: Sequence[PackedTensor]) -> Built:
        new = PackedExperts(packed[0], transposed=transposed, dtype=dtype)
        return new, [new]

    shape = (len(parameter), *matrices[0].shape)
    return Candidate(shape, matrices, build, lambda each: (join(each),), parameter=name)


def _transposed(module: Any) -> bool | None:
    """Whether a module has stacks `[experts, k, n]`; None: it is not known to have any."""
    if isinstance(getattr(module, "has_gate", None), bool):  # transformers 5 says so
        stated = getattr(module, "is_transposed", None)
        return stated if isinstance(stated, bool) else None
    return _STACKS.get(type(module).__name__)


def _embedding(module: Any) -> dict[str, Candidate | LeftAlone]:
    return {"": LeftAlone(_shape(module), "an embedding is looked up, not multiplied by")}


def _other(module: Module) -> dict[str, Candidate | LeftAlone]:
    """What looks as if it could have been meant."""
    name = type(module).__name__
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        shape = (module.out_features, module.in_features)
        if all(isinstance(length, int) for length in shape) and not hasattr(module, "base_layer"):
            return {"": LeftAlone(shape, f"{name} is not a torch.nn.Linear")}
    wide = [p for p in module._parameters.values() if p is not None and _dims(p) >= 2]
    if not wide or name == "ParametrizationList":
        return {}
    reason = f"{name} is not known to multiply by its weight as a linear layer does"
    return {"": LeftAlone(tuple(wide[0].shape), reason)}


_KINDS: tuple[tuple[Callable[[Any], bool], Callable[[Any], Any]], ...] = (
    (lambda m: isinstance(m, nn.Linear), _linear),
    (_is_conv1d, _conv1d),
    (lambda m: isinstance(m, (nn.Conv1d, nn.Conv2d)), _conv),
    (lambda m: isinstance(m, nn.MultiheadAttention), _attention),
    (lambda m: isinstance(m, (nn.Embedding, nn.EmbeddingBag)), _embedding),
    (_is_stack, _stacks),
)


# -- small questions ------------------------------------------------------------------------------


def _dims(parameter: Parameter) -> int:
    return 0 if isinstance(parameter, UninitializedParameter) else parameter.dim()


def _shape(module: Any) -> tuple[int, ...]:
    weight = getattr(module, "weight", None)
    lazy = isinstance(weight, UninitializedParameter)
    return tuple(weight.shape) if isinstance(weight, torch.Tensor) and not lazy else ()


def _lazy_shape(matrix: Matrix) -> tuple[int, ...]:
    return () if isinstance(matrix.parameter, UninitializedParameter) else matrix.shape


def _biases(module: Any) -> tuple[torch.Tensor, ...]:
    return () if module.bias is None else (module.bias,)


def _take_over(new: Any, old: Module) -> Any:
    """Mode, hooks (the same dictionaries, so that their handles still remove them) and whatever
    else was set on the layer."""
    new.train(old.training)
    for name in _HOOKS:
        new.__dict__[name] = old.__dict__[name]
    for name, value in old.__dict__.items():
        new.__dict__.setdefault(name, value)
    return new


def _format_of(module: Any) -> str:
    format = getattr(module, "format", None)
    return f": {format}" if isinstance(format, str) else ""

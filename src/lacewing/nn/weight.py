"""A packed weight that looks like the dense tensor it stands for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.utils._pytree import tree_map

from lacewing.errors import RequestError
from lacewing.formats import PackedTensor
from lacewing.nn import ops

__all__ = ["PackedWeight"]

_ASKING_FOR_GRADIENT = (torch.Tensor.requires_grad.__set__, torch.Tensor.requires_grad_)


class PackedWeight(torch.Tensor):
    """`[n, k]`: shape, type and device cost nothing; `F.linear` with it multiplies by the packed
    weight; whatever else reads it gets the dequantized matrix, made anew each time.

    It cannot be written to and takes no gradient: RequestError.
    """

    part_0: torch.Tensor
    part_1: torch.Tensor | None
    format: str

    @staticmethod
    def __new__(
        cls,
        part_0: torch.Tensor,
        part_1: torch.Tensor | None,
        format: str,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> PackedWeight:
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device="cpu")
        self.part_0, self.part_1, self.format = part_0, part_1, format
        made: PackedWeight = self
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"PackedWeight({self.format}, shape={list(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        return self  # it never changes

    def packed(self) -> PackedTensor:
        """The same bytes without PyTorch."""
        n, k = self.shape
        return ops.packed_of(self.part_0, self.part_1, self.format, n, k)

    def dequantized(self) -> torch.Tensor:
        """The matrix `[n, k]` that the packed weight stands for, in `dtype`."""
        n, k = self.shape
        return ops.dequantize(self.part_0, self.part_1, self.format, n, k).to(self.dtype)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x W^T + bias` by the packed weight."""
        arguments = (ops.autocast(x), self.part_0, self.part_1, bias, self.format, *self.shape)
        y: torch.Tensor = ops.linear(*arguments)
        return y

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        names = ["part_0"] if self.part_1 is None else ["part_0", "part_1"]
        return names, (self.format, tuple(self.shape), self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, torch.Tensor],
        context: tuple[Any, ...],
        outer_size: Sequence[int],
        outer_stride: Sequence[int],
    ) -> PackedWeight:
        return PackedWeight(inner["part_0"], inner.get("part_1"), *context)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _ASKING_FOR_GRADIENT and not _asked_for_gradient(*args, **kwargs or {}):
            return args[0]
        if func in _ASKING_FOR_GRADIENT or func == torch.Tensor.data.__set__:
            raise _frozen("data" if func == torch.Tensor.data.__set__ else "requires_grad")
        if func is torch.Tensor.share_memory_:  # there is no dense memory to share
            raise _frozen("share_memory_")
        if func is functional.linear:
            x, weight, bias = _linear_arguments(*args, **kwargs or {})
            if isinstance(weight, PackedWeight) and not isinstance(x, PackedWeight):
                return weight.linear(x, bias)
        with torch._C.DisableTorchFunctionSubclass():  # results are plain tensors
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(isinstance(each, PackedWeight) for each in _written(func, args)):
            raise _frozen(func.__name__)
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            self = args[0]
            return PackedWeight(self.part_0, self.part_1, self.format, self.shape, self.dtype)
        args, kwargs = tree_map(_dense, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


def _linear_arguments(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    return input, weight, bias


def _written(func: Any, args: Sequence[Any]) -> Iterable[Any]:
    """The arguments that an operator writes to."""
    for declared, value in zip(func._schema.arguments, args, strict=False):
        if declared.alias_info is not None and declared.alias_info.is_write:
            yield value


def _dense(value: Any) -> Any:
    return value.dequantized() if isinstance(value, PackedWeight) else value


def _asked_for_gradient(weight: torch.Tensor, requires_grad: bool = True) -> bool:
    return requires_grad


def _frozen(what: str) -> RequestError:
    return RequestError(
        f"`{what}`: a packed weight is frozen: it cannot be written to and takes no gradient",
        hint="train adapters on top of it (PEFT) and leave them unmerged, or train and merge in the"
        " dense model and replace its layers afterwards",
    )

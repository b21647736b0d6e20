"""The operators of packed weights as PyTorch knows them:

    lacewing::linear(Tensor x, Tensor part_0, Tensor? part_1, Tensor? bias, str format,
                     int n, int k)
    lacewing::linear_no_grad(..)                    the same without a gradient: less to do per call
    lacewing::linear_backward(Tensor grad, Tensor part_0, Tensor? part_1, str format, int n, int k)
    lacewing::dequantize(Tensor part_0, Tensor? part_1, str format, int n, int k)

`linear` is `x W^T + bias`: x `[..., k]` of float32, bfloat16 or float16 with any strides, W
`[n, k]` in the parts of `format`, bias `[n]` or None; the result is `[..., n]` in the type of x, in
the bits of `Format.reference_linear` with x in float32, rounded to the type of x. The kernel
is C++ behind PyTorch's stable C interface, on PyTorch's own threads (docs/adr/0007-torch.md); a
PyTorch older than 2.10 gets it through numpy. `linear_backward` is `grad W`: the weight is frozen.
`dequantize` is W in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lacewing import native
from lacewing.formats import PackedTensor, get_format

__all__ = [
    "FLOATS",
    "autocast",
    "dequantize",
    "linear",
    "linear_backward",
    "linear_by_numpy",
    "linear_no_grad",
    "packed_of",
]

_ARGUMENTS = (
    "(Tensor x, Tensor part_0, Tensor? part_1, Tensor? bias, str format, int n, int k) -> Tensor"
)
_NAMES = ("linear", "linear_no_grad")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What x and the bias may be."""
_BACKWARD_WEIGHTS = 1 << 24
"""Weights that are dequantized at once while a gradient is computed: 64 MB."""


def packed_of(
    part_0: torch.Tensor, part_1: torch.Tensor | None, format: str, n: int, k: int
) -> PackedTensor:
    """The packed weight `[n, k]` over the bytes of two tensors. Checks nothing."""
    names = get_format(format).part_names
    parts = [part.numpy() for part in (part_0, part_1) if part is not None]
    return PackedTensor(format, (n, k), dict(zip(names, parts, strict=True)))


def autocast(x: torch.Tensor) -> torch.Tensor:
    """x in autocast's type, if that is on and x is of a type that it casts."""
    wanted = torch.is_autocast_enabled("cpu") and x.dtype in FLOATS
    return x.to(torch.get_autocast_dtype("cpu")) if wanted else x


def _rows(packed: PackedTensor, begin: int, end: int) -> torch.Tensor:
    """Rows `begin..end` of a packed weight in float32, `[end - begin, k]`."""
    rows = np.arange(begin, end, dtype=np.int32)
    return torch.from_numpy(native.compiled().gather_rows(native.tensor(packed), rows))


def _dequantize(
    part_0: torch.Tensor, part_1: torch.Tensor | None, format: str, n: int, k: int
) -> torch.Tensor:
    return _rows(packed_of(part_0, part_1, format, n, k), 0, n)


def _dequantize_shape(
    part_0: torch.Tensor, part_1: torch.Tensor | None, format: str, n: int, k: int
) -> torch.Tensor:
    return part_0.new_empty((n, k), dtype=torch.float32)


def linear_by_numpy(
    x: torch.Tensor,
    part_0: torch.Tensor,
    part_1: torch.Tensor | None,
    bias: torch.Tensor | None,
    format: str,
    n: int,
    k: int,
) -> torch.Tensor:
    """The kernel of a PyTorch without a stable C interface."""
    packed = packed_of(part_0, part_1, format, n, k)
    y: torch.Tensor = native.linear(x, packed, bias, threads=torch.get_num_threads())
    return y


def _linear_shape(
    x: torch.Tensor,
    part_0: torch.Tensor,
    part_1: torch.Tensor | None,
    bias: torch.Tensor | None,
    format: str,
    n: int,
    k: int,
) -> torch.Tensor:
    torch._check(x.shape[-1] == k, lambda: f"lacewing::linear: x must be [..., {k}]")
    for other in (part_0, part_1, bias):
        valued = other is None or other.device.type != "meta" or x.device.type == "meta"
        torch._check(valued, lambda: "lacewing::linear: parts and bias must be on the CPU")
    return x.new_empty((*x.shape[:-1], n))


def _linear_backward(
    grad: torch.Tensor,
    part_0: torch.Tensor,
    part_1: torch.Tensor | None,
    format: str,
    n: int,
    k: int,
) -> torch.Tensor:
    packed = packed_of(part_0, part_1, format, n, k)
    rows = grad.reshape(-1, n).float()
    total = torch.zeros(rows.shape[0], k, dtype=torch.float32)
    step = max(1, _BACKWARD_WEIGHTS // k)
    for begin in range(0, n, step):
        end = min(begin + step, n)
        total += rows[:, begin:end] @ _rows(packed, begin, end)
    return total.to(grad.dtype).reshape(*grad.shape[:-1], k)


def _linear_backward_shape(
    grad: torch.Tensor,
    part_0: torch.Tensor,
    part_1: torch.Tensor | None,
    format: str,
    n: int,
    k: int,
) -> torch.Tensor:
    return grad.new_empty((*grad.shape[:-1], k))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, part_0, part_1, _, ctx.format, ctx.n, ctx.k = inputs
    ctx.save_for_backward(part_0, part_1)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    part_0, part_1 = ctx.saved_tensors
    for_x, for_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    parts = part_0, part_1, ctx.format, ctx.n, ctx.k
    dx = linear_backward(grad, *parts) if for_x else None
    db = grad.reshape(-1, grad.shape[-1]).sum(0) if for_bias else None
    return dx, None, None, db, None, None, None


def _keep_for_second(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, part_0, part_1, *ctx.weight = inputs
    ctx.save_for_backward(part_0, part_1)


def _second_gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    weight = dequantize(*ctx.saved_tensors, *ctx.weight)
    return (grad.float() @ weight.T).to(grad.dtype), None, None, None, None, None


def _define() -> None:
    if native.compiled().define_torch_operators([name + _ARGUMENTS for name in _NAMES]):
        for name in _NAMES:
            torch.library.define(f"lacewing::{name}", _ARGUMENTS)
            torch.library.impl(f"lacewing::{name}", "cpu", linear_by_numpy)
    backward = "lacewing::linear_backward"
    arguments = "(Tensor grad, Tensor part_0, Tensor? part_1, str format, int n, int k) -> Tensor"
    torch.library.define(backward, arguments)
    torch.library.impl(backward, "cpu", _linear_backward)
    torch.library.register_fake(backward, _linear_backward_shape)
    torch.library.register_autograd(backward, _second_gradients, setup_context=_keep_for_second)
    whole = "lacewing::dequantize"
    arguments = "(Tensor part_0, Tensor? part_1, str format, int n, int k) -> Tensor"
    torch.library.define(whole, arguments)
    torch.library.impl(whole, "cpu", _dequantize)
    torch.library.register_fake(whole, _dequantize_shape)
    for name in _NAMES:
        torch.library.register_fake(f"lacewing::{name}", _linear_shape)
    torch.library.register_autograd("lacewing::linear", _gradients, setup_context=_keep)


_define()
linear = torch.ops.lacewing.linear.default
linear_no_grad = torch.ops.lacewing.linear_no_grad.default
linear_backward = torch.ops.lacewing.linear_backward.default
dequantize = torch.ops.lacewing.dequantize.default

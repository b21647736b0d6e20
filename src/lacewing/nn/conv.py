"""1x1 convolutions with a packed weight: a product for every pixel."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Module

from lacewing.errors import FormatError, RequestError
from lacewing.nn.linear import Linear

__all__ = ["Conv1d", "Conv2d"]


class _Pointwise(Module):
    """What both share: `y[.., n, p] = sum_k W[n, k] x[.., k, p * stride] + bias[n]`.

    x: `[N, C, *]` or `[C, *]`. Its rows are its pixels, so that channels-last is its layout: such
    an x is not copied, and y is channels-last then; else y is contiguous.
    """

    _dims: int
    """Axes of a picture: 1 or 2."""
    linear: Linear
    in_channels: int
    stride: tuple[int, ...]

    def __init__(self, dense: Any, linear: Linear) -> None:
        """dense: the convolution whose options it takes over; linear: its weight `[n, k]`."""
        Module.__init__(self)
        own = self.__dict__
        own.update({name: value for name, value in dense.__dict__.items() if name not in own})
        self.linear = linear

    @property
    def weight(self) -> torch.Tensor:
        """`[out_channels, in_channels, 1, ..]`, dequantized each time it is read."""
        return self.linear.weight.reshape(*self.linear.weight.shape, *[1] * self._dims)

    @property
    def bias(self) -> torch.nn.Parameter | None:
        return self.linear.bias

    def register_parameter(self, name: str, param: torch.nn.Parameter | None) -> None:
        if name in ("weight", "bias"):
            raise RequestError(
                f"lacewing.nn.{type(self).__name__}: `{name}` is that of its `linear` and cannot be"
                " assigned",
                hint="assign `linear.bias`" if name == "bias" else "replace a dense layer instead",
            )
        super().register_parameter(name, param)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels = x.ndim - 1 - self._dims
        if channels not in (0, 1) or x.shape[channels] != self.in_channels:
            wanted = f"{self.in_channels}{', *' * self._dims}"
            raise FormatError(
                f"lacewing.nn.{type(self).__name__} needs x [N, {wanted}] or [{wanted}],"
                f" got {list(x.shape)}"
            )
        if any(step > 1 for step in self.stride):
            x = x[(..., *(slice(None, None, step) for step in self.stride))]
        pixels = x.movedim(channels, -1)
        last = pixels.stride(-1) == 1
        y = self.linear(pixels if last else pixels.contiguous()).movedim(-1, channels)
        return y if last else y.contiguous()


class Conv1d(_Pointwise, torch.nn.Conv1d):
    """A `torch.nn.Conv1d` with kernel 1, padding 0 and one group."""

    _dims = 1


class Conv2d(_Pointwise, torch.nn.Conv2d):
    """A `torch.nn.Conv2d` with kernel 1x1, padding 0 and one group."""

    _dims = 2

"""The matrices `[n, k]` inside a module's parameters, and the same ones inside a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lacewing.checkpoint import SourceTensor
from lacewing.checkpoint.tensors import F32
from lacewing.formats import Codes

__all__ = ["Cut", "DenseMatrix", "FileMatrix", "Matrix", "RowsOfTwo", "cut_tensor"]


@dataclass(frozen=True)
class Cut:
    """How a matrix lies in a tensor."""

    expert: int | None = None
    """Of a stack `[experts, ...]`."""
    transposed: bool = False
    """`[inputs, outputs]` in the tensor."""
    rows: tuple[int, int] | None = None
    """Its outputs among those of the tensor."""

    @property
    def whole(self) -> bool:
        return self.expert is None and not self.transposed and self.rows is None

    def of(self, tensor: Any) -> Any:
        """A view of a torch tensor or numpy array. Axes of length 1 (kernels) are dropped."""
        chosen = tensor if self.expert is None else tensor[self.expert]
        matrix = chosen.reshape(chosen.shape[0], -1) if chosen.ndim != 2 else chosen
        matrix = matrix.T if self.transposed else matrix
        return matrix if self.rows is None else matrix[slice(*self.rows)]


@dataclass(frozen=True, eq=False)
class Matrix:
    """One matrix to pack: of a parameter, called `key` in its layer."""

    key: str
    parameter: torch.Tensor
    cut: Cut = Cut()

    def view(self) -> torch.Tensor:
        view: torch.Tensor = self.cut.of(self.parameter.detach())
        return view

    @property
    def shape(self) -> tuple[int, int]:
        """Reads nothing, so that it works on the meta device too."""
        n, k = self.view().shape
        return n, k

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for matrices that are the same memory."""
        view = self.view()
        return view.data_ptr(), tuple(view.shape), view.stride(), view.dtype


class DenseMatrix(SourceTensor):
    """A matrix of a module: a view."""

    def __init__(self, name: str, view: torch.Tensor) -> None:
        self._view = view
        self.name = name
        self.shape = tuple(view.shape)
        self.dtype = str(view.dtype).removeprefix("torch.")
        self.nbytes = view.nbytes

    def dequantize(self, begin: int = 0, end: int | None = None) -> F32:
        rows: F32 = self._view[begin:end].float().numpy()
        return rows

    def codes(self, begin: int = 0, end: int | None = None) -> tuple[str, Codes] | None:
        if self._view.dtype != torch.bfloat16:
            return None
        bits = self._view[begin:end].contiguous().view(torch.int16).numpy()
        return "bf16", Codes(bits.view(np.uint16))


class FileMatrix(SourceTensor):
    """A matrix cut out of a tensor of a checkpoint."""

    def __init__(self, tensor: SourceTensor, cut: Cut, shape: tuple[int, int]) -> None:
        self._tensor = tensor
        self._cut = cut
        self._read: F32 | None = None
        self.name = tensor.name
        self.shape = shape
        self.dtype = tensor.dtype
        self.nbytes = tensor.nbytes

    def dequantize(self, begin: int = 0, end: int | None = None) -> F32:
        stop = self.shape[0] if end is None else end
        if self._cut.expert is None and not self._cut.transposed:
            first = self._cut.rows[0] if self._cut.rows else 0
            rows = self._tensor.dequantize(first + begin, first + stop)
            return rows.reshape(stop - begin, -1)
        if self._read is None:
            self._read = self._cut.of(self._all())
        return self._read[begin:stop]

    def _all(self) -> F32:
        """The tensor, as much of it as the cut needs, in its own order of axes."""
        expert = self._cut.expert
        if expert is None:
            return self._tensor.dequantize()
        one = self._tensor.dequantize(expert, expert + 1)
        return np.broadcast_to(one, (expert + 1, *one.shape[1:]))

    def release(self) -> None:
        self._read = None
        self._tensor.release()


class RowsOfTwo(SourceTensor):
    """The rows of one matrix, then those of another: what a model has as one."""

    def __init__(self, first: SourceTensor, second: SourceTensor) -> None:
        self._both = first, second
        self.name = f"{first.name} + {second.name}"
        self.shape = (first.shape[0] + second.shape[0], first.shape[1])
        self.dtype = first.dtype
        self.nbytes = first.nbytes + second.nbytes
        self.own_format = first.own_format if first.own_format == second.own_format else None

    def dequantize(self, begin: int = 0, end: int | None = None) -> F32:
        return np.concatenate([t.dequantize(b, e) for t, b, e in self._runs(begin, end)])

    def codes(self, begin: int = 0, end: int | None = None) -> tuple[str, Codes] | None:
        return _joined([t.codes(b, e) for t, b, e in self._runs(begin, end)])

    def near_codes(self, begin: int = 0, end: int | None = None) -> tuple[str, Codes] | None:
        return _joined([t.near_codes(b, e) for t, b, e in self._runs(begin, end)])

    def _runs(self, begin: int, end: int | None) -> list[tuple[SourceTensor, int, int]]:
        """The tensors and their own rows that make up rows `begin..end`."""
        first, second = self._both
        n = first.shape[0]
        stop = self.shape[0] if end is None else end
        runs = [(first, begin, min(stop, n)), (second, max(begin - n, 0), stop - n)]
        return [(tensor, b, e) for tensor, b, e in runs if b < e]

    def release(self) -> None:
        for tensor in self._both:
            tensor.release()


def _joined(runs: list[tuple[str, Codes] | None]) -> tuple[str, Codes] | None:
    """None unless all runs are codes of one format."""
    found = [run for run in runs if run is not None]
    if len(found) < len(runs) or len({name for name, _ in found}) != 1:
        return None
    codes = [each for _, each in found]
    scales = [each.scales for each in codes if each.scales is not None]
    mins = [each.mins for each in codes if each.mins is not None]
    return found[0][0], Codes(
        np.concatenate([each.q for each in codes]),
        np.concatenate(scales) if scales else None,
        np.concatenate(mins) if mins else None,
    )


def cut_tensor(tensor: SourceTensor, matrix: Matrix) -> SourceTensor:
    """The tensor itself where the matrix is all of it: it may have codes of its own."""
    if matrix.cut.whole and len(tensor.shape) == 2:
        return tensor
    return FileMatrix(tensor, matrix.cut, matrix.shape)

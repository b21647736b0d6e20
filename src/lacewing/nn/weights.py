"""Where the weights of a model's layers are read: in the model, or in a checkpoint of it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.nn import Module

from lacewing.checkpoint import SourceTensor, open_source, open_weights
from lacewing.checkpoint.manifest import MANIFEST
from lacewing.errors import CheckpointError, RequestError
from lacewing.nn.candidates import Candidate
from lacewing.nn.matrices import DenseMatrix, Matrix, cut_tensor

__all__ = ["Weights"]


class Weights:
    """The model's own weights, or those of a checkpoint.

    A checkpoint's names are the model's, but for what comes first: one may have a prefix that the
    other has not (`model.`, `transformer.`), the same for every layer. What PEFT and
    `torch.compile` put between (`base_layer.`, `_orig_mod.`) does not count.
    """

    def __init__(self, model: Module, path: Any) -> None:
        self.from_file = path is not None
        self._path = path
        self._tensors: Mapping[str, SourceTensor] = {}
        self._tied: dict[int, list[str]] = {}
        self._change: tuple[str, str] | None = None
        if path is not None:
            self._tensors = _open(path)
            for name, parameter in model.named_parameters(remove_duplicate=False):
                self._tied.setdefault(id(parameter), []).append(_plain(name))

    def of(self, names: tuple[str, ...], found: Candidate) -> tuple[tuple[SourceTensor, ...], Any]:
        """What the layer's matrices are read from, and what is equal for equal weights.

        Raises CheckpointError where a checkpoint does not have them, in their shape.
        """
        if not self.from_file:
            views = [DenseMatrix(f"{names[0]}.{m.key}", m.view()) for m in found.matrices]
            return tuple(views), tuple(m.identity for m in found.matrices)
        tensors = tuple(self._in_file(names[0], matrix, found) for matrix in found.matrices)
        return tensors, tuple((t.name, m.cut) for t, m in zip(tensors, found.matrices, strict=True))

    def _in_file(self, layer: str, matrix: Matrix, found: Candidate) -> SourceTensor:
        own = layer if found.parameter is not None else f"{layer}.{matrix.key}"
        called = [_plain(own), *self._tied.get(id(matrix.parameter), [])]
        tensor = next((t for t in map(self._find, called) if t is not None), None)
        if tensor is None:
            near = difflib.get_close_matches(_plain(own), list(self._tensors), 3)
            raise CheckpointError(
                f"{self._path}: `{own}` must be in a checkpoint of this model, and is not",
                hint=f"near matches: {', '.join(near)}" if near else "it is of another model",
            )
        wanted = tuple(matrix.parameter.shape)
        if tuple(tensor.shape) != wanted:
            raise CheckpointError(
                f"{self._path}: `{tensor.name}` must be {list(wanted)} as in the model,"
                f" got {list(tensor.shape)}",
                hint="it is of another model",
            )
        tensor.check_type()
        return cut_tensor(tensor, matrix)

    def _find(self, name: str) -> SourceTensor | None:
        if self._change is None:
            self._change = self._difference(name)
        if self._change is None:
            return None
        ours, theirs = self._change
        return self._tensors.get(theirs + name[len(ours) :]) if name.startswith(ours) else None

    def _difference(self, name: str) -> tuple[str, str] | None:
        """What the model's names begin with and what the checkpoint's do instead."""
        if name in self._tensors:
            return "", ""
        parts = name.split(".")
        for i in range(1, len(parts) - 1):
            shorter = ".".join(parts[i:])
            if shorter in self._tensors:
                return name[: -len(shorter)], ""
        longer = [each for each in self._tensors if each.endswith("." + name)]
        return ("", longer[0][: -len(name)]) if len(longer) == 1 else None


def _open(path: Any) -> Mapping[str, SourceTensor]:
    if not isinstance(path, (str, os.PathLike)):
        raise RequestError(f"`checkpoint` must be the path of a model, got {path!r}")
    place = Path(path)
    if place.is_dir() and not (place / MANIFEST).exists():
        return open_weights(place)
    return open_source(place).tensors


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "_orig_mod"))

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
from lacewing.nn.matrices import DenseMatrix, Matrix, RowsOfTwo, cut_tensor

__all__ = ["Weights"]

_APART = {
    "gate_up_proj": (
        (".mlp.", ("gate_proj", "up_proj")),
        (".block_sparse_moe.", ("w1", "w3")),
    ),
    "down_proj": ((".mlp.", ("down_proj",)), (".block_sparse_moe.", ("w2",))),
    "up_proj": ((".mlp.", ("up_proj",)),),
}
"""A stack of transformers 5 -> what checkpoints have in its place for every expert: the module
above the experts (`.mlp.` in the model), and the matrices, one below the other."""


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
        alone = None if tensor is not None else self._expert(_plain(own), matrix)
        if alone is not None:
            return alone
        if tensor is None:
            near = difflib.get_close_matches(_plain(own), list(self._tensors), 3)
            raise CheckpointError(
                f"{self._path}: `{own}` must be in a checkpoint of this model, and is not",
                hint=f"near matches: {', '.join(near)}" if near else "it is of another model",
            )
        wanted = tuple(matrix.parameter.shape)
        if tuple(tensor.shape) != wanted:
            raise _other_shape(self._path, tensor, wanted)
        tensor.check_type()
        return cut_tensor(tensor, matrix)

    def _expert(self, name: str, matrix: Matrix) -> SourceTensor | None:
        """The weight of one expert where the checkpoint has them apart, as most have."""
        stack, _, projection = name.rpartition(".")
        if matrix.cut.expert is None or matrix.cut.transposed:
            return None
        for above, parts in _APART.get(projection, ()):
            place = f"{stack.replace('.mlp.', above)}.{matrix.cut.expert}"
            found = [self._find(f"{place}.{part}.weight") for part in parts]
            tensors = [tensor for tensor in found if tensor is not None]
            if len(tensors) < len(parts):
                continue
            whole = tensors[0] if len(tensors) == 1 else RowsOfTwo(*tensors)
            if {t.shape[1:] for t in tensors} != {whole.shape[1:]} or whole.shape != matrix.shape:
                raise _other_shape(self._path, whole, matrix.shape)
            for tensor in tensors:
                tensor.check_type()
            return whole
        return None

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


def _other_shape(path: Any, tensor: SourceTensor, wanted: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{path}: `{tensor.name}` must be {list(wanted)} as in the model, got {list(tensor.shape)}",
        hint="it is of another model",
    )


def _open(path: Any) -> Mapping[str, SourceTensor]:
    if not isinstance(path, (str, os.PathLike)):
        raise RequestError(f"`checkpoint` must be the path of a model, got {path!r}")
    place = Path(path)
    if place.is_dir() and not (place / MANIFEST).exists():
        return open_weights(place)
    return open_source(place).tensors


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "_orig_mod"))

"""The safetensors of a model directory: one file, or an index of shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lacewing.checkpoint.files import fail, read_json, shown
from lacewing.checkpoint.safetensors import SafetensorsFile, read_safetensors
from lacewing.checkpoint.tensors import F32, SourceTensor
from lacewing.errors import UnsupportedModelError
from lacewing.formats import Codes

__all__ = ["FLOATS", "INDEX", "SINGLE", "FloatTensor", "as_f32", "open_shards"]

Array = npt.NDArray[Any]

FLOATS = ("F32", "F16", "BF16")
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DAMAGED = "the download is incomplete or damaged: fetch it again"


def as_f32(values: Array, dtype: str) -> F32:
    """Stored values of one of FLOATS in f32, without loss; bf16 is held as its bits."""
    if dtype == "BF16":
        values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(invalid="ignore"):  # NaN; found by whoever rounds
        return values.astype(np.float32, copy=False)


class FloatTensor(SourceTensor):
    """A tensor that is stored as it is."""

    def __init__(self, file: SafetensorsFile, name: str) -> None:
        entry = file.tensors[name]
        self.file = file
        self.name = name
        self.shape = entry.shape
        self.dtype = entry.dtype
        self.nbytes = entry.nbytes

    def check_type(self) -> None:
        if self.dtype not in FLOATS:
            raise UnsupportedModelError(
                f"`{self.name}`: needs a type of {', '.join(FLOATS)}, got {self.dtype}",
                hint="use the original model, or a GGUF file of it",
            )

    def array(self) -> Array:
        """The stored values, a view of the file; bf16 as its bits."""
        return self.file.array(self.name)

    def dequantize(self, begin: int = 0, end: int | None = None) -> F32:
        values = self.array()
        return as_f32(values[begin:end] if values.shape else values, self.dtype)

    def release(self) -> None:
        self.file.release(self.name)

    def codes(self, begin: int = 0, end: int | None = None) -> tuple[str, Codes] | None:
        if self.dtype != "BF16" or len(self.shape) != 2:
            return None
        return "bf16", Codes(self.array()[begin:end])


def open_shards(path: Path) -> dict[str, SafetensorsFile]:
    """Tensor name -> the file that holds it: `model.safetensors`, shards with an index, or the only
    safetensors file there is, whatever its name (AutoGPTQ's). Raises CheckpointError."""
    single = path / SINGLE
    if not single.exists() and not (path / INDEX).exists():
        found = list(path.glob("*.safetensors"))
        single = found[0] if len(found) == 1 else single
    if single.exists():
        file = read_safetensors(single)
        return dict.fromkeys(file.tensors, file)
    if not (path / INDEX).exists():
        others = any(path.glob("*.bin")) or any(path.glob("*.pt*"))
        hint = "convert the weights to safetensors first" if others else _DAMAGED
        fail(str(path), f"{SINGLE} or {INDEX}", "neither", hint)
    index = path / INDEX
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict):
        fail(f"{index}: `weight_map`", "a mapping of tensors to files", shown(placed))
    for name, file_name in placed.items():
        _check_file_name(index, name, file_name)
    files = {file_name: read_safetensors(path / file_name) for file_name in set(placed.values())}
    for name, file_name in placed.items():
        if name not in files[file_name].tensors:
            fail(f"{index}: tensor `{shown(name)}`", f"to be in {file_name}", "none", _DAMAGED)
    return {name: files[file_name] for name, file_name in placed.items()}


def _check_file_name(index: Path, name: str, value: Any) -> None:
    """The files lie in the directory itself (links are welcome: the hub's cache has them)."""
    plain = isinstance(value, str) and value.isprintable() and not set("/\\") & set(value)
    if not plain or value in ("", ".", ".."):
        fail(f"{index}: tensor `{shown(name)}`", "the name of a file beside it", shown(value))

"""Packed layers under the names that a file of transformers has for them, which
`checkpoint/transformers.py` describes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import Module

from lacewing.checkpoint.files import fail
from lacewing.checkpoint.safetensors import NAMES, SafetensorsFile
from lacewing.checkpoint.transformers import DAMAGED, damaged
from lacewing.errors import CheckpointError, FormatError, RequestError
from lacewing.formats import PackedTensor, get_format
from lacewing.formats.base import Array, aligned_empty
from lacewing.nn.attention import MultiheadAttention
from lacewing.nn.candidates import Candidate
from lacewing.nn.conv import Conv1d, Conv2d
from lacewing.nn.experts import PackedExperts
from lacewing.nn.huggingface.config import LacewingConfig
from lacewing.nn.linear import Linear
from lacewing.nn.plan import Layer, layers_of

__all__ = [
    "Parts",
    "Room",
    "check_marks",
    "check_types",
    "is_loaded",
    "make_room",
    "parameter_of",
    "stored",
    "tensors_of",
]

_CONVOLUTIONS = (Conv1d, Conv2d)
_MARK = (1, 1, 1, 1, 1)


def parameter_of(layer: Layer) -> str | None:
    """The one parameter that a layer is packed from, as its module calls it; None for a layer that
    has several, or none."""
    if not isinstance(layer.found, Candidate):
        return None
    keys = {matrix.key for matrix in layer.found.matrices}
    return keys.pop() if len(keys) == 1 else None


def is_loaded(tensor: torch.Tensor) -> bool:
    """Whether transformers has read it from a checkpoint; else it has made it up."""
    return getattr(tensor, "_is_hf_initialized", False) and not tensor.is_meta


# -- saving ---------------------------------------------------------------------------------------


def stored(model: Module) -> dict[str, Linear | PackedExperts]:
    """The packed weights of a model by the names of their dense ones (`<name>.weight`). Raises
    RequestError for a layer that has no names in a file."""
    found: dict[str, Linear | PackedExperts] = {}
    for name, module in model.named_modules():
        if isinstance(module, MultiheadAttention):
            raise RequestError(
                f"`{name}`: save_pretrained cannot store a packed MultiheadAttention",
                hint="leave it out of what is packed: `exclude`",
            )
        if isinstance(module, PackedExperts):
            found[name] = module
        elif isinstance(module, _CONVOLUTIONS):
            found[f"{name}.weight"] = module.linear
        elif isinstance(module, Linear) and not isinstance(_above(model, name), _CONVOLUTIONS):
            found[f"{name}.weight"] = module
    return found


def _above(model: Module, name: str) -> Module:
    return model.get_submodule(name.rpartition(".")[0])


def tensors_of(model: Module) -> dict[str, torch.Tensor]:
    """What save_pretrained writes."""
    inner = [f"{n}.linear." for n, m in model.named_modules() if isinstance(m, _CONVOLUTIONS)]
    tensors = {}
    for key, tensor in model.state_dict().items():
        own = next((prefix for prefix in inner if key.startswith(prefix)), None)
        tensors[key if own is None else own.removesuffix("linear.") + key[len(own) :]] = tensor
    for name, weight in stored(model).items():
        tensors[name] = torch.full(_MARK, torch.nan, dtype=weight.dtype)
    return tensors


# -- loading --------------------------------------------------------------------------------------


class Parts(Module):
    """Stands where a dense weight was: buffers without a size, called as the parts of a format."""

    _is_hf_initialized = True  # transformers has nothing to fill with random numbers here

    def __init__(self, format: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        for part, kind in get_format(format).part_dtypes.items():
            empty = torch.from_numpy(np.empty(0, kind))
            self.register_buffer(part, empty.to("meta"))


@dataclass(frozen=True, eq=False)
class Room:
    """A layer of a skeleton whose packed weight is still to be read."""

    name: str
    """Of the dense weight."""
    layer: Layer
    entry: Mapping[str, Any]
    """Of `quantization_config.layers`."""
    parts: Parts

    def fill(self) -> None:
        """Puts the packed layer in place. Raises CheckpointError for parts that are missing or
        not those of the format."""
        needed = {f"{self.name}.{part}": tensor for part, tensor in self.parts.named_buffers()}
        bias = getattr(self.layer.module, "bias", None)
        if isinstance(bias, torch.Tensor):
            needed[f"{self.layer.names[0]}.bias"] = bias
        for key, tensor in needed.items():
            if not is_loaded(tensor):
                raise CheckpointError(
                    f"`{key}`: needed by config.json, and not in the checkpoint",
                    hint=DAMAGED,
                )
        assert isinstance(self.layer.found, Candidate)
        try:
            self.layer.put(self.layer.found.build([self._packed()])[0])
        except (FormatError, IndexError, TypeError, ValueError) as error:
            hint = getattr(error, "hint", None) or DAMAGED
            raise CheckpointError(f"`{self.name}`: {error}", hint=hint) from error

    def _packed(self) -> PackedTensor:
        format, (*experts, n, k) = self.entry["format"], self.entry["shape"]
        kind = get_format(format)
        parts = {
            part: _aligned(tensor, kind.part_dtypes[part])
            for part, tensor in self.parts.named_buffers()
        }
        packed = PackedTensor(format, (n, k), parts)
        if not experts:
            kind.validate(packed)
        elif any(len(part) != experts[0] for key, part in parts.items() if key != "stream"):
            raise FormatError(f"needs parts of {experts[0]} experts")
        return packed


def check_types(model: Any, rooms: Iterable[Room], file: SafetensorsFile) -> None:
    """Raises CheckpointError for parts of another type than their format's: transformers would
    convert them."""
    prefix = f"{model.base_model_prefix}."
    for room in rooms:
        names = {room.name, prefix + room.name, room.name.removeprefix(prefix)}
        for part, dtype in get_format(room.entry["format"]).part_dtypes.items():
            for key in (f"{name}.{part}" for name in names):
                found = file.tensors.get(key)
                if found is not None and found.dtype != NAMES[dtype]:
                    fail(f"{file.path}: `{key}`", NAMES[dtype], found.dtype, DAMAGED)


def check_marks(model: Module) -> None:
    """Raises CheckpointError where a mark has come in the place of a weight. New versions of
    transformers refuse it themselves."""
    for name, parameter in model.named_parameters():
        if tuple(parameter.shape) == _MARK:
            raise CheckpointError(
                f"`{name}`: packed in the checkpoint, and not listed in config.json", hint=DAMAGED
            )


def _aligned(tensor: torch.Tensor, dtype: np.dtype[Any]) -> Array:
    """A copy on a 64-byte boundary, which files of transformers do not keep."""
    array = tensor.numpy()
    # What belongs to a module that it keeps in f32, transformers has converted; this was exact.
    widened = array.dtype == np.float32 and dtype.itemsize <= 2
    out = aligned_empty(array.shape, dtype if widened else array.dtype)
    out[...] = array
    return out


def make_room(model: Any, config: LacewingConfig) -> list[Room]:
    """Takes the dense weights out of a skeleton for what config.json says is packed. What belongs
    to a head that the model does not have is left out. Raises CheckpointError if they do not fit.
    """
    if config.layers is None:
        damaged(".layers", "the packed layers", None)
    layers = {name: layer for layer in layers_of(model) for name in layer.names}
    rooms = []
    for name, entry in config.layers.items():
        layer = _find(model, name, layers)
        if layer is not None:
            rooms.append(_room(layer, name, entry))
        elif name.startswith(f"{model.base_model_prefix}."):
            damaged(f".layers.{name}", "a layer of the model that can be packed", "none")
    if config.layers and not rooms:
        damaged(".layers", "layers of the model", f"none of {next(iter(config.layers))}, ..")
    _expect_marks(model, [room.name for room in rooms])
    return rooms


def _find(model: Any, name: str, layers: Mapping[str, Layer]) -> Layer | None:
    """A model with a head has the layers of its base model behind a prefix."""
    prefix = f"{model.base_model_prefix}."
    for own in (name, prefix + name, name.removeprefix(prefix)):
        if own in layers and parameter_of(layers[own]) is not None:
            return layers[own]
    return None


def _room(layer: Layer, name: str, entry: Mapping[str, Any]) -> Room:
    found = layer.found
    assert isinstance(found, Candidate)
    if list(found.shape) != entry["shape"]:
        damaged(f".layers.{name}", f"the shape {list(found.shape)} of the model", entry["shape"])
    key = found.parameter or found.matrices[0].key
    dense = layer.module._parameters.pop(key)
    assert dense is not None
    parts = Parts(entry["format"], getattr(torch, entry.get("dtype", ""), dense.dtype))
    layer.module._modules[key] = parts
    whole = layer.names[0] if found.parameter else f"{layer.names[0]}.{key}"
    return Room(whole, layer, entry, parts)


def _expect_marks(model: Any, names: Iterable[str]) -> None:
    """transformers is not to report the marks, which are for others."""
    prefix = f"{model.base_model_prefix}."
    choices = "|".join(re.escape(name.removeprefix(prefix)) for name in names)
    known = model._keys_to_ignore_on_load_unexpected
    patterns = [*(known or ()), rf"(^|\.)({choices})$"]
    model._keys_to_ignore_on_load_unexpected = set(patterns) if isinstance(known, set) else patterns

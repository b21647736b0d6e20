"""What transformers calls while it loads and saves a model of ours.

Packing while loading: the skeleton keeps its dense layers, on the device meta; transformers hands
over one weight at a time, which is packed and dropped, and in the end the layers are exchanged.

Loading what is packed: the dense layers of the skeleton make way for a `_Slot` with the parts'
names, transformers fills it in its own way (shards, prefixes, renamed tensors), and in the end it
becomes a layer. A dense weight never exists.

A saved model holds, for every packed layer, `<name>.weight.<part>`, and `<name>.weight`: a single
NaN of three dimensions. It fits no weight, so that whoever takes the directory for a dense model
fails: transformers without Lacewing would else leave out what it does not know, and begin with
random weights.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from lacewing.checkpoint.safetensors import read_safetensors
from lacewing.errors import CheckpointError, FormatError, LacewingError, RequestError
from lacewing.formats import PackedTensor, get_format, pack
from lacewing.formats.base import aligned_empty
from lacewing.nn.huggingface.config import METHOD, LacewingConfig, damaged
from lacewing.nn.linear import Linear

__all__ = ["LacewingQuantizer", "register"]


def register() -> None:
    """Makes the method known to transformers; once is enough."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(LacewingConfig)
        register_quantizer(METHOD)(LacewingQuantizer)


class LacewingQuantizer(HfQuantizer):
    """See the top of this file. The names are transformers'."""

    quantization_config: LacewingConfig
    requires_calibration = False
    is_trainable = True  # as far as there is something to train: adapters on top
    is_compileable = True

    def __init__(self, quantization_config: LacewingConfig, **kwargs: Any) -> None:
        # A copy: the list of layers is one model's, and the caller may load several.
        super().__init__(copy.copy(quantization_config), **kwargs)
        self.plan: dict[str, str] = {}
        self.packed: dict[str, tuple[PackedTensor, torch.dtype]] = {}
        self.error: LacewingError | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        for place in device_map.values() if isinstance(device_map, Mapping) else ():
            if str(place) != "cpu":
                raise RequestError(
                    f"`device_map`: packed layers are in the memory of the CPU, got {place!r}",
                    hint='leave `device_map` out, or let it be "cpu"',
                )

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    # -- loading ----------------------------------------------------------------------------------

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            self.plan = choose(model, self.quantization_config)
            return
        for file in checkpoint_files or ():
            if str(file).endswith(".safetensors"):
                read_safetensors(Path(file))  # whole and consistent, before anything is made of it
        layers = _layers_of(model, self.quantization_config)
        for name, entry in layers.items():
            model.set_submodule(name, _Slot(model.get_submodule(name), entry))
        _untie(model, layers)
        _expect_marks(model, layers)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        module, _, name = param_name.rpartition(".")
        if not self.pre_quantized:
            return name == "weight" and module in self.plan
        # Of a part, it means that transformers need not check the shape: the format does.
        return isinstance(model.get_submodule(module), _Parts)

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self)

    def take(self, model: Any, name: str, weight: torch.Tensor) -> None:
        """Packs the dense weight of the module `name`. An error is kept for the end: transformers
        would make its own of it."""
        module = model.get_submodule(name)
        if weight.shape != module.weight.shape:
            wanted, got = list(module.weight.shape), list(weight.shape)
            self.error = self.error or CheckpointError(
                f"`{name}.weight`: needs {wanted} by config.json, got {got}",
                hint="the checkpoint is another model's",
            )
        if self.error is not None:
            return
        matrix = weight.T if isinstance(module, Conv1D) else weight
        try:
            packed = pack(matrix, self.plan[name], self._sparsity(model, module))
        except FormatError as error:
            self.error = FormatError(f"`{name}.weight`: {error}", hint=error.hint)
            return
        self.packed[name] = packed, weight.dtype

    def _sparsity(self, model: Any, module: Any) -> float | None:
        head = model.get_output_embeddings()
        return None if module is head else self.quantization_config.sparsity

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            for name, slot in list(model.named_modules()):
                if isinstance(slot, _Slot):
                    model.set_submodule(name, slot.layer(name, model.dtype))
        else:
            self._exchange(model)
        self._record(model)
        return model

    def _exchange(self, model: Any) -> None:
        for name in self.plan:
            weight = model.get_submodule(name).weight
            if name not in self.packed and _is_loaded(weight):  # a tied one, or merged from several
                self.take(model, name, weight)
        if self.error is not None:
            raise self.error
        for name, (packed, dtype) in self.packed.items():
            model.set_submodule(name, Linear(packed, model.get_submodule(name).bias, dtype=dtype))
        _untie(model, self.packed)
        self.packed.clear()

    # -- saving -----------------------------------------------------------------------------------

    def _record(self, model: Any) -> dict[str, Linear]:
        layers = {
            name: module for name, module in model.named_modules() if isinstance(module, Linear)
        }
        self.quantization_config.record(layers, model.dtype)
        model.config.quantization_config = self.quantization_config
        return layers

    def get_state_dict_and_metadata(
        self, model: Any, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        layers = self._record(model)
        tensors = model.state_dict()
        for name, layer in layers.items():
            tensors[f"{name}.weight"] = torch.full((1, 1, 1), torch.nan, dtype=layer.dtype)
        return tensors, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, Linear):
                model.set_submodule(name, _dense(module, dtype or module.dtype))
        return model


class _Pack(ConversionOps):
    """Takes a weight from transformers as soon as it is read."""

    def __init__(self, quantizer: LacewingQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], *args: Any, model: Any, missing_keys: Any, **kwargs: Any
    ) -> dict[str, Any]:
        left = {}
        for key, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if not self.quantizer.param_needs_quantization(model, key):
                left[key] = tensor
                continue
            self.quantizer.take(model, key.removesuffix(".weight"), tensor)
            missing_keys.discard(key)
            model.get_parameter(key)._is_hf_initialized = True  # stays on the device meta
        return left


def _is_loaded(tensor: torch.Tensor) -> bool:
    """Whether transformers has read it from the checkpoint (else it has made it up)."""
    return getattr(tensor, "_is_hf_initialized", False) and not tensor.is_meta


class _Parts(torch.nn.Module):
    """Buffers without a size, named as the parts of a format."""

    def __init__(self, format: str) -> None:
        super().__init__()
        for part, dtype in get_format(format).part_dtypes.items():
            kind = torch.from_numpy(np.empty(0, dtype)).dtype
            self.register_buffer(part, torch.empty(0, dtype=kind, device="meta"))


class _Slot(torch.nn.Module):
    """Stands for a packed layer in a skeleton: its tensors have the names that a file gives them."""

    def __init__(self, dense: torch.nn.Module, entry: Mapping[str, Any]) -> None:
        super().__init__()
        self.entry = entry
        self.weight = _Parts(entry["format"])
        self.bias = dense.bias

    def layer(self, name: str, dtype: torch.dtype) -> Linear:
        """The layer itself; `dtype` is the model's. Raises CheckpointError."""
        format, shape = self.entry["format"], tuple(self.entry["shape"])
        needed = {f"weight.{part}": tensor for part, tensor in self.weight.named_buffers()}
        for key, tensor in {**needed, "bias": self.bias}.items():
            if tensor is not None and not _is_loaded(tensor):
                raise CheckpointError(
                    f"`{name}.{key}`: needed by config.json, and not in the checkpoint",
                    hint="the directory is damaged: save the model again",
                )
        dtypes = get_format(format).part_dtypes
        parts = {part: _aligned(t, dtypes[part]) for part, t in self.weight.named_buffers()}
        try:
            packed = PackedTensor(format, shape, parts)
            get_format(format).validate(packed)
            own = getattr(torch, self.entry.get("dtype", ""), dtype)
            return Linear(packed, self.bias, dtype=own)
        except FormatError as error:
            raise CheckpointError(f"`{name}.weight`: {error}", hint=error.hint) from error


def _aligned(tensor: torch.Tensor, dtype: np.dtype[Any]) -> Any:
    """A copy on a 64-byte boundary, which the safetensors of transformers do not keep."""
    array = tensor.numpy()
    # What belongs to a module that it keeps in f32, transformers has converted; this was exact.
    widened = array.dtype == np.float32 and dtype.itemsize <= 2
    out = aligned_empty(array.shape, dtype if widened else array.dtype)
    out[...] = array
    return out


def _dense(layer: Linear, dtype: torch.dtype) -> torch.nn.Linear:
    n, k = layer.out_features, layer.in_features
    dense = torch.nn.Linear(k, n, bias=layer.bias is not None, device="meta")
    dense.weight = torch.nn.Parameter(layer.weight.dequantized().to(dtype))
    if layer.bias is not None:
        dense.bias = torch.nn.Parameter(layer.bias.detach().to(dtype))
    return dense.train(layer.training)


# -- which layers ---------------------------------------------------------------------------------


def _layers_of(model: Any, config: LacewingConfig) -> dict[str, dict[str, Any]]:
    """The layers that config.json says are packed, by their names in this model. Those of a head
    that the model does not have are left out. Raises CheckpointError if they do not fit."""
    if config.layers is None:
        damaged(".layers", "the packed layers", None)
    found = {}
    for name, entry in config.layers.items():
        own = _own_name(model, name)
        if own is not None:
            shape = _shape(model.get_submodule(own))
            if shape != entry["shape"]:
                damaged(f".layers.{name}", f"the shape {shape} of the model", entry["shape"])
            found[own] = entry
        elif name.startswith(f"{model.base_model_prefix}."):
            damaged(f".layers.{name}", "a linear layer of the model", "none of that name")
    if config.layers and not found:
        damaged(".layers", "layers of the model", f"none of {next(iter(config.layers))}, ..")
    return found


def _own_name(model: Any, name: str) -> str | None:
    """A model with a head has the base model's layers behind a prefix."""
    prefix = f"{model.base_model_prefix}."
    for own in (name, prefix + name, name.removeprefix(prefix)):
        try:
            if _shape(model.get_submodule(own)) is not None:
                return own
        except AttributeError:
            continue
    return None


def _shape(module: torch.nn.Module) -> list[int] | None:
    """[n, k] of a linear layer; None for another module."""
    if isinstance(module, Conv1D):
        return [module.weight.shape[1], module.weight.shape[0]]
    return list(module.weight.shape) if isinstance(module, torch.nn.Linear) else None


def _untie(model: Any, packed: Iterable[str]) -> None:
    """A packed head no longer shares the embedding's weight."""
    weights = {f"{name}.weight" for name in packed}
    tied = model.all_tied_weights_keys
    for target in [t for t, source in tied.items() if t in weights or source in weights]:
        del tied[target]


def _expect_marks(model: Any, packed: Iterable[str]) -> None:
    """transformers is not to report `<name>.weight`, which only others are meant to see."""
    prefix = f"{model.base_model_prefix}."
    names = "|".join(re.escape(name.removeprefix(prefix)) for name in packed)
    known = model._keys_to_ignore_on_load_unexpected
    patterns = [*(known or ()), rf"(^|\.)({names})\.weight$"]
    model._keys_to_ignore_on_load_unexpected = set(patterns) if isinstance(known, set) else patterns


def choose(model: Any, config: LacewingConfig) -> dict[str, str]:
    out = {}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if type(module) in (torch.nn.Linear, Conv1D):
            out[name] = _HEAD if module is head and not config.format.startswith("bf16") else config.format
    return out


_HEAD = "w8a8g32"

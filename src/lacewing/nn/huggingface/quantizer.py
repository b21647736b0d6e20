"""What transformers calls while it loads and saves a model with packed layers.

Packing while loading: the skeleton keeps its dense layers, on the meta device; transformers hands
over one weight at a time, which is packed and dropped, and in the end the layers are exchanged.

Loading what is packed: the weights of the skeleton make way for the parts of their formats,
transformers fills them in its own way (shards, prefixes, tensors it has renamed), and in the end
the layers are made of them. A dense weight never exists.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from lacewing.checkpoint.packing import Job, packing_threads
from lacewing.checkpoint.safetensors import read_safetensors
from lacewing.errors import CheckpointError, LacewingError, RequestError
from lacewing.formats import PackedTensor, get_format
from lacewing.nn.candidates import Candidate
from lacewing.nn.experts import PackedExperts
from lacewing.nn.huggingface.config import METHOD, LacewingConfig
from lacewing.nn.huggingface.stored import (
    Parts,
    Room,
    check_marks,
    check_types,
    is_loaded,
    make_room,
    parameter_of,
    stored,
    tensors_of,
)
from lacewing.nn.linear import Linear
from lacewing.nn.matrices import DenseMatrix
from lacewing.nn.plan import Layer, choose_layers
from lacewing.nn.registration import attach_to_transformers
from lacewing.nn.replace import target_machine
from lacewing.nn.ties import apply, changes_of

__all__ = ["LacewingQuantizer", "attach", "register"]

HEAD_FORMAT = "w8a8g32"
"""Of the output head where the format is no float format, as in `checkpoint.convert`."""


def register() -> None:
    """Makes the method known to transformers; once is enough."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(LacewingConfig)
        register_quantizer(METHOD)(LacewingQuantizer)


def attach(model: Any) -> None:
    """Lets `save_pretrained` of a model, if it has packed layers, write what `from_pretrained`
    reads. A model that has a quantizer already keeps it."""
    packed = [m for m in model.modules() if isinstance(m, (Linear, PackedExperts))]
    if packed and getattr(model, "hf_quantizer", None) is None:
        formats = Counter(m.format for m in packed if isinstance(m, Linear))
        config = LacewingConfig(*(format for format, _ in formats.most_common(1)))
        model.hf_quantizer = LacewingQuantizer(config, pre_quantized=False)
        model.is_quantized = True
        model.quantization_method = METHOD


class LacewingQuantizer(HfQuantizer):
    """See the top of this file. The names are transformers'."""

    quantization_config: LacewingConfig
    requires_calibration = False
    is_trainable = True  # adapters on top of the packed layers
    is_compileable = True

    def __init__(self, quantization_config: LacewingConfig, **kwargs: Any) -> None:
        # A copy: the list of layers is one model's, and the caller may load several.
        super().__init__(copy.copy(quantization_config), **kwargs)
        self._packing = _Packing(self.quantization_config)
        self._rooms: list[Room] = []

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
            self._packing.choose(model)
            return
        # Whole and consistent, before anything is made of them.
        paths = [Path(file) for file in checkpoint_files or ()]
        files = [read_safetensors(path) for path in paths if path.suffix == ".safetensors"]
        self._rooms = make_room(model, self.quantization_config)
        for file in files:
            check_types(model, self._rooms, file)
        _forget(model, [room.layer for room in self._rooms], [room.name for room in self._rooms])

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        if not self.pre_quantized:
            return param_name in self._packing.wanted
        # Of a part it means that transformers need not check the shape: its format does.
        return isinstance(model.get_submodule(param_name.rpartition(".")[0]), Parts)

    def get_quantize_ops(self) -> ConversionOps:
        return self._packing

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            check_marks(model)
        for room in self._rooms:
            room.fill()
        self._rooms = []
        self._packing.finish(model)
        self.record(model)
        attach_to_transformers(model)
        return model

    # -- saving -----------------------------------------------------------------------------------

    def record(self, model: Any) -> None:
        """Writes into the model's config what is packed."""
        self.quantization_config.record(stored(model), model.dtype)
        model.config.quantization_config = self.quantization_config

    def get_state_dict_and_metadata(
        self, model: Any, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        self.record(model)
        _keep_names(model, stored(model))
        return tensors_of(model), {}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        layers = {name: _above(model, name) for name in stored(model)}
        for name, layer in layers.items():
            if not isinstance(layer, Linear):
                raise RequestError(f"`{name}`: only linear layers can be made dense again")
        kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for name, layer in layers.items():
            model.set_submodule(name.removesuffix(".weight"), _dense(layer, kind or layer.dtype))
        return model


def _above(model: Any, name: str) -> Any:
    return model.get_submodule(name.rpartition(".")[0])


class _Packing(ConversionOps):
    """Takes weights from transformers as soon as they are read, and packs them."""

    def __init__(self, config: LacewingConfig) -> None:
        self.config = config
        self.wanted: dict[str, tuple[Layer, str, float | None]] = {}
        """Name of a dense weight -> its layer, format and sparsity."""
        self.packed: dict[str, list[PackedTensor]] = {}
        self.error: LacewingError | None = None

    def choose(self, model: Any) -> None:
        config, per_layer = self.config, dict(self.config.per_layer or {})
        head = _head(model) if get_format(config.format).group_size else None
        if head is not None:
            per_layer.setdefault(head, HEAD_FORMAT)
        own_head = head is not None and head not in (config.per_layer or {})
        chosen, _ = choose_layers(
            model, config.format, config.sparsity, config.include, config.exclude or (), per_layer
        )
        for layer, format in chosen:
            key = parameter_of(layer)
            if key is not None:
                is_stack = layer.found.parameter is not None  # type: ignore[union-attr]
                name = layer.names[0] if is_stack else f"{layer.names[0]}.{key}"
                dense_head = own_head and layer.names[0] == head
                self.wanted[name] = layer, format, None if dense_head else config.sparsity

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        model, missing_keys = kwargs["model"], kwargs["missing_keys"]
        left = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if name not in self.wanted:
                left[name] = tensor
                continue
            place = model.get_parameter(name)
            self._take(name, tensor, place)
            missing_keys.discard(name)
            place.data = place.data.to(tensor.dtype)  # some layers are kept in float32
            place._is_hf_initialized = True  # and stays on the meta device
        return left

    def _take(self, name: str, weight: torch.Tensor, place: torch.Tensor) -> None:
        """An error is kept for the end: transformers would make one of its own of it."""
        if weight.shape != place.shape:
            wanted, got = list(place.shape), list(weight.shape)
            self.error = self.error or CheckpointError(
                f"`{name}`: needs {wanted} by config.json, got {got}",
                hint="the checkpoint is another model's",
            )
        if self.error is None:
            try:
                self.packed[name] = self._pack(name, weight)
            except LacewingError as error:
                self.error = error

    def _pack(self, name: str, weight: torch.Tensor) -> list[PackedTensor]:
        layer, format, sparsity = self.wanted[name]
        assert isinstance(layer.found, Candidate)
        machine, kind = target_machine(None), get_format(format)
        with packing_threads(None) as pool:
            views = [matrix.cut.of(weight.detach()) for matrix in layer.found.matrices]
            jobs = (Job(pool, DenseMatrix(name, v), kind, sparsity, machine) for v in views)
            packed: list[Any] = [job.result()[1] for job in jobs]
        return list(layer.found.assemble(packed))

    def finish(self, model: Any) -> None:
        """Exchanges the layers."""
        for name in self.wanted.keys() - self.packed.keys():
            weight = model.get_parameter(name)
            if is_loaded(weight):  # tied to another, or made of several tensors
                self._take(name, weight, weight)
        if self.error is not None:
            raise self.error
        layers = {name: self.wanted[name][0] for name in self.packed}
        _forget(model, layers.values(), layers)
        for name, layer in layers.items():
            assert isinstance(layer.found, Candidate)
            layer.put(layer.found.build(self.packed.pop(name))[0])
        self.wanted.clear()


def _head(model: Any) -> str | None:
    """The output head's name."""
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        return None
    return next((name for name, module in model.named_modules() if module is head), None)


def _forget(model: Any, layers: Iterable[Layer], weights: Iterable[str]) -> None:
    """What else speaks of the dense weights."""
    stacks = [layer.module for layer in layers if getattr(layer.found, "parameter", None)]
    apply(changes_of(model, set(weights), stacks))


def _keep_names(model: Any, weights: Iterable[str]) -> None:
    """Packed weights are not split and joined again as dense ones of the model's first checkpoint
    were: they are saved under the names that the model has for them."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        conversions = get_model_conversion_mapping(model, add_legacy=False)
    kept = [c for c in conversions if not _joins(c, weights)]
    if len(kept) < len(conversions):
        model._weight_conversions = kept


def _joins(conversion: Any, weights: Iterable[str]) -> bool:
    if not isinstance(conversion, WeightConverter):
        return False
    back = conversion.reverse_transform()
    return any(back.rename_source_key(name)[1] is not None for name in weights)


def _dense(layer: Linear, dtype: torch.dtype) -> torch.nn.Linear:
    n, k = layer.out_features, layer.in_features
    dense = torch.nn.Linear(k, n, bias=layer.bias is not None, device="meta")
    dense.weight = torch.nn.Parameter(layer.weight.dequantized().to(dtype))
    if layer.bias is not None:
        dense.bias = torch.nn.Parameter(layer.bias.detach().to(dtype))
    return dense.train(layer.training)

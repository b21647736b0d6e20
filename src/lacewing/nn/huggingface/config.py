"""`LacewingConfig`: `quantization_config` of a model, in `from_pretrained` and in config.json
(`checkpoint/transformers.py` describes that)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from lacewing.checkpoint.transformers import VERSION, check_config
from lacewing.errors import FormatError, RequestError
from lacewing.formats import get_format

__all__ = ["METHOD", "LacewingConfig"]

METHOD = "lacewing"


class LacewingConfig(QuantizationConfigMixin):
    """How `from_pretrained` packs a model.

    format, sparsity, include, exclude, per_layer: as in `lacewing.replace_linear`. The output head
    becomes w8a8g32 without pruning, as in `lacewing compress`, unless `format` is a float format or
    `per_layer` names the head.

    Patterns are strings. Raises FormatError for an unknown format and a sparsity out of range,
    RequestError for patterns of another kind.
    """

    layers: dict[str, dict[str, Any]] | None

    def __init__(
        self,
        format: str = "w4a8g64",
        *,
        sparsity: float | None = None,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        per_layer: Mapping[str, str | None] | None = None,
    ) -> None:
        get_format(format)
        if sparsity is not None and not 0 <= sparsity < 1:
            raise FormatError(f"sparsity must be in [0, 1), got {sparsity}")
        self.quant_method: Any = METHOD
        self.version = VERSION
        self.format = format
        self.sparsity = sparsity
        self.include = _names("include", include)
        self.exclude = _names("exclude", exclude)
        self.per_layer = None if per_layer is None else dict(per_layer)
        _names("per_layer", self.per_layer)
        self.layers = None

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """From what `to_dict` gave. Raises CheckpointError for what `to_dict` never gives."""
        check_config(config_dict)
        asked = ("sparsity", "include", "exclude", "per_layer")
        given = {name: config_dict.get(name) for name in asked}
        config = cls(config_dict.get("format", "w4a8g64"), **given)
        config.layers = config_dict.get("layers")
        return (config, kwargs) if return_unused_kwargs else config

    def to_diff_dict(self) -> dict[str, Any]:
        """What is shown: everything. (transformers 5.0 has no default.)"""
        return self.to_dict()

    def record(self, weights: Mapping[str, Any], dtype: torch.dtype) -> None:
        """Lists the packed weights of a model that is otherwise in `dtype`."""
        self.layers = {}
        for name, weight in weights.items():
            entry: dict[str, Any] = {"format": weight.format, "shape": _shape(weight)}
            if weight.dtype != dtype:
                entry["dtype"] = str(weight.dtype).removeprefix("torch.")
            self.layers[name.removesuffix(".weight")] = entry


def _names(where: str, patterns: str | Iterable[str] | None) -> list[str] | None:
    if patterns is None:
        return None
    names = [patterns] if isinstance(patterns, str) else list(patterns)
    if not all(isinstance(name, str) for name in names):
        raise RequestError(
            f"`{where}`: needs names, globs or `re:...`, which a config.json can hold, got {names}",
            hint="for classes of layers there is lacewing.replace_linear",
        )
    return names


def _shape(weight: Any) -> list[int]:
    """[n, k] of a layer, [experts, n, k] of a stack."""
    stack = getattr(weight, "matrix_shape", None)
    return [len(weight), *stack] if stack else [weight.out_features, weight.in_features]

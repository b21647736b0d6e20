"""`LacewingConfig`: `quantization_config` of a model, in `from_pretrained` and in config.json.

    {"quant_method": "lacewing", "version": 1,
     "format", "sparsity", "include", "exclude", "per_layer"      what was asked for
     "layers": {"<name>": {"format": "w4a8g64", "shape": [n, k]}}}

`layers` says what is packed, once it is: modules, and parameters that are stacks of experts
`[experts, n, k]`. An entry has a `dtype` where the weight that it stands for has another one than
the model. Other keys are left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from lacewing.checkpoint.files import fail, shown
from lacewing.errors import FormatError, RequestError
from lacewing.formats import get_format

__all__ = ["DAMAGED", "METHOD", "LacewingConfig", "damaged"]

METHOD = "lacewing"
VERSION = 1
_DTYPES = ("float32", "bfloat16", "float16")
DAMAGED = "the directory is damaged: save the model again"


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
        _check(config_dict)
        asked = ("sparsity", "include", "exclude", "per_layer")
        given = {name: config_dict.get(name) for name in asked}
        config = cls(config_dict.get("format", "w4a8g64"), **given)
        config.layers = config_dict.get("layers")
        return (config, kwargs) if return_unused_kwargs else config

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
    if not _are_text(names):
        raise RequestError(
            f"`{where}`: needs names, globs or `re:...`, which a config.json can hold, got {names}",
            hint="for classes of layers there is lacewing.replace_linear",
        )
    return names


def _shape(weight: Any) -> list[int]:
    """[n, k] of a layer, [experts, n, k] of a stack."""
    stack = getattr(weight, "matrix_shape", None)
    return [len(weight), *stack] if stack else [weight.out_features, weight.in_features]


# -- config.json, which anybody may have written --------------------------------------------------


def damaged(key: str, requirement: str, actual: object, hint: str | None = None) -> NoReturn:
    """Raises the CheckpointError for `quantization_config<key>`."""
    fail(f"`quantization_config{key}`", requirement, shown(actual), hint or DAMAGED)


def _check(config: Mapping[str, Any]) -> None:
    version = config.get("version", VERSION)
    if type(version) is not int or version != VERSION:
        newer = type(version) is int and version > VERSION
        damaged(".version", str(VERSION), version, "update Lacewing" if newer else None)
    _check_format("", config.get("format", "w4a8g64"))
    if not isinstance(config.get("sparsity"), (int, float, type(None))):
        damaged(".sparsity", "a number", config["sparsity"])
    for key in ("include", "exclude"):
        patterns = config.get(key)
        if patterns is not None and not _are_text(patterns):
            damaged(f".{key}", "a list of patterns", patterns)
    for key in ("per_layer", "layers"):
        if not isinstance(config.get(key), (dict, type(None))):
            damaged(f".{key}", "a mapping", config[key])
    for name, entry in (config.get("layers") or {}).items():
        _check_layer(f".layers.{shown(name)}", entry)


def _are_text(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _check_format(key: str, format: object) -> None:
    try:
        get_format(format)  # type: ignore[arg-type]
    except (FormatError, TypeError) as error:
        hint = getattr(error, "hint", None)
        damaged(f"{key}.format", "the name of a weight format", format, hint)


def _check_layer(key: str, entry: Any) -> None:
    if not isinstance(entry, dict):
        damaged(key, "format and shape", entry)
    _check_format(key, entry.get("format"))
    shape = entry.get("shape")
    if (
        not isinstance(shape, list)
        or len(shape) not in (2, 3)
        or not all(type(i) is int and 0 < i < 1 << 31 for i in shape)
    ):
        damaged(f"{key}.shape", "[n, k] or [experts, n, k]", shape)
    if entry.get("dtype") not in (None, *_DTYPES):
        damaged(f"{key}.dtype", f"one of {', '.join(_DTYPES)}", entry["dtype"])

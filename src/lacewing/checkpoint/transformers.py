"""A directory that transformers has saved of a model with packed layers (`lacewing.nn`).

`quantization_config` of its config.json, version 1:

    {"quant_method": "lacewing", "version": 1,
     "format", "sparsity", "include", "exclude", "per_layer"      what was asked for
     "layers": {"<name>": {"format": "w4a8g64", "shape": [n, k]}}}

`layers` says what is packed: modules, and parameters that are stacks of experts `[experts, n, k]`.
An entry has a `dtype` where the weight that it stands for has another one than the model. Other
keys are left alone. The tensors of each:

    <name>.weight.<part>, <name>.<part>     its parts; of a stack with a leading axis of experts
    <name>.weight, <name>                   the mark: a single NaN with five dimensions

The mark fits no weight: whoever takes the directory for a dense model fails. transformers without
Lacewing would leave out what it does not know and begin with random weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from lacewing.checkpoint.files import fail, shown
from lacewing.checkpoint.manifest import PackedWeight
from lacewing.checkpoint.parts import Files, Parts, Reading
from lacewing.checkpoint.safetensors import NAMES
from lacewing.errors import CheckpointError, FormatError, UnsupportedModelError
from lacewing.formats import PackedTensor, get_format
from lacewing.formats.base import aligned_copy

__all__ = ["DAMAGED", "VERSION", "check_config", "damaged", "read_transformers"]

VERSION = 1
DAMAGED = "the directory is damaged: save the model again"
_DTYPES = ("float32", "bfloat16", "float16")


def damaged(key: str, requirement: str, actual: object, hint: str | None = None) -> NoReturn:
    """Raises the CheckpointError for `quantization_config<key>`."""
    fail(f"`quantization_config{key}`", requirement, shown(actual), hint or DAMAGED)


# -- config.json ----------------------------------------------------------------------------------


def check_config(config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for values that are not of their kind, and for a later version."""
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


# -- tensors --------------------------------------------------------------------------------------


def read_transformers(place: Path, config: Mapping[str, Any], files: Files) -> Reading:
    """The packed weights, under the names of the dense ones. Raises CheckpointError, and
    UnsupportedModelError for stacks of experts."""
    check_config(config)
    if config.get("layers") is None:
        damaged(".layers", "the packed layers", None)
    reading = Reading()
    for module, entry in config["layers"].items():
        if len(entry["shape"]) == 3:
            raise UnsupportedModelError(
                f"{place}: `{shown(module)}`: needs a weight [n, k], got a stack of experts",
                hint="load the directory with transformers",
            )
        name = f"{module}.weight"
        parts = Parts(place, name, get_format(entry["format"]).part_names, files)
        reading.add(_Saved(name, _packed(parts, entry)), parts)
        if name in files:
            reading.left_out.append(name)
    return reading


def _packed(parts: Parts, entry: Mapping[str, Any]) -> PackedTensor:
    kind = get_format(entry["format"])
    n, k = entry["shape"]
    arrays = {part: parts.array(part, (NAMES[kind.part_dtypes[part]],)) for part in kind.part_names}
    packed = PackedTensor(kind.name, (n, k), arrays)
    try:
        kind.validate(packed)
    except FormatError as error:
        raise CheckpointError(
            f"{parts.place}: `{shown(parts.module)}`: {error}", hint=error.hint or DAMAGED
        ) from None
    return packed


class _Saved(PackedWeight):
    """A packed weight that lies anywhere in its file."""

    def packed(self) -> PackedTensor:
        """On 64-byte boundaries, which files of transformers do not keep."""
        stored = super().packed()
        parts = {name: aligned_copy(array) for name, array in stored.parts.items()}
        return PackedTensor(stored.format, stored.shape, parts)

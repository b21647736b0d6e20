"""A packed directory: `model.safetensors` with the parts of every weight, `lacewing.json` with what
they are, `tokenizer.json`. The schema of `lacewing.json`, version 1:

    {"lacewing": 1,
     "config":    {..}                            in the words of a Hugging Face config.json
     "tokenizer": {"chat_template", "bos_token", "eos_token": string or null,
                   "bos_token_id": integer or null, "eos_token_ids": [integers], "add_bos": bool},
     "tensors":   {"<name>": {"format": "w4a8g32", "shape": [n, k]},      parts `<name>.<part>`
                   "<name>": {"format": "f32", "shape": [n]}},            one tensor `<name>`
     "recipe":    {..}                            how it was compressed, where that is known

Other keys are left alone. Norm weights are stored so that y = x / rms(x) * w. A weight of a model
with experts will have the shape [experts, n, k].
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from lacewing.checkpoint.files import fail, read_json, read_text, shown
from lacewing.checkpoint.safetensors import read_safetensors
from lacewing.checkpoint.tensors import F32, Source, SourceTensor, TokenizerFiles, check_ids
from lacewing.errors import CheckpointError, FormatError, UnsupportedModelError
from lacewing.formats import Codes, PackedTensor, get_format
from lacewing.formats.tiles import STRIP, strips

__all__ = [
    "MANIFEST",
    "TOKENIZER",
    "VECTOR",
    "VERSION",
    "WEIGHTS",
    "PackedSource",
    "PackedWeight",
    "manifest_json",
]

MANIFEST = "lacewing.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
VERSION = 1
VECTOR = "f32"
"""The format of tensors of one dimension."""

Packed = PackedTensor | npt.NDArray[np.float32]
_DAMAGED = "the directory is damaged: convert the model again"


def manifest_json(
    config: Mapping[str, Any],
    tokenizer: TokenizerFiles,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    recipe: Mapping[str, Any] | None = None,
) -> str:
    """The text of lacewing.json. `tensors`: name -> (format, shape)."""
    document: dict[str, Any] = {
        "lacewing": VERSION,
        "config": dict(config),
        "tokenizer": {
            key: getattr(tokenizer, key)
            for key in TokenizerFiles.__dataclass_fields__
            if key != "tokenizer_json"
        },
        "tensors": {
            name: {"format": format, "shape": list(shape)}
            for name, (format, shape) in tensors.items()
        },
    }
    if recipe is not None:
        document["recipe"] = dict(recipe)
    return json.dumps(document, ensure_ascii=False, indent=1)


class PackedSource(Source):
    """A packed directory. Raises CheckpointError when opened, for any disagreement between the
    manifest and the weights."""

    kind = "packed"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._manifest = read_json(path / MANIFEST)
        version = self._manifest.get("lacewing")
        if version != VERSION or isinstance(version, bool):
            newer = isinstance(version, int) and version > VERSION
            hint = "update Lacewing, or convert the model again" if newer else _DAMAGED
            self._fail("`lacewing`", f"version {VERSION}", shown(version), hint)
        self.config = self._mapping(self._manifest, "config")
        recipe = self._manifest.get("recipe")
        self.recipe: dict[str, Any] | None = recipe if isinstance(recipe, dict) else None
        self.file = read_safetensors(path / WEIGHTS)
        listed = self._mapping(self._manifest, "tensors")
        self.values = {name: self._value(name, entry) for name, entry in listed.items()}
        self._check_no_more()

    @cached_property
    def tensors(self) -> dict[str, SourceTensor]:  # type: ignore[override]
        return {name: _tensor(name, value) for name, value in self.values.items()}

    def _fail(
        self, where: str, requirement: str, actual: object, hint: str | None = _DAMAGED
    ) -> NoReturn:
        fail(f"{self.path / MANIFEST}: {where}", requirement, actual, hint)

    def _mapping(self, parent: Mapping[str, Any], key: str) -> dict[str, Any]:
        value = parent.get(key)
        if not isinstance(value, dict):
            self._fail(f"`{key}`", "a mapping", shown(value))
        return value

    # -- tensors ----------------------------------------------------------------------------------

    def _value(self, name: str, entry: Any) -> Packed:
        where = f"tensor `{shown(name)}`"
        if not isinstance(entry, dict) or not isinstance(entry.get("format"), str):
            self._fail(where, "format and shape", shown(entry))
        shape = entry.get("shape")
        if not isinstance(shape, list) or not all(
            type(i) is int and 0 < i < 1 << 31 for i in shape
        ):
            self._fail(where, "a shape of positive integers", shown(shape))
        if entry["format"] == VECTOR:
            return self._vector(name, where, shape)
        if len(shape) == 3:
            raise UnsupportedModelError(
                f"{self.path / MANIFEST}: {where}: needs a weight [n, k], got one with experts"
            )
        return self._weight(name, where, entry["format"], tuple(shape))

    def _vector(self, name: str, where: str, shape: list[int]) -> F32:
        entry = self.file.tensors.get(name)
        if entry is None or entry.dtype != "F32" or list(entry.shape) != shape or len(shape) != 1:
            found = "none" if entry is None else f"{entry.dtype} {list(entry.shape)}"
            self._fail(where, f"F32 {shown(shape)} with one dimension in {WEIGHTS}", found)
        values: F32 = self.file.array(name)
        if not np.isfinite(values).all():
            self._fail(where, "finite values", "NaN or infinity")
        return values

    def _weight(self, name: str, where: str, format: str, shape: tuple[int, ...]) -> PackedTensor:
        try:
            kind = get_format(format)
            missing = [
                part for part in kind.part_names if f"{name}.{part}" not in self.file.tensors
            ]
            if missing:
                self._fail(where, f"the part `{missing[0]}` in {WEIGHTS}", "none")
            parts = {part: self.file.array(f"{name}.{part}") for part in kind.part_names}
            packed = PackedTensor(format, shape, parts)  # type: ignore[arg-type]
            kind.validate(packed)
        except FormatError as error:
            raise CheckpointError(
                f"{self.path / MANIFEST}: {where}: {error}", hint=error.hint or _DAMAGED
            ) from None
        return packed

    def _check_no_more(self) -> None:
        owned = set(self.values)
        for name, value in self.values.items():
            if isinstance(value, PackedTensor):
                owned.remove(name)
                owned.update(f"{name}.{part}" for part in value.parts)
        for name in self.file.tensors:
            if name not in owned:
                self._fail(f"`{shown(name)}` of {WEIGHTS}", "an owner in the manifest", "none")

    # -- tokenizer --------------------------------------------------------------------------------

    def _read_tokenizer(self) -> TokenizerFiles:
        stated = self._mapping(self._manifest, "tokenizer")
        text, integer = (str, type(None)), (int, type(None))
        ends = stated.get("eos_token_ids")
        fits = isinstance(ends, list) and all(type(i) is int and i >= 0 for i in ends)
        if not fits:
            self._fail("`tokenizer.eos_token_ids`", "a list of token ids", shown(ends))
        for key, kinds in (
            ("chat_template", text),
            ("bos_token", text),
            ("eos_token", text),
            ("bos_token_id", integer),
            ("add_bos", (bool,)),
        ):
            if type(stated.get(key)) not in kinds:
                names = " or ".join(kind.__name__ for kind in kinds)
                self._fail(f"`tokenizer.{key}`", names, shown(stated.get(key)))
        self._check_ids("bos_token_id", [stated.get("bos_token_id") or 0])
        self._check_ids("eos_token_ids", stated["eos_token_ids"])
        return TokenizerFiles(
            tokenizer_json=read_text(self.path / TOKENIZER),
            chat_template=stated.get("chat_template"),
            bos_token=stated.get("bos_token"),
            eos_token=stated.get("eos_token"),
            bos_token_id=stated.get("bos_token_id"),
            eos_token_ids=list(stated["eos_token_ids"]),
            add_bos=stated["add_bos"],
        )

    def _check_ids(self, key: str, ids: list[int]) -> None:
        size = self.config.get("vocab_size")
        where = f"{self.path / MANIFEST}: `tokenizer.{key}`"
        check_ids(where, ids, size if isinstance(size, int) else None)


def _tensor(name: str, value: Packed) -> SourceTensor:
    return PackedWeight(name, value) if isinstance(value, PackedTensor) else _Vector(name, value)


class _Vector(SourceTensor):
    def __init__(self, name: str, values: F32) -> None:
        self.name = name
        self.shape = values.shape
        self.dtype = VECTOR
        self.nbytes = values.nbytes
        self._values = values

    def dequantize(self, begin: int = 0, end: int | None = None) -> F32:
        return self._values[begin:end]


class PackedWeight(SourceTensor):
    """A packed weight. Runs of rows are unpacked strip by strip."""

    def __init__(self, name: str, packed: PackedTensor) -> None:
        self.name = name
        self.shape = packed.shape
        self.dtype = self.own_format = packed.format
        self.nbytes = packed.nbytes
        self._packed = packed

    def packed(self) -> PackedTensor:
        return self._packed

    def codes(self, begin: int = 0, end: int | None = None) -> tuple[str, Codes]:
        n, k = self._packed.shape
        last = n if end is None else min(end, n)
        first = begin // STRIP
        parts = self._strips(first, strips(last))
        rows = min(strips(last) * STRIP, n) - first * STRIP
        packed = PackedTensor(self.dtype, (rows, k), parts)
        codes = get_format(self.dtype).unpack(packed)
        return self.dtype, codes.rows(begin - first * STRIP, last - first * STRIP)

    def _strips(self, begin: int, end: int) -> dict[str, npt.NDArray[Any]]:
        """The parts of strips `begin..end`, which stand alone in every format."""
        parts = self._packed.parts
        if "offsets" not in parts:
            return {name: part[begin:end] for name, part in parts.items()}
        offsets, stream = parts["offsets"], parts["stream"]
        tail = len(stream) - int(offsets[-1])
        at, stop = int(offsets[begin]), int(offsets[end])
        return {"stream": stream[at : stop + tail], "offsets": offsets[begin : end + 1] - at}

    def dequantize(self, begin: int = 0, end: int | None = None) -> F32:
        return get_format(self.dtype).dequantize(self.codes(begin, end)[1])

"""What is inside a model file, told without reading a weight: `lacewing info`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

from lacewing.checkpoint.ggufmodel import GgufSource
from lacewing.checkpoint.manifest import PackedSource
from lacewing.checkpoint.source import open_source
from lacewing.checkpoint.tensors import Source
from lacewing.errors import LacewingError

__all__ = ["describe"]

Entry = dict[str, Any]


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A model in JSON's own types. Works for architectures that cannot be run, too.

        kind            `packed`, `huggingface` or `gguf`
        architecture    its name in the file, or None
        runnable        whether Lacewing runs it; `problem` says why not
        config          in the words of Hugging Face, or None where it cannot be mapped
        weights, bytes  of all tensors
        bits_per_weight
        formats         [{format, tensors, weights, bytes, bits_per_weight}], largest first
        tensors         [{name, format, shape, weights, bytes, bits_per_weight}], in file order
        notes           what the file asks for and Lacewing does otherwise
        recipe          of a packed directory: how it was compressed, or None
        metadata        of a GGUF file: {key: value}, long arrays as "<n values>"

    Raises CheckpointError for a path that is no model, or a damaged one.
    """
    source = open_source(path)
    tensors = _gguf_tensors(source) if isinstance(source, GgufSource) else _tensors(source)
    weights, nbytes = _sum(tensors, "weights"), _sum(tensors, "bytes")
    found: dict[str, Any] = {
        "path": str(path),
        "kind": source.kind,
        "architecture": _architecture(source),
        **_verdict(source),
        "weights": weights,
        "bytes": nbytes,
        "bits_per_weight": _bits(nbytes, weights),
        "formats": _formats(tensors),
        "tensors": tensors,
        "notes": list(source.notes),
    }
    if isinstance(source, PackedSource):
        found["recipe"] = source.recipe
    if isinstance(source, GgufSource):
        found["metadata"] = {key: _brief(v) for key, v in source.file.metadata.items()}
    return found


def _verdict(source: Source) -> dict[str, Any]:
    config, problem = None, None
    try:
        config = source.config
        _ = source.spec
    except LacewingError as error:
        problem = str(error)
    return {"runnable": problem is None, "problem": problem, "config": config}


def _architecture(source: Source) -> str | None:
    """The name in the file, whether or not it is known."""
    if isinstance(source, GgufSource):
        name = source.file.metadata.get("general.architecture")
    else:
        name = source.config.get("model_type")
    return name if isinstance(name, str) else None


def _gguf_tensors(source: GgufSource) -> list[Entry]:
    """From the file itself, under its own names: it may be of any architecture."""
    return [_entry(t.name, t.type.name, t.shape, t.nbytes) for t in source.file.tensors.values()]


def _tensors(source: Source) -> list[Entry]:
    return [_entry(t.name, t.dtype, t.shape, t.nbytes) for t in source.tensors.values()]


def _entry(name: str, format: str, shape: tuple[int, ...], nbytes: int) -> Entry:
    weights = math.prod(shape)
    return {
        "name": name,
        "format": format,
        "shape": list(shape),
        "weights": weights,
        "bytes": nbytes,
        "bits_per_weight": _bits(nbytes, weights),
    }


def _formats(tensors: list[Entry]) -> list[Entry]:
    rows = []
    for format in dict.fromkeys(entry["format"] for entry in tensors):
        own = [entry for entry in tensors if entry["format"] == format]
        weights, nbytes = _sum(own, "weights"), _sum(own, "bytes")
        rows.append(
            {
                "format": format,
                "tensors": len(own),
                "weights": weights,
                "bytes": nbytes,
                "bits_per_weight": _bits(nbytes, weights),
            }
        )
    return sorted(rows, key=lambda row: -int(row["bytes"]))


def _sum(entries: Iterable[Entry], key: str) -> int:
    return sum(int(entry[key]) for entry in entries)


def _bits(nbytes: int, weights: int) -> float | None:
    return 8 * nbytes / weights if weights else None


def _brief(value: Any) -> Any:
    if isinstance(value, (str, int, float, bool)):
        return value if not isinstance(value, float) or math.isfinite(value) else str(value)
    values = value.tolist() if hasattr(value, "tolist") else list(value)
    return values if len(values) <= 16 else f"<{len(values)} values>"

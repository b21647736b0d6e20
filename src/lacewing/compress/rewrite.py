"""A packed directory with some of its tensors replaced."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lacewing.checkpoint.files import read_json, write_file
from lacewing.checkpoint.manifest import (
    MANIFEST,
    TOKENIZER,
    VECTOR,
    WEIGHTS,
    PackedSource,
    manifest_json,
)
from lacewing.checkpoint.safetensors import SafetensorsWriter
from lacewing.formats import PackedTensor

__all__ = ["rewrite"]

Packed = PackedTensor | npt.NDArray[np.float32]


def rewrite(
    source: PackedSource,
    place: Path,
    replaced: Mapping[str, Callable[[], Packed]],
    added: Mapping[str, Any],
) -> None:
    """Fills the new directory `place` with the model of `source`, tensors made one by one by
    `replaced` in place of its own, and keys `added` to its manifest."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    names = [f"{name}.{part}" for name in source.values for part in ("stream", "offsets")]
    with SafetensorsWriter(place / WEIGHTS, names, {"format": "lacewing"}) as out:
        for name, old in source.values.items():
            value = replaced[name]() if name in replaced else old
            if isinstance(value, PackedTensor):
                tensors[name] = (value.format, value.shape)
                for part, array in value.parts.items():
                    out.add(f"{name}.{part}", array)
            else:
                tensors[name] = (VECTOR, value.shape)
                out.add(name, value)
    fresh = json.loads(manifest_json(source.config, source.tokenizer, tensors))
    kept = read_json(source.path / MANIFEST)
    document = fresh | {key: value for key, value in kept.items() if key not in fresh} | added
    text = json.dumps(document, ensure_ascii=False, indent=1)
    write_file(place / TOKENIZER, source.tokenizer.tokenizer_json.encode())
    write_file(place / MANIFEST, text.encode())

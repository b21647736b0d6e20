"""One door for every kind of model: a packed directory, a Hugging Face directory, a GGUF file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from lacewing.checkpoint.files import fail, read_json
from lacewing.checkpoint.ggufmodel import GgufSource
from lacewing.checkpoint.hub import HubSource
from lacewing.checkpoint.manifest import MANIFEST, PackedSource
from lacewing.checkpoint.tensors import Source, SourceTensor
from lacewing.checkpoint.weights import CONFIG, read_weights

__all__ = ["open_source", "open_weights"]


def open_source(path: str | os.PathLike[str]) -> Source:
    """Opens a model; reads headers and metadata, no tensor data.

    Raises CheckpointError for a path that is no model or a damaged one. Whether the architecture
    is implemented shows in `Source.spec`, which raises UnsupportedModelError.
    """
    place = Path(path)
    if place.is_dir():
        return PackedSource(place) if (place / MANIFEST).exists() else HubSource(place)
    if place.suffix in (".safetensors", ".json", ".bin", ".pt", ".pth"):
        hint = f"name the directory it lies in: {place.parent}"
        fail(str(place), "a model directory or a GGUF file", "one file of a model", hint)
    if not os.path.lexists(place):
        hint = "name a packed directory, a Hugging Face directory or a GGUF file"
        fail(str(place), "an existing model", "nothing at that path", hint)
    return GgufSource(place)


def open_weights(path: str | os.PathLike[str]) -> Mapping[str, SourceTensor]:
    """Every tensor of a model by its Hugging Face name, such as
    `model.layers.0.self_attn.q_proj.weight`; reads headers, no weights.

    A Hugging Face directory may be of any architecture, and have no config.json; weights that
    compressed-tensors, GPTQ, AWQ or auto-round keep in parts are put together (`weights.py`), and
    norms are as they are stored. Packed directories and GGUF files as `open_source` has them.

    Raises CheckpointError for a model that is damaged or contradicts itself, and
    UnsupportedModelError for a compression that is not implemented.
    """
    place = Path(path)
    if not place.is_dir() or (place / MANIFEST).exists():
        return open_source(place).tensors
    config = read_json(place / CONFIG) if (place / CONFIG).exists() else {}
    return read_weights(place, config).tensors

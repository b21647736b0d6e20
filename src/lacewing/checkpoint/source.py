"""One door for every kind of model: a packed directory, a Hugging Face directory, a GGUF file."""

from __future__ import annotations

import os
from pathlib import Path

from lacewing.checkpoint.files import fail
from lacewing.checkpoint.ggufmodel import GgufSource
from lacewing.checkpoint.hub import HubSource
from lacewing.checkpoint.manifest import MANIFEST, PackedSource
from lacewing.checkpoint.tensors import Source

__all__ = ["open_source"]


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

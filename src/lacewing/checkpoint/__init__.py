"""Model files: GGUF, Hugging Face directories (compressed by others, too), and Lacewing's own packed directories."""

from __future__ import annotations

from lacewing.checkpoint.convert import (
    AUTO,
    PackedModel,
    Report,
    convert,
    load_model,
    load_packed,
    write_packed,
)
from lacewing.checkpoint.describe import describe
from lacewing.checkpoint.source import open_source
from lacewing.checkpoint.tensors import Source, SourceTensor, TokenizerFiles
from lacewing.checkpoint.weights import open_weights

__all__ = [
    "AUTO",
    "PackedModel",
    "Report",
    "Source",
    "SourceTensor",
    "TokenizerFiles",
    "convert",
    "describe",
    "load_model",
    "load_packed",
    "open_source",
    "open_weights",
    "write_packed",
]

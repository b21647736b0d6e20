"""Model files: GGUF, Hugging Face directories (as they are, or compressed by others), and packed
directories of our own."""

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
from lacewing.checkpoint.export import write_compressed_tensors
from lacewing.checkpoint.patterns import Pattern, pattern_of, sparse_format
from lacewing.checkpoint.source import open_source
from lacewing.checkpoint.tensors import Source, SourceTensor, TokenizerFiles
from lacewing.checkpoint.weights import open_weights

__all__ = [
    "AUTO",
    "PackedModel",
    "Pattern",
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
    "pattern_of",
    "sparse_format",
    "write_compressed_tensors",
    "write_packed",
]

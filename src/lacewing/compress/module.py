"""A model of transformers in memory, as the files of a model look."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from lacewing.checkpoint import Source, SourceTensor, TokenizerFiles
from lacewing.checkpoint.hub import norms_are_offsets, read_tokenizer
from lacewing.checkpoint.tensors import F32
from lacewing.errors import CheckpointError, RecipeError, UnsupportedModelError

__all__ = ["ModuleSource"]

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class ModuleSource(Source):
    """A language model that transformers has made: `config`, and `state_dict()` with the names of
    its files. Weights are read where they lie, and not changed.

    tokenizer: the directory with its tokenizer.json, or that file.
    """

    kind = "module"

    def __init__(self, model: Module, tokenizer: str | os.PathLike[str] | None) -> None:
        name = type(model).__name__
        self.path = Path(name)
        config: Any = getattr(model, "config", None)
        if not hasattr(config, "to_json_string"):
            raise RecipeError(
                f"{name}: needs a model of transformers, with a `config`, got one without",
                hint="save it in the layout of Hugging Face, and name the directory",
            )
        if tokenizer is None:
            raise RecipeError(
                f"{name}: a model in memory has no tokenizer",
                hint="name the directory of its tokenizer.json: `tokenizer=`",
            )
        self.config = json.loads(config.to_json_string())
        self._tokenizer = Path(tokenizer)
        self._weights: dict[str, Tensor] = model.state_dict()

    @cached_property
    def tensors(self) -> Mapping[str, SourceTensor]:  # type: ignore[override]
        offset = norms_are_offsets(self.config)
        return {
            name: _Weight(name, value, 1.0 if offset and name.endswith("norm.weight") else 0.0)
            for name, value in self._weights.items()
        }

    def _read_tokenizer(self) -> TokenizerFiles:
        place = self._tokenizer
        if place.name == "tokenizer.json":
            place = place.parent
        if not place.is_dir():
            raise CheckpointError(
                f"{self._tokenizer}: needs a directory with a tokenizer.json, got none"
            )
        return read_tokenizer(place, self.config)


class _Weight(SourceTensor):
    def __init__(self, name: str, values: Tensor, offset: float) -> None:
        self.name = name
        self.shape = tuple(values.shape)
        self.dtype = _DTYPES.get(values.dtype, str(values.dtype))
        self.nbytes = values.numel() * values.element_size()
        self._values = values
        self._offset = offset

    def check_type(self) -> None:
        if self._values.dtype not in _DTYPES or self._values.is_meta:
            held = "no memory" if self._values.is_meta else self.dtype
            raise UnsupportedModelError(f"`{self.name}`: needs weights of floats, got {held}")

    def dequantize(self, begin: int = 0, end: int | None = None) -> F32:
        """The 1 that Gemma adds to the weights of norms is added."""
        rows = self._values[begin:end].detach().to("cpu", torch.float32)
        values: F32 = (rows + self._offset if self._offset else rows).numpy()
        return values

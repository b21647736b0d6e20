"""What every kind of model file looks like from above: a config, a tokenizer, and tensors under
their Hugging Face names that can be read a few rows at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lacewing.checkpoint.files import fail
from lacewing.formats import Codes, PackedTensor
from lacewing.models import DecoderSpec, get_spec

__all__ = ["FLOATS_TO", "TABLES", "Source", "SourceTensor", "TokenizerFiles"]

F32 = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

FLOATS_TO = "w8a8g32"
"""What `auto` rounds floats to."""
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
"""Embedding and head, which formats and pruning leave out."""


@dataclass(frozen=True)
class TokenizerFiles:
    """What the engine needs to turn text into tokens and back."""

    tokenizer_json: str
    """A document of the `tokenizers` library."""
    chat_template: str | None
    """Jinja source, or None for a model that has none."""
    bos_token: str | None
    eos_token: str | None
    bos_token_id: int | None
    eos_token_ids: list[int]
    """Any of them ends an answer."""
    add_bos: bool
    """Whether a prompt begins with `bos_token`."""


class SourceTensor(ABC):
    """One tensor of a model file. Row ranges count outputs: `begin..end` of `shape[0]`."""

    name: str
    """The Hugging Face name."""
    shape: tuple[int, ...]
    dtype: str
    """The type in the words of the file: `Q4_1`, `BF16`, `w8a8g32`."""
    nbytes: int
    """Bytes in the file."""
    own_format: str | None = None
    """The weight format that is the tensor's own grid, or the nearest to it; None for floats."""

    def __repr__(self) -> str:
        return f"<{self.dtype} {self.name} {list(self.shape)}>"

    def check_type(self) -> None:
        """Raises UnsupportedModelError for a type that cannot be read. Reads nothing."""
        return None

    @abstractmethod
    def dequantize(self, begin: int = 0, end: int | None = None) -> F32:
        """The weights in f32: rows `begin..end`, or all of a tensor of one dimension."""

    def nonzero(self, begin: int = 0, end: int | None = None) -> Bools:
        """Where the codes of rows, or without any the weights, are not zero."""
        found: Bools = self.dequantize(begin, end) != 0
        return found

    def codes(self, begin: int = 0, end: int | None = None) -> tuple[str, Codes] | None:
        """Rows on the tensor's own grid, without loss, as (format, codes); None if it has none."""
        return None

    def near_codes(self, begin: int = 0, end: int | None = None) -> tuple[str, Codes] | None:
        """Rows with their own codes on a grid that holds the scales only nearly (K-quants)."""
        return None

    def with_format(self, format: str) -> SourceTensor:
        """The same tensor with `format` as its own one, where that has its grid too; or itself."""
        return self

    def release(self) -> None:
        """Gives back the memory that reading has taken, where the file is mapped."""
        return None

    def packed(self) -> PackedTensor | None:
        """The tensor as it is, where it is packed already."""
        return None


class Source(ABC):
    """An open model file or directory. Tensor data is read when it is asked for."""

    kind: str
    """`gguf`, `huggingface` or `packed`."""
    path: Path
    config: dict[str, Any]
    """In the words of a Hugging Face config.json."""
    tensors: Mapping[str, SourceTensor]
    notes: tuple[str, ...] = ()
    """What the file asks for and Lacewing does otherwise."""

    @cached_property
    def tokenizer(self) -> TokenizerFiles:
        """Raises CheckpointError where there is none, or a damaged one."""
        return self._read_tokenizer()

    @abstractmethod
    def _read_tokenizer(self) -> TokenizerFiles: ...

    @cached_property
    def spec(self) -> DecoderSpec:
        """The decoder the config describes, with the tensors checked against it.

        Raises UnsupportedModelError (also for types that cannot be read), and CheckpointError for
        tensors that are missing, superfluous or of another shape than the config says.
        """
        return self.check_spec()

    def check_spec(self) -> DecoderSpec:
        """What `spec` says, worked out anew."""
        spec = get_spec(self.config)
        spec.check_shapes({name: tensor.shape for name, tensor in self.tensors.items()})
        for name in spec.tensor_shapes():
            self.tensors[name].check_type()
        return spec


def check_ids(where: str, ids: list[int], vocab_size: int | None) -> None:
    """Raises CheckpointError for a token id that the model has no embedding for."""
    for index in ids:
        if index < 0 or (vocab_size is not None and index >= vocab_size):
            fail(where, f"a token id from 0 to {(vocab_size or 0) - 1}", index)

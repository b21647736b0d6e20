"""AWQ weights of 4 bits, version `gemm` (AutoAWQ, and auto-round's exports of this kind).

    <module>.qweight  int32 [k, n / 8]: codes packed along the outputs
    <module>.qzeros   int32 [groups, n / 8]: zero points, as they are, packed in the same way
    <module>.scales   [groups, n]

    weight[o, i] = scales[i // group_size, o] * (code[i, o] - zero_point[i // group_size, o])

The eight codes of a word are, from its lowest bits on, those of the outputs 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lacewing.checkpoint.files import shown
from lacewing.checkpoint.grid import I16, U8, GridTensor
from lacewing.checkpoint.parts import Files, Parts, Reading, modules_with
from lacewing.checkpoint.settings import Config, Settings, refuse
from lacewing.checkpoint.tensors import F32
from lacewing.checkpoint.words import unpack_words

__all__ = ["AWQ_PARTS", "AwqTensor", "read_awq"]

Array = npt.NDArray[Any]

AWQ_PARTS = ("qweight", "qzeros", "scales")
PER_WORD = 8
_PLACE = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""Where in a word the code of output 0, 1, .. 7 lies."""
_OTHER = "export it as `gemm`, or as compressed-tensors"


def read_awq(place: Path, config: Config, files: Files) -> Reading:
    """Raises UnsupportedModelError and CheckpointError."""
    where = f"{place / 'config.json'}: `quantization_config`"
    version = config.get("version") or config.get("checkpoint_format") or "gemm"
    if not isinstance(version, str) or version.lower() != "gemm":
        refuse(f"{where}.version", "gemm", version, _OTHER)
    named = {
        "bits": config.get("bits", config.get("w_bit")),
        "group_size": config.get("group_size", config.get("q_group_size", -1)),
    }
    settings = Settings.of(where, named)
    reading = Reading()
    for module in modules_with("qweight", files):
        parts = Parts(place, module, AWQ_PARTS, files)
        reading.add(AwqTensor(parts, settings), parts)
    return reading


class AwqTensor(GridTensor):
    """A weight of three parts."""

    def __init__(self, parts: Parts, settings: Settings, kind: str = "awq") -> None:
        if settings.bits != 4:
            parts.refuse("4 bits", f"{settings.bits}", _OTHER)
        self.bits = settings.bits
        self.group_size = settings.group_size
        self.code_range = (0, 15)
        self._words = parts.array("qweight", ("I32",), (None, None))
        k, words = self._words.shape
        n = words * PER_WORD
        if 0 in (n, k):
            parts.fail("qweight", "inputs and outputs", shown([k, words]))
        super().__init__(parts, (n, k), f"{kind} {settings.grouped()}")
        self._scale = parts.scales("scales", (self.groups, n))
        self._stored_zeros = parts.array("qzeros", ("I32",), (self.groups, words))

    def _codes(self, begin: int, end: int) -> U8:
        return np.ascontiguousarray(_outputs(self._words, begin, end).T)

    def _zeros(self, begin: int, end: int) -> I16:
        return _outputs(self._stored_zeros, begin, end).T.astype(np.int16)

    def _scales(self, begin: int, end: int) -> F32:
        return self._parts.floats("scales", self._scale[:, begin:end].T)


def _outputs(words: Array, begin: int, end: int) -> U8:
    """Codes `[r, end - begin]` of outputs `begin..end`; only their words are read."""
    first, last = begin // PER_WORD, -(-end // PER_WORD)
    codes = unpack_words(words[:, first:last], 4, (last - first) * PER_WORD)
    ordered = codes.reshape(len(words), -1, PER_WORD)[:, :, _PLACE]
    return ordered.reshape(len(words), -1)[:, begin - first * PER_WORD : end - first * PER_WORD]

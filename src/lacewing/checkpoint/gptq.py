"""GPTQ weights (AutoGPTQ, GPTQModel, optimum, and auto-round's exports of this kind).

    <module>.qweight  int32 [words, n]: codes packed along the inputs
    <module>.qzeros   int32 [groups, words]: zero points packed along the outputs; format `gptq`
                      (v1) stores them less one, `gptq_v2` and `gptq_p` as they are
    <module>.scales   [groups, n]
    <module>.g_idx    int32 [k]: group of every input. Runs of `group_size` inputs, or any groups
                      (desc_act, the activation order)

    weight[o, i] = scales[g_idx[i], o] * (code[i, o] - zero_point[g_idx[i], o])

Codes lie in words as a stream (words.py). GPTQModel lays 5, 6 and 7 bits in planes, and 3 bits
where the format is `gptq_p`. In v1 a stored zero point of all ones is refused: the libraries that
read it do not agree on what it means (0 or 2^bits).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lacewing.checkpoint.files import fail, shown
from lacewing.checkpoint.grid import I16, U8, GridTensor, checked_g_idx
from lacewing.checkpoint.parts import Files, Parts, Reading, modules_with
from lacewing.checkpoint.settings import Config, Settings, refuse
from lacewing.checkpoint.targets import matches
from lacewing.checkpoint.tensors import F32
from lacewing.checkpoint.words import Layout, unpack_range, unpack_words, word_count

__all__ = ["GPTQ_PARTS", "GptqTensor", "read_gptq"]

GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_EXPORT = "export it in the format gptq_v2"
_ZERO_OFFSET = {"gptq": 1, "gptq_v2": 0, "gptq_p": 0}
"""What is added to a stored zero point, per checkpoint format."""


def read_gptq(place: Path, config: Config, files: Files) -> Reading:
    """Raises UnsupportedModelError and CheckpointError."""
    where = f"{place / 'config.json'}: `quantization_config`"
    format = config.get("checkpoint_format") or config.get("format") or "gptq"
    if config.get("is_marlin_format"):
        format = "marlin"
    if not isinstance(format, str) or format not in _ZERO_OFFSET:
        known = ", ".join(_ZERO_OFFSET)
        refuse(f"{where}.checkpoint_format", f"one of {known}", format, _EXPORT)
    if config.get("pack_dtype", "int32") != "int32":
        refuse(f"{where}.pack_dtype", "int32", config["pack_dtype"], _EXPORT)
    rules = _rules(where, config)
    reading = Reading()
    for module in modules_with("qweight", files):
        parts = Parts(place, module, GPTQ_PARTS, files)
        settings = _settings(where, config, rules, module)
        layout = _layout(config, format, settings.bits)
        reading.add(GptqTensor(parts, settings, _ZERO_OFFSET[format], layout), parts)
    return reading


def _layout(config: Config, format: str, bits: int) -> Layout:
    by_auto_round = config.get("provider") == "auto-round" or "autoround_version" in config
    planar = bits in (5, 6, 7) and not by_auto_round
    return "planar" if planar or (bits == 3 and format == "gptq_p") else "stream"


def _rules(where: str, config: Config) -> dict[str, Any]:
    """`dynamic`: expression -> what differs for the modules that it matches."""
    rules = config.get("dynamic") or {}
    if not isinstance(rules, dict):
        fail(f"{where}.dynamic", "a mapping", shown(rules))
    for pattern, changes in rules.items():
        if not isinstance(changes, dict) and not (pattern.startswith("-:") or changes is None):
            fail(f"{where}.dynamic `{shown(pattern)}`", "a mapping", shown(changes))
    return rules


def _settings(where: str, config: Config, rules: dict[str, Any], module: str) -> Settings:
    """The first rule that matches wins. `-:` leaves a module as it is; one that has packed codes
    nevertheless is read as the config says."""
    for pattern, changes in rules.items():
        expression = pattern.removeprefix("+:").removeprefix("-:")
        if matches(expression, module, f"{where}.dynamic"):
            return Settings.of(where, {**config, **(changes or {})})
    return Settings.of(where, config)


class GptqTensor(GridTensor):
    """A weight of four parts."""

    def __init__(
        self, parts: Parts, settings: Settings, zero_offset: int, layout: Layout, kind: str = "gptq"
    ) -> None:
        self.bits = bits = settings.bits
        self.group_size = settings.group_size
        self.code_range = (0, (1 << bits) - 1)
        self._layout = layout
        self._zero_offset = zero_offset
        self._words = parts.array("qweight", ("I32",), (None, None))
        words, n = self._words.shape
        k = _inputs(parts, words, bits)
        if 0 in (n, k) or words != word_count(k, bits, layout):
            needs = f"{word_count(k, bits, layout)} words for {k} inputs of {bits} bits"
            parts.fail("qweight", f"outputs, and {needs}", shown([words, n]))
        super().__init__(parts, (n, k), f"{kind} {settings.grouped()}")
        self._scale = parts.scales("scales", (self.groups, n))
        size = (self.groups, word_count(n, bits, layout))
        self._stored_zeros = parts.array("qzeros", ("I32",), size)
        if "g_idx" in parts:
            found = parts.array("g_idx", ("I32", "I64"), (k,))
            group, reordered = self.group_size or k, settings.reordered
            self.g_idx = checked_g_idx(parts, "g_idx", found, group, self.groups, reordered)
        if self.g_idx is not None:
            self.dtype += " act-order"

    def _codes(self, begin: int, end: int) -> U8:
        return unpack_words(self._words[:, begin:end].T, self.bits, self.shape[1], self._layout)

    def _scales(self, begin: int, end: int) -> F32:
        return self._parts.floats("scales", self._scale[:, begin:end].T)

    def _zeros(self, begin: int, end: int) -> I16:
        stored = unpack_range(self._stored_zeros, self.bits, begin, end, self._layout)
        zeros = stored.T.astype(np.int16) + np.int16(self._zero_offset)
        largest = int(zeros.max())
        if largest > self.code_range[1]:
            needs = f"zero points up to {self.code_range[1]}"
            self._parts.fail("qzeros", needs, f"{largest} (stored less one)", _EXPORT)
        return zeros


def _inputs(parts: Parts, words: int, bits: int) -> int:
    """Inputs of a weight: as many as have a group, or as the words hold."""
    if "g_idx" in parts:
        shape = parts.entry("g_idx").shape
        if len(shape) != 1:
            parts.fail("g_idx", "a group for every input", shown(list(shape)))
        return shape[0]
    if words * 32 % bits:
        parts.fail("qweight", f"whole codes of {bits} bits", f"{words} words")
    return words * 32 // bits

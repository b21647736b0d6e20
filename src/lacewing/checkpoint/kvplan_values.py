"""What a KV plan says of heads: spans and labels, and the checks of a stranger's.

Checks raise CheckpointError with the place in the file, what it requires and what was found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from lacewing.checkpoint.files import fail, shown

__all__ = [
    "BLOCK",
    "EVERYTHING",
    "MOST_CHANNELS",
    "Labels",
    "Span",
    "check_keys",
    "check_labels",
    "check_model",
    "check_spans",
    "kept_blocks",
    "read_labels",
    "read_spans",
]

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]

MOST_CHANNELS = 64
"""Of a key, that are labels: as many as the kernels take."""
BLOCK = 16
"""Tokens of a block of the cache."""

_MAX_TOKENS = 1 << 31
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Span:
    """What the query heads of one KV head read, in blocks of 16 tokens.

    Query block i reads key block j <= i if j < sinks / 16, or i - j < window / 16, or stride > 0
    and j % stride == phase. sinks, window: tokens, multiples of 16; stride, phase: blocks. window 0
    is everything, and then the rest is 0 too. What no later query reads need not be kept.
    """

    sinks: int = 0
    window: int = 0
    stride: int = 0
    phase: int = 0

    def reads(self, query: int, key: int) -> bool:
        """Whether a query of block `query` reads block `key`, which is not after it."""
        if self.window == 0 or key < self.sinks // BLOCK or query - key < self.window // BLOCK:
            return True
        return self.stride > 0 and key % self.stride == self.phase

    def __str__(self) -> str:
        if self.window == 0:
            return "all"
        strided = f" every {self.stride}+{self.phase}" if self.stride else ""
        return f"{self.sinks}+{self.window}{strided}"


EVERYTHING = Span()


def kept_blocks(span: Span, blocks: int) -> int:
    """How many of the first `blocks` blocks the last of them reads; it is what has to be kept,
    as later ones read no more of these."""
    if span.window == 0:
        return blocks
    near = min(blocks, span.window // BLOCK)
    far = blocks - near
    sinks = min(far, span.sinks // BLOCK)
    strided = 0
    if span.stride:
        strided = _in_phase(span, far) - _in_phase(span, sinks)
    return near + sinks + strided


def _in_phase(span: Span, end: int) -> int:
    """Blocks j < end with j % stride == phase."""
    return max(0, -(-(end - span.phase) // span.stride))


@dataclass(frozen=True, eq=False)
class Labels:
    """channels: int32 `[layers, kv_heads, r]`, distinct within a head. scales: f32, as many.

    The label of a key k (after norm and RoPE) in channel c is the code
    `clip(round(k[c] / scale[c]), -127, 127)`. r is a multiple of 4.
    """

    channels: I32
    scales: F32


# -- spans -----------------------------------------------------------------------------------------


def read_spans(layers: Any) -> list[list[Span]]:
    """From the words of a file; what the numbers may be, `check_spans` says."""
    _check_grid("spans", layers, {})
    for where, value in _each("spans", layers):
        if value is None:
            continue
        if not isinstance(value, dict):
            fail(where, "an object, or null for everything", shown(value))
        check_keys(where, value, [key.name for key in fields(Span)])
    return [[EVERYTHING if s is None else Span(**s) for s in heads] for heads in layers]


def check_spans(layers: Any, model: Mapping[str, Any]) -> None:
    """Of a plan that says `model`: its layers and heads, and the numbers of each span."""
    _check_grid("spans", layers, model)
    for where, span in _each("spans", layers):
        _check_span(where, span)


def _check_span(where: str, span: Span) -> None:
    for key, value in asdict(span).items():
        if not _is_count(value, 0, _MAX_TOKENS):
            fail(f"{where}.{key}", f"a whole number from 0 to {_MAX_TOKENS}", shown(value))
    for key in ("sinks", "window"):
        if getattr(span, key) % BLOCK:
            fail(f"{where}.{key}", f"a multiple of {BLOCK} tokens", getattr(span, key))
    if span.window == 0 and span != EVERYTHING:
        hint = f"window {BLOCK} is the least: the query's own block"
        fail(where, "a window, or nothing else beside it: window 0 reads everything", span, hint)
    if span.phase >= max(span.stride, 1):
        fail(f"{where}.phase", "less than the stride", f"{span.phase} of {span.stride}")


# -- labels ----------------------------------------------------------------------------------------


def read_labels(value: Any) -> Labels:
    """From the words of a file; `check_labels` says the rest."""
    if not isinstance(value, dict):
        fail("`labels`", "an object", shown(value))
    check_keys("`labels`", value, ("channels", "scales"))
    channels: Any = value.get("channels")
    scales: Any = value.get("scales")
    for name, found in (("labels.channels", channels), ("labels.scales", scales)):
        _check_grid(name, found, {})
        _check_lists(name, found)
    for where, numbers in _each("labels.channels", channels):
        bad = [c for c in numbers if not _is_count(c, 0, 1 << 20)]
        if bad:
            fail(where, "whole numbers from 0 on", shown(bad[0]))
    for where, numbers in _each("labels.scales", scales):
        bad = [s for s in numbers if type(s) not in (int, float) or not _SMALLEST <= s <= _LARGEST]
        if bad:
            fail(where, "finite positive numbers", shown(bad[0]))
    return Labels(np.array(channels, np.int32), np.array(scales, np.float32))


def _check_lists(name: str, layers: Sequence[Sequence[Any]]) -> None:
    """Every head's entry is a list, and all are of one length."""
    count = None
    for where, numbers in _each(name, layers):
        if not isinstance(numbers, list) or not numbers:
            fail(where, "a list of numbers", shown(numbers))
        count = len(numbers) if count is None else count
        if len(numbers) != count:
            fail(where, f"{count} numbers, as the first head has", len(numbers))


def check_labels(labels: Labels, model: Mapping[str, Any]) -> None:
    """Of a plan that says `model`: types, shapes and numbers."""
    channels, scales = labels.channels, labels.scales
    if channels.dtype != np.int32 or scales.dtype != np.float32 or channels.ndim != 3:
        types = f"{channels.dtype} {list(channels.shape)} and {scales.dtype}"
        fail("`labels`", "int32 channels [layers, kv_heads, r] and float32 scales", types)
    if channels.shape != scales.shape:
        fail("`labels`", "a scale for each channel", f"{channels.shape} and {scales.shape}")
    layers, heads, r = channels.shape
    head_dim = model.get("head_dim", 1 << 20)
    most = min(head_dim, MOST_CHANNELS)
    if not channels.size or r % 4 or r > most:
        fail("`labels`", f"a multiple of 4 channels, at most {most}", r)
    wanted = (model.get("layers", layers), model.get("kv_heads", heads))
    if (layers, heads) != wanted:
        fail("`labels`", f"{wanted[0]} layers of {wanted[1]} KV heads", f"{layers} of {heads}")
    if channels.min() < 0 or channels.max() >= head_dim:
        bad = channels[(channels < 0) | (channels >= head_dim)][0]
        fail("`labels.channels`", f"channels from 0 to {head_dim - 1}", bad)
    twice = (np.diff(np.sort(channels, axis=2), axis=2) == 0).any(axis=2)
    if twice.any():
        layer, head = np.argwhere(twice)[0]
        where = f"`labels.channels[{layer}][{head}]`"
        fail(where, "distinct channels", shown(channels[layer, head].tolist()))
    if not (np.isfinite(scales) & (scales >= _SMALLEST)).all():
        fail("`labels.scales`", "finite positive numbers", "others")


# -- both ------------------------------------------------------------------------------------------


def check_keys(where: str, found: Mapping[str, Any], known: Sequence[str]) -> None:
    """No key but the `known`: a misspelt one is not passed over."""
    for key in found:
        if key not in known:
            fail(where, f"only {', '.join(f'`{name}`' for name in known)}", f"`{shown(key)}`")


def check_model(model: Mapping[str, Any]) -> None:
    """What a plan says of the model it is for; each may be absent."""
    counts = ("layers", "kv_heads", "head_dim")
    check_keys("`model`", model, ("type", *counts, "fingerprint"))
    for key in counts:
        if key in model and not _is_count(model[key], 1, 1 << 20):
            fail(f"`model.{key}`", "a whole number from 1 to 1048576", shown(model[key]))
    if not isinstance(model.get("type", ""), str):
        fail("`model.type`", "text", shown(model["type"]))
    digits = model.get("fingerprint", "0" * 16)
    if not (isinstance(digits, str) and re.fullmatch("[0-9a-f]{16}", digits)):
        fail("`model.fingerprint`", "16 hexadecimal digits", shown(digits))


def _check_grid(name: str, layers: Any, model: Mapping[str, Any]) -> None:
    """A list of layers of equally many heads, as many of both as the model has."""
    if not isinstance(layers, list) or not layers:
        fail(f"`{name}`", "a list with an entry for each layer", shown(layers))
    if len(layers) != model.get("layers", len(layers)):
        fail(f"`{name}`", f"{model['layers']} layers, as `model` says", len(layers))
    for index, heads in enumerate(layers):
        if not isinstance(heads, list) or not heads:
            fail(f"`{name}[{index}]`", "a list with an entry for each KV head", shown(heads))
        wanted = model.get("kv_heads", len(layers[0]))
        if len(heads) != wanted:
            fail(f"`{name}[{index}]`", f"{wanted} KV heads", len(heads))


def _each(name: str, layers: Sequence[Sequence[Any]]) -> Iterator[tuple[str, Any]]:
    for index, heads in enumerate(layers):
        for head, value in enumerate(heads):
            yield f"`{name}[{index}][{head}]`", value


def _is_count(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most

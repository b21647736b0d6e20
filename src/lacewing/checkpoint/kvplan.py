"""What of the KV cache a model's heads read: a file, calibrated or written by hand.

    {"kvplan": 1,
     "model": {"type": "llama", "layers": 30, "kv_heads": 3, "head_dim": 64,
               "fingerprint": "0123456789abcdef"},
     "labels": {"channels": [[[3, 9, ..], ..], ..], "scales": [[[0.07, 0.11, ..], ..], ..]},
     "spans": [[{"sinks": 16, "window": 512}, null, ..], ..],
     "notes": {..}}

`kvplan` is the version; all else may be left out. Lists have an entry for each layer, and in it one
for each KV head. A span is an object of `sinks`, `window`, `stride` and `phase` (what is not said
is 0) or null, which reads everything. By hand a plan is `{"kvplan": 1, "spans": [..]}`.

Labels are those of Double Sparsity (arXiv:2408.07092): channels of the keys from which scores of
whole blocks are guessed. Spans are those of MoA (arXiv:2406.14909), stride and phase those of
S2-Attention (arXiv:2407.17678). Files are taken for hostile, as all others.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lacewing.checkpoint.files import fail, read_json, reading, replace_file, shown
from lacewing.checkpoint.tensors import SourceTensor
from lacewing.errors import CheckpointError
from lacewing.formats import PackedTensor
from lacewing.formats.bf16 import f32_to_bf16
from lacewing.models import DecoderSpec

__all__ = [
    "BLOCK",
    "EVERYTHING",
    "KVPLAN",
    "KvPlan",
    "Labels",
    "Span",
    "fingerprint",
    "kept_blocks",
]

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]

BLOCK = 16
"""Tokens of a block of the cache."""
KVPLAN = "kvplan.json"
"""The file's name in a packed directory."""

_VERSION = 1
_MAX_BYTES = 32_000_000
_MAX_TOKENS = 1 << 31
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_OTHER = "calibrate anew for this model: lacewing calibrate-kv"


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


@dataclass(frozen=True, eq=False)
class KvPlan:
    """Labels and spans of a model; each may be absent. See the module for the file.

    model: `type`, `layers`, `kv_heads`, `head_dim`, `fingerprint`, as far as they are known. notes:
    how it was made, as JSON; nothing depends on it.

    Raises CheckpointError for values that no plan has.
    """

    model: dict[str, Any] = field(default_factory=dict)
    labels: Labels | None = None
    spans: list[list[Span]] | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_model(self.model)
        if self.spans is not None:
            _check_grid("spans", self.spans, self.model)
            for where, span in _each("spans", self.spans):
                _check_span(where, span)
        if self.labels is not None:
            _check_labels(self.labels, self.model)
        shapes = {shape for shape in (self._span_shape(), self._label_shape()) if shape}
        if len(shapes) > 1:
            fail("labels", f"as many heads as spans, {self._span_shape()}", self._label_shape())

    # -- files ------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> KvPlan:
        """Raises CheckpointError for a file that is absent, too large, no JSON or no plan."""
        place = Path(path)
        with reading(place):
            size = place.stat().st_size
        if size > _MAX_BYTES:
            fail(str(place), f"a plan of at most {_MAX_BYTES} bytes", size)
        try:
            return cls.from_dict(read_json(place))
        except CheckpointError as error:
            if str(error).startswith(str(place)):
                raise
            raise CheckpointError(f"{place}: {error}", hint=error.hint) from None

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> KvPlan:
        """A plan from the words of the file. Raises CheckpointError."""
        version = document.get("kvplan")
        if type(version) is not int or version != _VERSION:
            hint = "is it a plan? `lacewing calibrate-kv` writes one"
            fail("`kvplan`", f"version {_VERSION}", shown(version), hint)
        _check_keys("the plan", document, ("kvplan", "model", "labels", "spans", "notes"))
        for name in ("model", "notes"):
            if not isinstance(document.get(name, {}), dict):
                fail(f"`{name}`", "an object", shown(document[name]))
        labels, spans = document.get("labels"), document.get("spans")
        return cls(
            document.get("model", {}),
            None if labels is None else _read_labels(labels),
            None if spans is None else _read_spans(spans),
            document.get("notes", {}),
        )

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads."""
        document: dict[str, Any] = {"kvplan": _VERSION}
        if self.model:
            document["model"] = self.model
        if self.labels is not None:
            document["labels"] = {
                "channels": self.labels.channels.tolist(),
                # The shortest decimals that give the same f32 back.
                "scales": _mapped(self.labels.scales, lambda scale: float(str(scale))),
            }
        if self.spans is not None:
            document["spans"] = [[_written(span) for span in layer] for layer in self.spans]
        if self.notes:
            document["notes"] = self.notes
        return document

    def save(self, path: str | Path, force: bool = False) -> None:
        """Writes the file, which appears whole or not at all; the same plan is the same bytes.

        force: replace a plan that is there. Raises CheckpointError where something is in the way
        or the place cannot be written.
        """
        check_free(path, force)
        replace_file(Path(path), _text(self.to_dict()).encode())

    # -- of a model -------------------------------------------------------------------------------

    def check(self, spec: DecoderSpec, fingerprint: str | None = None) -> None:
        """Raises CheckpointError unless the plan is of this model: its shape and, where both are
        known, the `fingerprint` of its weights."""
        asked = {
            "type": spec.model_type,
            "layers": spec.n_layers,
            "kv_heads": spec.n_kv_heads,
            "head_dim": spec.head_dim,
        }
        if fingerprint is not None:
            asked["fingerprint"] = fingerprint
        for key, value in asked.items():
            if self.model.get(key, value) != value:
                actual = f"a plan of another: {shown(self.model[key])}"
                fail(f"`model.{key}`", f"{value}, as this model has", actual, _OTHER)
        shape = (spec.n_layers, spec.n_kv_heads)
        for name, found in (("spans", self._span_shape()), ("labels", self._label_shape())):
            if found not in (None, shape):
                wanted = f"{shape[0]} layers of {shape[1]} KV heads, as this model has"
                fail(f"`{name}`", wanted, f"a plan of another: {found}", _OTHER)
        if self.labels is not None and self.labels.channels.max() >= spec.head_dim:
            wanted = f"channels below {spec.head_dim}, the model's head size"
            fail("`labels.channels`", wanted, self.labels.channels.max(), _OTHER)
        for index, spans in enumerate(self.spans or []):
            window = spec.layers[index].window
            if window and any(span != EVERYTHING for span in spans):
                wanted = f"null: the layer has a window of its own, {window} tokens"
                fail(f"`spans[{index}]`", wanted, ", ".join(map(str, spans)))

    def bytes_share(self, context: int, spec: DecoderSpec | None = None) -> float:
        """The share of the dense cache of `context` tokens that the spans keep, 0 to 1. spec: leave
        out layers that have a window of their own, whose cache is no longer than that anyway."""
        if self.spans is None:
            return 1.0
        blocks = max(1, -(-context // BLOCK))
        counts = [
            kept_blocks(span, blocks)
            for index, layer in enumerate(self.spans)
            if spec is None or spec.layers[index].window == 0
            for span in layer
        ]
        return sum(counts) / (len(counts) * blocks) if counts else 1.0

    def _span_shape(self) -> tuple[int, int] | None:
        return None if self.spans is None else (len(self.spans), len(self.spans[0]))

    def _label_shape(self) -> tuple[int, int] | None:
        if self.labels is None:
            return None
        layers, kv_heads, _ = self.labels.channels.shape
        return layers, kv_heads


def fingerprint(tensors: Mapping[str, SourceTensor | PackedTensor | F32]) -> str:
    """Tells models of one shape apart, whatever their weights are rounded to: the first 16 digits
    of the sha256 of all RMSNorm weights as bf16, which no format rounds further. tensors: of a
    source or of a packed model; the rest of them is not read."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if not name.endswith("norm.weight"):
            continue
        tensor = tensors[name]
        values = tensor.dequantize() if isinstance(tensor, SourceTensor) else tensor
        bits = f32_to_bf16(np.ascontiguousarray(values, np.float32))
        digest.update(f"{name} {bits.size}\n".encode() + bits.astype("<u2").tobytes())
    return digest.hexdigest()[:16]


def check_free(path: str | Path, force: bool = False) -> None:
    """Raises CheckpointError where `KvPlan.save` would not write."""
    place = Path(path)
    if not place.parent.is_dir():
        fail(str(place), "an existing parent directory", f"none at {place.parent}")
    if not (place.exists() or place.is_symlink()):
        return
    if not force:
        fail(str(place), "a path that is free", "an existing one", "replace it with --force")
    try:
        KvPlan.load(place)
    except CheckpointError:
        hint = "name another file: what Lacewing did not write it does not delete"
        fail(str(place), "a KV plan, to replace it", "something else", hint)


# -- what a file may say --------------------------------------------------------------------------


def _check_keys(where: str, found: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in found:
        if key not in known:
            fail(where, f"only {', '.join(f'`{name}`' for name in known)}", f"`{shown(key)}`")


def _check_model(model: Mapping[str, Any]) -> None:
    counts = ("layers", "kv_heads", "head_dim")
    _check_keys("`model`", model, ("type", *counts, "fingerprint"))
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


def _read_spans(layers: Any) -> list[list[Span]]:
    _check_grid("spans", layers, {})
    for where, value in _each("spans", layers):
        if value is None:
            continue
        if not isinstance(value, dict):
            fail(where, "an object, or null for everything", shown(value))
        _check_keys(where, value, [key.name for key in fields(Span)])
    return [[EVERYTHING if s is None else Span(**s) for s in heads] for heads in layers]


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


def _read_labels(value: Any) -> Labels:
    if not isinstance(value, dict):
        fail("`labels`", "an object", shown(value))
    _check_keys("`labels`", value, ("channels", "scales"))
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


def _check_labels(labels: Labels, model: Mapping[str, Any]) -> None:
    channels, scales = labels.channels, labels.scales
    if channels.dtype != np.int32 or scales.dtype != np.float32 or channels.ndim != 3:
        types = f"{channels.dtype} {list(channels.shape)} and {scales.dtype}"
        fail("`labels`", "int32 channels [layers, kv_heads, r] and float32 scales", types)
    if channels.shape != scales.shape:
        fail("`labels`", "a scale for each channel", f"{channels.shape} and {scales.shape}")
    layers, heads, r = channels.shape
    head_dim = model.get("head_dim", 1 << 20)
    if not channels.size or r % 4 or r > head_dim:
        fail("`labels`", f"a multiple of 4 channels, at most {model.get('head_dim', 'all')}", r)
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


def _is_count(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


# -- the text of a file ---------------------------------------------------------------------------


def _written(span: Span) -> dict[str, int] | None:
    if span == EVERYTHING:
        return None
    found = asdict(span)
    return {key: value for key, value in found.items() if value or key in ("sinks", "window")}


def _mapped(values: Any, change: Any) -> Any:
    return [_mapped(v, change) for v in values] if np.ndim(values) else change(values)


def _text(document: Mapping[str, Any]) -> str:
    """JSON with a line for each layer: a plan is also written and compared by people."""
    lines = [f'"{key}": {_value_text(value, " ")}' for key, value in document.items()]
    return "{" + ",\n ".join(lines) + "}\n"


def _value_text(value: Any, indent: str) -> str:
    inner = indent + " "
    if isinstance(value, dict) and any(isinstance(v, list) for v in value.values()):
        pairs = [f"{json.dumps(k)}: {_value_text(v, inner)}" for k, v in value.items()]
        return "{" + f",\n{inner}".join(pairs) + "}"
    if isinstance(value, list) and any(isinstance(v, list) for v in value):
        return "[" + f",\n{inner}".join(json.dumps(v) for v in value) + "]"
    return json.dumps(value)

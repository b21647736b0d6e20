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
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lacewing.checkpoint.files import fail, read_json, reading, replace_file, shown
from lacewing.checkpoint.kvplan_values import (
    BLOCK,
    EVERYTHING,
    Labels,
    Span,
    check_keys,
    check_labels,
    check_model,
    check_spans,
    kept_blocks,
    read_labels,
    read_spans,
)
from lacewing.checkpoint.tensors import SourceTensor
from lacewing.errors import CheckpointError
from lacewing.formats import PackedTensor
from lacewing.formats.bf16 import f32_to_bf16
from lacewing.models import AttentionShape

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

F32 = npt.NDArray[np.float32]

KVPLAN = "kvplan.json"
"""The file's name in a packed directory."""

_VERSION = 1
_MAX_BYTES = 32_000_000
_OTHER = "calibrate anew for this model: lacewing calibrate-kv"


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
        check_model(self.model)
        if self.spans is not None:
            check_spans(self.spans, self.model)
        if self.labels is not None:
            check_labels(self.labels, self.model)
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
        check_keys("the plan", document, ("kvplan", "model", "labels", "spans", "notes"))
        for name in ("model", "notes"):
            if not isinstance(document.get(name, {}), dict):
                fail(f"`{name}`", "an object", shown(document[name]))
        labels, spans = document.get("labels"), document.get("spans")
        return cls(
            document.get("model", {}),
            None if labels is None else read_labels(labels),
            None if spans is None else read_spans(spans),
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

    def check(self, spec: AttentionShape, fingerprint: str | None = None) -> None:
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
            window = spec.windows[index]
            if window and any(span != EVERYTHING for span in spans):
                wanted = f"null: the layer has a window of its own, {window} tokens"
                fail(f"`spans[{index}]`", wanted, ", ".join(map(str, spans)))

    def layer(self, index: int, layers: int) -> KvPlan:
        """The plan of one layer alone, of a model of `layers`. Raises CheckpointError if the plan
        is of one with more or fewer."""
        shapes = [shape for shape in (self._span_shape(), self._label_shape()) if shape]
        for found in (self.model.get("layers", layers), *(shape[0] for shape in shapes)):
            if found != layers:
                actual = f"a plan of another: {found}"
                fail("`model.layers`", f"{layers}, as this model has", actual, _OTHER)
        one = slice(index, index + 1)
        labels = self.labels and Labels(self.labels.channels[one], self.labels.scales[one])
        spans = self.spans and self.spans[one]
        return KvPlan({**self.model, "layers": 1}, labels, spans)

    def bytes_share(self, context: int, spec: AttentionShape | None = None) -> float:
        """The share of the dense cache of `context` tokens that the spans keep, 0 to 1. spec: leave
        out layers that have a window of their own, whose cache is no longer than that anyway."""
        if self.spans is None:
            return 1.0
        blocks = max(1, -(-context // BLOCK))
        counts = [
            kept_blocks(span, blocks)
            for index, layer in enumerate(self.spans)
            if spec is None or spec.windows[index] == 0
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

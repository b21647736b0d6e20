"""What became of the layers of a model."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["LayerReport", "Report", "plain"]

_WIDTH = 100
_NAME = 41


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer."""

    names: tuple[str, ...]
    """All names under which the model has it."""
    kind: str
    """Its class before."""
    shape: tuple[int, ...]
    """Of its weight: `[outputs, inputs]`, before them experts; all matrices of an attention layer
    as one."""
    format: str | None
    """The format it is packed in; None: left alone."""
    bytes_before: int
    """Of its weight; 0 where another layer with the same weight counts it, or where it is kept
    (an embedding has it too)."""
    bytes_after: int
    bits_per_weight: float | None = None
    error: float | None = None
    """Added by rounding: ‖w - w'‖ / ‖w‖."""
    instead_of: str | None = None
    """The sparse format that was asked for, where its dense twin is smaller or faster."""
    density: float | None = None
    """Share of the weights that a sparse format stores, where one was asked for."""
    notes: tuple[str, ...] = ()
    reason: str | None = None
    """Why it was left alone."""

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def replaced(self) -> bool:
        return self.format is not None


@dataclass(frozen=True)
class Report:
    """What `replace_linear` did, layer by layer. `print` shows a table."""

    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...] = ()
    """What else was changed in the model."""

    @property
    def replaced(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.replaced)

    @property
    def left_alone(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if not layer.replaced)

    @property
    def bytes_before(self) -> int:
        """Of the weights of the layers that were replaced and are gone."""
        return sum(layer.bytes_before for layer in self.replaced)

    @property
    def bytes_after(self) -> int:
        """Of the packed weights that took their place."""
        return sum(layer.bytes_after for layer in self.replaced)

    def __getitem__(self, name: str) -> LayerReport:
        """The layer of that name. Raises KeyError."""
        for layer in self.layers:
            if name in layer.names:
                return layer
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON knows."""
        layers = [plain(asdict(layer)) for layer in self.layers]
        return {
            "layers": layers,
            "notes": list(self.notes),
            "replaced": len(self.replaced),
            "left_alone": len(self.left_alone),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        if self.replaced:
            yield _row("layer", "weight", "became", "bits", "error", "bytes", "now")
            for layer in self.replaced:
                yield from _replaced_lines(layer)
        if self.left_alone:
            yield "left alone"
            for layer in self.left_alone:
                shape = f" {_dims(layer.shape)}" if layer.shape else ""
                text = f"{_short(layer.name)}  {layer.kind}{shape}: {layer.reason}"
                yield from textwrap.wrap(text, _WIDTH, subsequent_indent="    ")
        for note in self.notes:
            yield from textwrap.wrap(f"note: {note}", _WIDTH)
        count = len(self.replaced)
        yield (
            f"{count} layer{'s' if count != 1 else ''} replaced, {len(self.left_alone)} left alone:"
            f" {_bytes(self.bytes_before)} of weights are now {_bytes(self.bytes_after)}"
        )


def plain(value: Any) -> Any:
    """`value` in types that JSON knows: tuples as lists, NaN and infinities as None."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _replaced_lines(layer: LayerReport) -> Iterator[str]:
    bits, error = layer.bits_per_weight or 0.0, layer.error or 0.0
    yield _row(
        _short(layer.name),
        _dims(layer.shape),
        layer.format or "",
        f"{bits:.2f}",
        f"{error:.2%}" if error else "exact",
        _bytes(layer.bytes_before),
        _bytes(layer.bytes_after),
    )
    if len(layer.names) > 1:
        yield from _wrapped(f"also called {', '.join(layer.names[1:])}")
    if layer.instead_of is not None:
        yield from _wrapped(
            f"instead of {layer.instead_of}: {layer.density or 0.0:.0%} of the weights are not"
            " zero, too many for it to pay"
        )
    for note in layer.notes:
        yield from _wrapped(note)


def _row(*cells: str) -> str:
    name, shape, format, bits, error, before, after = cells
    return (
        f"{name:<{_NAME}}{shape:>16} {format:<11}{bits:>6}{error:>8}{before:>8}{after:>8}"
    ).rstrip()


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="    ", subsequent_indent="    ")


def _short(name: str) -> str:
    """Its end, where it is too long."""
    return name if len(name) < _NAME else "..." + name[4 - _NAME :]


def _dims(shape: tuple[int, ...]) -> str:
    return "x".join(str(length) for length in shape)


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f}{unit}" if size >= 10 or unit == "B" else f"{size:.1f}{unit}"

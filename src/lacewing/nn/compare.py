"""A model beside its replaced copy: time, outputs, memory, layer by layer."""

from __future__ import annotations

import copy
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import Module
from torch.utils._pytree import tree_leaves

from lacewing.errors import RequestError
from lacewing.nn.replace import replace_linear
from lacewing.nn.report import Report, plain

__all__ = ["Comparison", "LayerTime", "Run", "Timing", "compare"]

Run = Callable[[Module], Any]
"""What is timed: takes the model, returns its output."""
Advance = Callable[[str, int, int], None]
"""What is being done, steps done, steps in all."""


@dataclass(frozen=True)
class Timing:
    """Of one run. Seconds are medians over the rounds, in which both models take turns."""

    run: str
    dense: float
    replaced: float
    dense_layers: float
    """Seconds of `dense` that are spent in the layers that were replaced."""
    replaced_layers: float
    dense_spread: float
    """(slowest - fastest) / median."""
    replaced_spread: float
    error: float | None
    """‖y - y'‖ / ‖y‖ over all floats of the output; None: there are none."""
    cosine: float | None
    agreement: float
    """Share of rows of the output whose largest value is at the same place; of integers that are
    the same."""
    rounds: int

    @property
    def speedup(self) -> float:
        return self.dense / self.replaced


@dataclass(frozen=True)
class LayerTime:
    """Seconds in one layer, or in all of the same place in a stack (`layers.*.q_proj`)."""

    run: str
    name: str
    count: int
    kind: str
    shape: tuple[int, ...]
    format: str
    error: float
    """Of the weight; of several the largest."""
    dense: float
    replaced: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` found."""

    timings: tuple[Timing, ...]
    layers: tuple[LayerTime, ...]
    report: Report
    dense_bytes: int
    """Parameters and buffers of the whole model."""
    replaced_bytes: int
    replacing_seconds: float
    threads: int

    def by_place(self) -> tuple[LayerTime, ...]:
        """`layers` with those of the same place in a stack added up, slowest first."""
        places: dict[tuple[Any, ...], list[LayerTime]] = {}
        for layer in self.layers:
            place = re.sub(r"\b\d+\b", "*", layer.name)
            key = place, layer.run, layer.shape, layer.format
            places.setdefault(key, []).append(layer)
        found = [_together(place, layers) for (place, *_), layers in places.items()]
        return tuple(sorted(found, key=lambda layer: -layer.dense))

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON knows."""
        told = {
            "timings": [{**asdict(each), "speedup": each.speedup} for each in self.timings],
            "layers": [asdict(each) for each in self.layers],
            "dense_bytes": self.dense_bytes,
            "replaced_bytes": self.replaced_bytes,
            "replacing_seconds": self.replacing_seconds,
            "threads": self.threads,
            "report": self.report.to_dict(),
        }
        return {key: plain(value) for key, value in told.items()}


def _together(place: str, layers: list[LayerTime]) -> LayerTime:
    first = layers[0]
    return LayerTime(
        first.run,
        place if len(layers) > 1 else first.name,
        len(layers),
        first.kind,
        first.shape,
        first.format,
        max(layer.error for layer in layers),
        sum(layer.dense for layer in layers),
        sum(layer.replaced for layer in layers),
    )


def compare(
    model: Module,
    runs: Mapping[str, Run],
    format: str = "w8a8g64",
    *,
    rounds: int = 5,
    progress: Advance | None = None,
    **options: Any,
) -> Comparison:
    """Times `runs` on `model` and on a copy of it with replaced layers, in turn.

    runs: name -> what to call with the model. options: of `replace_linear`. The model stays as it
    is; the copy takes as much memory again until its layers are packed. Gradients are off.

    Raises RequestError where no layer was replaced or `rounds` is below 1, and what
    `replace_linear` and the model raise.
    """
    if type(rounds) is not int or rounds < 1:
        raise RequestError(f"`rounds` must be an integer >= 1, got {rounds!r}")
    steps = len(runs) * (rounds + 2) + 1
    done = 0

    def advance(what: str) -> None:
        nonlocal done
        if progress is not None:
            progress(what, done, steps)
        done += 1

    advance("replacing layers")
    other = copy.deepcopy(model)
    start = time.perf_counter()
    report = replace_linear(other, format, **options)
    replacing = time.perf_counter() - start
    if not report.replaced:
        raise RequestError(
            "no layer of the model was replaced",
            hint="`print(lacewing.replace_linear(model))` says why each was left alone",
        )
    timings: list[Timing] = []
    layers: list[LayerTime] = []
    with torch.inference_mode():
        for name, run in runs.items():
            advance(f"{name}: warming up")
            same = _outputs(run(model), run(other))
            advance(f"{name}: layer by layer")
            found = _layer_times(name, run, model, other, report)
            times: tuple[list[float], list[float]] = ([], [])
            for turn in range(rounds):
                advance(f"{name}: round {turn + 1} of {rounds}")
                _round(run, (model, other), times, turn)
            timings.append(_timing(name, times, same, found))
            layers += found
    return Comparison(
        tuple(timings),
        tuple(layers),
        report,
        _bytes(model),
        _bytes(other),
        replacing,
        torch.get_num_threads(),
    )


def _round(run: Run, models: tuple[Module, ...], times: tuple[list[float], ...], turn: int) -> None:
    """Each model once; who goes first alternates."""
    for index in ((0, 1), (1, 0))[turn % 2]:
        start = time.perf_counter()
        run(models[index])
        times[index].append(time.perf_counter() - start)


def _timing(
    name: str,
    times: tuple[list[float], list[float]],
    same: tuple[float | None, float | None, float],
    layers: list[LayerTime],
) -> Timing:
    dense, replaced = (statistics.median(each) for each in times)
    spreads = [(max(each) - min(each)) / statistics.median(each) for each in times]
    return Timing(
        name,
        dense,
        replaced,
        sum(layer.dense for layer in layers),
        sum(layer.replaced for layer in layers),
        spreads[0],
        spreads[1],
        *same,
        len(times[0]),
    )


def _outputs(dense: Any, replaced: Any) -> tuple[float | None, float | None, float]:
    """(error, cosine, agreement) of two outputs of the same structure."""
    pairs = [
        (a, b)
        for a, b in zip(tree_leaves(dense), tree_leaves(replaced), strict=True)
        if isinstance(a, torch.Tensor) and a.shape == b.shape and a.numel()
    ]
    if not pairs:
        raise RequestError(
            "the model's outputs hold no tensors of the same shape to compare",
            hint="let the run return a tensor, or tensors in lists and dicts",
        )
    floats = [(a, b) for a, b in pairs if a.is_floating_point()]
    same = torch.cat([_agreement(a, b) for a, b in pairs]).double().mean().item()
    if not floats:
        return None, None, same
    x, y = (torch.cat([pair[i].double().reshape(-1) for pair in floats]) for i in (0, 1))
    error = ((x - y).norm() / x.norm()).item()
    return error, torch.nn.functional.cosine_similarity(x, y, dim=0).item(), same


def _agreement(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if not a.is_floating_point():
        return (a == b).reshape(-1)
    if a.ndim == 0:
        return (a == b).reshape(1)
    return (a.argmax(-1) == b.argmax(-1)).reshape(-1)


def _layer_times(
    name: str, run: Run, model: Module, other: Module, report: Report
) -> list[LayerTime]:
    """Of one run of each. A layer that is called several times counts as often."""
    modules = dict(model.named_modules())
    chosen = [layer for layer in report.replaced if layer.name in modules]
    seconds: list[dict[str, float]] = []
    for each in (model, other):
        with _timed({layer.name: each.get_submodule(layer.name) for layer in chosen}) as found:
            run(each)
        seconds.append(found)
    dense, replaced = seconds
    return [
        LayerTime(
            name,
            layer.name,
            1,
            layer.kind,
            layer.shape,
            layer.format or "",
            layer.error or 0.0,
            dense[layer.name],
            replaced[layer.name],
        )
        for layer in chosen
    ]


@contextmanager
def _timed(layers: Mapping[str, Module]) -> Iterator[dict[str, float]]:
    """Adds up the seconds spent in each of `layers`."""
    found = dict.fromkeys(layers, 0.0)
    begun: dict[str, float] = {}

    def begin(layer: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            begun[layer] = time.perf_counter()

        return hook

    def end(layer: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            found[layer] += time.perf_counter() - begun[layer]

        return hook

    handles = []
    for layer, module in layers.items():
        handles.append(module.register_forward_pre_hook(begin(layer)))
        handles.append(module.register_forward_hook(end(layer)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _bytes(model: Module) -> int:
    """Of all parameters and buffers, shared memory once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())

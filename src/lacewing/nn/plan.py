"""Which layers of a model are packed, in what and from where: all that can be said, and refused,
before a weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch.nn import Module, MultiheadAttention
from torch.nn.parameter import UninitializedParameter

from lacewing.checkpoint import AUTO, SourceTensor
from lacewing.checkpoint.tensors import FLOATS_TO
from lacewing.errors import FormatError, RequestError
from lacewing.formats import Format, get_format
from lacewing.nn.candidates import WHOLE, Candidate, LeftAlone, candidates_of
from lacewing.nn.reasons import COMPILED
from lacewing.nn.registration import check_saving
from lacewing.nn.report import LayerReport
from lacewing.nn.targets import Pattern, check_used, patterns
from lacewing.nn.weights import Weights

__all__ = ["Layer", "Plan", "Site", "choose_layers", "layers_of", "make_plan"]

Slot = tuple[Module, str]
"""A module and the name under which it has a layer."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer as the model has it."""

    names: tuple[str, ...]
    slots: tuple[Slot, ...]
    module: Module
    lineage: tuple[Module, ...]
    """The module, and those it lies in under any of its names."""
    found: Candidate | LeftAlone

    def called_by(self, pattern: Pattern) -> bool:
        """A pattern that names the output projection of an attention layer names all of it."""
        parts = [f"{name}.out_proj" for name in self.names if self.whole]
        return pattern.matches([*self.names, *parts], self.lineage)

    def put(self, new: Module) -> None:
        """Puts the packed layer in its place. Into the dictionaries themselves: nothing that a
        model may have overridden is called."""
        new.register_state_dict_pre_hook(check_saving)
        for module, name in self.slots:
            module._parameters.pop(name, None)
            module._modules[name] = new

    @property
    def whole(self) -> bool:
        """Whether it has layers inside that are part of it."""
        return isinstance(self.module, MultiheadAttention)

    @property
    def kind(self) -> str:
        return type(self.module).__name__


@dataclass(frozen=True, eq=False)
class Site:
    """A layer that will be packed."""

    layer: Layer
    candidate: Candidate
    format: Format
    tensors: tuple[SourceTensor, ...]
    """Where its matrices are read."""
    key: Any
    """Equal for layers with the same weights in the same format."""
    search: bool
    """Whether zeros in the matrices may make the format a sparse one."""


@dataclass(frozen=True, eq=False)
class Plan:
    sites: tuple[Site, ...]
    left_alone: tuple[LayerReport, ...]

    @property
    def weights(self) -> int:
        distinct = {site.key: site for site in self.sites}
        return sum(m.shape[0] * m.shape[1] for s in distinct.values() for m in s.tensors)


def make_plan(
    model: Module,
    format: str,
    sparsity: float | None,
    include: Any,
    exclude: Any,
    per_layer: Mapping[Any, str | None],
    checkpoint: Any,
) -> Plan:
    """Raises RequestError, FormatError or CheckpointError for whatever could not be done."""
    auto = checkpoint is not None
    chosen, left = choose_layers(model, format, sparsity, include, exclude, per_layer, auto)
    weights = Weights(model, checkpoint)
    sites = [_site(layer, name, sparsity, weights) for layer, name in chosen]
    return Plan(tuple(sites), tuple(left))


def choose_layers(
    model: Module,
    format: str,
    sparsity: float | None,
    include: Any,
    exclude: Any,
    per_layer: Mapping[Any, str | None],
    auto: bool = False,
) -> tuple[list[tuple[Layer, str]], list[LayerReport]]:
    """The layers to pack, each with the name of its format (`auto` only where that may be), and
    those that are left alone. Reads no weight: the model may be on the meta device.

    Raises RequestError or FormatError for arguments that do not fit each other or the model.
    """
    wanted = None if include is None else patterns("include", include)
    if wanted == []:
        raise RequestError("`include` is empty: no layer would be replaced")
    unwanted = patterns("exclude", exclude)
    if not isinstance(per_layer, Mapping):
        raise RequestError(f"`per_layer` must be a mapping of patterns, got {per_layer!r}")
    formats = [(Pattern("per_layer", key), value) for key, value in per_layer.items()]
    if sparsity is not None and not isinstance(sparsity, Real):
        raise FormatError(f"`sparsity` must be a number in [0, 1) or None, got {sparsity!r}")
    _check_format("format", format, sparsity, auto)
    for pattern, name in formats:
        if name is not None:
            _check_format(f"per_layer[{pattern}]", name, sparsity, auto)
    layers = list(layers_of(model))
    chosen: list[tuple[Layer, str]] = []
    left: list[LayerReport] = []
    for layer in layers:
        answer = _choose(layer, format, wanted, unwanted, formats)
        if isinstance(answer, LeftAlone):
            left.append(_left_alone(layer, answer))
        else:
            chosen.append((layer, answer.name))
    check_used(
        [*(wanted or []), *unwanted, *(pattern for pattern, _ in formats)],
        [name for layer in layers for name in layer.names],
    )
    return chosen, left


@dataclass(frozen=True)
class _Chosen:
    name: str


def _choose(
    layer: Layer,
    format: str,
    wanted: Sequence[Pattern] | None,
    unwanted: Sequence[Pattern],
    formats: Sequence[tuple[Pattern, str | None]],
) -> _Chosen | LeftAlone:
    """Every pattern sees every layer, so that it is known which have matched none."""
    shape = layer.found.shape
    by = [pattern for pattern in unwanted if layer.called_by(pattern)]
    asked = wanted is None or bool([pattern for pattern in wanted if layer.called_by(pattern)])
    own = [(pattern, name) for pattern, name in formats if layer.called_by(pattern)]
    if isinstance(layer.found, LeftAlone):
        return layer.found
    if by:
        return LeftAlone(shape, f"excluded by {by[0]}")
    if not asked:
        return LeftAlone(shape, "not in `include`")
    if own:
        pattern, name = own[0]
        return _Chosen(name) if name else LeftAlone(shape, f"`per_layer` has None for {pattern}")
    return _Chosen(format)


def _check_format(where: str, name: str, sparsity: float | None, auto: bool) -> None:
    """Raises FormatError for a format that there is not, or that cannot have the sparsity."""
    if not isinstance(name, str):
        raise FormatError(f"`{where}` must be the name of a weight format, got {name!r}")
    if name == AUTO:
        if not auto:
            raise FormatError(
                "`auto` is the format that a checkpoint's weights have already, and there is none",
                hint="name a format such as `w8a8g64`, or a `checkpoint`",
            )
        return
    get_format(name).round(np.zeros((16, 64), np.float32), sparsity)


def _site(layer: Layer, name: str, sparsity: float | None, weights: Weights) -> Site:
    found = layer.found
    assert isinstance(found, Candidate)
    for matrix in found.matrices:
        _check_place(layer.names[0], matrix.parameter, read=not weights.from_file)
    for tensor in found.keeps:
        _check_place(layer.names[0], tensor)
    tensors, key = weights.of(layer.names, found)
    auto = name == AUTO
    kind = get_format((tensors[0].own_format or FLOATS_TO) if auto else name)
    _check_format(layer.names[0], kind.name, sparsity, False)
    search = auto and not sparsity and found.parameter is None  # a stack has one format
    return Site(layer, found, kind, tensors, (key, kind.name, search, len(found.matrices)), search)


def _check_place(name: str, tensor: torch.Tensor, read: bool = True) -> None:
    """read: whether the values are needed, which the meta device has not."""
    if isinstance(tensor, UninitializedParameter):
        raise RequestError(
            f"`{name}` is lazy: its weight has no shape yet",
            hint="run the model once first, or leave the layer out: `exclude`",
        )
    if tensor.device.type == "meta" and read:
        raise RequestError(
            f"`{name}` is on the meta device: it has no values",
            hint="load the weights first, or leave the layer out: `exclude`",
        )
    if tensor.device.type not in ("cpu", "meta"):
        raise RequestError(
            f"`{name}` is on {tensor.device}, and packed layers compute on the CPU",
            hint='move the model first: model.to("cpu")',
        )


# -- the model's layers ---------------------------------------------------------------------------


def layers_of(model: Module) -> Iterator[Layer]:
    """Every layer once, under all its names, in the order of the model."""
    if not isinstance(model, Module):
        raise RequestError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
    modules = dict(model.named_modules(remove_duplicate=False))
    places: dict[int, list[str]] = {}
    for name, module in modules.items():
        places.setdefault(id(module), []).append(name)
    inside: set[str] = set()
    for name, module in modules.items():
        if name and _parent(name) in inside:
            inside.add(name)
        elif places[id(module)][0] == name:
            if isinstance(module, WHOLE):
                inside.add(name)
            for key, found in candidates_of(module).items():
                yield _layer(modules, places[id(module)], key, found)


def _layer(
    modules: Mapping[str, Module], names: Sequence[str], key: str, found: Candidate | LeftAlone
) -> Layer:
    module = modules[names[0]]
    lineage = (module, *(modules[above] for name in names for above in _ancestors(name)))
    adapter = _adapter(names[0], modules)
    if adapter is not None:
        found = LeftAlone(found.shape, adapter)
    if key:
        slots: tuple[Slot, ...] = ((module, key),)
        called = tuple(f"{name}.{key}" if name else key for name in names)
        return Layer(called, slots, module, lineage, found)
    if names[0] == "" and isinstance(found, Candidate):
        raise RequestError(
            f"the model itself is a {type(module).__name__}: it cannot be replaced in place",
            hint="wrap it, `model = torch.nn.Sequential(model)`, or make the packed layer:"
            " `lacewing.nn.Linear.from_dense(model, format)`",
        )
    slots = tuple((modules[_parent(name)], name.rpartition(".")[2]) for name in names)
    if any(slot == "_orig_mod" for _, slot in slots):  # of what torch.compile(layer) returns
        found = LeftAlone(found.shape, COMPILED)
    return Layer(tuple(names), slots, module, lineage, found)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _ancestors(name: str) -> list[str]:
    """Names of the modules that a module lies in, the nearest first."""
    out = []
    while name:
        name = _parent(name)
        out.append(name)
    return out


def _adapter(name: str, modules: Mapping[str, Module]) -> str | None:
    """A layer of an adapter (PEFT) trains, and stays: all but the layer it adapts."""
    for above in _ancestors(name):
        holders = getattr(type(modules[above]), "adapter_layer_names", ())
        inner = name[len(above) :].lstrip(".").partition(".")[0]
        if holders and hasattr(modules[above], "base_layer") and inner in holders:
            return "part of an adapter"
    return None


def _left_alone(layer: Layer, why: LeftAlone) -> LayerReport:
    return LayerReport(layer.names, layer.kind, why.shape, None, 0, 0, reason=why.reason)

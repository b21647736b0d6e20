"""`replace_linear`: the linear layers of any PyTorch model, packed in place.

All layers are packed before the first is put in place, into a temporary file: until the last one
is made the model is untouched, so that an error or Ctrl-C leaves it as it was, and what is packed
takes no memory beside the dense weights. Then all are put in place at once, the dense weights go,
and the packed ones are read into memory. Peak memory is the model, and what it takes to pack one
layer. Where the directory for temporary files (`TMPDIR`) is in memory itself, or has no room, the
packed weights are in memory beside the dense ones.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch.nn import Module

from lacewing import native
from lacewing.checkpoint.breakeven import MACHINES
from lacewing.checkpoint.interrupts import uninterrupted
from lacewing.checkpoint.packing import AHEAD, Job, packing_threads
from lacewing.checkpoint.patterns import find_sparser
from lacewing.errors import FormatError, RequestError
from lacewing.formats import PackedTensor
from lacewing.nn.candidates import Built
from lacewing.nn.plan import Plan, Site, make_plan
from lacewing.nn.registration import attach_to_transformers
from lacewing.nn.report import LayerReport, Report
from lacewing.nn.spill import Spill, in_memory
from lacewing.nn.ties import Change, apply, changes_of

__all__ = ["Progress", "replace_linear", "target_machine"]

Progress = Callable[[str, int, int], None]
"""Called after every matrix: the layer's name, weights done, weights in all."""


def replace_linear(
    model: Module,
    format: str = "w8a8g64",
    *,
    sparsity: float | None = None,
    include: Any = None,
    exclude: Any = (),
    per_layer: Mapping[Any, str | None] | None = None,
    checkpoint: Any = None,
    machine: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Packs the linear layers of `model`, in place, without calibration data.

    Replaced are `nn.Linear`, transformers' `Conv1D`, 1x1 `nn.Conv1d` and `nn.Conv2d`,
    `nn.MultiheadAttention`, and the stacks of experts in transformers' models. `print` the report:
    it says what became of every layer, and why one was left alone. Either all of it happens or,
    with an error or Ctrl-C, nothing.

    - format: a weight format, as in `lacewing.pack`; with a checkpoint also `auto`, as the
      engine packs it: the format that its weights are in or near to, w8a8g32 for floats, or a
      sparse one where they have the zeros for it (but for stacks of experts).
    - sparsity: share of the weights, in [0, 1), that is set to zero first, by magnitude. A sparse
      format without it uses the zeros that are there.
    - include, exclude: one pattern or several; None includes all. A pattern is a name (of a layer,
      or of a module that it lies in), a glob (`*.q_proj`), `re:` and a regular expression that
      matches the whole name, or a class (of the layer, or of a module that it lies in).
    - per_layer: pattern -> format, or None to leave those layers alone. The first match counts;
      what is excluded stays so.
    - checkpoint: a model file or directory, of the same model, from which the weights are read
      instead; what it has packed, or quantized in a format of ours, is taken as it is.
    - machine: `avx512`, `avx2` or `scalar`: where a sparse format must be faster than the dense
      one of its width, or that one takes its place; None: this machine.
    - threads: that pack; None: one per core, at most 8.
    - progress: called after every matrix with the layer's name, weights done, weights in all.

    Raises RequestError (an argument, a pattern without a match, a model that is not on the CPU),
    FormatError (no such format; NaN or infinite weights; a sparsity it cannot hold),
    CheckpointError (a checkpoint that is damaged or of another model), UnsupportedModelError (one
    that is compressed in a way that is not implemented).
    """
    threads = native.check_threads(threads) or None
    if progress is not None and not callable(progress):
        raise RequestError(f"`progress` must be callable or None, got {progress!r}")
    own = {} if per_layer is None else per_layer
    plan = make_plan(model, format, sparsity, include, exclude, own, checkpoint)
    target = target_machine(machine)
    with Spill() as spill, packing_threads(threads) as pool:
        made = list(_pack(plan, sparsity, target, pool, spill, progress))
    changes = _changes(model, plan)
    layers = _reports(model, plan, made)
    with uninterrupted():  # from here on there is no way back
        _put_in_place(plan, made, changes)
        del plan  # and with it the dense weights
        _settle(made)
    attach_to_transformers(model)
    notes = tuple(note for *_, note in changes if note)
    return Report(layers, notes)


def target_machine(machine: str | None) -> str:
    if machine not in (None, *MACHINES):
        raise FormatError(f"`machine` must be one of {', '.join(MACHINES)}, got {machine!r}")
    native.check_isa()
    return machine or str(native.compiled().default_isa())


# -- packing --------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Made:
    """A new layer that waits to be put in place."""

    built: Built
    packed: Sequence[PackedTensor]
    """What the parts of the new layer hold, in the order of `built`."""
    jobs: Sequence[_Done]
    first: bool
    """Whether no other layer before it has these weights."""


@dataclass(frozen=True)
class _Done:
    """What a job says of its matrix."""

    weights: int
    lost: float
    whole: float
    exact: bool
    stored: float | None
    instead_of: str | None


def _pack(
    plan: Plan,
    sparsity: float | None,
    machine: str,
    pool: ThreadPoolExecutor,
    spill: Spill,
    progress: Progress | None,
) -> Iterator[_Made]:
    """Every site's new layer, in order; layers with the same weights share them."""
    total, done = plan.weights, 0
    known: dict[Any, tuple[Sequence[PackedTensor], Sequence[_Done]]] = {}
    distinct = list({site.key: site for site in plan.sites}.values())
    results = _results(distinct, sparsity, machine, pool)
    for site in plan.sites:
        first = site.key not in known
        if first:
            packed, jobs = [], []
            for _ in site.tensors:
                one, job = next(results)
                packed.append(one)
                jobs.append(job)
                done += job.weights
                if progress is not None:
                    progress(site.layer.names[0], done, total)
            known[site.key] = [spill.keep(p) for p in site.candidate.assemble(packed)], jobs
        kept, told = known[site.key]
        yield _Made(site.candidate.build(kept), kept, told, first)
        spill.unread()  # sparse weights have been checked, byte by byte


def _results(
    sites: Sequence[Site], sparsity: float | None, machine: str, pool: ThreadPoolExecutor
) -> Iterator[tuple[PackedTensor, _Done]]:
    """Every matrix of the sites, packed; a few are under way at once."""
    waiting: deque[Job] = deque()
    for site in sites:
        for tensor in site.tensors:
            found = find_sparser(tensor, machine, pool) if site.search else None
            waiting.append(Job(pool, tensor, site.format, sparsity, machine, found))
            while sum(job.weights for job in waiting) > AHEAD + waiting[0].weights:
                yield _finish(waiting.popleft())
    while waiting:
        yield _finish(waiting.popleft())


def _finish(job: Job) -> tuple[PackedTensor, _Done]:
    _, packed, said = job.result()
    assert isinstance(packed, PackedTensor)
    stored = None if said.density is None else said.density * job.weights
    done = _Done(
        job.weights,
        job.lost,
        job.whole,
        said.exact,
        stored,
        said.instead_of,
    )
    return packed, done


# -- putting in place -----------------------------------------------------------------------------


def _changes(model: Module, plan: Plan) -> list[Change]:
    gone = {f"{name}.weight" for site in plan.sites for name in site.layer.names}
    stacks = [s.layer.module for s in plan.sites if s.candidate.parameter is not None]
    return changes_of(model, gone, stacks)


def _put_in_place(plan: Plan, made: Sequence[_Made], changes: Sequence[Change]) -> None:
    """Nothing of this can fail halfway."""
    for site, each in zip(plan.sites, made, strict=True):
        site.layer.put(each.built[0])
    apply(changes)


def _settle(made: Sequence[_Made]) -> None:
    """Reads the packed weights into memory, now that the dense ones are gone."""
    copies: dict[int, PackedTensor] = {}
    for each in made:
        for holder, packed in zip(each.built[1], each.packed, strict=True):
            if id(packed) not in copies:
                copies[id(packed)] = in_memory(packed)
            holder._set_packed(copies[id(packed)])


# -- the report -----------------------------------------------------------------------------------


def _reports(model: Module, plan: Plan, made: Sequence[_Made]) -> tuple[LayerReport, ...]:
    """In the order of the model: what was replaced, then what was not."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    own = {name for site in plan.sites for name in _parameter_names(site)}
    told = []
    for site, each in zip(plan.sites, made, strict=True):
        held = [
            name
            for parameter in {id(m.parameter) for m in site.candidate.matrices}
            for name in owners.get(parameter, [])
            if name not in own
        ]
        told.append(_report(site, each, held))
    return (*told, *plan.left_alone)


def _parameter_names(site: Site) -> set[str]:
    if site.candidate.parameter is not None:
        return set(site.layer.names)
    return {f"{name}.{m.key}" for name in site.layer.names for m in site.candidate.matrices}


def _report(site: Site, made: _Made, held: Sequence[str]) -> LayerReport:
    jobs, found = made.jobs, site.candidate
    weights = sum(job.weights for job in jobs)
    nbytes = sum(packed.nbytes for packed in made.packed)
    lost, whole = sum(job.lost for job in jobs), sum(job.whole for job in jobs)
    stored = [job.stored for job in jobs if job.stored is not None]
    parameters = {id(m.parameter): m.parameter for m in found.matrices}.values()
    dense = sum(parameter.nbytes for parameter in parameters)
    return LayerReport(
        names=site.layer.names,
        kind=site.layer.kind,
        shape=found.shape,
        format="/".join(sorted({packed.format for packed in made.packed})),
        bytes_before=0 if held or not made.first else dense,
        bytes_after=nbytes if made.first else 0,
        bits_per_weight=8 * nbytes / weights,
        error=math.sqrt(lost / whole) if whole else math.sqrt(lost),
        instead_of=next((job.instead_of for job in jobs if job.instead_of), None),
        density=sum(stored) / weights if stored else None,
        notes=tuple(_notes(site, made, held)),
    )


def _notes(site: Site, made: _Made, held: Sequence[str]) -> Iterator[str]:
    yield from site.candidate.notes
    padded = {(k, site.format.k_pad(k)) for _, k in (m.shape for m in site.candidate.matrices)}
    for k, k_pad in sorted(padded):
        if k_pad != k:
            yield f"inputs padded from {k} to {k_pad}"
    if held:
        yield f"tied to {', '.join(held)}, which stays dense"
    if not made.first:
        yield "shares its packed weight with a layer above"
    hooks = getattr(made.built[0], "_forward_hooks", {}), made.built[0]._forward_pre_hooks
    if any(hooks):
        yield "keeps its hooks"

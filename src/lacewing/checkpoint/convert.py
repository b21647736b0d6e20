"""From any model file to packed weights: rounded where they have to be, as they are where they fit.

What `format="auto"` packs a weight into:

    GGUF Q8_0 Q4_0 Q4_1 Q5_0 Q5_1   their own grid, without loss
    GGUF Q4_K Q5_K Q6_K             w4a8g32z, w5a8g32z, w8a8g32: the nearest grid
    weights that others rounded     their own grid, without loss, or the nearest (`grid.py`)
    F32 F16 BF16                    w8a8g32
    with zeros in them              the sparse format of the same width, where it pays
                                    (`patterns.py`)
    packed                          as it is

With another format the embedding and the head become w8a8g32 (bf16 with bf16). Tensors of one
dimension are f32. Work is cut into runs of rows of about a million weights, so that memory stays
bounded whatever the size of a tensor, and the runs are shared by two or more threads (numpy lets go
of the interpreter in its loops). Results do not depend on the number of threads.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lacewing.checkpoint.breakeven import MACHINES
from lacewing.checkpoint.files import new_directory, write_file
from lacewing.checkpoint.manifest import (
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    PackedSource,
    manifest_json,
)
from lacewing.checkpoint.packing import AHEAD, Job, Packed, Report, packing_threads
from lacewing.checkpoint.patterns import find_sparser
from lacewing.checkpoint.safetensors import SafetensorsWriter
from lacewing.checkpoint.source import open_source
from lacewing.checkpoint.tensors import FLOATS_TO, TABLES, Source, SourceTensor, TokenizerFiles
from lacewing.errors import CheckpointError, FormatError
from lacewing.formats import Format, PackedTensor, get_format

__all__ = [
    "AUTO",
    "PackedModel",
    "Progress",
    "Report",
    "add_to",
    "convert",
    "load_model",
    "load_packed",
    "make_plan",
    "memory_of",
    "pack_all",
    "write_packed",
]

AUTO = "auto"

Plan = dict[str, tuple[SourceTensor, Format | None]]
Progress = Callable[[str, int, int], None]
"""Called after every tensor: its name, weights done, weights in all."""


@dataclass(frozen=True, eq=False)
class PackedModel:
    """A model the engine can run. Weights may be views of a mapped file."""

    config: dict[str, Any]
    tokenizer: TokenizerFiles
    tensors: dict[str, Packed]
    reports: tuple[Report, ...] = ()
    """One per tensor that was packed in memory; empty for a packed directory."""


def load_packed(path: str | os.PathLike[str]) -> PackedModel:
    """Opens a packed directory: mapped, no weight is read or copied.

    Raises CheckpointError for a damaged directory, UnsupportedModelError for its architecture.
    """
    source = PackedSource(Path(path))
    names = source.spec.tensor_shapes()
    values = {name: source.values[name] for name in names}
    return PackedModel(source.config, source.tokenizer, values)


def load_model(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    sparsity: float | None = None,
    head_format: str | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
    machine: str | None = None,
) -> PackedModel:
    """Opens any model; packs in memory what is not packed yet.

    format and the rest: as in `convert`; None is `auto`. Raises CheckpointError,
    UnsupportedModelError, FormatError.
    """
    source = open_source(path)
    chosen = format or AUTO
    if source.kind == "packed" and chosen == AUTO and sparsity is None and head_format is None:
        return load_packed(path)
    tokenizer = source.tokenizer
    tensors: dict[str, Packed] = {}
    reports = []
    with memory_of(source):
        for name, value, report in convert(
            source, chosen, sparsity, head_format, progress, threads, machine
        ):
            tensors[name] = value
            reports.append(report)
    return PackedModel(source.config, tokenizer, tensors, tuple(reports))


@contextmanager
def memory_of(source: Source) -> Iterator[None]:
    """Turns a lack of memory while packing into a CheckpointError."""
    try:
        yield
    except MemoryError:
        raise CheckpointError(
            f"{source.path}: packing it needs more memory than there is",
            hint="choose a smaller format, or `lacewing compress` it first: a packed directory is"
            " mapped, and takes no memory of its own",
        ) from None


def write_packed(
    source: Source | str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    format: str = AUTO,
    sparsity: float | None = None,
    head_format: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    threads: int | None = None,
    machine: str | None = None,
) -> list[Report]:
    """Converts a model into a packed directory, which appears complete or not at all.

    force: replace an existing packed directory, which stays until the new one is on disk. An
    interrupted conversion leaves nothing and starts again from zero.

    Raises CheckpointError (source damaged, target exists or cannot be written),
    UnsupportedModelError, FormatError.
    """
    opened = source if isinstance(source, Source) else open_source(source)
    plan = make_plan(opened, format, sparsity, head_format, machine)
    tokenizer = opened.tokenizer
    reports = []
    stream = convert(opened, format, sparsity, head_format, progress, threads, machine)
    with memory_of(opened), new_directory(Path(out_dir), MANIFEST, force) as place:
        parts = [f"{name}.{part}" for name in plan for part in ("stream", "offsets")]
        with SafetensorsWriter(place / WEIGHTS, parts, {"format": "lacewing"}) as out:
            for name, value, report in stream:
                add_to(out, name, value)
                reports.append(report)
        tensors = {report.name: (report.format, report.shape) for report in reports}
        manifest = manifest_json(opened.config, tokenizer, tensors)
        write_file(place / TOKENIZER, tokenizer.tokenizer_json.encode())
        write_file(place / MANIFEST, manifest.encode())
    return reports


def add_to(out: SafetensorsWriter, name: str, value: Packed) -> None:
    """Writes a weight's parts, or a vector."""
    if isinstance(value, PackedTensor):
        for part, array in value.parts.items():
            out.add(f"{name}.{part}", array)
    else:
        out.add(name, value)


# -- the stream of tensors ------------------------------------------------------------------------


def convert(
    source: Source,
    format: str = AUTO,
    sparsity: float | None = None,
    head_format: str | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
    machine: str | None = None,
) -> Iterator[tuple[str, Packed, Report]]:
    """Every tensor of the model, packed, one at a time.

    format: a weight format, or `auto` (see above); embedding and head follow it only where it is
    `auto` or `bf16`, unless `head_format` says. sparsity: share of the weights of every other
    matrix that is dropped, by magnitude. threads: None is one per core, at most 8. machine: the
    class of machines, `avx512`, `avx2` or `scalar`, on which a sparse format must be faster than
    the dense one of its width, or the dense one takes its place (see `breakeven`); None: where only
    bytes count.

    Raises UnsupportedModelError, CheckpointError (tensors that are not those of the config),
    FormatError (naming the tensor: NaN, a sparsity its format cannot hold).
    """
    plan = make_plan(source, format, sparsity, head_format, machine)
    yield from pack_all(plan, sparsity, progress, threads, machine, search=format == AUTO)


def pack_all(
    plan: Mapping[str, tuple[SourceTensor, Format | None]],
    sparsity: float | None,
    progress: Progress | None,
    threads: int | None,
    machine: str | None,
    search: bool,
) -> Iterator[tuple[str, Packed, Report]]:
    """Every tensor of the plan, packed. search: look for zeros in them (`patterns`)."""
    total = sum(math.prod(tensor.shape) for tensor, _ in plan.values())
    done = 0
    waiting: deque[Job] = deque()
    with packing_threads(threads) as pool:
        for name, (tensor, kind) in plan.items():
            share = None if name in TABLES else sparsity
            found = find_sparser(tensor, machine, pool) if search and not share else None
            waiting.append(Job(pool, tensor, kind, share, machine, found))
            while sum(job.weights for job in waiting) > AHEAD + waiting[0].weights:
                job = waiting.popleft()
                yield job.result()
                done = _advance(progress, job, done, total)
        while waiting:
            job = waiting.popleft()
            yield job.result()
            done = _advance(progress, job, done, total)


def _advance(progress: Progress | None, job: Job, done: int, total: int) -> int:
    done += job.weights
    if progress is not None:
        progress(job.tensor.name, done, total)
    return done


def make_plan(
    source: Source,
    format: str,
    sparsity: float | None,
    head_format: str | None,
    machine: str | None,
) -> Plan:
    """Name -> (tensor, format), everything checked that can be without reading a weight."""
    for name in (format, head_format):
        if name not in (None, AUTO):
            get_format(name)
    if sparsity is not None and not 0 <= sparsity < 1:
        raise FormatError(f"sparsity must be in [0, 1), got {sparsity}")
    if machine not in (None, *MACHINES):
        raise FormatError(f"`machine` must be one of {', '.join(MACHINES)}, got {machine!r}")
    plan: Plan = {}
    for name in source.spec.tensor_shapes():
        tensor = source.tensors[name]
        kind = _choose(tensor, format, head_format)
        if sparsity and kind is not None and not kind.holds_zero and name not in TABLES:
            raise FormatError(
                f"`{name}`: {kind.name} cannot hold pruned weights: zero is not on its grid",
                hint="name a symmetric or a sparse format, such as `w8a8g64_sp`",
            )
        plan[name] = (tensor, kind)
    return plan


def _choose(tensor: SourceTensor, format: str, head_format: str | None) -> Format | None:
    """None for a vector."""
    if len(tensor.shape) == 1:
        return None
    chosen = format
    if tensor.name in TABLES:
        if head_format is not None:
            chosen = head_format
        elif format not in (AUTO, "bf16", "bf16_sp"):
            chosen = FLOATS_TO
    if chosen == AUTO:
        chosen = tensor.own_format or FLOATS_TO
    return get_format(chosen)

"""The measurement behind `lacewing bench kernels`: one linear layer at a time.

A round goes through all candidates in turn, so that a slow moment of the machine hits each of them
alike; every figure is a median over rounds. Weights are cold: a candidate has as many copies of its
weight as its share of the working set, and reads each copy once a round, so that between two reads
of the same bytes the whole working set has gone through the caches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from lacewing import formats
from lacewing.cli import screen
from lacewing.cli.probe import random_codes
from lacewing.errors import FormatError, RequestError
from lacewing.formats.base import aligned_copy
from lacewing.native import compiled, tensor

LEAST_COLD = 2.0  # times the last-level cache: below, a figure may be that of the cache
_HOT_CALLS = 8  # calls per round where the weights stay in the caches
_LEAST_ROUNDS = 5


@dataclass(frozen=True)
class Plan:
    """What is measured: every format x sparsity x shape `(n, k)` x rows x ISA."""

    formats: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    isas: tuple[str, ...]
    sparsities: tuple[float, ...]
    threads: int
    seconds: float  # per row of the table
    hot: bool
    working_set: int  # bytes


@dataclass(frozen=True)
class KernelTime:
    """One row of the table. `seconds` is the median of one multiplication."""

    engine: str  # "lacewing", or the rival
    format: str
    sparsity: float | None  # share of zeros in a sparse format
    isa: str | None  # None: the rival's own choice
    n: int
    k: int
    m: int
    bytes: int
    seconds: float
    spread: float  # (90th - 10th percentile) / median
    samples: int

    @property
    def name(self) -> str:
        return self.format if self.sparsity is None else f"{self.format} {self.sparsity:.0%}"

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / (self.n * self.k)

    @property
    def gb_s(self) -> float:
        return self.bytes / self.seconds / 1e9

    @property
    def gop_s(self) -> float:
        """Two operations per weight and row, counting zeros: the work of the dense product."""
        return 2 * self.m * self.n * self.k / self.seconds / 1e9

    @property
    def peak(self) -> str:
        """Which peak bounds it: of `int8` or of `float` products."""
        return "int8" if self._group_size else "float"

    @property
    def _group_size(self) -> int:
        known = formats.FORMATS.get(self.format)
        return known.group_size if known else int("int8" in self.format)

    def as_dict(self) -> dict[str, Any]:
        more = {name: getattr(self, name) for name in ("bits_per_weight", "gb_s", "gop_s")}
        return {**vars(self), **more}


class Weight(Protocol):
    """Copies of one weight `[n, k]`, ready to be multiplied."""

    engine: str
    format: str
    sparsity: float | None
    bytes: int

    def isas(self, plan: Plan) -> tuple[str | None, ...]: ...
    def time(self, m: int, isa: str | None, calls: int) -> list[float]:
        """Seconds of every call: each copy once, or `calls` calls with the one copy."""


@dataclass
class Packed:
    """Our own weight: a format's packed copies."""

    format: str
    sparsity: float | None
    weights: list[Any]
    bytes: int
    k: int
    threads: int
    engine: str = "lacewing"
    _inputs: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def random(
        cls, format: str, sparsity: float | None, n: int, k: int, share: int, threads: int
    ) -> Packed:
        """As many copies as fill `share` bytes, at least one."""
        codes = random_codes(format, n, k, 0.5 if sparsity is None else sparsity)
        packed = formats.get_format(format).pack(codes)
        del codes
        copies = [packed]
        while sum(copy.nbytes for copy in copies) < share:
            copies.append(_copy_of(packed))
        weights = [tensor(copy) for copy in copies]
        return cls(format, sparsity, weights, packed.nbytes, k, threads)

    def isas(self, plan: Plan) -> tuple[str | None, ...]:
        return plan.isas

    def time(self, m: int, isa: str | None, calls: int) -> list[float]:
        x = self._inputs.setdefault(
            m, np.random.default_rng(0).standard_normal((m, self.k), dtype=np.float32)
        )
        linear = compiled().linear
        times = []
        for turn in range(max(calls, len(self.weights))):
            weight = self.weights[turn % len(self.weights)]
            start = time.perf_counter()
            linear(x, weight, isa=isa, threads=self.threads)
            times.append(time.perf_counter() - start)
        return times


def _copy_of(packed: formats.PackedTensor) -> formats.PackedTensor:
    parts = {name: aligned_copy(part) for name, part in packed.parts.items()}
    return formats.PackedTensor(packed.format, packed.shape, parts)


# ---- memory


def check_memory(plan: Plan, rivals: int) -> None:
    """Raises RequestError where the largest shape would not fit into memory."""
    from lacewing.kv.memory import available_memory

    free = available_memory()
    if free is None:
        return
    for n, k in plan.shapes:
        needed = _memory_needed(plan, n, k, rivals)
        if needed > free:
            raise RequestError(
                f"shape {n}x{k} needs about {screen.bytes_text(needed)} of memory to be packed"
                f" and measured, {screen.bytes_text(free)} is free",
                hint="measure a slice, such as fewer outputs (a product's time is proportional to"
                " them), or fewer formats with --format",
            )


def _memory_needed(plan: Plan, n: int, k: int, rivals: int) -> int:
    sizes = [
        n * k * formats.get_format(name).weight_bits * 5 // 32  # packed, a quarter for the rest
        for name, _ in variants(plan)
    ]
    sizes += [2 * n * k, n * k][:rivals]
    share = plan.working_set // max(1, len(sizes))
    activations = 8 * max(plan.rows) * (n + k)
    return 10 * n * k + activations + sum(max(size, share) for size in sizes)


# ---- measuring


def variants(plan: Plan) -> list[tuple[str, float | None]]:
    """Formats, the sparse ones once per sparsity (where their pattern leaves a choice)."""
    found: list[tuple[str, float | None]] = []
    for name in plan.formats:
        form = formats.get_format(name)
        if not form.sparse:
            found.append((name, None))
        elif form.fixed_sparsity:
            found.append((name, form.fixed_sparsity))
        else:
            found += [(name, each) for each in plan.sparsities]
    return found


def measure(
    plan: Plan, rivals: list[Any], told: Callable[[float, float, str], None]
) -> Iterator[KernelTime]:
    """Yields the rows of one shape after the other. `told(done, total, text)` hears of progress."""
    steps = 2 * len(plan.shapes)
    for index, (n, k) in enumerate(plan.shapes):
        told(2 * index, steps, f"packing {n}x{k}")
        weights = _weights(plan, rivals, n, k)
        told(2 * index + 1, steps, f"measuring {n}x{k}")
        yield from _interleave(plan, weights, n, k)
        for rival in rivals:
            rival.drop()
        told(2 * index + 2, steps, "")


def _weights(plan: Plan, rivals: list[Any], n: int, k: int) -> list[Weight]:
    kinds = variants(plan)
    share = 0 if plan.hot else plan.working_set // (len(kinds) + sum(len(r.kinds) for r in rivals))
    found: list[Weight] = []
    for name, sparsity in kinds:
        try:
            found.append(Packed.random(name, sparsity, n, k, share, plan.threads))
        except FormatError as error:  # a format that cannot hold such a shape
            screen.note(f"{name} {n}x{k} is left out: {error}")
    for rival in rivals:
        found += rival.weights(n, k, share)
    return found


def _interleave(plan: Plan, weights: list[Weight], n: int, k: int) -> Iterator[KernelTime]:
    """Rounds through all candidates until their time is up; then their rows."""
    rows = [
        (weight, m, isa)
        for m in plan.rows
        for isa in dict.fromkeys(isa for weight in weights for isa in weight.isas(plan))
        for weight in weights
        if isa in weight.isas(plan)
    ]
    calls = _HOT_CALLS if plan.hot else 0
    times: list[list[float]] = [[] for _ in rows]
    for weight, m, isa in rows:  # not counted: first pages, first code, threads asleep
        weight.time(m, isa, calls)
    end = time.perf_counter() + plan.seconds * len(rows)
    rounds = 0
    while rounds < _LEAST_ROUNDS or time.perf_counter() < end:
        for found, (weight, m, isa) in zip(times, rows, strict=True):
            found += weight.time(m, isa, calls)
        rounds += 1
    for found, (weight, m, isa) in zip(times, rows, strict=True):
        low, median, high = np.percentile(found, (10, 50, 90)).tolist()
        yield KernelTime(
            weight.engine, weight.format, weight.sparsity, isa, n, k, m, weight.bytes,
            median, (high - low) / median, len(found),
        )  # fmt: skip

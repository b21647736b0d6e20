"""A model opened for a verb: the bar while it packs, what packing added, and what it weighs."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lacewing.checkpoint import AUTO, PackedModel, Report, load_model
from lacewing.cli import screen
from lacewing.engine import LLM, default_model
from lacewing.formats import PackedTensor
from lacewing.kv.layout import find_plan
from lacewing.native import check_isa, check_threads, compiled

if TYPE_CHECKING:
    from lacewing.compress.session import LayerReport

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_BANDWIDTH_SECONDS = 0.5


@dataclass(frozen=True)
class Opened:
    """An LLM and what a table says about it."""

    llm: LLM
    path: Path
    seconds: float
    """From the path to a model that can answer."""
    threads: int

    @property
    def isa(self) -> str:
        return str(compiled().default_isa())

    @property
    def bytes_per_token(self) -> int:
        """Bytes read for one token of one sequence: every weight, but of an embedding that is not
        the head too only a row."""
        tensors = self.llm.model.tensors
        untied = _HEAD in tensors
        return sum(t.nbytes for name, t in tensors.items() if not (untied and name == _EMBEDDING))

    @cached_property
    def read_bandwidth(self) -> float:
        """GB/s that this machine reads with as many threads."""
        from lacewing.cli.doctor import measure_bandwidth

        return measure_bandwidth(_BANDWIDTH_SECONDS, self.threads)[self.threads]

    def size(self) -> dict[str, Any]:
        """`format`, `bits_per_weight` and `bytes` of the whole model."""
        return weigh(self.llm.model)

    def share(self, tokens_per_second: float) -> float:
        """Of the read bandwidth, what a decode rate of one sequence uses."""
        return tokens_per_second * self.bytes_per_token / 1e9 / self.read_bandwidth


def open_llm(
    model: str | None, format: str, threads: int | None = None, kv: str = "f16", **options: Any
) -> Opened:
    """Opens MODEL (None: the demo model) in `format`; says on stderr what rounding added."""
    check_isa()  # what is wrong with the options is said before a file is read
    check_threads(threads)
    path = Path(model) if model is not None else default_model()
    plan = find_plan(kv, path)
    start = time.perf_counter()
    with screen.progress(f"packing {path.name}") as advance:
        packed = load_model(
            path,
            format,
            progress=lambda name, done, total: advance(done, total, name),
            machine=compiled().default_isa(),
        )
    llm = LLM.from_model(packed, threads, kv=kv, plan=plan, **options)
    seconds = time.perf_counter() - start
    for line in added_error(packed.reports):
        screen.note(line)
    return Opened(llm, path, seconds, threads or compiled().threads())


def weigh(model: PackedModel) -> dict[str, Any]:
    """`format` (the one of most weights), `bits_per_weight`, `bytes`."""
    matrices = [t for t in model.tensors.values() if isinstance(t, PackedTensor)]
    weights: dict[str, int] = {}
    for matrix in matrices:
        n, k = matrix.shape
        weights[matrix.format] = weights.get(matrix.format, 0) + n * k
    nbytes = sum(tensor.nbytes for tensor in model.tensors.values())
    return {
        "format": max(weights, key=lambda name: weights[name]),
        "bits_per_weight": 8 * nbytes / sum(weights.values()),
        "bytes": nbytes,
    }


@dataclass
class Rounding:
    """Tensors of one source type that went into one format."""

    source: str
    format: str
    tensors: int = 0
    weights: int = 0
    bytes: int = 0
    exact: bool = True
    worst: float = 0.0
    worst_name: str = ""
    _squares: float = 0.0

    @property
    def error(self) -> float:
        """Root mean square of the tensors' relative errors, each counted by its weights."""
        return float((self._squares / self.weights) ** 0.5) if self.weights else 0.0

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights

    def add(self, report: Report) -> None:
        size = 1
        for dimension in report.shape:
            size *= dimension
        self.tensors += 1
        self.weights += size
        self.bytes += report.nbytes
        self.exact = self.exact and report.exact
        self._squares += size * report.error**2
        if report.error > self.worst:
            self.worst, self.worst_name = report.error, report.name

    def as_dict(self) -> dict[str, Any]:
        known = ("source", "format", "tensors", "weights", "bytes", "bits_per_weight", "exact")
        error = {"error": self.error, "worst_error": self.worst, "worst_tensor": self.worst_name}
        return {**{name: getattr(self, name) for name in known}, **error}


def roundings(reports: Iterable[Report]) -> list[Rounding]:
    """Reports added up per pair of source type and format, most bytes first."""
    found: dict[tuple[str, str], Rounding] = {}
    for report in reports:
        key = (report.source, report.format)
        found.setdefault(key, Rounding(*key)).add(report)
    return sorted(found.values(), key=lambda rounding: -rounding.bytes)


def dense_instead(reports: Iterable[Report | LayerReport]) -> list[dict[str, Any]]:
    """Tensors that are dense although a sparse format was asked for, per pair of formats, with the
    largest share of weights that are not zero."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for report in reports:
        if report.instead_of is None:
            continue
        empty = {"format": report.format, "instead_of": report.instead_of, "tensors": 0}
        row = found.setdefault((report.format, report.instead_of), {**empty, "density": 0.0})
        row["tensors"] += 1
        row["density"] = max(row["density"], report.density or 0.0)
    return list(found.values())


def note_dense(reports: Iterable[Report | LayerReport], machine: str) -> None:
    """What is dense although a sparse format was asked for."""
    for row in dense_instead(reports):
        screen.note(
            f"{row['tensors']} tensors are {row['format']} instead of {row['instead_of']}: up to"
            f" {row['density']:.0%} of their weights are not zero, too many to pay on {machine}"
        )


def found_zeros(reports: Iterable[Report]) -> list[dict[str, Any]]:
    """Tensors that `auto` has made sparse for the zeros that it found, per format, with the zeros
    of one that has the fewest."""
    found: dict[str, dict[str, Any]] = {}
    for report in reports:
        if report.pattern is None:
            continue
        row = found.setdefault(report.format, {"format": report.format, "tensors": 0})
        row["tensors"] += 1
        if report.pattern.density >= row.get("density", 0):
            row |= {"density": report.pattern.density, "zeros": str(report.pattern)}
    return list(found.values())


def added_error(reports: Iterable[Report]) -> list[str]:
    """A line per rounding that is not exact."""
    return [
        f"rounded {r.tensors} tensors {r.source} -> {r.format}: added error {r.error:.2%} of the "
        f"weights' norm, at most {r.worst:.2%} ({r.worst_name})"
        for r in roundings(reports)
        if not r.exact
    ]


FORMAT_HELP = f"Weight format, or `{AUTO}`: the file's own grid where it has one."

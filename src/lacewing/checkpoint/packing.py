"""One tensor on its way from a model file to its packed bytes, a run of rows at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from lacewing.checkpoint.breakeven import dense_twin, pays
from lacewing.checkpoint.interrupts import uninterrupted
from lacewing.checkpoint.manifest import VECTOR
from lacewing.checkpoint.patterns import Pattern, Sparser
from lacewing.checkpoint.tensors import F32, SourceTensor
from lacewing.errors import FormatError, LacewingError
from lacewing.formats import Codes, Format, PackedTensor
from lacewing.formats.base import aligned_empty, row_chunks
from lacewing.formats.tiles import STRIP

__all__ = ["AHEAD", "Job", "Packed", "Report", "packing_threads", "round_rows"]

Packed = PackedTensor | F32

AHEAD = 8 << 20
"""Weights under way at once beyond the tensor that is waited for."""
_MAX_THREADS = 8


@dataclass(frozen=True)
class Report:
    """What became of one tensor."""

    name: str
    shape: tuple[int, ...]
    source: str
    """Type in the source: `Q4_1`, `BF16`."""
    format: str
    """Weight format, or `f32` for a tensor of one dimension."""
    nbytes: int
    error: float
    """Added by rounding: ‖w - w'‖ / ‖w‖, against what the source says w is."""
    exact: bool
    instead_of: str | None = None
    """The sparse format that was asked for, where `format` is its dense twin because so many
    weights are not zero that the sparse one would be larger or slower."""
    density: float | None = None
    """Share of the weights that a sparse format stores, where one was asked for: those that are not
    zero; in blocks, of the blocks that are not all zeros."""
    pattern: Pattern | None = None
    """The zeros that `auto` has found in the weights, where they made it choose a sparse format."""


@contextmanager
def packing_threads(threads: int | None) -> Iterator[ThreadPoolExecutor]:
    """Threads that stop early when the caller does; None: one per core, at most 8."""
    count = threads or min(len(os.sched_getaffinity(0)), _MAX_THREADS)
    pool = ThreadPoolExecutor(count, thread_name_prefix="pack")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Job:
    """One tensor under way: its runs of rows are with the pool."""

    lost = whole = 0.0
    """Squared norms of what rounding took away and of the weights, once there is a result; 0 where
    nothing was rounded."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        tensor: SourceTensor,
        kind: Format | None,
        sparsity: float | None,
        machine: str | None = None,
        found: Sparser | None = None,
    ) -> None:
        """found: what is packed in place of `tensor` in `kind`, where that pays."""
        self._dense = pool, tensor, kind
        self._found = found
        if found is not None:
            tensor, kind = found.tensor, found.kind
        self.tensor = tensor
        self.kind = kind
        self.machine = machine
        self.weights = math.prod(tensor.shape)
        self._packed = tensor.packed() if kind is not None and sparsity is None else None
        if self._packed is not None and kind is not None and self._packed.format != kind.name:
            self._packed = None
        self._pieces: list[Future[_Piece]] = []
        if kind is not None and self._packed is None:
            n, k = tensor.shape
            self._join = _joiner(kind, n, k)
            with uninterrupted():
                self._pieces = [
                    pool.submit(self._piece, kind, sparsity, begin, end)
                    for begin, end in row_chunks(n, k)
                ]

    def result(self) -> tuple[str, Packed, Report]:
        """Waits for the pieces and joins them."""
        name = self.tensor.name
        if self.kind is None:
            vector = self._vector()
            return name, vector, self._report(VECTOR, vector.nbytes, 0.0, True)
        if self._packed is not None:
            report = self._report(self._packed.format, self._packed.nbytes, 0.0, True)
            return name, self._packed, report
        pieces = [future.result() for future in self._pieces]
        self._pieces = []
        self.tensor.release()
        density = sum(p.kept for p in pieces) / self.weights if self.kind.sparse else None
        packed = self._join.finish(self.kind)
        if self._found is None:
            packed = self._faster(packed, density)
        elif not self._found.pays(packed, density or 0.0, self.machine):
            return self._without_search()
        self.lost, self.whole = sum(p.lost for p in pieces), sum(p.whole for p in pieces)
        error = math.sqrt(self.lost / self.whole) if self.whole else math.sqrt(self.lost)
        exact = all(p.exact for p in pieces)
        instead_of = None if packed.format == self.kind.name else self.kind.name
        report = self._report(packed.format, packed.nbytes, error, exact)
        pattern = self._found.pattern if self._found is not None else None
        report = replace(report, instead_of=instead_of, density=density, pattern=pattern)
        return name, packed, report

    def _without_search(self) -> tuple[str, Packed, Report]:
        job = Job(*self._dense, None, self.machine)
        result = job.result()
        self.lost, self.whole = job.lost, job.whole
        return result

    def _faster(self, packed: PackedTensor, density: float | None) -> PackedTensor:
        """The same weights in the dense format of the same width, where that is faster or takes no
        more bytes: a sparse weight is never slower than a dense one. Every product is the same."""
        if density is None or pays(packed, density, self.machine):
            return packed
        assert self.kind is not None
        twin = dense_twin(self.kind)
        assert twin is not None
        return twin.pack(self.kind.unpack(packed))

    def _report(self, format: str, nbytes: int, error: float, exact: bool) -> Report:
        tensor = self.tensor
        return Report(tensor.name, tensor.shape, tensor.dtype, format, nbytes, error, exact)

    def _vector(self) -> F32:
        vector = np.ascontiguousarray(self.tensor.dequantize(), np.float32)
        if not np.isfinite(vector).all():
            at = int(np.flatnonzero(~np.isfinite(vector))[0])
            raise FormatError(
                f"`{self.tensor.name}`: needs finite values, got {vector[at]} at [{at}]",
                hint="the model file is damaged, or its training diverged",
            )
        return vector

    def _piece(self, kind: Format, sparsity: float | None, begin: int, end: int) -> _Piece:
        try:
            codes, piece = _round(self.tensor, kind, sparsity, begin, end)
            self._join.put(begin, kind.pack(codes))
        except LacewingError as error:
            if self.tensor.name in str(error):
                raise
            text = f"`{self.tensor.name}`, rows {begin} to {end - 1}: {error}"
            raise type(error)(text, hint=error.hint) from None
        return piece


@dataclass(frozen=True)
class _Piece:
    """Of one run of rows: squared norms of what rounding took away and of the weights, and how many
    weights are stored."""

    lost: float
    whole: float
    exact: bool
    kept: int


def round_rows(tensor: SourceTensor, kind: Format, begin: int, end: int) -> Codes:
    """What rows of a tensor are packed as, where nothing is pruned. Raises FormatError."""
    return _round(tensor, kind, None, begin, end)[0]


def _round(
    tensor: SourceTensor, kind: Format, sparsity: float | None, begin: int, end: int
) -> tuple[Codes, _Piece]:
    """Codes of a run of rows, from the tensor's own grid where that is the format's."""
    if not sparsity:
        own = tensor.codes(begin, end) if tensor.own_format == kind.name else None
        if own is None and kind.name == "bf16":
            own = tensor.codes(begin, end)
        if own is not None and own[0] == kind.name:
            _check_finite_bits(own[1])
            return own[1], _Piece(0.0, 0.0, True, kind.stored(own[1]))
    weights = tensor.dequantize(begin, end)
    near = tensor.near_codes(begin, end) if not sparsity else None
    codes = near[1] if near is not None and near[0] == kind.name else None
    if codes is None:
        codes = kind.round(weights, sparsity)
    lost = kind.dequantize(codes)
    lost -= weights
    missing = _square(lost)
    exact = missing == 0 and not lost.any()
    return codes, _Piece(missing, _square(weights), exact, kind.stored(codes))


def _square(weights: F32) -> float:
    flat = np.ascontiguousarray(weights).reshape(-1)
    total = float(np.dot(flat, flat))
    return total if math.isfinite(total) else float(np.dot(flat.astype(np.float64), flat))


def _check_finite_bits(codes: Codes) -> None:
    if codes.q.dtype == np.uint16 and ((codes.q & 0x7F80) == 0x7F80).any():
        raise FormatError(
            "needs finite weights, got NaN or infinity",
            hint="the model file is damaged, or its training diverged",
        )


class _DenseJoin:
    """Parts of dense formats have one entry per strip of 16 outputs: runs are written in place."""

    def __init__(self, kind: Format, n: int, k: int) -> None:
        self._shape = (n, k)
        self._parts = {
            name: aligned_empty(shape, kind.part_dtypes[name])
            for name, shape in kind.part_shapes(n, k).items()
        }

    def put(self, begin: int, piece: PackedTensor) -> None:
        for name, part in piece.parts.items():
            first = begin // STRIP
            self._parts[name][first : first + len(part)] = part

    def finish(self, kind: Format) -> PackedTensor:
        return PackedTensor(kind.name, self._shape, self._parts)


class _StreamJoin:
    """Streams are laid end to end, without the zeros that follow the last strip of each."""

    def __init__(self, kind: Format, n: int, k: int) -> None:
        self._shape = (n, k)
        self._pieces: dict[int, PackedTensor] = {}

    def put(self, begin: int, piece: PackedTensor) -> None:
        self._pieces[begin] = piece

    def finish(self, kind: Format) -> PackedTensor:
        pieces = [self._pieces[begin].parts for begin in sorted(self._pieces)]
        size = sum(int(piece["offsets"][-1]) for piece in pieces)
        tail = len(pieces[0]["stream"]) - int(pieces[0]["offsets"][-1])
        stream = aligned_empty((size + tail,), np.uint8)
        stream[size:] = 0
        offsets = [np.zeros(1, np.int64)]
        at = 0
        for piece in pieces:
            length = int(piece["offsets"][-1])
            stream[at : at + length] = piece["stream"][:length]
            offsets.append(piece["offsets"][1:] + at)
            at += length
        self._pieces.clear()
        parts = {"stream": stream, "offsets": np.concatenate(offsets)}
        return PackedTensor(kind.name, self._shape, parts)


def _joiner(kind: Format, n: int, k: int) -> _DenseJoin | _StreamJoin:
    return _StreamJoin(kind, n, k) if "stream" in kind.part_names else _DenseJoin(kind, n, k)

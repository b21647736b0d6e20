"""Packed weights that wait in a temporary file until all of them are made.

Until then the dense model must stay whole, or an error could not leave it as it was; and both at
once would be more memory than the model. Pages of a file that are only read can be dropped.
"""

from __future__ import annotations

import mmap
import tempfile
from contextlib import suppress
from types import TracebackType
from typing import Any

import numpy as np

from lacewing.formats import PackedTensor
from lacewing.formats.base import Array, aligned_copy

__all__ = ["Spill", "in_memory"]

_FIRST_MAP = 1 << 26


class Spill:
    """The file; it has no name and is gone when nothing reads it any more. Where it cannot be
    written (no room, no such place) weights stay in memory."""

    def __init__(self) -> None:
        self._size = 0
        self._map: mmap.mmap | None = None
        self._mapped = 0, 0
        """Of the file, by the newest map: from, to."""
        self._read: list[mmap.mmap] = []
        self._file: Any = None
        with suppress(OSError):
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (`__exit__` closes it)

    def __enter__(self) -> Spill:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def keep(self, packed: PackedTensor) -> PackedTensor:
        """`packed`, its parts mapped from the file."""
        try:
            parts = {name: self._keep(part) for name, part in packed.parts.items()}
        except OSError:
            return packed
        return PackedTensor(packed.format, packed.shape, parts)

    def unread(self) -> None:
        """Gives back the memory that reading what is kept has taken."""
        for view in self._read:
            view.madvise(mmap.MADV_DONTNEED)
        self._read.clear()

    def _keep(self, part: Array) -> Array:
        if self._file is None or part.nbytes == 0:
            return part
        begin = -(-self._size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._file.seek(begin)
        rest = part.reshape(-1).view(np.uint8).data
        while rest:
            rest = rest[self._file.write(rest) :]
        self._size = begin + part.nbytes
        if self._size > self._mapped[1]:
            self._map_from(begin, part.nbytes)
        view, offset = self._map, begin - self._mapped[0]
        assert view is not None
        self._read.append(view)
        out: Array = np.frombuffer(view, part.dtype, part.size, offset).reshape(part.shape)
        return out

    def _map_from(self, begin: int, least: int) -> None:
        """Every map holds a file descriptor, so that each is as long as all before it: a few are
        enough. What is mapped and not yet written takes no room in the file."""
        length = max(_FIRST_MAP, begin, least)
        self._file.truncate(begin + length)
        self._map = mmap.mmap(self._file.fileno(), length, access=mmap.ACCESS_COPY, offset=begin)
        self._mapped = begin, begin + length


def in_memory(packed: PackedTensor) -> PackedTensor:
    """A copy of `packed` in memory of its own; `packed` itself where there is none left."""
    try:
        parts = {name: aligned_copy(part) for name, part in packed.parts.items()}
    except MemoryError:
        return packed
    return PackedTensor(packed.format, packed.shape, parts)

"""What formats share whose strips of 16 outputs differ in length: one stream of bytes, and where in
it every strip begins.

Part `stream`: strips back to back, each padded with zeros to 64 bytes; 64 zero bytes follow the
last one, so that a kernel may load 64 bytes wherever a value begins.
Part `offsets`: int64 `[S+1]`, where each strip begins, multiples of 64, and where the last ends.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lacewing.errors import FormatError
from lacewing.formats.base import CHUNK, Codes, Format, PackedTensor, aligned_empty
from lacewing.formats.tiles import STRIP, ceil_to, strips

__all__ = ["STREAM_AND_OFFSETS", "Stream"]

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]

STREAM_AND_OFFSETS: Mapping[str, np.dtype[Any]] = {
    "stream": np.dtype(np.uint8),
    "offsets": np.dtype(np.int64),
}
TAIL_BYTES = 64
"""Zero bytes after the last strip."""


class Stream(Format):
    """A sparse format in strips of its own length; what lies in a strip is the format's own."""

    sparse = True
    part_dtypes = STREAM_AND_OFFSETS
    input_multiple = 64

    def part_shapes(self, n: int, k: int) -> dict[str, tuple[int, ...]]:
        return {"stream": (-1,), "offsets": (strips(n) + 1,)}

    @abstractmethod
    def _least_bytes(self, k: int) -> int:
        """Bytes of a strip of which no weight is left."""

    @abstractmethod
    def _pack_strips(self, codes: Codes) -> tuple[U8, I64]:
        """The bytes of whole strips, and the size of each strip, a multiple of 64."""

    @abstractmethod
    def _unpack_strips(self, stream: U8, offsets: I64, first_strip: int, out: Codes) -> None:
        """Fills `out`, whole strips, whose bytes lie between consecutive `offsets`."""

    def pack(self, codes: Codes) -> PackedTensor:
        n, k = self.check_codes(codes)
        pieces = []
        offsets = np.zeros(strips(n) + 1, np.int64)
        for begin, end in _strip_chunks(n, k):
            piece, sizes = self._pack_strips(codes.rows(begin * STRIP, min(end * STRIP, n)))
            pieces.append(piece)
            offsets[begin + 1 : end + 1] = offsets[begin] + np.cumsum(sizes)
        stream = aligned_empty((int(offsets[-1]) + TAIL_BYTES,), np.uint8)
        np.concatenate([*pieces, np.zeros(TAIL_BYTES, np.uint8)], out=stream)
        return PackedTensor(self.name, (n, k), {"stream": stream, "offsets": offsets})

    def unpack(self, packed: PackedTensor) -> Codes:
        self.validate(packed)
        n, k = packed.shape
        stream, offsets = packed.parts["stream"], packed.parts["offsets"]
        self._check_room(k, offsets)
        out = self.empty_codes(n, k)
        for begin, end in _strip_chunks(n, k):
            rows = out.rows(begin * STRIP, min(end * STRIP, n))
            self._unpack_strips(stream, offsets[begin : end + 1], begin, rows)
        return out

    def validate(self, packed: PackedTensor) -> None:
        super().validate(packed)
        stream, offsets = packed.parts["stream"], packed.parts["offsets"]
        size = len(stream) - TAIL_BYTES
        if offsets[0] != 0 or (offsets[1:] < offsets[:-1]).any() or (offsets % 64 != 0).any():
            raise FormatError(
                f"{self.name} offsets must begin at 0, not decrease, and be multiples of 64"
            )
        if offsets[-1] != size:
            raise FormatError(
                f"{self.name} stream must have {int(offsets[-1]) + TAIL_BYTES} bytes"
                f" (end of the last strip + {TAIL_BYTES}), got {len(stream)}"
            )

    def _check_room(self, k: int, offsets: I64) -> None:
        """Before memory for the codes is taken: every strip has room for what it must have."""
        least = self._least_bytes(k)
        short = np.flatnonzero(np.diff(offsets) < least)
        if short.size:
            raise FormatError(
                f"{self.name} strip {short[0]} needs at least {least} bytes for {k} inputs,"
                f" got {offsets[short[0] + 1] - offsets[short[0]]}"
            )


def _strip_chunks(n: int, k: int) -> Iterator[tuple[int, int]]:
    """Ranges of strips of about CHUNK weights."""
    count = strips(n)
    step = max(1, CHUNK // (STRIP * ceil_to(k, 64)))
    for begin in range(0, count, step):
        yield begin, min(begin + step, count)

"""compressed-tensors' `sparse-bitmask` and `sparse-24-bitmask`: the values that are not zero, and a
bit for every weight.

    <module>.shape        int64 [2] or [2, 1]: n, k
    <module>.bitmask      uint8 [n, ceil(k / 8)], bit i % 8 of byte i // 8 is set where input i of
                          the row is stored
    <module>.compressed   the stored values, row after row; sparse-24: [n, k / 2], two of every four
                          inputs, zeros among them where a weight has more
    <module>.row_offsets  int64 [n], where each row begins (sparse-bitmask alone)

The library wrote them until 0.14; it reads them no more. The values are floats, or the int8 codes
of an `int-quantized` weight.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from lacewing.checkpoint.parts import Parts
from lacewing.checkpoint.shards import FLOATS, as_f32
from lacewing.checkpoint.tensors import F32, SourceTensor
from lacewing.formats import Codes

__all__ = ["BITMASK_PARTS", "BitmaskRows", "BitmaskTensor"]

I64 = npt.NDArray[np.int64]
Array = npt.NDArray[Any]

BITMASK_PARTS = ("compressed", "bitmask", "shape", "row_offsets")
_READABLE = (*FLOATS, "I8")


class BitmaskRows:
    """Rows of a weight whose zeros are left out."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.shape = n, k = parts.size("shape")
        self.dtype = parts.entry("compressed").dtype
        if self.dtype.startswith("F8"):
            parts.refuse("weights of floats or int8", self.dtype, "use the original model")
        self._bitmask = parts.array("bitmask", ("U8",), (n, -(-k // 8)))
        self.two_of_four = "row_offsets" not in parts
        if self.two_of_four and k % 4:
            parts.fail("shape", "inputs in fours", k)
        shape = (n, k // 2) if self.two_of_four else (None,)
        self._values = parts.array("compressed", _READABLE, shape).reshape(-1)
        if len(self._values) > n * k:
            parts.fail("compressed", f"at most {n * k} values", len(self._values))

    @cached_property
    def _offsets(self) -> I64:
        """Where every row begins in the values, and where the last one ends."""
        n, k = self.shape
        if self.two_of_four:
            return np.arange(n + 1, dtype=np.int64) * (k // 2)
        starts = self._parts.array("row_offsets", ("I64", "I32"), (n,)).astype(np.int64)
        offsets = np.append(starts, len(self._values))
        wrong = np.flatnonzero((np.diff(offsets) < 0) | (np.diff(offsets) > k))
        if starts[0] != 0 or wrong.size:
            row = int(wrong[0]) if starts[0] == 0 else 0
            requirement = f"0, and then 0 to {k} more for every row up to {len(self._values)}"
            actual = f"{offsets[row]} and {offsets[row + 1]} in row {row}"
            self._parts.fail("row_offsets", requirement, actual)
        return offsets

    def read(self, begin: int, end: int) -> Array:
        """Rows `begin..end` `[r, k]` as they were stored, bf16 as its bits."""
        k = self.shape[1]
        bits = np.unpackbits(self._bitmask[begin:end], axis=1, bitorder="little").view(np.bool_)
        if bits[:, k:].any():
            self._parts.fail("bitmask", f"no bit beyond input {k - 1}", "one that is set")
        present = bits[:, :k]
        self._check_counts(present.sum(axis=1, dtype=np.int64), begin, end)
        out = np.zeros((end - begin, k), self._values.dtype)
        out[present] = self._values[self._offsets[begin] : self._offsets[end]]
        return out

    def _check_counts(self, counts: I64, begin: int, end: int) -> None:
        stored = np.diff(self._offsets[begin : end + 1])
        wrong = np.flatnonzero(counts != stored)
        if wrong.size:
            row = int(wrong[0])
            self._parts.fail(
                "bitmask",
                f"{stored[row]} bits set in row {begin + row}, as many as values",
                int(counts[row]),
            )


class BitmaskTensor(SourceTensor):
    """A weight of floats whose zeros are left out."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._rows = BitmaskRows(parts)
        self.name = parts.weight
        self.shape = self._rows.shape
        self.nbytes = parts.nbytes
        kind = "sparse-24-bitmask" if self._rows.two_of_four else "sparse-bitmask"
        self.dtype = f"{kind} {self._rows.dtype}"
        if self._rows.dtype not in FLOATS:
            parts.fail("compressed", f"a type of {', '.join(FLOATS)}", self._rows.dtype)

    def dequantize(self, begin: int = 0, end: int | None = None) -> F32:
        return as_f32(self._read(begin, end), self._rows.dtype)

    def codes(self, begin: int = 0, end: int | None = None) -> tuple[str, Codes] | None:
        if self._rows.dtype != "BF16":
            return None
        return "bf16", Codes(self._read(begin, end))

    def _read(self, begin: int, end: int | None) -> Array:
        last = self.shape[0] if end is None else min(end, self.shape[0])
        return self._rows.read(begin, last)

    def release(self) -> None:
        self._parts.release()

"""Weights that other libraries rounded: `scale * (code - zero_point)` per group of inputs, and the
formats of ours whose grid that is.

Codes are unsigned here. Which format is a tensor's own follows from d = code - zero_point, whose
range the number of bits and the zero points give, and from the length G of its groups (G is a
multiple of the format's group: scales are repeated; a whole row: of any):

    d in -4..3                  w3a8g64                             exact
    d in -8..7                  w4a8g128, w4a8g64, w4a8g32          exact
    4 or 5 bits                 w4a8g32z, w5a8g32z: scale * code + minimum, minimum = -scale * zero
                                exact where the minimum is a float16, else nearly
    d in -128..127              w8a8 (rows), w8a8g64, w8a8g32       exact
    others, and activation      none: rounded from floats
    order (g_idx)

Exact also wants scales that are float16; where they are not (bf16 with a wide range, f32), the same
codes with scales rounded to float16 are the nearest grid.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from lacewing.checkpoint.parts import Parts
from lacewing.checkpoint.tensors import F32, Bools, SourceTensor
from lacewing.formats import Codes, Format, get_format
from lacewing.formats.base import ROW, row_chunks

__all__ = ["GridTensor", "checked_g_idx", "own_format"]

U8 = npt.NDArray[np.uint8]
I16 = npt.NDArray[np.int16]
I32 = npt.NDArray[np.int32]
Array = npt.NDArray[Any]
T = TypeVar("T", bound=np.generic)

_EXACT = (
    "w3a8g64",
    "w4a8g128",
    "w4a8g64",
    "w4a8g32",
    "w4a8g32z",
    "w5a8g32z",
    "w8a8",
    "w8a8g64",
    "w8a8g32",
)
"""The formats that are tried, in the order of bytes."""


def own_format(
    bits: int, group: int | None, low: int, high: int, k: int, names: tuple[str, ...] = _EXACT
) -> str | None:
    """The format among `names` for codes of `bits` whose distances to their zero point lie in
    `low..high`, in groups of `group` inputs of rows of `k` (None: a row); None if none fits."""
    for name in names:
        kind = get_format(name)
        if kind.asymmetric:
            fits = kind.weight_bits == bits
        else:
            fits = -kind.zero_point <= low and high <= kind.max_code - kind.zero_point
        if fits and _groups_fit(kind, group, k):
            return name
    return None


def _groups_fit(kind: Format, group: int | None, k: int) -> bool:
    if kind.group_size == ROW:
        return group is None and k <= ROW
    return group is None or group % kind.group_size == 0


def _is_symmetric(kind: Format) -> bool:
    """Whether weights are `scale * (code - zero_point)`."""
    return kind.holds_zero and kind.group_size != 0


class GridTensor(SourceTensor):
    """A weight `[n, k]` made of parts. Subclasses read codes, scales and zero points."""

    bits: int
    code_range: tuple[int, int]
    """Smallest and largest code."""
    zero_point: int | None = None
    """The zero point of every group, or None where they are stored."""
    group_size: int | None
    """Inputs per scale, or None for a row."""
    g_idx: I32 | None = None
    """Group of every input `[k]`, where groups are not runs of inputs (activation order)."""

    def __init__(self, parts: Parts, shape: tuple[int, int], label: str) -> None:
        self._parts = parts
        self.name = parts.weight
        self.shape = shape
        self.nbytes = parts.nbytes
        self.dtype = label

    # -- what is stored --------------------------------------------------------------------------

    @abstractmethod
    def _codes(self, begin: int, end: int) -> U8:
        """Codes `[r, k]` of rows `begin..end`."""

    @abstractmethod
    def _scales(self, begin: int, end: int) -> F32:
        """Scales `[r, groups]`."""

    def _zeros(self, begin: int, end: int) -> I16:
        """Zero points `[r, groups]` where they are stored."""
        raise NotImplementedError

    @property
    def groups(self) -> int:
        """Scales per row."""
        return -(-self.shape[1] // (self.group_size or self.shape[1]))

    def release(self) -> None:
        self._parts.release()

    def _checked_codes(self, begin: int, end: int) -> U8:
        codes = self._codes(begin, end)
        low, high = self.code_range
        if (low, high) != (0, (1 << self.bits) - 1):  # or else no code can be anything else
            smallest, largest = int(codes.min()), int(codes.max())
            if smallest < low or largest > high:
                wrong = smallest if smallest < low else largest
                self._parts.fail("weight", f"codes from {low} to {high}", wrong)
        return codes

    def _all_zeros(self, begin: int, end: int) -> I16:
        if self.zero_point is None:
            return self._zeros(begin, end)
        return np.full((end - begin, self.groups), self.zero_point, np.int16)

    @cached_property
    def _zero_range(self) -> tuple[int, int]:
        if self.zero_point is not None:
            return self.zero_point, self.zero_point
        n = self.shape[0]
        found = [self._zeros(begin, end) for begin, end in row_chunks(n, self.groups)]
        return min(int(z.min()) for z in found), max(int(z.max()) for z in found)

    # -- what it means ---------------------------------------------------------------------------

    def dequantize(self, begin: int = 0, end: int | None = None) -> F32:
        last = self.shape[0] if end is None else min(end, self.shape[0])
        out = self._checked_codes(begin, last).astype(np.float32)
        out -= self._per_input(self._all_zeros(begin, last).astype(np.float32))
        with np.errstate(over="ignore", invalid="ignore"):  # damaged scales; found by who rounds
            out *= self._per_input(self._scales(begin, last))
        return out

    def nonzero(self, begin: int = 0, end: int | None = None) -> Bools:
        last = self.shape[0] if end is None else min(end, self.shape[0])
        zeros = self._per_input(self._all_zeros(begin, last))
        found: Bools = self._checked_codes(begin, last) != zeros
        return found

    def _per_input(self, values: npt.NDArray[T]) -> npt.NDArray[T]:
        """Values per group `[r, groups]` for every input, `[r, k]` or what broadcasts to it."""
        if self.g_idx is not None:
            return values[:, self.g_idx]
        if values.shape[1] == 1:
            return values
        return np.repeat(values, self.group_size or 1, axis=1)[:, : self.shape[1]]

    # -- what it is in our formats ---------------------------------------------------------------

    def _distances(self) -> tuple[int, int]:
        """Range of code - zero_point."""
        (low, high), (first, last) = self.code_range, self._zero_range
        return low - last, high - first

    @cached_property
    def own_format(self) -> str | None:  # type: ignore[override]
        if self.g_idx is not None:
            return None
        return own_format(self.bits, self.group_size, *self._distances(), self.shape[1])

    def with_format(self, format: str) -> SourceTensor:
        low, high = self._distances()
        named = (format,) if _is_symmetric(get_format(format)) else ()
        fits = own_format(self.bits, self.group_size, low, high, self.shape[1], named)
        if fits is None or self.g_idx is not None:
            return self
        changed = copy.copy(self)
        changed.own_format = format
        return changed

    def codes(self, begin: int = 0, end: int | None = None) -> tuple[str, Codes] | None:
        return self._on_grid(begin, end, exact=True)

    def near_codes(self, begin: int = 0, end: int | None = None) -> tuple[str, Codes] | None:
        return self._on_grid(begin, end, exact=False)

    def _on_grid(self, begin: int, end: int | None, exact: bool) -> tuple[str, Codes] | None:
        if self.own_format is None:
            return None
        kind = get_format(self.own_format)
        last = self.shape[0] if end is None else min(end, self.shape[0])
        zeros = self._all_zeros(begin, last)
        scales = self._scales(begin, last)
        mins = None
        with np.errstate(over="ignore", invalid="ignore"):
            if kind.asymmetric:
                mins = -scales * (zeros - self.code_range[0]).astype(np.float32)
            parts = [None if v is None else self._halves(kind, v, exact) for v in (scales, mins)]
        if parts[0] is None or (mins is not None and parts[1] is None):
            return None
        q = self._checked_codes(begin, last)
        if kind.asymmetric:
            q -= np.uint8(self.code_range[0])
        else:
            shift = (kind.zero_point - zeros).astype(np.uint8)  # modulo 256, as the sum is
            q += self._per_input(shift)
        return kind.name, Codes(q, parts[0], parts[1])

    def _halves(self, kind: Format, values: F32, exact: bool) -> npt.NDArray[np.float16] | None:
        """Values per group as float16 per group of `kind`; None where that loses something, or
        with `exact` off, where it cannot be."""
        halves = values.astype(np.float16)
        kept = halves.astype(np.float32) == values if exact else np.isfinite(halves)
        if not kept.all():
            return None
        k = self.shape[1]
        first = np.arange(kind.groups(k)) * kind.group(k)
        return np.ascontiguousarray(halves[:, first // (self.group_size or k)])


def checked_g_idx(
    parts: Parts, part: str, found: Array, group: int, groups: int, reordered: bool
) -> I32 | None:
    """None for runs of `group` inputs. Zeros only, of several groups, are an order that was never
    written: runs again.

    Raises CheckpointError for a group that does not exist, and for such zeros where the config says
    that groups are in an order of their own (`reordered`).
    """
    if found.min() < 0 or found.max() >= groups:
        wrong = int(found[(found < 0) | (found >= groups)][0])
        parts.fail(part, f"groups from 0 to {groups - 1}", wrong)
    unwritten = groups > 1 and not found.any()
    if unwritten and reordered:
        parts.fail(part, "groups in activation order, as the config says", "zeros only")
    if unwritten or (found == np.arange(len(found)) // group).all():
        return None
    return found.astype(np.int32)

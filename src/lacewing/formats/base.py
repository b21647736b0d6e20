"""What a packed weight is: codes, packed parts, and the format that turns one into the other.

A weight is `[n, k]`: n outputs, k inputs. `Format.round` makes `Codes` from floats, `Format.pack`
brings them into the order of bytes that the kernels read, `Format.reference_linear` says what the
result means. numpy only, and written to be read: the fast twins are the kernels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lacewing.errors import FormatError
from lacewing.formats.activations import quantize_rows
from lacewing.formats.prune import magnitude_mask
from lacewing.formats.tiles import STRIP, ceil_to

__all__ = [
    "CHUNK",
    "ROW",
    "Codes",
    "Format",
    "PackedTensor",
    "add_bias",
    "aligned_copy",
    "aligned_empty",
    "as_weight",
    "check_activations",
    "check_bias",
    "row_chunks",
]

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Array = npt.NDArray[Any]

ALIGNMENT = 64
ROW = 1 << 17
"""The group size of formats with one scale per row: as long as the longest row they hold. Up to
there the sum of a row is exact in int32: 128 * 127 * 2^17 < 2^31."""
CHUNK = 1 << 20
"""Weights that are rounded or packed at once: bounds the temporary memory to some 20 MB."""


@dataclass(frozen=True, eq=False)
class Codes:
    """A rounded weight `[n, k]` before packing.

    q: uint8 `[n, k]` codes (`weight = scale * (code - zero_point)`, or `scale * code + min` in the
       asymmetric formats); for bf16 the values themselves, uint16.
    scales, mins: f16 `[n, ceil(k / group_size)]`, or None where the format has none.
    In a sparse format a weight is absent when its code equals the zero point.
    """

    q: Array
    scales: F16 | None = None
    mins: F16 | None = None

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.q.shape
        return n, k

    def rows(self, begin: int, end: int) -> Codes:
        """Outputs `begin..end`, as a view."""
        scales = None if self.scales is None else self.scales[begin:end]
        mins = None if self.mins is None else self.mins[begin:end]
        return Codes(self.q[begin:end], scales, mins)


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """A weight `[n, k]` in the bytes the kernels read. Parts may be read-only views of a file."""

    format: str
    shape: tuple[int, int]
    parts: Mapping[str, Array]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits of all parts, padding included, per weight of the unpadded matrix."""
        n, k = self.shape
        return 8 * self.nbytes / (n * k)


class Format(ABC):
    """One weight format. The attributes and the layout never depend on the machine."""

    name: str
    weight_bits: int
    group_size: int
    """Inputs per scale, and per group of activations; ROW: the whole row; 0 in a float format."""
    zero_point: int
    code_step: int = 1
    """`weight = scale * (code_step * code - zero_point)`: 2 for levels between which zero lies."""
    asymmetric: bool = False
    sparse: bool = False
    """Zero weights are left out: a weight is absent when its code is the zero point."""
    fixed_sparsity: float | None = None
    """The share of zeros that the format's pattern prescribes, which `round` then brings about."""
    part_dtypes: ClassVar[Mapping[str, np.dtype[Any]]]
    code_dtype: ClassVar[np.dtype[Any]] = np.dtype(np.uint8)
    input_multiple: int
    """Inputs are padded to a multiple of this."""

    def __repr__(self) -> str:
        return f"<format {self.name}>"

    @property
    def part_names(self) -> tuple[str, ...]:
        return tuple(self.part_dtypes)

    def k_pad(self, k: int) -> int:
        return ceil_to(k, self.input_multiple)

    @property
    def max_code(self) -> int:
        return (1 << self.weight_bits) - 1

    @property
    def holds_zero(self) -> bool:
        """Whether zero is on every grid of the format, so that it can hold pruned weights."""
        return not self.asymmetric and self.code_step == 1

    @property
    def padding(self) -> int:
        """The code of padded inputs: zero, or any, since they meet activations that are zero."""
        return self.zero_point if self.holds_zero else 0

    def group(self, k: int) -> int:
        """Inputs that share a scale in a row of k: `group_size`, or the padded row."""
        return self.k_pad(k) if self.group_size == ROW else self.group_size

    def groups(self, k: int) -> int:
        """Scales per output; 0 in a float format."""
        return -(-k // self.group_size) if self.group_size else 0

    # -- layout ---------------------------------------------------------------------------------

    @abstractmethod
    def part_shapes(self, n: int, k: int) -> dict[str, tuple[int, ...]]:
        """Shape of every part of an `[n, k]` weight; -1 where it depends on the weights."""

    def expected_part_bytes(self, n: int, k: int) -> dict[str, int | None]:
        """Bytes of every part, None where they depend on the weights (the stream of a sparse
        format). Python integers, so that absurd shapes from a file do not overflow."""
        sizes: dict[str, int | None] = {}
        for name, shape in self.part_shapes(n, k).items():
            size = self.part_dtypes[name].itemsize
            for length in shape:
                size *= length
            sizes[name] = size if size >= 0 else None
        return sizes

    def validate(self, packed: PackedTensor) -> None:
        """Raises FormatError unless the parts have the names, types and sizes of this format.

        Cheap: reads no weight. What depends on the content of a sparse stream is checked by
        `unpack`, and by the compiled module before a kernel sees it.
        """
        if packed.format != self.name:
            raise FormatError(f"expected a tensor in {self.name}, got {packed.format!r}")
        n, k = self._check_shape(packed.shape)
        if set(packed.parts) != set(self.part_names):
            raise FormatError(
                f"{self.name} has the parts {', '.join(self.part_names)},"
                f" got {', '.join(sorted(packed.parts)) or 'none'}"
            )
        for name, shape in self.part_shapes(n, k).items():
            self._check_part(name, packed.parts[name], shape, (n, k))

    def _check_part(
        self, name: str, part: Array, shape: tuple[int, ...], weight: tuple[int, int]
    ) -> None:
        where = f"{self.name} part `{name}` of a {list(weight)} weight"
        if part.dtype != self.part_dtypes[name]:
            raise FormatError(f"{where} must be {self.part_dtypes[name]}, got {part.dtype}")
        fits = part.ndim == len(shape) and all(
            want in (-1, have) for want, have in zip(shape, part.shape, strict=True)
        )
        if not fits:
            wanted = str(list(shape)).replace("-1", "any")
            raise FormatError(f"{where} must have shape {wanted}, got {list(part.shape)}")
        if not part.flags.c_contiguous:
            raise FormatError(f"{where} must be contiguous")

    def _check_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        if len(shape) != 2 or min(shape) < 1:
            raise FormatError(
                f"{self.name} holds a weight [n, k] with n, k >= 1, got {list(shape)}"
            )
        n, k = shape
        if self.group_size == ROW and k > ROW:
            raise FormatError(
                f"{self.name} adds up whole rows in 32 bits and holds k up to {ROW}, got {k}",
                hint="use a format with groups, such as `w8a8g64`",
            )
        return int(n), int(k)

    # -- floats to codes ------------------------------------------------------------------------

    def round(self, weight: npt.ArrayLike, sparsity: float | None = None) -> Codes:
        """Rounds `weight` `[n, k]` to the nearest codes, without calibration data.

        sparsity: share of the weights, in [0, 1), that is set to zero first: in every row the
        `floor(k * sparsity + 0.5)` of smallest magnitude, or what else `mask` says.

        Raises FormatError for NaN and infinities (with the first place), a shape that is not
        `[n, k]`, a sparsity out of range, and weights beyond the range of the format.
        """
        w = as_weight(weight)
        n, k = self._check_shape(w.shape)
        if sparsity is not None and not self.holds_zero:
            raise FormatError(
                f"{self.name} cannot hold pruned weights: zero is not on its grid",
                hint="use a symmetric or a sparse format, such as `w4a8g64_sp`",
            )
        out = self.empty_codes(n, k)
        for begin, end in row_chunks(n, k):
            rows = np.ascontiguousarray(w[begin:end], dtype=np.float32)
            _check_finite(self.name, rows, begin)
            mask = self.mask(rows, sparsity)
            if mask is not None:
                rows = np.where(mask, rows, np.float32(0))
            self._round_rows(rows, out.rows(begin, end), begin)
        return out

    def mask(self, rows: F32, sparsity: float | None) -> Bools | None:
        """True for the weights of `rows` `[r, k]`, whole strips, that pruning keeps; None: all.

        Raises FormatError for a sparsity that the format cannot have.
        """
        return None if sparsity is None else magnitude_mask(rows, sparsity)

    @abstractmethod
    def _round_rows(self, rows: F32, out: Codes, first_row: int) -> None:
        """Fills `out` with the codes of `rows` `[r, k]`, which are finite and contiguous."""

    # -- codes to bytes -------------------------------------------------------------------------

    @abstractmethod
    def pack(self, codes: Codes) -> PackedTensor:
        """The packed form of `codes`; parts are 64-byte aligned.

        Raises FormatError if the codes are not codes of this format.
        """

    @abstractmethod
    def unpack(self, packed: PackedTensor) -> Codes:
        """The codes of a packed tensor: `unpack(pack(codes))` equals `codes`.

        Raises FormatError if the parts are not a valid tensor of this format.
        """

    def empty_codes(self, n: int, k: int) -> Codes:
        """Uninitialised codes of this format."""
        groups = self.groups(k)
        scales = np.empty((n, groups), np.float16) if groups else None
        mins = np.empty((n, groups), np.float16) if self.asymmetric else None
        return Codes(np.empty((n, k), self.code_dtype), scales, mins)

    def stored(self, codes: Codes) -> int:
        """How many of the weights `codes` the packed form stores: in a sparse format those that are
        not zero."""
        return int(np.count_nonzero(codes.q != self.zero_point)) if self.sparse else codes.q.size

    def check_codes(self, codes: Codes) -> tuple[int, int]:
        """Raises FormatError unless `codes` are codes of this format; returns `(n, k)`."""
        n, k = self._check_shape(codes.q.shape)
        if codes.q.dtype != self.code_dtype:
            raise FormatError(f"{self.name} codes must be {self.code_dtype}, got {codes.q.dtype}")
        largest = int(codes.q.max())
        if largest > self.max_code:
            raise FormatError(f"{self.name} codes must be below {self.max_code + 1}, got {largest}")
        self._check_per_group("scales", codes.scales, n, self.groups(k))
        self._check_per_group("mins", codes.mins, n, self.groups(k) if self.asymmetric else 0)
        return n, k

    def _check_per_group(self, what: str, values: Array | None, n: int, groups: int) -> None:
        if groups == 0 or values is None:
            if (values is None) != (groups == 0):
                raise FormatError(f"{self.name} codes must {'' if groups else 'not '}have {what}")
            return
        if values.dtype != np.float16 or values.shape != (n, groups):
            raise FormatError(
                f"{self.name} {what} must be float16 {[n, groups]},"
                f" got {values.dtype} {list(values.shape)}"
            )
        if not np.isfinite(values).all():
            raise FormatError(f"{self.name} {what} must be finite, got NaN or infinity")

    # -- meaning --------------------------------------------------------------------------------

    def dequantize(self, packed: PackedTensor | Codes) -> F32:
        """The weight `[n, k]` that the tensor stands for, in f32 (each step rounded to f32)."""
        codes = self._codes(packed)
        n, k = codes.shape
        out = np.empty((n, k), np.float32)
        for begin, end in row_chunks(n, k):
            self._dequantize_rows(codes.rows(begin, end), out[begin:end])
        return out

    def _dequantize_rows(self, codes: Codes, out: F32) -> None:
        assert codes.scales is not None
        k = codes.shape[1]
        np.multiply(codes.q, np.float32(self.code_step), out=out)
        out -= np.float32(self.zero_point)
        out *= _per_input(codes.scales, self.group(k), k)
        if codes.mins is not None:
            out += _per_input(codes.mins, self.group(k), k)

    def reference_linear(
        self, x: npt.ArrayLike, packed: PackedTensor | Codes, bias: npt.ArrayLike | None = None
    ) -> F32:
        """`x` `[m, k]` times the transposed weight, plus `bias` `[n]`: f32 `[m, n]`.

        THE definition of what the format means. In integer formats every float step is rounded to
        f32 in a stated order, so that every kernel returns these very bits:

            q, sx, sumx = quantize_rows(x, group_size)  # or group(k): the row is the one group
            acc = 0; for every group j in order:
                acc = acc + float(sum_i (code_step * code_i - zero_point) * q_i) * (scale_j * sx_j)
            asymmetric:
                acc = acc + (float(sum_i code_i * q_i) * (scale_j * sx_j)
                             + float(sumx_j) * (min_j * sx_j))
            y = acc + bias
        """
        codes = self._codes(packed)
        k = codes.shape[1]
        activations = check_activations(x, k)
        group = self.group(k)
        q, scale, total = quantize_rows(activations, group)
        assert codes.scales is not None
        acc = np.zeros((len(q), codes.shape[0]), np.float32)
        sw = codes.scales.astype(np.float32)
        mw = None if codes.mins is None else codes.mins.astype(np.float32)
        for j in range(sw.shape[1]):
            inputs = slice(j * group, min((j + 1) * group, k))
            sx = scale[:, j, None]
            term = self._dot(codes.q[:, inputs], q[:, inputs]) * (sw[:, j] * sx)
            if mw is not None:
                term += total[:, j, None].astype(np.float32) * (mw[:, j] * sx)
            acc += term
        return add_bias(acc, bias)

    def _dot(self, codes: Array, q: npt.NDArray[np.int8]) -> F32:
        """Exact integer dot products `[m, n]` of one group, rounded to f32. Float multiplication is
        exact here in any order: all partial sums are below 128 * 128 * 127 < 2^24, and those of
        rows below 2^31, in float64."""
        exact = np.float64 if self.group_size == ROW else np.float32
        w: Any = codes.astype(exact)
        w *= self.code_step
        w -= self.zero_point
        dots: F32 = (q.astype(exact) @ w.T).astype(np.float32, copy=False)
        return dots

    def _codes(self, packed: PackedTensor | Codes) -> Codes:
        if isinstance(packed, PackedTensor):
            return self.unpack(packed)
        self.check_codes(packed)
        return packed


def add_bias(y: F32, bias: npt.ArrayLike | None) -> F32:
    """`y + bias` in f32, or `y` itself."""
    return y if bias is None else y + check_bias(bias, y.shape[1])


def aligned_empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """An uninitialised array whose data begins on a 64-byte boundary."""
    kind = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % ALIGNMENT
    out: Array = raw[begin : begin + nbytes].view(kind).reshape(shape)
    return out


def aligned_copy(array: Array) -> Array:
    """A copy of `array` that begins on a 64-byte boundary."""
    out = aligned_empty(array.shape, array.dtype)
    out[...] = array
    return out


def as_weight(weight: Any) -> Array:
    """`weight` as a numpy array; a torch tensor is recognised by its methods, not by its type."""
    if hasattr(weight, "detach"):
        weight = weight.detach().float().cpu().numpy()
    array: Array = np.asarray(weight)
    if array.dtype.kind not in "fiu":
        raise FormatError(f"a weight must be an array of real numbers, got dtype {array.dtype}")
    return array


def row_chunks(n: int, k: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows, whole strips, of about CHUNK weights each."""
    step = max(STRIP, CHUNK // k // STRIP * STRIP)
    for begin in range(0, n, step):
        yield begin, min(begin + step, n)


def _check_finite(name: str, rows: F32, first_row: int) -> None:
    finite = np.isfinite(rows)
    if finite.all():
        return
    row, column = np.argwhere(~finite)[0]
    raise FormatError(
        f"{name} needs finite weights, got {rows[row, column]} at [{first_row + row}, {column}]",
        hint="the model file is damaged, or its training diverged",
    )


def check_bias(bias: npt.ArrayLike, n: int) -> F32:
    """`bias` as f32 `[n]`."""
    values: F32 = np.asarray(bias, np.float32)
    if values.shape != (n,):
        raise FormatError(f"bias must have shape {[n]}, got {list(values.shape)}")
    return values


def check_activations(x: npt.ArrayLike, k: int) -> F32:
    rows: F32 = np.asarray(x, np.float32)
    if rows.ndim != 2 or rows.shape[1] != k:
        raise FormatError(f"activations must have shape [m, {k}], got {list(rows.shape)}")
    return rows


def _per_input(values: F16, group: int, k: int) -> F32:
    """Per-group values `[n, groups]` repeated for every input, `[n, k]`."""
    out: F32 = np.repeat(values.astype(np.float32), group, axis=1)[:, :k]
    return out

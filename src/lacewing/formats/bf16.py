"""bf16: dense weights in 16 bits, for reference and for models that must not be rounded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lacewing.errors import FormatError
from lacewing.formats.base import Codes, PackedTensor, add_bias, check_activations, check_bias
from lacewing.formats.dense import Dense
from lacewing.formats.tiles import STRIP, from_tiles, strips, to_tiles

__all__ = ["Bf16", "bf16_to_f32", "f32_to_bf16"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U16 = npt.NDArray[np.uint16]
Array = npt.NDArray[Any]

VALUES: Mapping[str, np.dtype[Any]] = {"values": np.dtype(np.uint16)}


def f32_to_bf16(values: F32) -> U16:
    """The bits of the nearest bf16, ties to even. Finite values only."""
    bits = values.view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    out: U16 = (rounded >> np.uint32(16)).astype(np.uint16)
    return out


def bf16_to_f32(bits: U16) -> F32:
    """The values of bf16 bits, exactly."""
    out: F32 = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return out


class Bf16(Dense):
    """Part `values`: uint16 `[S][k_pad/2][16][2]`, k padded to 2."""

    name = "bf16"
    weight_bits = 16
    group_size = 0
    zero_point = 0
    code_dtype = np.dtype(np.uint16)
    input_multiple = 2
    part_dtypes = VALUES

    def part_shapes(self, n: int, k: int) -> dict[str, tuple[int, ...]]:
        return {"values": (strips(n), self.k_pad(k) // 2, STRIP, 2)}

    def _round_rows(self, rows: F32, out: Codes, first_row: int) -> None:
        out.q[:] = f32_to_bf16(rows)
        if ((out.q & 0x7FFF) == 0x7F80).any():
            raise FormatError(
                f"bf16 holds magnitudes up to 3.39e38, got {np.abs(rows).max()} in rows"
                f" {first_row}..{first_row + len(rows) - 1}"
            )

    def _pack_rows(self, codes: Codes) -> dict[str, Array]:
        return {"values": to_tiles(codes.q, self.k_pad(codes.shape[1]), 0)}

    def _unpack_rows(self, parts: Mapping[str, Array], out: Codes) -> None:
        out.q[:] = from_tiles(parts["values"], *out.shape)

    def _dequantize_rows(self, codes: Codes, out: F32) -> None:
        out[:] = bf16_to_f32(codes.q)

    def reference_linear(
        self, x: npt.ArrayLike, packed: PackedTensor | Codes, bias: npt.ArrayLike | None = None
    ) -> F32:
        """`x` `[m, k]` times the transposed weight, plus `bias`, in float64, rounded to f32 once.

        A kernel may differ from it by `tolerance`; the bits a kernel must return are those of
        `chain_linear`.
        """
        w = self.dequantize(packed).astype(np.float64)
        y = check_activations(x, w.shape[1]).astype(np.float64) @ w.T
        if bias is not None:
            y += check_bias(bias, len(w))
        with np.errstate(over="ignore"):
            return y.astype(np.float32)

    def chain_linear(
        self, x: npt.ArrayLike, packed: PackedTensor | Codes, bias: npt.ArrayLike | None = None
    ) -> F32:
        """The same in the kernels' steps: f32 fma chains over the even and the odd inputs, in
        order, then their sum, then the bias. Bit for bit what a kernel returns; slow."""
        w = self.dequantize(packed)
        rows = check_activations(x, w.shape[1])
        chains = np.zeros((2, len(rows), len(w)), np.float32)
        for i in range(w.shape[1]):
            chains[i % 2] = _fma(rows[:, i, None], w[:, i], chains[i % 2])
        return add_bias(chains[0] + chains[1], bias)

    def tolerance(self, x: npt.ArrayLike, packed: PackedTensor | Codes, tiles: bool = False) -> F64:
        """Largest error `[m, n]` of a two-chain f32 evaluation against exact arithmetic, without
        bias: each of the k/2 + 1 roundings on the way of a product is off by 2^-24 at most.

        tiles: of AMX, which rounds the activations to bf16 first (`f32_to_bf16`), and whose steps
        (no more of them) take subnormal numbers, operands and results, for zero.
        """
        w = np.abs(self.dequantize(packed)).astype(np.float64)
        size = np.abs(check_activations(x, w.shape[1])).astype(np.float64)
        steps = w.shape[1] // 2 + 3
        out: F64 = size @ w.T * (steps * 2.0**-24 * 1.01) + steps * 2.0**-149
        if not tiles:
            return out
        rounded = bf16_to_f32(f32_to_bf16(np.asarray(x, np.float32))).astype(np.float64)
        moved = np.abs(rounded - np.asarray(x, np.float64)) @ w.T
        flushed = (size.sum(axis=1)[:, None] + w.sum(axis=1) + 3 * steps) * 2.0**-126
        out = moved + np.abs(rounded) @ w.T * (steps * 2.0**-24 * 1.01) + flushed
        return out


def _fma(a: F32, b: F32, c: F32) -> F32:
    """`a * b + c`, rounded once, for f32 `a`, `c` and bf16 values `b`.

    The product has 32 bits and is exact in float64. The sum is rounded to float64 towards odd
    (TwoSum gives its error), which makes the second rounding, to f32, harmless.
    """
    p = a.astype(np.float64) * b.astype(np.float64)
    c64 = c.astype(np.float64)
    total = p + c64
    back = total - p
    error = (p - (total - back)) + (c64 - back)
    bits = total.view(np.int64)
    even_and_inexact = (error != 0) & (bits & 1 == 0)
    away = (error > 0) == (total > 0)
    step = np.where(away, 1, -1)
    odd = np.where(even_and_inexact, bits + step, bits).view(np.float64)
    with np.errstate(over="ignore"):
        out: F32 = odd.astype(np.float32)
    return out

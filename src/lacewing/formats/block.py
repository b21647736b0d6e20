"""w8a8_b16x1: blocks of 16 outputs x 1 input, kept or dropped as a whole; one scale per row.

Part `stream`: a strip of 16 outputs is

    32 B     f16 scales[16]
    bitmap   `[k_pad/8]` bytes, bit i % 8 of byte i // 8 is set where input i is kept: where the
             weight of any of the 16 outputs is not zero
    padded with zeros to a multiple of 64 bytes
    blocks   uint8 `[ceil(kept/4)][16][4]`: byte `[o][i]` of block b is the code of output o and of
             the (4b + i)-th kept input; the last block is padded with the zero point

Part `offsets`: `stream.py`. Blocks are VNNI blocks of the inputs that are kept: with one row a
kernel takes the same inputs out of the activations and multiplies as if the weight were dense.

Which blocks go: in every strip those of smallest L2 norm, the same number in each. Strips are then
equally long, so that threads with equally many of them have equally much to do, and what becomes of
a strip depends on nothing else: a matrix may be rounded a run of rows at a time. A choice over the
whole matrix would keep little more. Share of the squared norm that is kept at 50 % (70 %) zeros,
SmolLM2's layer 10 and Gaussian weights:

                             q_proj         up_proj        down_proj      Gaussian
    blocks, per strip        0.667 (0.459)  0.653 (0.444)  0.666 (0.461)  0.638 (0.428)
    blocks, whole matrix     0.703 (0.497)  0.655 (0.446)  0.668 (0.463)  0.639 (0.428)
    its longest strip / mean 1.74 (2.40)    1.29 (1.59)    1.37 (1.73)    1.07 (1.13)
    single weights, per row  0.932 (0.791)  0.932 (0.793)  0.934 (0.796)  0.928 (0.782)

The last line is what blocks cost: without training, unstructured formats lose far less.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from lacewing.errors import FormatError
from lacewing.formats.base import ROW, Codes
from lacewing.formats.dense import Symmetric
from lacewing.formats.prune import magnitude_mask
from lacewing.formats.stream import Stream
from lacewing.formats.tiles import STRIP, ceil_to, from_tiles, strips, to_strips, to_tiles

__all__ = ["W8b16x1"]

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

SCALE_BYTES = 2 * STRIP
BLOCK_BYTES = 4 * STRIP


class W8b16x1(Stream, Symmetric):
    """`weight = scale * (code - 128)`; the inputs that a strip keeps are its own."""

    def __init__(self) -> None:
        super().__init__(8, ROW)
        self.name += "_b16x1"

    def mask(self, rows: F32, sparsity: float | None) -> Bools | None:
        """In every strip `floor(k * sparsity + 0.5)` inputs go, those whose 16 weights have the
        smallest norm; of equal ones the earlier."""
        if sparsity is None:
            return None
        n, k = rows.shape
        count = strips(n)
        norms = np.zeros((count, k), np.float64)
        for o in range(STRIP):  # in order, whatever the number of strips
            weights = rows[o::STRIP].astype(np.float64)
            norms[: len(weights)] += weights * weights
        keep = np.repeat(magnitude_mask(norms, sparsity), STRIP, axis=0)
        return keep[:n]

    def stored(self, codes: Codes) -> int:
        n = codes.shape[0]
        heights = np.minimum(STRIP, n - STRIP * np.arange(strips(n)))
        return int(heights @ self._kept(codes.q).sum(axis=1))

    def _kept(self, q: U8) -> Bools:
        """`[S, k]`: which inputs every strip keeps."""
        first = np.arange(0, len(q), STRIP)
        kept: Bools = np.logical_or.reduceat(q != self.zero_point, first, axis=0)
        return kept

    def _least_bytes(self, k: int) -> int:
        return ceil_to(SCALE_BYTES + self.k_pad(k) // 8, 64)

    def _pack_strips(self, codes: Codes) -> tuple[U8, I64]:
        k = codes.shape[1]
        assert codes.scales is not None
        head, kept = self._least_bytes(k), self._kept(codes.q)
        scales = to_strips(codes.scales).view(np.uint8).reshape(len(kept), -1)
        sizes = head + BLOCK_BYTES * (-(-kept.sum(axis=1, dtype=np.int64) // 4))
        out = np.zeros(int(sizes.sum()), np.uint8)
        for i, end in enumerate(np.cumsum(sizes).tolist()):
            strip = out[end - sizes[i] : end]
            bitmap = np.packbits(kept[i], bitorder="little")
            strip[:SCALE_BYTES] = scales[i]
            strip[SCALE_BYTES : SCALE_BYTES + len(bitmap)] = bitmap
            columns = codes.q[STRIP * i : STRIP * (i + 1), kept[i]]
            tiles = to_tiles(columns, ceil_to(columns.shape[1], 4), self.zero_point)
            strip[head:] = tiles.reshape(-1)
        return out, sizes

    def _unpack_strips(self, stream: U8, offsets: I64, first_strip: int, out: Codes) -> None:
        n, k = out.shape
        assert out.scales is not None
        head = self._least_bytes(k)
        out.q[:] = self.zero_point
        for i, (begin, end) in enumerate(pairwise(offsets.tolist())):
            where = f"{self.name} strip {first_strip + i}"
            rows = slice(STRIP * i, min(STRIP * (i + 1), n))
            height = rows.stop - rows.start
            scales: Any = stream[begin : begin + SCALE_BYTES].view(np.float16)
            out.scales[rows, 0] = scales[:height]
            bitmap = stream[begin + SCALE_BYTES :][: self.k_pad(k) // 8]
            bits = np.unpackbits(bitmap, bitorder="little").view(np.bool_)
            if bits[k:].any():
                raise FormatError(f"{where} keeps an input beyond the last of {k}")
            kept = int(bits.sum())
            size = head + BLOCK_BYTES * -(-kept // 4)
            if begin + size != end:
                raise FormatError(f"{where} must end at byte {begin + size}, its offset says {end}")
            blocks = stream[begin + head : end].reshape(1, -1, STRIP, 4)
            columns = from_tiles(blocks, height, kept)
            if (columns == self.zero_point).all(axis=0).any():
                raise FormatError(
                    f"{where} stores zeros explicitly: absent inputs must not be in the bitmap"
                )
            out.q[rows, bits[:k]] = columns

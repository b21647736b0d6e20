"""Weight formats: what a packed weight is, how it is made, and what it means.

    name        weights                              bits per weight (large matrices)
    bf16        16-bit floats                        16
    w8a8        8 bits, one scale per row            8
    w8a8g32/64  8 bits, symmetric                    8.5 / 8.25
    w4a8g32/64  4 bits, symmetric                    4.5 / 4.25
    w4a8g128    4 bits, symmetric                    4.125
    w3a8g64     3 bits, symmetric                    3.25
    w2a8g64     2 bits, the levels -3, -1, 1, 3      2.25
    w1.6a8      -1, 0 or 1, one scale per row        1.6
    w4a8g32z    4 bits, scale and minimum            5
    w5a8g32z    5 bits, scale and minimum            6
    w8a8g64_sp  8 bits per non-zero weight           1.25 + 8 * density
    w4a8g64_sp  4 bits per non-zero weight           1.25 + about 4 * density
    bf16_sp     16 bits per non-zero weight          1 + 16 * density
    w8a8g64_24  8 bits, two of every four weights    5.25
    w4a8g64_24  4 bits, two of every four weights    3.25
    w8a8_b16x1  8 bits per weight of blocks of 16    0.06 + 8 * density
                outputs x 1 input that are kept

`docs/concepts/formats.md` shows the bytes.
"""

from __future__ import annotations

import difflib
from typing import Any

from lacewing.errors import FormatError
from lacewing.formats.activations import quantize_rows
from lacewing.formats.asymmetric import W4z, W5z
from lacewing.formats.base import ROW, Codes, Format, PackedTensor
from lacewing.formats.bf16 import Bf16
from lacewing.formats.block import W8b16x1
from lacewing.formats.dense import W4, W8
from lacewing.formats.narrow import W2, W3, Ternary
from lacewing.formats.nm import W4of24, W8of24
from lacewing.formats.sparse import Bf16sp, W4sp, W8sp

__all__ = ["FORMATS", "Codes", "Format", "PackedTensor", "get_format", "pack", "quantize_rows"]

_ALL: tuple[Format, ...] = (
    Bf16(),
    W8(ROW),
    W8(32),
    W8(64),
    W4(32),
    W4(64),
    W4(128),
    W3(64),
    W2(64),
    Ternary(),
    W4z(),
    W5z(),
    W8sp(64),
    W4sp(64),
    Bf16sp(),
    W8of24(),
    W4of24(),
    W8b16x1(),
)

FORMATS: dict[str, Format] = {format.name: format for format in _ALL}
"""Every format by its name; adding one is one line in `_ALL`."""


def get_format(name: str) -> Format:
    """The format called `name`. Raises FormatError, naming near matches, if there is none."""
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(name, FORMATS, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"formats: {', '.join(FORMATS)}"
    raise FormatError(f"there is no weight format {name!r}", hint=hint)


def pack(weight: Any, format: str, sparsity: float | None = None) -> PackedTensor:
    """Rounds `weight` `[n, k]`, a numpy array or a torch tensor, to nearest and packs it.

    sparsity: share of the weights of smallest magnitude in every row (in w8a8_b16x1: of the blocks
    of smallest norm in every 16 rows), in [0, 1), set to zero first.

    Raises FormatError for an unknown format, NaN or infinite weights, a shape that is not `[n, k]`,
    and a sparsity that is out of range or that the format cannot hold.
    """
    chosen = get_format(format)
    return chosen.pack(chosen.round(weight, sparsity))

"""Executes the kernels of one ISA on small inputs: `python -m lacewing.cli.probe ISA`.

A process of its own, because an ISA that the CPU names but the machine does not run ends it with
SIGILL. Prints `{"formats": {name: "ok" | "differs"}}`; the scalar kernels are the measure, and for
bf16 in AMX tiles, whose bits are their own, the tolerance of the format.
"""

from __future__ import annotations

import json
import sys

import numpy as np

from lacewing import formats
from lacewing.formats import Codes
from lacewing.formats.bf16 import Bf16
from lacewing.native import compiled, tensor

ROWS, OUTPUTS, INPUTS = 17, 48, 192  # rows enough for tiles


def random_codes(name: str, n: int, k: int, sparsity: float = 0.5, seed: int = 0) -> Codes:
    """Codes of a `[n, k]` weight that covers the whole range of the format."""
    form = formats.get_format(name)
    random = np.random.default_rng(seed)
    values = random.standard_normal((n, k), dtype=np.float32)
    kept = form.mask(values, form.fixed_sparsity or sparsity) if form.sparse else None
    if form.group_size == 0:
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        return Codes(bits if kept is None else np.where(kept, bits, np.uint16(0)), None, None)
    codes = random.integers(0, form.max_code + 1, (n, k), dtype=np.uint8)
    if kept is not None:
        codes[~kept] = form.zero_point
    groups = -(-k // form.group_size)
    scales = (0.005 + 0.01 * random.random((n, groups))).astype(np.float16)
    minima = (-8 * scales.astype(np.float32)).astype(np.float16) if form.asymmetric else None
    return Codes(codes, scales, minima)


def agrees(name: str, isa: str) -> bool:
    """Whether `isa` multiplies by a weight of format `name` as the scalar kernels do."""
    form = formats.get_format(name)
    packed = form.pack(random_codes(name, OUTPUTS, INPUTS))
    weight = tensor(packed)
    x = np.random.default_rng(1).standard_normal((ROWS, INPUTS), dtype=np.float32)
    linear = compiled().linear
    found = linear(x, weight, isa=isa, threads=1)
    if isinstance(form, Bf16) and isa.startswith("amx"):
        error = np.abs(found - form.reference_linear(x, packed))
        return bool((error <= form.tolerance(x, packed, tiles=True)).all())
    return bool(np.array_equal(linear(x, weight, isa="scalar", threads=1), found))


def main(isa: str) -> None:
    found = {name: "ok" if agrees(name, isa) else "differs" for name in formats.FORMATS}
    print(json.dumps({"formats": found}))


if __name__ == "__main__":
    main(sys.argv[1])

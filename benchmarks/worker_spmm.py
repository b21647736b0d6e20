"""Worker: XNNPACK-style sparse 1x1 convolutions (spmm.c; see worker.py). Needs NumPy and a C
compiler with OpenMP.

Only the 1x1 convolutions of the network are there, each by itself, its input in CHW already: what
surrounds them costs nothing. For each layer panels are as wide, and of the compiler's targets it is
the one, that is fastest.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from mobilenet import F32, Layer, network, pointwise
from worker import serve

SOURCE = Path(__file__).with_name("spmm.c")
FLAGS = ["-O3", "-fopenmp", "-shared", "-fPIC"]
ALIGNED = 16  # pixels
WIDTHS = (1, 2, 4, 8)


class _Conv(ctypes.Structure):
    _fields_ = [
        ("outputs", ctypes.c_int64),
        ("pixels", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("begins", "inputs", "values", "bias", "x", "y")),
    ]


class Sparse:
    """One layer: its non-zeros by outputs, an input and room for the output."""

    def __init__(self, layer: Layer, threads: int, targets: list[str]) -> None:
        self.threads = threads
        pixels = -(-(layer.size**2) // ALIGNED) * ALIGNED
        rows = layer.weight.reshape(layer.outputs, layer.inputs)
        of, inputs = np.nonzero(rows)
        begins = np.concatenate([[0], np.bincount(of, minlength=len(rows)).cumsum()])
        rng = np.random.default_rng(0)
        self.x = rng.random((layer.inputs, pixels), dtype=np.float32)
        self.y = np.zeros((layer.outputs, pixels), np.float32)
        self.arrays: list[npt.NDArray[Any]] = [
            begins.astype(np.int32), inputs.astype(np.int32), rows[of, inputs], layer.bias, self.x,
            self.y,
        ]  # fmt: skip
        self.conv = _Conv(layer.outputs, pixels, *(each.ctypes.data for each in self.arrays))
        self.check(np.maximum(rows @ self.x + layer.bias[:, None], 0), targets[0])
        choices = [(target, width) for target in targets for width in WIDTHS]
        self.choice = min(choices, key=lambda each: min(self.seconds(*each) for _ in range(10)))

    def check(self, want: F32, target: str) -> None:
        for width in WIDTHS:
            self.seconds(target, width)
            np.testing.assert_allclose(self.y, want, rtol=1e-3, atol=1e-3)

    def seconds(self, target: str, width: int) -> float:
        convolve = kernels(target).convolve
        start = time.perf_counter()
        convolve(ctypes.byref(self.conv), ctypes.c_int64(width), self.threads)
        return time.perf_counter() - start


class Model:
    """The 1x1 convolutions of `mobilenet.network`, or the one of `mobilenet.pointwise`."""

    def __init__(
        self,
        seed: int,
        sparsity: float,
        threads: int,
        targets: list[str],
        shape: tuple[int, int, int] | None = None,
    ) -> None:
        layers = [pointwise(seed, shape, sparsity)] if shape else network(seed, sparsity)
        layers = [each for each in layers if each.kernel == 1]
        self.layers = [Sparse(each, threads, targets) for each in layers]

    def close(self) -> None:
        self.layers = []

    def run(self, calls: int) -> dict[str, Any]:
        """Seconds of each call, all layers together; what was chosen for each."""
        seconds = [sum(each.seconds(*each.choice) for each in self.layers) for _ in range(calls)]
        return {"seconds": seconds, "choices": [each.choice for each in self.layers]}


@cache
def kernels(target: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as place:
        made = f"{place}/spmm.so"
        command = [os.environ.get("CC", "cc"), *FLAGS, f"-march={target}", str(SOURCE), "-o", made]
        subprocess.run(command, check=True)
        return ctypes.CDLL(made)


if __name__ == "__main__":
    serve(Model)

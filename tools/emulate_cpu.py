"""Runs the package on CPUs that are not at hand: qemu-user executes Python and the module.

    python tools/emulate_cpu.py              a CPU with AVX2 but no AVX-512, and one without AVX
    python tools/emulate_cpu.py Haswell      one of qemu's CPU models (`qemu-x86_64 -cpu help`)

Prints which ISAs the module finds there and which it chooses, and compares a product in every
format with the numpy oracle. qemu 7.2 and later emulate AVX2, none emulates AVX-512.
Exit status: 0 if all agreed, 1 if not, 2 if there is no qemu-x86_64 (Debian: qemu-user).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"Haswell": "avx2", "Nehalem": "scalar"}  # and what must be chosen there
QEMU = "qemu-x86_64"

PROGRAM = """
import json
import numpy as np
from lacewing import _C, formats
from lacewing.formats.bf16 import Bf16
from lacewing.native import linear, tensor

def agrees(name):
    rng = np.random.default_rng(0)
    form = formats.get_format(name)
    packed = formats.pack(rng.standard_normal((33, 192), dtype=np.float32), name)
    x = rng.standard_normal((9, 192), dtype=np.float32)
    y = linear(x, packed)
    if isinstance(form, Bf16):
        return bool(np.array_equal(y, form.chain_linear(x, packed)))
    return bool(np.array_equal(y, form.reference_linear(x, packed)))

print(json.dumps({
    "isas": {isa["name"]: isa["missing"] for isa in _C.isas()},
    "default": _C.default_isa(),
    "wrong": [name for name in formats.FORMATS if not agrees(name)],
}))
"""


def run(model: str, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`code` in this Python on an emulated CPU."""
    env = {key: value for key, value in os.environ.items() if key != "LACEWING_ISA"}
    # OpenBLAS picks its kernels by CPUID too; one thread, since emulated ones are slow to start.
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
    command = [QEMU, "-cpu", model, sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=env | environment
    )


def examine(model: str) -> dict[str, Any]:
    """What the package finds, chooses and computes there. Raises RuntimeError if it dies."""
    result = run(model, PROGRAM)
    if result.returncode:
        raise RuntimeError(f"{model}: exit status {result.returncode}\n{result.stderr}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def main(models: list[str]) -> int:
    if not shutil.which(QEMU):
        print(f"error: no {QEMU}\nhint: apt-get install qemu-user", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT / "src"))
    status = 0
    for model in models or list(MODELS):
        found = examine(model)
        good = not found["wrong"] and found["default"] == MODELS.get(model, found["default"])
        lacking = [f"{isa} lacks {what}" for isa, what in found["isas"].items() if what]
        verdict = "all formats agree" if not found["wrong"] else f"WRONG: {found['wrong']}"
        print(f"{model}: runs {found['default']} ({'; '.join(lacking)}); {verdict}")
        status |= not good
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The kernel tables this CPU runs against the scalar one, in C++, with memory that ends in faults.

What `tests/kernels` cannot see from Python: reads past a part's end, writes beside the output,
row counts that only the engine uses. The same program proves AVX-512 on an emulated machine
(`tools/emulate_avx512.py`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
TOOL = REPO / "tools" / "emulate_avx512.py"
BUILD = Path(os.environ.get("LACEWING_BUILD", REPO / "build"))


def test_every_table_equals_the_scalar_one() -> None:
    if not list(BUILD.rglob("isa/scalar.cpp.o")):
        pytest.skip(f"no object files under {BUILD} (set LACEWING_BUILD)")
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler")
    command = [sys.executable, str(TOOL), str(BUILD), "--native"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr

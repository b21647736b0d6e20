"""Which table runs: what is missing on machines that are not at hand, and what is chosen here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lacewing import _C

REPO = Path(__file__).resolve().parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))

STATE = "AMX state enabled by the OS"
REFUSED = "the kernel's permission to use AMX tiles (arch_prctl)"
MISSING = {
    "all": ("-", "-", "-"),
    "nothing": ("AVX", "AVX", "AVX"),
    "no avx2": ("AVX2", "AVX2", "AVX2"),
    "no vbmi2": ("-", "AVX512_VBMI2", "AVX512_VBMI2"),
    "no avx512 state": ("-", *["AVX-512 state enabled by the OS"] * 2),
    "no amx": ("-", "-", "AMX-TILE"),
    "no amx-int8": ("-", "-", "AMX-INT8"),
    "no amx-bf16": ("-", "-", "AMX-BF16"),
    "tile configuration not saved": ("-", "-", STATE),
    "tile data not saved": ("-", "-", STATE),
    "permission refused": ("-", "-", REFUSED),
}


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_what_is_missing_is_named(tmp_path: Path) -> None:
    """Also that a refused permission leaves AVX-512 to run."""
    assert COMPILER
    sources = [REPO / "tests/native/cpu_features.cpp", REPO / "csrc/core/cpu.cpp"]
    program = tmp_path / "cpu_features"
    command = [COMPILER, "-std=c++20", f"-I{REPO / 'csrc'}", *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True)
    run = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    lines = dict(line.split(": ") for line in run.stdout.splitlines())
    assert {name: tuple(line.split(" / ")) for name, line in lines.items()} == MISSING


def test_amx_and_its_emulation_are_never_the_default() -> None:
    isas = {isa["name"]: isa for isa in _C.isas()}
    assert isas["amx_emulated"]["usable"] and isas["amx_emulated"]["emulated"]
    assert [name for name, isa in isas.items() if isa["emulated"]] == ["amx_emulated"]
    code = "from lacewing import _C; print(_C.default_isa())"
    env = {key: value for key, value in os.environ.items() if key != "LACEWING_ISA"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    others = {name: isa for name, isa in isas.items() if not name.startswith("amx")}
    assert run.stdout.strip() == [name for name, isa in others.items() if isa["usable"]][-1]

"""The package on CPUs without AVX-512 and without AVX, emulated by qemu-user."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "emulate_cpu.py"


@pytest.fixture(scope="module")
def tool() -> Any:
    if not shutil.which("qemu-x86_64"):
        pytest.skip("no qemu-x86_64 (Debian: apt-get install qemu-user)")
    spec = importlib.util.spec_from_file_location("emulate_cpu", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("model", ["Haswell", "Nehalem"])
def test_it_chooses_what_is_there_and_is_right(tool: Any, model: str) -> None:
    found = tool.examine(model)
    assert found["default"] == tool.MODELS[model]
    assert found["wrong"] == []
    assert found["isas"]["avx512"] is not None and found["isas"]["amx"] is not None
    assert found["isas"]["scalar"] is None


def test_a_forced_isa_fails_politely(tool: Any) -> None:
    """The missing feature is named; no SIGILL."""
    code = "from lacewing import _C; _C.default_isa()"
    for model, isa, missing in (("Nehalem", "avx2", "AVX"), ("Haswell", "avx512", "AVX512F")):
        result = tool.run(model, code, LACEWING_ISA=isa)
        assert result.returncode == 1
        assert f"LACEWING_ISA={isa} needs {missing}, which is missing here" in result.stderr

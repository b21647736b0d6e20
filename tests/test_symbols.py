"""`tools/check_symbols.py` finds what it is for: weak and stray symbols in an ISA's object."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
TOOL = REPO / "tools" / "check_symbols.py"
COMPILER = shutil.which("c++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def check(directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), str(directory)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def compile_isa(directory: Path, source: str) -> None:
    (directory / "isa").mkdir()
    file = directory / "isa" / "test.cpp"
    file.write_text(source)
    assert COMPILER
    command = [COMPILER, "-std=c++20", "-c", str(file), "-o", str(file.with_suffix(".cpp.o"))]
    subprocess.run(command, check=True)


TABLE = "namespace lacewing { extern const int kTestTable; const int kTestTable = 1; }\n"


def test_a_table_alone_passes(tmp_path: Path) -> None:
    compile_isa(tmp_path, TABLE + "namespace { [[maybe_unused]] int local() { return 2; } }")
    run = check(tmp_path)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_weak_symbol_fails(tmp_path: Path) -> None:
    source = "inline int twice(int x) { return 2 * x; }\n"
    source += "[[gnu::used]] static int (*keep)(int) = twice;\n"
    compile_isa(tmp_path, TABLE + source)
    run = check(tmp_path)
    assert run.returncode == 1
    assert "weak symbol `twice(int)`" in run.stderr


def test_a_stray_symbol_fails(tmp_path: Path) -> None:
    compile_isa(tmp_path, TABLE + "int stray() { return 3; }")
    run = check(tmp_path)
    assert run.returncode == 1
    assert "exported symbol `stray()`" in run.stderr


def test_no_objects_is_an_error(tmp_path: Path) -> None:
    run = check(tmp_path)
    assert run.returncode == 1
    assert "hint:" in run.stderr


def test_the_built_objects(tmp_path: Path) -> None:
    if not list((REPO / "build").rglob("isa/*.o")):
        pytest.skip("no objects under build/ (the module was built elsewhere)")
    run = check(REPO / "build")
    assert run.returncode == 0, run.stderr

"""Imports go down only, and the engine never loads PyTorch."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "lacewing"

# A module may import what lies on a lower level, and its own package. Packages that share a level
# are siblings and do not know each other. `native` and `linear` stand between numpy and `_C`.
LEVELS = {
    name: level
    for level, names in enumerate(
        (
            ("errors", "version"),
            ("formats", "models"),
            ("checkpoint", "_C", "tuning"),
            ("native", "quality"),
            ("kv",),
            ("compress", "nn", "engine", "linear"),
            ("server",),
            ("__init__",),
            ("cli",),
        )
    )
    for name in names
}
TORCH_ALLOWED = {"compress", "nn"}
TORCH_PROCESS = "torch_worker.py"  # of the command line: only ever run, never imported
MODULES = sorted(SRC.rglob("*.py"))


def part_of(path: Path) -> str:
    relative = path.relative_to(SRC)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def package_of(path: Path) -> list[str]:
    return ["lacewing", *path.relative_to(SRC).parts[:-1]]


def imported(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Absolute dotted names that the module imports, functions' own imports included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package_of(path)[: len(package_of(path)) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def upward_imports(path: Path, source: str) -> list[str]:
    here = part_of(path)
    found = []
    for line, name in imported(path, ast.parse(source)):
        parts = name.split(".")
        if parts[0] == "torch" and here not in TORCH_ALLOWED and path.name != TORCH_PROCESS:
            found.append(f"{path.name}:{line}: {here} imports torch")
        if parts[0] != "lacewing":
            continue
        # `from lacewing import LLM` names the top itself; only the top may.
        there = parts[1] if len(parts) > 1 and parts[1] in LEVELS else "__init__"
        if there != here and LEVELS[there] >= LEVELS[here]:
            found.append(f"{path.name}:{line}: {here} imports {there} ({name})")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_go_down_only(path: Path) -> None:
    assert part_of(path) in LEVELS, f"say in LEVELS where {part_of(path)} lies"
    assert upward_imports(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("formats/w4.py", "from lacewing.engine import llm"),
        ("formats/w4.py", "from ..checkpoint import gguf"),
        ("formats/w4.py", "from lacewing import LLM"),
        ("engine/llm.py", "import lacewing.nn.linear"),
        ("engine/llm.py", "def late():\n    import torch"),
        ("models/llama.py", "from lacewing.formats import get_format"),
        ("checkpoint/hub.py", "from .. import _C"),
    ],
)
def test_the_walk_sees_an_upward_import(where: str, source: str) -> None:
    assert upward_imports(SRC / where, source)


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("engine/llm.py", "from .engine import Engine\nfrom lacewing.errors import RequestError"),
        ("compress/obs.py", "import torch"),
        ("cli/run.py", "from ..engine import LLM\nfrom . import screen"),
        ("__init__.py", "from .engine import LLM"),
    ],
)
def test_the_walk_accepts_a_downward_import(where: str, source: str) -> None:
    assert upward_imports(SRC / where, source) == []


def test_importing_the_engine_loads_no_torch(record_property: pytest.RecordProperty) -> None:
    code = """
import json, sys, time
start = time.perf_counter()
import lacewing
seconds = time.perf_counter() - start
import lacewing.engine
lacewing.LLM
print(json.dumps({"seconds": seconds, "modules": sorted(sys.modules)}))
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    loaded = json.loads(run.stdout)
    # Reported, not asserted: a clock on a busy machine proves nothing (see benchmarks/).
    record_property("import_seconds", loaded["seconds"])
    print(f"import lacewing: {loaded['seconds']:.3f} s")
    assert "torch" not in loaded["modules"]
    assert "transformers" not in loaded["modules"]


def test_importing_the_command_line_loads_no_model_code() -> None:
    code = "import sys, lacewing.cli.__main__ as m; print([x for x in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for heavy in ("'torch'", "'tokenizers'", "'lacewing.engine'", "'lacewing.checkpoint'"):
        assert heavy not in run.stdout

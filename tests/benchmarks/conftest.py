"""The benchmarks are scripts in a folder of their own; these tests import them as they do. That
folder does not stay on the path: it has names that test packages have too."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

_MODULES = (
    *("axes", "configurations", "harness", "judges", "kvquality", "labels"),
    *("models", "page", "picture", "quality", "verdict"),
)

_before = list(sys.path)
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
for _name in _MODULES:
    import_module(_name)
sys.path[:] = _before

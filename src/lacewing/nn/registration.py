"""transformers learns of Lacewing's checkpoints as soon as both are imported, in either order: to
import it on suspicion would take seconds from those who do not use it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

from lacewing.errors import LacewingError

__all__ = ["register_with_transformers"]

_REGISTRY = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Now if it is imported, else when it is. A version that is too old is left alone: it cannot
    load such a checkpoint, and says so."""
    if _REGISTRY in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _OnImport())


def _register() -> None:
    with suppress(LacewingError):
        importlib.import_module("lacewing.nn.huggingface")


class _OnImport(MetaPathFinder):
    """Finds nothing; lets the module that holds the registry call `_register` when it is there."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec

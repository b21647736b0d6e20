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

__all__ = ["attach_to_transformers", "register_with_transformers"]

_REGISTRY = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Now if it is imported, else when it is. A version that is too old is left alone: it cannot
    load such a checkpoint, and says so."""
    if _REGISTRY in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _OnImport())


def attach_to_transformers(model: Any) -> None:
    """A model of transformers, or the one inside, that has packed layers now: its `save_pretrained`
    is to say so. Without that, loading what it has saved would begin with random weights."""
    library = sys.modules.get("transformers.modeling_utils")
    if library is None:
        return
    own = next((m for m in model.modules() if isinstance(m, library.PreTrainedModel)), None)
    if own is not None:
        with suppress(LacewingError):
            importlib.import_module("lacewing.nn.huggingface.quantizer").attach(own)


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

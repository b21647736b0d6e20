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

from lacewing.errors import LacewingError, RequestError

__all__ = ["attach_to_transformers", "check_saving", "register_with_transformers"]

_REGISTRY = "transformers.quantizers.auto"
_MODELS = "transformers.modeling_utils"


def register_with_transformers() -> None:
    """Now if it is imported, else when it is. A version that is too old is left alone: it cannot
    load such a checkpoint, and says so."""
    if _REGISTRY in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _OnImport())


def attach_to_transformers(model: Any) -> None:
    """A model of transformers, and those inside, that have packed layers now: `save_pretrained` of
    each is to say so. Without that, loading what it has saved would begin with random weights."""
    library = sys.modules.get(_MODELS)
    if library is None:
        return
    with suppress(LacewingError):
        attach = importlib.import_module("lacewing.nn.huggingface.quantizer").attach
        for own in model.modules():
            if isinstance(own, library.PreTrainedModel):
                attach(own)


def check_saving(module: Any, prefix: str, keep_vars: bool) -> None:
    """A hook of packed layers, before `state_dict`. A model that lies around the one whose layers
    were replaced cannot be found from there: it does not know of them, and what it saves would
    load with random weights. Raises RequestError."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == _MODELS and frame.f_code.co_name == "save_pretrained":
            if not _is_recorded(frame.f_locals["self"]):
                raise RequestError(
                    f"save_pretrained: `{prefix.rstrip('.')}` is packed, and the model that is"
                    f" saved, a {type(frame.f_locals['self']).__name__}, does not know it",
                    hint="call lacewing.replace_linear on that model, with the same layers to"
                    " `include`: what is packed stays as it is, and is known then",
                )
            return


def _is_recorded(model: Any) -> bool:
    """Whether what `model` saves can be loaded: with its packed layers, or adapters alone."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    adapters = getattr(model, "_hf_peft_config_loaded", False)
    return adapters or getattr(config, "quant_method", None) == "lacewing"


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

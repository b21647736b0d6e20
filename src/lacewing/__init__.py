"""Lacewing: small, fast transformer language models on ordinary CPUs.

    import lacewing

    with lacewing.LLM("model.gguf") as llm:
        print(llm.generate("The sea is", lacewing.SamplingParams(max_tokens=32))[0].text)

Names are loaded when they are first used, so `import lacewing` itself costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lacewing.version import __version__

if TYPE_CHECKING:
    from lacewing import checkpoint, engine, errors, formats, models, nn, quality
    from lacewing.compress.recipe import Calibration, Recipe, Reconstruct, Rule
    from lacewing.compress.run import compress
    from lacewing.engine import LLM, Piece, Result, SamplingParams
    from lacewing.errors import (
        CheckpointError,
        FormatError,
        LacewingError,
        RecipeError,
        RequestError,
        UnsupportedCpuError,
        UnsupportedModelError,
    )
    from lacewing.formats import PackedTensor, pack
    from lacewing.native import linear
    from lacewing.nn import Report, replace_linear
    from lacewing.nn.huggingface import LacewingConfig

__all__ = [
    "LLM",
    "Calibration",
    "CheckpointError",
    "FormatError",
    "LacewingConfig",
    "LacewingError",
    "PackedTensor",
    "Piece",
    "Recipe",
    "RecipeError",
    "Reconstruct",
    "Report",
    "RequestError",
    "Result",
    "Rule",
    "SamplingParams",
    "UnsupportedCpuError",
    "UnsupportedModelError",
    "__version__",
    "checkpoint",
    "compress",
    "engine",
    "errors",
    "formats",
    "linear",
    "models",
    "nn",
    "pack",
    "quality",
    "replace_linear",
]

_HOMES = {
    "compress": ("Calibration", "Recipe", "Reconstruct", "Rule"),
    "engine": ("LLM", "Piece", "Result", "SamplingParams"),
    "errors": (
        "CheckpointError",
        "FormatError",
        "LacewingError",
        "RecipeError",
        "RequestError",
        "UnsupportedCpuError",
        "UnsupportedModelError",
    ),
    "formats": ("PackedTensor", "pack"),
    "native": ("linear",),
    "nn": ("Report", "replace_linear"),
    "nn.huggingface": ("LacewingConfig",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
_PACKAGES = {"checkpoint", "compress", "engine", "errors", "formats", "models", "nn", "quality"}


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return _package(name)
    if name not in _HOME:
        raise AttributeError(f"module 'lacewing' has no attribute {name!r}")
    value = getattr(_package(_HOME[name]), name)
    globals()[name] = value
    return value


def _package(name: str) -> Any:
    try:
        return import_module(f"lacewing.{name}")
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "safetensors"):
            raise
        from lacewing.errors import LacewingError

        raise LacewingError(
            f"`lacewing.{name}` needs {error.name}, which is not installed",
            hint="pip install 'lacewing[torch]'",
        ) from error


def __dir__() -> list[str]:
    return sorted(__all__)

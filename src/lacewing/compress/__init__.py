"""Compression with calibration: prune and round a model so that its outputs change least.

    import lacewing

    lacewing.compress("model.gguf", "packed", recipe="balanced", data=["text.txt"])

The package can be called; what is called is `run.compress`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from lacewing.compress.recipe import Calibration, Recipe, Reconstruct, Rule

__all__ = ["Calibration", "Recipe", "Reconstruct", "Rule"]


class _Package(ModuleType):
    """Importing any of its modules binds the package as `lacewing.compress`: so that this is the
    function as well, in whatever order things are imported, the package itself is callable."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """See `lacewing.compress.run.compress`. Raises LacewingError where PyTorch is not
        installed."""
        return _function()(*arguments, **options)


def _function() -> Any:
    try:
        from lacewing.compress.run import compress
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        from lacewing.errors import LacewingError

        raise LacewingError(
            "compressing with a recipe needs torch, which is not installed",
            hint="pip install 'lacewing[compress]'",
        ) from error
    return compress


sys.modules[__name__].__class__ = _Package

"""The exception tree. Every message says where, the requirement and the actual value; `hint` says
the way out, and the command line prints it on a line of its own."""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "FormatError",
    "LacewingError",
    "RecipeError",
    "RequestError",
    "UnsupportedCpuError",
    "UnsupportedModelError",
]


class LacewingError(Exception):
    """Root of every error that Lacewing raises on purpose. `str(error)` is the message alone."""

    hint: str | None

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class FormatError(LacewingError, ValueError):
    """A weight, its codes or its packed parts do not fit the format."""


class CheckpointError(LacewingError):
    """A model file or directory is missing, damaged, or holds something else than it says."""


class RecipeError(LacewingError, ValueError):
    """A compression recipe asks for something that cannot be done."""


class UnsupportedModelError(LacewingError):
    """The architecture, or a feature of it, is not implemented."""


class UnsupportedCpuError(LacewingError):
    """The instruction set asked for does not run on this machine."""


class RequestError(LacewingError):
    """A request to the engine cannot be served (prompt too long, bad sampling parameter)."""

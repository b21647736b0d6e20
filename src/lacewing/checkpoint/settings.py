"""What GPTQ, AWQ and auto-round configs share: bits, group size, and rules for single modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from lacewing.checkpoint.files import fail, shown
from lacewing.errors import UnsupportedModelError

__all__ = ["Config", "Settings", "refuse"]

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """How one module is rounded."""

    bits: int
    group_size: int | None
    """Inputs per scale, or None for a row."""
    reordered: bool = False
    """Whether groups are not runs of inputs (`desc_act`)."""

    @classmethod
    def of(cls, where: str, config: Config) -> Settings:
        """From a config that says `bits` and `group_size`. Raises CheckpointError for nonsense,
        UnsupportedModelError for other numbers of bits."""
        bits, size = config.get("bits"), config.get("group_size", -1)
        if type(bits) is not int or not 2 <= bits <= 8:
            refuse(f"{where}.bits", "2 to 8 bits", bits)
        if type(size) is not int or not (size == -1 or 0 < size < 1 << 31):
            fail(f"{where}.group_size", "a positive number or -1", shown(size))
        return cls(bits, None if size == -1 else size, config.get("desc_act") is True)

    def grouped(self) -> str:
        """For a label: `int4 g128`."""
        return f"int{self.bits} " + (f"g{self.group_size}" if self.group_size else "channel")


def refuse(where: str, requirement: str, actual: object, hint: str | None = None) -> NoReturn:
    """Raises UnsupportedModelError."""
    text = f"{where}: needs {requirement}, got {shown(actual)}"
    raise UnsupportedModelError(text, hint=hint or "use the original model, or a GGUF file of it")

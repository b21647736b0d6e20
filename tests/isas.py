"""The instruction sets of this machine, and where they promise the same bits.

Integer formats: everywhere. bf16 and bf16_sp: everywhere but in AMX tiles, whose bits are their
own.
"""

from __future__ import annotations

from lacewing import _C

USABLE = [isa["name"] for isa in _C.isas() if isa["usable"]]
"""Slowest first."""


def promises_same_bits(format: str, isa: str) -> bool:
    """Whether `isa` gives the bits of the scalar kernels, for any number of rows."""
    return not (format.startswith("bf16") and isa.startswith("amx"))


def exact_isa(format: str) -> str | None:
    """The default ISA (None), or where it does not promise the same bits the fastest that does."""
    if promises_same_bits(format, _C.default_isa()):
        return None
    return [isa for isa in USABLE if promises_same_bits(format, isa)][-1]

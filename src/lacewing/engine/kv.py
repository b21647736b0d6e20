"""KV cache formats: how keys and values are stored between steps.

A block holds 16 tokens of one KV head. `f16`, `bf16` and `f32` store the numbers themselves;
`int8` stores codes with an f16 scale per token and head, for half the memory of f16.
The layouts are stated in `csrc/formats/kv.h`.
"""

from __future__ import annotations

from typing import Any

from lacewing.errors import RequestError
from lacewing.native import compiled

__all__ = ["DEFAULT_KV", "block_bytes", "check_kv", "kv_formats"]

DEFAULT_KV = "f16"


def kv_formats() -> tuple[str, ...]:
    """Names of the formats."""
    return tuple(compiled().KV_FORMATS)


def check_kv(name: Any) -> str:
    """`name` if it is a KV cache format. Raises `RequestError`."""
    known = kv_formats()
    if name not in known:
        choices = ", ".join(f"`{each}`" for each in known)
        raise RequestError(f"`kv` must be one of {choices}, got {name!r}")
    return str(name)


def block_bytes(name: str, head_dim: int) -> int:
    """Bytes of the keys and values of 16 tokens and one head."""
    return int(compiled().kv_block_bytes(name, head_dim))

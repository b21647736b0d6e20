"""How much must be read so that it comes from memory and not from a cache."""

from __future__ import annotations

from lacewing.engine.runner import available_memory
from lacewing.native import compiled

COLD = 4  # times the last-level cache: reading in turn then finds nothing of it there
_LEAST = 256 << 20  # a virtual machine may tell of less cache than there is


def last_level_cache() -> int:
    """Bytes of the largest cache that the CPU reports; 32 MiB if it tells none."""
    return max(compiled().cpu_info()["caches"].values(), default=0) or 32 << 20


def cold_bytes() -> int:
    """Bytes to read in turn, a buffer or rotated weights, so that no cache holds them: as far as a
    quarter of the free memory allows."""
    wanted = max(_LEAST, COLD * last_level_cache())
    free = available_memory()
    return wanted if free is None else min(wanted, free // 4)

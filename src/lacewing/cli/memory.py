"""How much must be read so that it comes from memory and not from a cache."""

from __future__ import annotations

from lacewing.kv.memory import available_memory
from lacewing.native import compiled

COLD = 4  # times the last-level cache: reading in turn then finds nothing of it there
_LEAST = 256 << 20  # a virtual machine may tell of less cache than there is


def last_level_cache() -> int:
    """Bytes of the last-level caches of all CPUs that this process may use, together; 32 MiB if
    they tell none."""
    cpu = compiled().cpu_info()
    return max(cpu["caches"].values(), default=0) * cpu["last_level_caches"] or 32 << 20


def cold_bytes() -> int:
    """Bytes to read in turn, a buffer or rotated weights, so that no cache holds them: as far as a
    quarter of the free memory allows."""
    wanted = max(_LEAST, COLD * last_level_cache())
    free = available_memory()
    return wanted if free is None else min(wanted, max(free // 4, 1 << 20))

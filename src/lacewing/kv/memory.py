"""How much memory there is."""

from __future__ import annotations

from pathlib import Path

__all__ = ["available_memory"]


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can still be allocated here: what the kernel and the control group leave.

    None where neither tells. `root` is for tests.
    """
    left = []
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                left.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError):
        pass
    group = root / "sys/fs/cgroup"
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            room = int((group / limit).read_text()) - int((group / used).read_text())
        except (OSError, ValueError):  # absent, or "max"
            continue
        left.append(max(room, 0))
    return min(left, default=None)

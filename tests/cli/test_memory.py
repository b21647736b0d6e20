"""How much is read so that no cache holds it."""

from __future__ import annotations

import pytest

from lacewing.cli import memory

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("cache", "free", "want"),
    [
        (8 * MIB, 64 * GIB, 256 * MIB),
        (100 * MIB, 64 * GIB, 400 * MIB),
        (100 * MIB, GIB, 256 * MIB),
        (8 * MIB, 100 * MIB, 25 * MIB),
        (8 * MIB, MIB, MIB),
        (100 * MIB, None, 400 * MIB),
    ],
)
def test_cold_bytes(
    monkeypatch: pytest.MonkeyPatch, cache: int, free: int | None, want: int
) -> None:
    monkeypatch.setattr(memory, "last_level_cache", lambda: cache)
    monkeypatch.setattr(memory, "available_memory", lambda: free)
    assert memory.cold_bytes() == want


def test_the_cache_is_one_that_the_cpu_reports() -> None:
    assert MIB <= memory.last_level_cache() <= 64 * GIB

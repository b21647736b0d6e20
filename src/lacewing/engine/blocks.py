"""BlockManager: who owns which block of the paged KV cache.

A block holds the keys and values of `BLOCK_SIZE` consecutive tokens of one sequence, in every
layer. A block table lists the blocks of a sequence in order, so token `t` lives in the slot
`table[t // BLOCK_SIZE] * BLOCK_SIZE + t % BLOCK_SIZE`.
"""

from __future__ import annotations

from array import array

__all__ = ["BLOCK_SIZE", "BlockManager", "block_table", "blocks_for"]

BLOCK_SIZE = 16


def block_table() -> array[int]:
    """An empty block table (int32, so that numpy reads it without a copy)."""
    return array("i")


def blocks_for(tokens: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // BLOCK_SIZE)


class BlockManager:
    """Free list over `total` blocks. Hands out whole blocks, all or nothing."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free: list[int] = []
        self.reset()

    @property
    def free(self) -> int:
        """Blocks nobody owns."""
        return len(self._free)

    def reserve(self, table: array[int], tokens: int) -> bool:
        """Extends `table` until it holds `tokens` tokens. False, and no change, if blocks lack."""
        missing = blocks_for(tokens) - len(table)
        if missing <= 0:
            return True
        if missing > len(self._free):
            return False
        for _ in range(missing):
            table.append(self._free.pop())
        return True

    def release(self, table: array[int]) -> None:
        """Takes every block of `table` back and empties it."""
        self._free.extend(reversed(table))
        del table[:]

    def reset(self) -> None:
        """Forgets all owners. The caller empties their tables."""
        self._free = list(range(self.total - 1, -1, -1))

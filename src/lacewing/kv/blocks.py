"""BlockManager: who owns which block of the paged KV cache.

The cache consists of stores. A block of a store holds the keys and values of `block_tokens`
consecutive tokens of one sequence, for the layers and heads of that store. A block table lists the
blocks of a sequence in order: token `t` lives in block `table[t // block_tokens]`. A store may keep
a part of the text only (`Keep`): blocks that no later token reads go to new tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BLOCK_SIZE",
    "BlockManager",
    "Keep",
    "Store",
    "Tables",
    "blocks_for",
    "stack",
    "stack_merged",
]

Ints = NDArray[np.int32]

BLOCK_SIZE = 16


@dataclass(frozen=True)
class Keep:
    """Of what a store holds, query block i reads the blocks j <= i with j < sinks, i - j < window,
    or j % stride == phase (stride > 0). In blocks."""

    sinks: int
    window: int
    stride: int = 0
    phase: int = 0

    def __contains__(self, pair: tuple[int, int]) -> bool:
        """(i, j): whether a query block from i on reads block j."""
        i, j = pair
        strided = self.stride > 0 and j % self.stride == self.phase
        return j < self.sinks or i - j < self.window or strided


@dataclass(frozen=True)
class Store:
    """A pool of `total` blocks. keep: None keeps all of a text."""

    total: int
    block_tokens: int = BLOCK_SIZE
    keep: Keep | None = None

    def blocks(self, tokens: int) -> int:
        """Blocks that `tokens` tokens fill."""
        return -(-tokens // self.block_tokens)

    def peak(self, tokens: int, rows: int) -> int:
        """Blocks held at once by a sequence of up to `tokens` tokens of which a step computes up
        to `rows`."""
        every = self.blocks(tokens)
        if self.keep is None:
            return every
        strided = every // self.keep.stride + 1 if self.keep.stride else 0
        return min(every, self.keep.sinks + self.keep.window + strided + self.blocks(rows) + 1)


@dataclass(eq=False)
class Tables:
    """The blocks of one sequence, by store."""

    tables: list[array[int]] = field(default_factory=list)
    """Block tables, int32 so that numpy reads them without a copy. Blocks that are not kept any
    more are 0: nothing reads them."""
    spare: list[list[int]] = field(default_factory=list)
    """Blocks owned and not in use yet."""
    kept: list[list[int]] = field(default_factory=list)
    """Numbers of the blocks in use that may be let go of, where a store does not keep all."""
    merged: array[int] = field(default_factory=lambda: array("i"))
    """While a step merges the sequence's prompt: the block table that replaces the one store's."""
    start: int = 0
    """Tokens before the rows that were placed last: what rows from there on read is kept."""


class BlockManager:
    """Free lists over the blocks of `stores`. Hands out whole blocks, all or nothing.

    step_tokens: rows of one sequence that a step computes at most.
    """

    def __init__(self, stores: Sequence[Store], step_tokens: int = 512) -> None:
        self.stores = tuple(stores)
        self.step_tokens = step_tokens
        self._free: list[list[int]] = []
        self.reset()

    @property
    def free(self) -> tuple[int, ...]:
        """Blocks nobody owns, by store."""
        return tuple(len(free) for free in self._free)

    def reserve(self, tables: Tables, tokens: int, rows: int | None = None) -> bool:
        """Makes `tables` own the blocks that a sequence of `tokens` tokens needs while its next
        `rows` are computed (None: a step's most). False, and no change, if blocks lack. What it
        owns beyond that goes back."""
        rows = min(tokens, self.step_tokens if rows is None else rows)
        missing = [
            store.peak(tokens, rows) - self.count(tables, i) for i, store in enumerate(self.stores)
        ]
        if any(want > len(free) for want, free in zip(missing, self._free, strict=True)):
            return False
        if not tables.tables:
            tables.tables = [array("i") for _ in self.stores]
            tables.spare, tables.kept = [[] for _ in self.stores], [[] for _ in self.stores]
        for want, free, spare in zip(missing, self._free, tables.spare, strict=True):
            for _ in range(want):
                spare.append(free.pop())
            for _ in range(min(-want, len(spare))):
                free.append(spare.pop())
        return True

    def place(self, tables: Tables, start: int, stop: int) -> bool:
        """Gives the tokens up to `stop` their blocks, before the rows `[start, stop)` are computed;
        what they and later rows do not read makes room. False: they have them already."""
        if self.covers(tables, stop):
            return False
        for i, store in enumerate(self.stores):
            table, spare, kept = tables.tables[i], tables.spare[i], tables.kept[i]
            if store.keep is not None:
                self._let_go(store.keep, start // store.block_tokens, table, spare, kept)
                kept.extend(range(len(table), store.blocks(stop)))
            for _ in range(store.blocks(stop) - len(table)):
                table.append(spare.pop())
        tables.start = start
        return True

    def covers(self, tables: Tables, tokens: int) -> bool:
        """Whether so many tokens have their blocks."""
        pairs = zip(self.stores, tables.tables, strict=False)
        return bool(tables.tables) and all(s.blocks(tokens) <= len(table) for s, table in pairs)

    def holds(self, tables: Tables, tokens: int) -> bool:
        """Whether what the rows behind so many tokens read is there: it is for those placed last,
        and for all where every block is kept."""
        return tokens >= tables.start or all(store.keep is None for store in self.stores)

    def may_rewind(self, tables: Tables, tokens: int) -> bool:
        """Whether a sequence can go back to so many tokens."""
        return tokens == 0 or self.holds(tables, tokens)

    def rewind(self, tables: Tables, tokens: int) -> None:
        """Goes back to `tokens` tokens, where that is possible: the blocks behind them are not in
        use any more."""
        for i, table in enumerate(tables.tables):
            store, spare, kept = self.stores[i], tables.spare[i], tables.kept[i]
            while len(table) > store.blocks(tokens):
                block = table.pop()
                if store.keep is None:
                    spare.append(block)
                elif kept and kept[-1] == len(table):
                    spare.append(block)
                    kept.pop()
        tables.start = min(tables.start, tokens)

    def begin_merge(self, tables: Tables, keep: int) -> None:
        """Gives the `keep` tokens that stay of a prompt their blocks, before the step that merges
        it. Only where there is one store, which keeps all."""
        for _ in range(self.stores[0].blocks(keep)):
            tables.merged.append(tables.spare[0].pop())

    def cancel_merge(self, tables: Tables) -> None:
        """Takes `begin_merge` back, after a step that failed."""
        while tables.merged:
            tables.spare[0].append(tables.merged.pop())

    def end_merge(self, tables: Tables, tokens: int) -> None:
        """The prompt is merged: the blocks that held it go back, but for those that a sequence of
        `tokens` tokens needs."""
        tables.spare[0].extend(reversed(tables.tables[0]))
        tables.tables[0], tables.merged = tables.merged, array("i")
        self.reserve(tables, tokens, 1)

    def release(self, tables: Tables) -> None:
        """Takes every block of `tables` back and empties it."""
        for i, free in enumerate(self._free[: len(tables.tables)]):
            free.extend(reversed(self.owned(tables, i)))
        self._empty(tables)

    def owned(self, tables: Tables, store: int = 0) -> list[int]:
        """The blocks of a store that are in use, in order, and then those that are not yet."""
        if not tables.tables:
            return []
        table = tables.tables[store]
        if self.stores[store].keep is None:
            return [*table, *tables.merged, *reversed(tables.spare[store])]
        return [*(table[j] for j in tables.kept[store]), *reversed(tables.spare[store])]

    def count(self, tables: Tables, store: int) -> int:
        """How many blocks `owned` lists."""
        if not tables.tables:
            return 0
        everything = self.stores[store].keep is None
        used = len(tables.tables[store]) if everything else len(tables.kept[store])
        return used + len(tables.merged) + len(tables.spare[store])

    def grow(self, totals: Sequence[int]) -> None:
        """So many blocks in every store, no fewer than there are."""
        for i, (store, total) in enumerate(zip(self.stores, totals, strict=True)):
            self._free[i][:0] = range(total - 1, store.total - 1, -1)
        pairs = zip(self.stores, totals, strict=True)
        self.stores = tuple(replace(store, total=total) for store, total in pairs)

    def fork(self, tables: Tables) -> tuple[Tables, list[list[tuple[int, int]]]]:
        """A second owner of as many blocks, which must be free, and by store the (from, to) whose
        contents it needs."""
        other, copies = deepcopy(tables), []
        for i, free in enumerate(self._free[: len(tables.tables)]):
            table, spare = other.tables[i], other.spare[i]
            used = range(len(table)) if self.stores[i].keep is None else other.kept[i]
            copies.append([(table[j], free.pop()) for j in used])
            for j, (_, block) in zip(used, copies[-1], strict=True):
                table[j] = block
            spare[:] = [free.pop() for _ in spare]
        return other, copies

    def reset(self, owners: Sequence[Tables] = ()) -> None:
        """Forgets all owners, and empties their tables."""
        self._free = [list(range(store.total - 1, -1, -1)) for store in self.stores]
        for tables in owners:
            self._empty(tables)

    @staticmethod
    def _let_go(
        keep: Keep, query: int, table: array[int], spare: list[int], kept: list[int]
    ) -> None:
        for j in kept:
            if (query, j) not in keep:
                spare.append(table[j])
                table[j] = 0
        kept[:] = [j for j in kept if (query, j) in keep]

    @staticmethod
    def _empty(tables: Tables) -> None:
        tables.tables, tables.spare, tables.kept, tables.merged = [], [], [], array("i")
        tables.start = 0


def stack(sequences: Sequence[Tables]) -> Ints:
    """Block tables int32 `[stores, sequences, widest]`, zeros behind the shorter ones."""
    every = [tables.tables for tables in sequences]
    if len(every) == len(every[0]) == 1:
        return np.array(every[0][0], np.int32).reshape(1, 1, -1)
    widest = max(len(table) for tables in every for table in tables)
    found = np.zeros((len(every[0]), len(every), widest), np.int32)
    for sequence, tables in enumerate(every):
        for store, table in enumerate(tables):
            found[store, sequence, : len(table)] = table
    return found


def stack_merged(sequences: Sequence[Tables]) -> Ints:
    """Block tables int32 `[sequences, widest]` of prompts that a step merges."""
    found = np.zeros((len(sequences), max(len(each.merged) for each in sequences)), np.int32)
    for row, tables in zip(found, sequences, strict=True):
        row[: len(tables.merged)] = tables.merged
    return found


def blocks_for(tokens: int) -> int:
    """Blocks of `BLOCK_SIZE` that hold `tokens` tokens."""
    return -(-tokens // BLOCK_SIZE)

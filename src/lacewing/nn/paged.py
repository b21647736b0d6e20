"""PagedLayer: one layer's KV cache for a batch of sequences that grow together, over `_C.KvCache`.

What stands in which block, and what is read, is what the engine does (`lacewing.kv`); here it is
the batch of a PyTorch model: sequences are rows, columns are their tokens with the padding before
them, and memory grows with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lacewing.checkpoint.kvplan import KvPlan
from lacewing.errors import RequestError
from lacewing.kv.blocks import (
    BLOCK_SIZE,
    BlockManager,
    Tables,
    blocks_for,
    stack,
    stack_merged,
)
from lacewing.kv.choice import MERGE_ROWS, KvChoice, kept_tokens
from lacewing.kv.layout import LayerShape, lay_out
from lacewing.kv.memory import available_memory
from lacewing.native import compiled

__all__ = ["PagedLayer"]

Floats = NDArray[np.float32]

_PIECE = 512  # columns of a prompt that are stored and attended at once
_SLACK, _LEAST = 16, 8  # a store grows by a 16th at least, and by 8 blocks
_ENDLESS = 1 << 30  # tokens: no window is longer


@dataclass
class _Row:
    """One sequence."""

    tables: Tables = field(default_factory=Tables)
    start: int = 0
    """The column of its first token."""
    prompt: int = 0
    """Tokens that were merged; 0: none."""
    dropped: int = 0
    """By how many these became fewer."""

    def tokens(self, length: int) -> int:
        """In so many columns."""
        return max(0, length - self.start)

    def cached(self, length: int) -> int:
        """Of them, what is in the cache."""
        return max(0, length - self.start - self.dropped)


class PagedLayer:
    """Keys and values of `batch` sequences as `choice` stores and reads them.

    plan: of this layer alone. whole: steps are never cut, so that other layers may attend the same
    keys. Raises RequestError for what `choice` and the layer cannot do together, CheckpointError
    for a plan of another layer.
    """

    def __init__(
        self,
        shape: LayerShape,
        choice: KvChoice,
        plan: KvPlan | None,
        batch: int,
        whole: bool = False,
        isa: str | None = None,
    ) -> None:
        if plan is not None:
            plan.check(shape)
        self.shape = shape
        self._share, self._most = choice.merge, _ENDLESS if whole else _PIECE
        self._layout = lay_out(shape, choice, plan, _ENDLESS)
        stores = [each.store(1) for each in self._layout.stores]
        self._blocks = BlockManager(stores)
        kv = self._layout.native(stores)
        heads = shape.n_kv_heads, shape.head_dim
        self._native: Any = _checked(compiled().KvCache, kv, *heads, isa)
        self._rows = [_Row() for _ in range(batch)]
        self._stacked: NDArray[np.int32] | None = None  # the rows' tables, while they stay
        self.length = 0
        """Columns, padding included."""

    @property
    def batch(self) -> int:
        return len(self._rows)

    @property
    def bytes(self) -> int:
        """Of all blocks, free ones too."""
        return int(self._native.bytes)

    def step(
        self, q: Floats, k: Floats, v: Floats, starts: Sequence[int], scale: float, threads: int
    ) -> Floats:
        """Adds columns, and attends them. q `[batch, columns, n_heads, head_dim]`, k and v
        `[batch, columns, n_kv_heads, head_dim]`, rotated; starts: of each sequence, the column of
        its first token, which may move until there is one. Returns the shape of q, zeros where
        there is padding. Raises RequestError; of a long prompt, pieces that are complete stay.
        """
        self._check_starts(starts)
        stop = self.length + q.shape[1]
        for row, start in zip(self._rows, starts, strict=True):
            row.start = start
        keep = [
            0 if row.tokens(self.length) else kept_tokens(row.tokens(stop), self._share)
            for row in self._rows
        ]
        self._reserve(stop, keep)
        found = np.zeros(q.shape, np.float32)
        for begin, end in self._pieces(q.shape[1]):
            here = slice(begin, end)
            last = keep if end == q.shape[1] and any(keep) else None
            self._place(self.length + end - begin, last)
            new = k[:, here], v[:, here]
            try:
                found[:, here] = self._attend(self.length, q[:, here], scale, threads, new, last)
            except RequestError:
                for row in self._rows:
                    self._blocks.cancel_merge(row.tables)
                raise
            self.length += end - begin
            if last is not None:
                self._end_merge(last)
        return found

    def attend(self, q: Floats, scale: float, threads: int) -> Floats:
        """Attends the columns of the last step once more, with other queries. Raises RequestError
        if some of what they read is not there any more."""
        first = self.length - q.shape[1]
        rows = self._rows
        if any(row.prompt or not self._blocks.holds(row.tables, row.cached(first)) for row in rows):
            raise RequestError(
                "a LacewingCache has let go of keys that another layer still attends",
                hint='kv="f16" keeps them, but for sliding windows; or compute prompts in pieces',
            )
        return self._attend(first, q, scale, threads)

    def check_crop(self, length: int) -> None:
        """Raises RequestError if what the columns behind `length` read is not there any more."""
        if not all(self._may_rewind(row, length) for row in self._rows):
            raise RequestError(
                f"a LacewingCache of {self.length} tokens cannot go back to {length}: what the "
                "next ones would read is let go of or merged",
                hint='kv="f16" keeps it, but for sliding windows',
            )

    def crop(self, length: int) -> None:
        """Forgets all columns but the first `length`. Raises as `check_crop`, and is then as it
        was."""
        length = min(length, self.length)
        self.check_crop(length)
        for row in self._rows:
            if row.tokens(length) == 0:
                row.prompt = row.dropped = 0
            self._blocks.rewind(row.tables, row.cached(length))
        self.length, self._stacked = length, None

    def select(self, rows: Sequence[int]) -> None:
        """The batch becomes copies of the sequences `rows`. Raises RequestError, and is then as it
        was, for rows that are not there and where memory lacks."""
        if not rows or not all(0 <= row < self.batch for row in rows):
            raise RequestError(
                f"LacewingCache: rows must be some of 0..{self.batch - 1}, got {list(rows)}"
            )
        unused = [self._rows[i] for i in range(self.batch) if i not in rows]
        again = [self._rows[r] for i, r in enumerate(rows) if r in rows[:i]]
        self._grow(
            [
                sum(self._blocks.count(row.tables, i) for row in again)
                - sum(self._blocks.count(row.tables, i) for row in unused)
                for i in range(len(self._blocks.stores))
            ]
        )
        for row in unused:
            self._blocks.release(row.tables)
        self._rows = [
            self._copy(self._rows[r]) if r in rows[:i] else self._rows[r]
            for i, r in enumerate(rows)
        ]
        self._stacked = None

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedLayer:
        """With blocks of its own: transformers' way to go on twice from one prompt."""
        made = copy(self)
        made._native = _checked(self._native.clone)
        made._blocks, made._rows = deepcopy(self._blocks, memo), deepcopy(self._rows, memo)
        return made

    # -- steps ------------------------------------------------------------------------------------

    def _check_starts(self, starts: Sequence[int]) -> None:
        """Only a sequence that has no token yet may begin elsewhere than before."""
        for b, (row, start) in enumerate(zip(self._rows, starts, strict=True)):
            if start != row.start and (row.tokens(self.length) or start < self.length):
                raise RequestError(
                    f"LacewingCache: sequence {b} began at {row.start}, not at {start}",
                    hint="attention_mask must say of earlier tokens what it said before",
                )

    def _pieces(self, columns: int) -> list[tuple[int, int]]:
        """Where a step is cut. The rows that a merge wants together stay so."""
        found, begin = [], 0
        while (rest := columns - begin) > self._most:
            end = begin + self._most - (MERGE_ROWS if rest < self._most + MERGE_ROWS else 0)
            found.append((begin, end))
            begin = end
        return [*found, (begin, columns)]

    def _place(self, stop: int, keep: Sequence[int] | None) -> None:
        for i, row in enumerate(self._rows):
            if self._blocks.place(row.tables, row.cached(self.length), row.cached(stop)):
                self._stacked = None
            if keep is not None:
                self._blocks.begin_merge(row.tables, keep[i])

    def _attend(
        self,
        first: int,
        q: Floats,
        scale: float,
        threads: int,
        new: tuple[Floats, Floats] | None = None,
        keep: Sequence[int] | None = None,
    ) -> Floats:
        """Of the columns from `first` on; new: their keys and values, None: they are there."""
        columns = np.arange(first, first + q.shape[1])
        real = columns >= np.array([[row.start] for row in self._rows])
        found = np.zeros(q.shape, np.float32)
        if not real.any():
            return found
        if self._stacked is None:
            self._stacked = stack([row.tables for row in self._rows])
        merged = None if keep is None else stack_merged([row.tables for row in self._rows])
        k, v = (None, None) if new is None else (_packed(new[0], real), _packed(new[1], real))
        found[real] = _checked(
            self._native.step,
            _packed(q, real),
            k,
            v,
            scale,
            self.shape.window,
            np.array([row.cached(first) for row in self._rows], np.int32),
            self._stacked,
            np.cumsum([0, *real.sum(1)], dtype=np.int32),
            None if keep is None else np.array(keep, np.int32),
            merged,
            threads,
        )
        return found

    def _end_merge(self, keep: Sequence[int]) -> None:
        for row, kept in zip(self._rows, keep, strict=True):
            if kept:
                row.prompt = row.tokens(self.length)
                row.dropped = row.prompt - kept
                self._blocks.end_merge(row.tables, kept)
        self._stacked = None

    def _may_rewind(self, row: _Row, length: int) -> bool:
        if row.tokens(length) == 0:
            return True
        merged = row.tokens(length) < row.prompt
        return not merged and self._blocks.may_rewind(row.tables, row.cached(length))

    # -- memory -----------------------------------------------------------------------------------

    def _reserve(self, stop: int, keep: Sequence[int]) -> None:
        """Blocks for all columns up to `stop`, and for the prompts that are merged then."""
        count = min(self._most, stop - self.length)
        asked = [
            (
                row.tables,
                blocks_for(row.cached(stop)) * BLOCK_SIZE + kept if kept else row.cached(stop),
            )
            for row, kept in zip(self._rows, keep, strict=True)
            if kept or not self._blocks.covers(row.tables, row.cached(stop))
        ]
        if not asked:
            return
        stores = enumerate(self._blocks.stores)
        self._grow(
            [
                sum(
                    max(0, store.peak(tokens, min(tokens, count)) - self._blocks.count(tables, i))
                    for tables, tokens in asked
                )
                for i, store in stores
            ]
        )
        for tables, tokens in asked:
            self._blocks.reserve(tables, tokens, count)

    def _grow(self, wanted: Sequence[int]) -> None:
        """Makes at least so many blocks free, by store."""
        lacking = [want - free for want, free in zip(wanted, self._blocks.free, strict=True)]
        if max(lacking) <= 0:
            return
        totals = [
            store.total + (max(lack, _LEAST, store.total // _SLACK) if lack > 0 else 0)
            for store, lack in zip(self._blocks.stores, lacking, strict=True)
        ]
        grown = [replace(s, total=n) for s, n in zip(self._blocks.stores, totals, strict=True)]
        size, free = self._layout.bytes(grown), available_memory()
        if free is not None and size > free:  # the old one is still there while it is copied
            raise RequestError(
                f"a layer's KV cache is to grow to {size / 2**20:.0f} MiB, "
                f"only {free / 2**20:.0f} MiB are available",
                hint='fewer or shorter sequences, or kv="int8"',
            )
        _checked(self._native.grow, totals)
        self._blocks.grow(totals)

    def _copy(self, row: _Row) -> _Row:
        tables, copies = self._blocks.fork(row.tables)
        for store, pairs in enumerate(copies):
            blocks = np.array(pairs, np.int32).reshape(-1, 2)
            self._native.copy(store, *np.ascontiguousarray(blocks.T))
        return replace(row, tables=tables)


def _packed(rows: Floats, real: NDArray[np.bool_]) -> Floats:
    """`[batch, columns, heads, head_dim]` without the padding: `[rows, heads, head_dim]`."""
    if real.all():
        return np.ascontiguousarray(rows).reshape(-1, *rows.shape[2:])
    return np.ascontiguousarray(rows[real])


def _checked(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except ValueError as error:
        raise RequestError(str(error)) from error
    except MemoryError as error:
        raise RequestError("no memory for the KV cache", 'try kv="int8"') from error

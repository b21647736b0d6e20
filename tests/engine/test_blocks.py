"""Blocks are handed out once, all or nothing, come back, and stay while something reads them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacewing.engine.blocks import BLOCK_SIZE, BlockManager, Keep, Store, Tables, blocks_for


def test_blocks_for_rounds_up() -> None:
    assert [blocks_for(n) for n in (0, 1, 16, 17, 32, 33)] == [0, 1, 1, 2, 2, 3]


def test_reserve_is_all_or_nothing() -> None:
    blocks = BlockManager([Store(3)])
    tables = Tables()
    assert blocks.reserve(tables, 2 * BLOCK_SIZE)
    before = blocks.owned(tables)
    assert not blocks.reserve(tables, 4 * BLOCK_SIZE)
    assert blocks.owned(tables) == before
    assert blocks.free == (1,)
    assert blocks.reserve(tables, 3 * BLOCK_SIZE)
    assert sorted(blocks.owned(tables)) == [0, 1, 2]


def test_reserve_is_all_or_nothing_over_stores() -> None:
    blocks = BlockManager([Store(9), Store(2)])
    tables = Tables()
    assert not blocks.reserve(tables, 3 * BLOCK_SIZE)
    assert blocks.free == (9, 2)
    assert blocks.reserve(tables, 2 * BLOCK_SIZE)
    assert blocks.free == (7, 0)


def test_what_a_sequence_owns_already_stays() -> None:
    blocks = BlockManager([Store(4)])
    tables = Tables()
    blocks.reserve(tables, 20)
    blocks.place(tables, 0, 20)
    before = list(tables.tables[0])
    assert blocks.reserve(tables, 32)
    blocks.place(tables, 20, 32)
    assert list(tables.tables[0]) == before


def test_reset_gives_every_block_back() -> None:
    blocks = BlockManager([Store(4)])
    tables = Tables()
    blocks.reserve(tables, 64)
    blocks.reset([tables])
    assert blocks.free == (4,)
    assert blocks.owned(tables) == []


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 120)), max_size=60))
def test_no_block_is_owned_twice_or_lost(requests: list[tuple[int, int]]) -> None:
    blocks = BlockManager([Store(12), Store(9, 32)])
    tables = [Tables() for _ in range(5)]
    for owner, tokens in requests:
        if tokens == 0:
            blocks.release(tables[owner])
        elif blocks.reserve(tables[owner], tokens):
            blocks.place(tables[owner], 0, tokens)
        for store in range(2):
            owned = [block for each in tables for block in blocks.owned(each, store)]
            assert len(set(owned)) == len(owned)
            assert len(owned) + blocks.free[store] == blocks.stores[store].total


keeps = st.builds(Keep, st.integers(0, 3), st.integers(1, 5), st.integers(0, 4), st.integers(0, 3))


@given(keeps, st.lists(st.integers(1, 90), min_size=1, max_size=30), st.integers(1, 90))
def test_what_is_read_is_kept(keep: Keep, steps: list[int], step_tokens: int) -> None:
    """Steps of any size: what a row or a later one reads is where it was put, no block has two
    uses, and no more blocks are held than `peak` says."""
    blocks = BlockManager([Store(200, keep=keep)], step_tokens)
    tables, end, holds = Tables(), 0, {}  # block number -> physical block
    for rows in steps:
        rows = min(rows, step_tokens)
        assert blocks.reserve(tables, end + rows, rows)
        assert len(blocks.owned(tables)) <= max(
            blocks.stores[0].peak(end + rows, rows), len(tables.kept[0])
        )
        blocks.place(tables, end, end + rows)
        table = tables.tables[0]
        first = end // BLOCK_SIZE
        end += rows
        holds |= {j: table[j] for j in range(blocks_for(end)) if j not in holds}
        read = [j for j in range(blocks_for(end)) if (first, j) in keep or j >= first]
        assert [table[j] for j in read] == [holds[j] for j in read]
        assert len({table[j] for j in read}) == len(read)
    blocks.release(tables)
    assert blocks.free == (200,)


def test_a_window_holds_little() -> None:
    blocks = BlockManager([Store(64, keep=Keep(1, 4))], 32)
    tables = Tables()
    for end in range(32, 3200, 32):
        assert blocks.reserve(tables, end, 32)
        blocks.place(tables, end - 32, end)
    assert len(blocks.owned(tables)) == 1 + 4 + 2 + 1


def test_decoding_gives_the_room_for_prompts_back() -> None:
    blocks = BlockManager([Store(64, keep=Keep(0, 2))], 512)
    tables = Tables()
    assert blocks.reserve(tables, 512)
    blocks.place(tables, 0, 512)
    assert blocks.reserve(tables, 513, 1)
    blocks.place(tables, 512, 513)
    assert blocks.reserve(tables, 514, 1)
    assert len(blocks.owned(tables)) == 2 + 1 + 1


@pytest.mark.parametrize("keep", [None, Keep(0, 2)])
def test_going_back_needs_every_block(keep: Any) -> None:
    assert BlockManager([Store(4), Store(4, keep=keep)]).rewinds == (keep is None)

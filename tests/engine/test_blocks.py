"""Blocks are handed out once, all or nothing, and come back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lacewing.engine.blocks import BLOCK_SIZE, BlockManager, block_table, blocks_for


def test_blocks_for_rounds_up() -> None:
    assert [blocks_for(n) for n in (0, 1, 16, 17, 32, 33)] == [0, 1, 1, 2, 2, 3]


def test_reserve_is_all_or_nothing() -> None:
    blocks = BlockManager(3)
    table = block_table()
    assert blocks.reserve(table, 2 * BLOCK_SIZE)
    before = list(table)
    assert not blocks.reserve(table, 4 * BLOCK_SIZE)
    assert list(table) == before
    assert blocks.free == 1
    assert blocks.reserve(table, 3 * BLOCK_SIZE)
    assert sorted(table) == [0, 1, 2]


def test_a_table_that_is_long_enough_stays() -> None:
    blocks = BlockManager(4)
    table = block_table()
    blocks.reserve(table, 20)
    before = list(table)
    assert blocks.reserve(table, 32)
    assert list(table) == before


def test_reset_gives_every_block_back() -> None:
    blocks = BlockManager(4)
    blocks.reserve(block_table(), 64)
    blocks.reset()
    assert blocks.free == 4


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 120)), max_size=60))
def test_no_block_is_owned_twice_or_lost(requests: list[tuple[int, int]]) -> None:
    blocks = BlockManager(12)
    tables = [block_table() for _ in range(5)]
    for owner, tokens in requests:
        if tokens == 0:
            blocks.release(tables[owner])
        else:
            blocks.reserve(tables[owner], tokens)
        owned = [block for table in tables for block in table]
        assert len(set(owned)) == len(owned)
        assert len(owned) + blocks.free == blocks.total

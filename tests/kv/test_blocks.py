"""Blocks are handed out once, all or nothing, come back, and stay while something reads them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacewing.kv.blocks import BLOCK_SIZE, BlockManager, Keep, Store, Tables, blocks_for


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


@given(
    st.one_of(st.none(), keeps),
    st.lists(st.tuples(st.integers(1, 90), st.integers(0, 60)), min_size=1, max_size=30),
)
def test_going_back(keep: Keep | None, steps: list[tuple[int, int]]) -> None:
    """As far as `may_rewind` says: what is read from there on is where it was put, no block is lost
    or owned twice, and the rows placed last can always be taken back."""
    blocks = BlockManager([Store(300, keep=keep)], 90)
    tables, end, holds = Tables(), 0, {}  # block number -> physical block
    for rows, back in steps:
        assert blocks.reserve(tables, end + rows, rows)
        blocks.place(tables, end, end + rows)
        holds = {j: b for j, b in holds.items() if j < end // BLOCK_SIZE}
        holds |= {j: tables.tables[0][j] for j in range(end // BLOCK_SIZE, blocks_for(end + rows))}
        to = max(0, end + rows - back)
        assert blocks.may_rewind(tables, to) or to < end
        if blocks.may_rewind(tables, to):
            blocks.rewind(tables, to)
            end = to
        else:
            end += rows
        first = end // BLOCK_SIZE
        read = [j for j in range(blocks_for(end)) if keep is None or (first, j) in keep]
        assert [tables.tables[0][j] for j in read if j in holds] == [
            holds[j] for j in read if j in holds
        ]
        owned = blocks.owned(tables)
        assert len(set(owned)) == len(owned) == blocks.count(tables, 0) == 300 - blocks.free[0]


def test_what_is_let_go_of_does_not_come_back() -> None:
    blocks = BlockManager([Store(9), Store(9, keep=Keep(0, 2))])
    tables = Tables()
    assert blocks.reserve(tables, 80)
    blocks.place(tables, 0, 60)
    blocks.place(tables, 60, 80)
    assert [blocks.may_rewind(tables, n) for n in (0, 1, 59, 60, 80)] == [1, 0, 0, 1, 1]
    blocks.rewind(tables, 0)
    assert blocks.count(tables, 0) == 5
    assert [len(table) for table in tables.tables] == [0, 0]
    blocks.place(tables, 0, 40)
    assert blocks.may_rewind(tables, 20)


def test_stores_grow() -> None:
    blocks = BlockManager([Store(2), Store(3)])
    tables = Tables()
    assert blocks.reserve(tables, 32)
    blocks.grow([5, 3])
    assert blocks.free == (3, 1)
    assert blocks.reserve(tables, 48)
    assert not blocks.reserve(tables, 64)
    blocks.release(tables)
    assert blocks.free == (5, 3)


@pytest.mark.parametrize("keep", [None, Keep(1, 2)])
def test_a_fork_has_blocks_of_its_own(keep: Keep | None) -> None:
    blocks = BlockManager([Store(20, keep=keep)])
    tables = Tables()
    assert blocks.reserve(tables, 100)
    blocks.place(tables, 0, 50)
    blocks.place(tables, 50, 100)
    other, (copies,) = blocks.fork(tables)
    assert not set(blocks.owned(tables)) & set(blocks.owned(other))
    assert blocks.count(other, 0) == blocks.count(tables, 0)
    names = range(7) if keep is None else tables.kept[0]
    assert copies == [(tables.tables[0][j], other.tables[0][j]) for j in names]
    blocks.release(tables)
    blocks.release(other)
    assert blocks.free == (20,)

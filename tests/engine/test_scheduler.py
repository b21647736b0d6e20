"""The policy, without a model: a step is simulated by taking a token where one is sampled."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lacewing.engine.sampling import SamplingParams
from lacewing.engine.scheduler import Chunk, Scheduler
from lacewing.engine.sequence import Sequence
from lacewing.kv.blocks import BLOCK_SIZE, BlockManager, Store, blocks_for

requests = st.lists(
    st.tuples(st.integers(1, 90), st.integers(1, 60), st.integers(0, 12)), min_size=1, max_size=12
)  # (prompt tokens, output tokens, step at which it arrives)


def sequence(prompt: int, output: int) -> Sequence:
    return Sequence.start([1] * prompt, SamplingParams(max_tokens=output), None, 1000)


def take_step(scheduler: Scheduler) -> list[Chunk]:
    """Schedules, checks what must hold for every step, and plays the model."""
    chunks = scheduler.schedule()
    check(scheduler, chunks)
    scheduler.commit(chunks)
    for chunk in chunks:
        if chunk.samples:
            chunk.sequence.append(1)
            if len(chunk.sequence.output) == chunk.sequence.max_tokens:
                chunk.sequence.finish_reason = "length"
                scheduler.remove(chunk.sequence)
    return chunks


def check(scheduler: Scheduler, chunks: list[Chunk]) -> None:
    assert chunks or not len(scheduler)
    assert sum(chunk.count for chunk in chunks) <= scheduler.token_budget
    assert len(scheduler.running) <= scheduler.max_sequences
    assert len({id(chunk.sequence) for chunk in chunks}) == len(chunks)
    slots = set()
    for chunk in chunks:
        assert chunk.start == chunk.sequence.computed
        assert chunk.count > 0
        end = chunk.start + chunk.count
        assert chunk.samples == (end == len(chunk.sequence.tokens))
        assert len(chunk.sequence.tables.tables[0]) >= blocks_for(end)
        for p in range(chunk.start, end):
            slots.add(
                chunk.sequence.tables.tables[0][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
            )
    assert len(slots) == sum(chunk.count for chunk in chunks), "a slot is used twice"
    everyone = (*scheduler.running, *scheduler.waiting)
    owned = [b for s in everyone for b in scheduler.blocks.owned(s.tables)]
    assert len(owned) == len(set(owned)), "a block has two owners"
    assert len(owned) + scheduler.blocks.free[0] == scheduler.blocks.stores[0].total, (
        "a block is lost"
    )
    assert all(not s.tables.tables and s.computed == 0 for s in scheduler.waiting)


@settings(max_examples=200)
@given(requests, st.integers(10, 40), st.integers(1, 64), st.integers(1, 8))
def test_every_request_finishes(
    wanted: list[tuple[int, int, int]], total: int, budget: int, together: int
) -> None:
    blocks = BlockManager([Store(total)])  # ten blocks hold the longest sequence alone
    scheduler = Scheduler(blocks, budget, together)
    arriving = [(step, sequence(prompt, output)) for prompt, output, step in wanted]
    sequences = [each for _, each in arriving]
    step = 0
    while arriving or len(scheduler):
        for each in [s for at, s in arriving if at <= step]:
            scheduler.add(each)
        arriving = [(at, s) for at, s in arriving if at > step]
        take_step(scheduler)
        step += 1
        assert step < 20_000
    assert all(len(s.output) == s.max_tokens for s in sequences)
    assert blocks.free == (blocks.stores[0].total,)
    assert all(not s.tables.tables for s in sequences)


@settings(max_examples=50)
@given(requests, st.data())
def test_aborting_leaks_nothing(wanted: list[tuple[int, int, int]], data: st.DataObject) -> None:
    scheduler = Scheduler(BlockManager([Store(12)]), 32, 4)
    sequences = [sequence(prompt, output) for prompt, output, _ in wanted]
    for each in sequences:
        scheduler.add(each)
    while len(scheduler):
        take_step(scheduler)
        victim = data.draw(st.sampled_from(sequences))
        scheduler.remove(victim)
    assert scheduler.blocks.free[0] == scheduler.blocks.stores[0].total


def test_a_long_prompt_is_cut_by_the_budget() -> None:
    scheduler = Scheduler(BlockManager([Store(100)]), 32, 8)
    scheduler.add(sequence(70, 2))
    counts = [[(c.start, c.count, c.samples) for c in take_step(scheduler)] for _ in range(4)]
    assert counts == [[(0, 32, False)], [(32, 32, False)], [(64, 6, True)], [(70, 1, True)]]


def test_decoding_goes_on_beside_a_long_prompt() -> None:
    scheduler = Scheduler(BlockManager([Store(100)]), 32, 8)
    first, second = sequence(4, 10), sequence(100, 2)
    scheduler.add(first)
    take_step(scheduler)
    scheduler.add(second)
    for _ in range(3):
        chunks = take_step(scheduler)
        assert [(c.sequence is first, c.count) for c in chunks] == [(True, 1), (False, 31)]


def test_prompts_share_a_step() -> None:
    scheduler = Scheduler(BlockManager([Store(100)]), 64, 8)
    for _ in range(3):
        scheduler.add(sequence(25, 2))
    assert [c.count for c in take_step(scheduler)] == [25, 25, 14]


def test_the_youngest_is_preempted_and_comes_back_first() -> None:
    scheduler = Scheduler(BlockManager([Store(4)]), 64, 8)
    old, young, late = sequence(31, 20), sequence(31, 20), sequence(5, 1)
    for each in (old, young, late):
        scheduler.add(each)
    take_step(scheduler)  # both prompts, all four blocks; `late` waits
    assert scheduler.running == [old, young]
    take_step(scheduler)  # token 32 of each fits
    take_step(scheduler)  # token 33 does not
    assert scheduler.running == [old]
    assert list(scheduler.waiting) == [young, late]
    assert (old.preemptions, young.preemptions) == (0, 1)
    assert len(young.tokens) == 33, "its output stays"


def test_one_sequence_alone_may_use_every_block() -> None:
    scheduler = Scheduler(BlockManager([Store(3)]), 64, 8)
    alone = sequence(1, 48)
    scheduler.add(alone)
    for _ in range(48):
        take_step(scheduler)
    assert len(alone.output) == 48
    assert alone.preemptions == 0


@pytest.mark.parametrize("damage", ["none", "block lost", "sequence nowhere twice"])
def test_preempt_all_recovers_from_any_state(damage: str) -> None:
    scheduler = Scheduler(BlockManager([Store(20)]), 64, 8)
    sequences = [sequence(20, 10) for _ in range(3)]
    for each in sequences:
        scheduler.add(each)
    take_step(scheduler)
    if damage == "block lost":
        sequences[0].tables.tables[0].pop()
    elif damage == "sequence nowhere twice":
        scheduler.waiting.appendleft(sequences[-1])  # interrupted between the two queues
    scheduler.preempt_all()
    assert list(scheduler.waiting) == sequences
    assert scheduler.blocks.free == (20,)
    while len(scheduler):
        take_step(scheduler)
    assert [len(s.output) for s in sequences] == [10, 10, 10]

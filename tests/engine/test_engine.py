"""Steps over a fake model: what a sequence says depends on its own tokens and on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lacewing import SamplingParams
from lacewing.engine.engine import Engine
from lacewing.engine.sampling import log_total
from lacewing.engine.sequence import Sequence
from lacewing.errors import LacewingError, RequestError
from lacewing.kv.choice import kept_tokens
from tests.engine.fakes import (
    EOS,
    FakeModel,
    ask,
    continuation,
    fake_engine,
    logits_after,
    merged_after,
)

prompts = st.lists(st.lists(st.integers(1, 255), min_size=1, max_size=60), min_size=1, max_size=8)


def run(engine: Engine, sequences: list[Sequence]) -> list[list[int]]:
    while len(engine.scheduler):
        engine.step()
    assert engine.scheduler.blocks.free == (engine.scheduler.blocks.stores[0].total,)
    assert all(sequence.finished for sequence in sequences)
    return [sequence.output for sequence in sequences]


def alone(prompt: list[int], params: SamplingParams) -> list[int]:
    engine = fake_engine()
    return run(engine, [ask(engine, prompt, params)])[0]


@settings(max_examples=60)
@given(prompts, st.integers(1, 40), st.integers(1, 6), st.integers(16, 40))
def test_chunks_batches_and_preemption_never_change_tokens(
    prompts: list[list[int]], budget: int, together: int, blocks: int
) -> None:
    engine = fake_engine(blocks, 256, token_budget=budget, max_sequences=together)
    params = SamplingParams(max_tokens=30)
    found = run(engine, [ask(engine, prompt, params) for prompt in prompts])
    assert found == [continuation(prompt, 30) for prompt in prompts]


long_prompts = st.lists(
    st.tuples(st.integers(1, 255), st.integers(1, 200)), min_size=1, max_size=6
)  # (first token, tokens)


@settings(max_examples=60)
@given(
    long_prompts,
    st.integers(1, 300),
    st.integers(1, 6),
    st.integers(25, 40),
    st.sampled_from([0.1, 0.5, 0.9]),
)
def test_merging_is_the_same_however_the_work_is_cut(
    shapes: list[tuple[int, int]], budget: int, together: int, blocks: int, share: float
) -> None:
    """Also of sequences that are computed again: what is merged is the prompt, and only that."""
    engine = fake_engine(blocks, 240, merge=share, token_budget=budget, max_sequences=together)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    prompts = [[(first + i * i) % 255 + 1 for i in range(count)] for first, count in shapes]
    found = run(engine, [ask(engine, prompt, params) for prompt in prompts])
    for prompt, output in zip(prompts, found, strict=True):
        keep = kept_tokens(len(prompt), share)
        assert output == continuation(prompt, 40, True, keep)


def test_a_merged_prompt_is_computed_again() -> None:
    prompts = [[s + 1] * 100 for s in range(4)]
    params = SamplingParams(max_tokens=120, ignore_eos=True)
    engine = fake_engine(24, merge=0.5)
    sequences = [ask(engine, prompt, params) for prompt in prompts]
    found = run(engine, sequences)
    assert any(sequence.preemptions for sequence in sequences)
    assert found == [continuation(prompt, 120, True, 50) for prompt in prompts]


def test_a_merged_prompt_gives_its_blocks_back() -> None:
    engine = fake_engine(64, merge=0.25)
    sequence = ask(engine, list(range(1, 161)), SamplingParams(max_tokens=30, ignore_eos=True))
    engine.step()
    assert sequence.merged == 120
    assert engine.scheduler.blocks.free == (64 - 3,)  # 40 tokens


@pytest.mark.parametrize("prompt", [63, 64, 100])
def test_logits_after_a_prompt_read_what_is_left_of_it(prompt: int) -> None:
    model = FakeModel(64)
    engine = fake_engine(model=model, merge=0.5, token_budget=40)
    tokens = [i % 250 + 1 for i in range(130)]

    def expected(start: int) -> list[list[float]]:
        keep = kept_tokens(start, 0.5)
        past = merged_after(tokens[:start], keep) if keep else tokens[:start]
        return [logits_after([*past, *tokens[start : i + 1]]).tolist() for i in range(start, 130)]

    def found(start: int) -> list[list[float]]:
        return np.concatenate(list(engine.logits(tokens, start))).tolist()

    assert found(prompt) == expected(prompt)
    steps = len(model.steps)
    assert found(prompt) == expected(prompt)
    assert len(model.steps) == steps + 1, "the same prompt is not computed again"
    for start in (0, prompt, prompt - 5, 0, 120, prompt, 0, 99):
        assert found(start) == expected(start), start


def test_score_merges_nothing() -> None:
    tokens = [i % 250 + 1 for i in range(130)]
    assert (fake_engine(merge=0.2).score(tokens) == fake_engine().score(tokens)).all()


@pytest.mark.parametrize("blocks", [16, 17, 24, 40])
def test_preemption_keeps_seeded_sampling(blocks: int) -> None:
    params = [SamplingParams(max_tokens=80, temperature=0.9, top_p=0.9, seed=s) for s in range(6)]
    prompts = [[s + 1] * 30 for s in range(6)]
    engine = fake_engine(blocks)
    sequences = [ask(engine, p, each) for p, each in zip(prompts, params, strict=True)]
    found = run(engine, sequences)
    assert found == [alone(p, each) for p, each in zip(prompts, params, strict=True)]
    assert blocks >= 40 or any(sequence.preemptions for sequence in sequences)


def test_requests_that_arrive_later_join_the_batch() -> None:
    model = FakeModel(64)
    engine = fake_engine(model=model)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    first = ask(engine, [1, 2, 3], params)
    engine.step()
    engine.step()
    second = ask(engine, [9], params)
    found = run(engine, [first, second])
    assert found == [continuation([1, 2, 3], 20, True), continuation([9], 20, True)]
    assert [1, 1] in model.steps


@pytest.mark.parametrize("context", [8, 16, 17, 40])
def test_the_context_ends_an_output(context: int) -> None:
    engine = fake_engine(3, context)
    sequence = ask(engine, [5] * 6, SamplingParams(max_tokens=1000, ignore_eos=True))
    run(engine, [sequence])
    assert sequence.finish_reason == "length"
    assert len(sequence.tokens) == context


def test_a_prompt_that_leaves_no_room_is_refused_before_work() -> None:
    model = FakeModel(4)
    engine = fake_engine(4, 32, model=model)
    with pytest.raises(RequestError, match="context of 32 tokens, got 32 tokens") as error:
        ask(engine, [1] * 32, SamplingParams())
    assert error.value.hint
    assert len(engine.scheduler) == 0
    assert model.steps == []
    assert engine.check([1] * 31)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt is empty"),
        ([1, 256], r"in \[0, 256\), the vocabulary, got 256"),
        ([-1], "got -1"),
        (["a"], "string or a list of token ids"),
        ([1.5], "string or a list of token ids"),
        (b"ab", "got bytes"),
        (None, "string or a list of token ids"),
    ],
)
def test_bad_prompts(prompt: list[int], message: str) -> None:
    engine = fake_engine()
    with pytest.raises(RequestError, match=message):
        ask(engine, prompt, SamplingParams())


def test_numpy_ids_are_fine() -> None:
    assert fake_engine().check(np.array([1, 2], np.int32)) == [1, 2]  # type: ignore[arg-type]


def test_end_tokens() -> None:
    prompt = [7, 7]
    said = continuation(prompt, 12)
    engine = fake_engine()
    sequence = ask(engine, prompt, SamplingParams(max_tokens=12, stop_token_ids=[said[4]]))
    run(engine, [sequence])
    assert sequence.output == said[: said.index(said[4]) + 1]
    assert sequence.finish_reason == "stop"


def test_eos_ends_unless_ignored() -> None:
    prompt = next([i] for i in range(1, 200) if EOS in continuation([i], 200))
    said = continuation(prompt, 200)
    engine = fake_engine()
    ends = ask(engine, prompt, SamplingParams(max_tokens=210))
    goes_on = ask(engine, prompt, SamplingParams(max_tokens=210, ignore_eos=True))
    run(engine, [ends, goes_on])
    assert ends.output == said
    assert ends.finish_reason == "stop"
    assert len(goes_on.output) == 210
    assert goes_on.output[: len(said)] == said
    assert goes_on.finish_reason == "length"


def test_logprobs_come_one_per_token() -> None:
    engine = fake_engine()
    sequence = ask(engine, [3], SamplingParams(max_tokens=5, logprobs=2, ignore_eos=True))
    run(engine, [sequence])
    assert [p.token_id for p in sequence.logprobs] == sequence.output
    for at, found in enumerate(sequence.logprobs):
        row = logits_after(sequence.tokens[: 1 + at])
        assert found.logprob == float(row[found.token_id]) - log_total(row)
        assert found.top[0] == (found.token_id, pytest.approx(found.logprob))


def test_abort_frees_the_blocks_and_spares_the_others() -> None:
    engine = fake_engine()
    sequences = [ask(engine, [i] * 40, SamplingParams(max_tokens=50)) for i in (1, 2, 3)]
    engine.step()
    engine.abort(sequences[1])
    engine.abort(sequences[1])
    assert sequences[1].finish_reason == "abort"
    run(engine, sequences)
    engine.abort(sequences[0])  # finished: no change
    assert sequences[0].finish_reason != "abort"
    assert sequences[0].output == continuation([1] * 40, 50)
    assert sequences[2].output == continuation([3] * 40, 50)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("no memory"), ValueError("x")])
@pytest.mark.parametrize("step", [0, 1, 7])
def test_an_interrupted_step_changes_nothing(error: BaseException, step: int) -> None:
    model = FakeModel(64)
    model.fail_at, model.error = step, error
    engine = fake_engine(model=model, token_budget=32)
    sequences = [ask(engine, [i] * 50, SamplingParams(max_tokens=20)) for i in (1, 2, 3)]
    with pytest.raises(type(error)):
        run(engine, sequences)
    assert run(engine, sequences) == [continuation([i] * 50, 20) for i in (1, 2, 3)]


def test_broken_logits_end_in_an_error_and_the_engine_stays_usable() -> None:
    model = FakeModel(64)
    engine = fake_engine(model=model)
    healthy = model.step
    model.step = lambda *args: healthy(*args) * np.float32(np.nan)  # type: ignore[method-assign]
    sequence = ask(engine, [1], SamplingParams())
    with pytest.raises(LacewingError, match="logits must be finite"):
        engine.step()
    engine.abort(sequence)
    model.step = healthy  # type: ignore[method-assign]
    assert run(engine, [ask(engine, [1], SamplingParams(max_tokens=9))]) == [continuation([1], 9)]


# -- score ------------------------------------------------------------------------------------


def slow_score(tokens: list[int]) -> list[float]:
    rows = [logits_after(tokens[:i]).astype(np.float64) for i in range(1, len(tokens))]
    return [
        float(row[t] - np.log(np.exp(row).sum())) for row, t in zip(rows, tokens[1:], strict=True)
    ]


@pytest.mark.parametrize("count", [2, 16, 17, 33, 200, 256])
def test_score_equals_the_slow_twin(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lacewing.engine.engine._SCORE_BYTES", 48 * 4 * 256)
    model = FakeModel(16)
    engine = fake_engine(16, model=model)
    tokens = np.random.default_rng(count).integers(0, 256, count).tolist()
    found = engine.score(tokens)
    assert found.shape == (count - 1,)
    assert found.dtype == np.float32
    assert found.tolist() == pytest.approx(slow_score(tokens), abs=1e-5)
    assert max(map(max, model.steps)) <= 48, "the logits held at once are bounded"
    assert engine.scheduler.blocks.free == (16,)


def test_score_between_steps_of_a_full_engine() -> None:
    engine = fake_engine(16)
    sequences = [ask(engine, [i] * 60, SamplingParams(max_tokens=40)) for i in (1, 2, 3, 4)]
    engine.step()
    assert engine.score([4] * 200).tolist() == pytest.approx(slow_score([4] * 200), abs=1e-5)
    assert run(engine, sequences) == [continuation([i] * 60, 40) for i in (1, 2, 3, 4)]


@pytest.mark.parametrize("tokens", [[], [1], [1] * 257, [1, 256]])
def test_score_refuses(tokens: list[int]) -> None:
    with pytest.raises(RequestError):
        fake_engine().score(tokens)


def test_an_interrupted_score_leaks_nothing() -> None:
    model = FakeModel(16)
    model.fail_at, model.error = 0, KeyboardInterrupt()
    engine = fake_engine(16, model=model)
    with pytest.raises(KeyboardInterrupt):
        engine.score([1] * 100)
    assert engine.scheduler.blocks.free == (16,)
    assert len(engine.score([1] * 100)) == 99


# -- logits -----------------------------------------------------------------------------------


def slow_logits(tokens: list[int], start: int = 0) -> list[list[float]]:
    return [logits_after(tokens[: i + 1]).tolist() for i in range(start, len(tokens))]


def read(engine: Engine, tokens: list[int], start: int = 0) -> list[list[float]]:
    return np.concatenate(list(engine.logits(tokens, start))).tolist()


@pytest.mark.parametrize(("count", "start"), [(1, 0), (16, 3), (100, 0), (200, 130), (256, 255)])
def test_logits_of_every_token(count: int, start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lacewing.engine.engine._SCORE_BYTES", 48 * 4 * 256)
    model = FakeModel(16)
    tokens = np.random.default_rng(count).integers(0, 256, count).tolist()
    engine = fake_engine(16, model=model, token_budget=40)
    assert read(engine, tokens, start) == slow_logits(tokens, start)
    assert max(map(max, model.steps)) <= 48, "the logits held at once are bounded"


def test_tokens_that_two_calls_begin_with_are_read_once() -> None:
    model = FakeModel(16)
    engine = fake_engine(16, model=model)
    for branch, computed in (([1, 2, 3], [50, 3]), ([4], [1]), ([4, 5], [2]), ([1, 2, 3], [3])):
        model.steps.clear()
        assert read(engine, [9] * 50 + branch, 50) == slow_logits([9] * 50 + branch, 50)
        assert [count for (count,) in model.steps] == computed
    assert read(engine, [9] * 40 + [1] * 20, 50) == slow_logits([9] * 40 + [1] * 20, 50)


def test_a_step_takes_the_blocks_of_logits_back() -> None:
    engine = fake_engine(16)
    chunks = engine.logits([4] * 250)
    next(chunks)
    assert engine.scheduler.blocks.free == (0,)
    assert run(engine, [ask(engine, [1] * 200, SamplingParams(max_tokens=9))]) == [
        continuation([1] * 200, 9)
    ]
    assert engine.scheduler.blocks.free == (16,)


def test_logits_go_on_after_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lacewing.engine.engine._SCORE_BYTES", 48 * 4 * 256)
    engine = fake_engine(16)
    tokens = np.random.default_rng(0).integers(0, 256, 200).tolist()
    sequence = ask(engine, [1] * 100, SamplingParams(max_tokens=40))
    rows: list[list[float]] = []
    for chunk, other in zip(engine.logits(tokens), engine.logits(tokens[::-1]), strict=True):
        rows += chunk.tolist()
        assert other.shape == chunk.shape
        engine.step()
    assert rows == slow_logits(tokens)
    assert run(engine, [sequence]) == [continuation([1] * 100, 40)]


@pytest.mark.parametrize(
    ("tokens", "start"), [([], 0), ([1] * 257, 0), ([1, 256], 0), ([1, 2], 2), ([1, 2], -1)]
)
def test_logits_refuse(tokens: list[int], start: int) -> None:
    with pytest.raises(RequestError):
        fake_engine().logits(tokens, start)


def test_logits_never_make_a_request_start_again() -> None:
    model = FakeModel(16)
    engine = fake_engine(16, model=model, token_budget=40)
    sequence = ask(engine, [1] * 200, SamplingParams(max_tokens=9, ignore_eos=True))
    engine.step()
    assert read(engine, [2] * 100) == slow_logits([2] * 100)
    assert sequence.finished
    assert sum(map(sum, model.steps)) == 200 + 8 + 100, "every token is computed once"


def test_closed_logits_give_their_blocks_back() -> None:
    engine = fake_engine(16)
    chunks, others = engine.logits([4] * 100), engine.logits([5] * 100)
    next(chunks)
    next(others)
    chunks.close()
    assert engine.scheduler.blocks.free == (9,), "those of the other call stay"
    others.close()
    assert engine.scheduler.blocks.free == (16,)


def test_interrupted_logits_leak_nothing() -> None:
    model = FakeModel(16)
    engine = fake_engine(16, model=model)
    read(engine, [1] * 30, 20)
    model.fail_at, model.error = 0, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        read(engine, [1] * 100, 20)
    assert engine.scheduler.blocks.free == (16,)
    assert read(engine, [1] * 100, 90) == slow_logits([1] * 100, 90)

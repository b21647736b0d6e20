"""The native model under the scheduler: the same bits alone and in a batch, in chunks and whole,
after preemption, with one thread and two, on every ISA."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lacewing import SamplingParams, formats
from lacewing.engine.engine import Engine
from tests.engine.fakes import ask
from tests.engine.tiny import tiny_engine
from tests.isas import promises_same_bits

PARAMS = SamplingParams(max_tokens=24, logprobs=3, ignore_eos=True)
SAMPLED = [
    SamplingParams(max_tokens=24, logprobs=3, ignore_eos=True, temperature=0.9, top_p=0.9, seed=s)
    for s in range(7)
]
PROMPTS = [
    np.random.default_rng(n).integers(1, 256, n).tolist() for n in (1, 2, 7, 16, 33, 70, 150)
]


def run(engine: Engine, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
    """Tokens and log-probabilities, to the last bit."""
    sequences = [ask(engine, p, each) for p, each in zip(prompts, params, strict=True)]
    while len(engine.scheduler):
        engine.step()
    assert engine.scheduler.blocks.free == (engine.scheduler.blocks.stores[0].total,)
    return [(sequence.output, sequence.logprobs) for sequence in sequences]


@pytest.fixture(scope="module")
def alone() -> list[Any]:
    """Each prompt on its own, the whole prompt in one step."""
    engine = tiny_engine(threads=1)
    return [run(engine, [p], [each])[0] for p, each in zip(PROMPTS, SAMPLED, strict=True)]


def test_a_batch_gives_the_same_bits(alone: list[Any]) -> None:
    assert run(tiny_engine(), PROMPTS, SAMPLED) == alone


@pytest.mark.parametrize("budget", [1, 5, 16, 17, 64])
def test_chunks_give_the_same_bits(alone: list[Any], budget: int) -> None:
    assert run(tiny_engine(token_budget=budget), PROMPTS, SAMPLED) == alone


def test_preemption_gives_the_same_bits(alone: list[Any]) -> None:
    engine = tiny_engine(kv_blocks=32, max_sequences=7)
    # All seven need 7 + ceil(sum / 16) blocks at their end; the context alone needs 32.
    long = [SamplingParams(**{**vars(each), "max_tokens": 120}) for each in SAMPLED]
    sequences = [ask(engine, p, each) for p, each in zip(PROMPTS, long, strict=True)]
    while len(engine.scheduler):
        engine.step()
    assert any(sequence.preemptions for sequence in sequences)
    for sequence, (tokens, logprobs) in zip(sequences, alone, strict=True):
        assert sequence.output[:24] == tokens
        assert sequence.logprobs[:24] == logprobs


@pytest.mark.parametrize("kv", ["merge:0.3", "int8+merge:0.6"])
def test_merged_prompts_give_the_same_bits(kv: str) -> None:
    """In a batch, in pieces, in steps of several chunks of 512 rows, computed again."""
    prompts = [*PROMPTS[4:], *([t % 250 + n for t in PROMPTS[6]] for n in range(3))]
    params = [SamplingParams(max_tokens=110, logprobs=3, ignore_eos=True)] * len(prompts)
    alone = [run(tiny_engine(kv=kv, threads=1), [p], params[:1])[0] for p in prompts]
    assert alone[1:] != [run(tiny_engine(), [p], params[:1])[0] for p in prompts[1:]]
    for budget in (7, 50, 900):
        assert run(tiny_engine(kv=kv, token_budget=budget), prompts, params) == alone
    engine = tiny_engine(kv=kv, kv_blocks=24, max_sequences=6)
    sequences = [ask(engine, p, each) for p, each in zip(prompts, params, strict=True)]
    while len(engine.scheduler):
        engine.step()
    assert any(sequence.preemptions for sequence in sequences)
    assert [(sequence.output, sequence.logprobs) for sequence in sequences] == alone


@pytest.mark.parametrize("format", sorted(formats.FORMATS))
def test_isas_and_threads_give_the_same_bits(format: str, isas: list[str]) -> None:
    prompts, params = PROMPTS[2:5], [PARAMS] * 3
    found = {
        (isa, threads): run(tiny_engine(format, isa=isa, threads=threads), prompts, params)
        for isa in isas
        for threads in (1, 2)
    }
    first = found["scalar", 1]
    for (isa, threads), result in found.items():
        same = promises_same_bits(format, isa)
        assert result == (first if same else found[isa, 1]), f"{isa}, {threads} threads"


def test_score_gives_the_bits_of_generate() -> None:
    engine = tiny_engine()
    tokens, logprobs = run(engine, [PROMPTS[4]], [PARAMS])[0]
    scored = engine.score([*PROMPTS[4], *tokens])[len(PROMPTS[4]) - 1 :]
    assert scored.tolist() == np.array([p.logprob for p in logprobs], np.float32).tolist()

"""The sampler against a slow twin that sorts the whole vocabulary in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacewing.engine.sampling import (
    Sampler,
    SamplingParams,
    log_total,
    nucleus,
    pick,
    top,
)
from lacewing.errors import LacewingError, RequestError


def slow_distribution(logits: Any, params: SamplingParams, seen: list[int]) -> dict[int, float]:
    """Token -> probability, step by step as the documentation says it."""
    values = {i: float(x) for i, x in enumerate(logits)}
    for token in set(seen):
        x = values[token]
        p = params.repetition_penalty
        values[token] = x / p if x > 0 else x * p
    values = {i: x / params.temperature for i, x in values.items()}
    best_first = sorted(values, key=lambda i: (-values[i], i))
    if params.top_k:
        best_first = best_first[: params.top_k]
    likely = softmax({i: values[i] for i in best_first})
    kept, mass = [], 0.0
    for i in best_first:
        if params.top_p < 1 and kept and mass >= params.top_p:
            break
        kept.append(i)
        mass += likely[i]
    kept = [i for i in kept if likely[i] >= params.min_p * likely[best_first[0]]]
    return softmax({i: values[i] for i in kept})


def softmax(values: dict[int, float]) -> dict[int, float]:
    peak = max(values.values())
    weights = {i: math.exp(x - peak) for i, x in values.items()}
    total = sum(weights.values())
    return {i: w / total for i, w in weights.items()}


def random_logits(size: int, seed: int = 0, spread: float = 3.0) -> Any:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


CUTS = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 600},
    {"top_k": 10**9},
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.9},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.1},
    {"top_p": 0.9, "min_p": 0.1},
    {"top_k": 50, "repetition_penalty": 1.3},
    {"top_p": 0.9, "repetition_penalty": 0.7},
]


@pytest.mark.parametrize("temperature", [0.3, 0.8, 1.0, 5.0])
@pytest.mark.parametrize("size", [2, 64, 1000, 5003])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_candidates_equal_the_slow_twin(size: int, cuts: Any, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, **cuts)
    logits = random_logits(size, size)
    seen = [0, 1, 1, size // 2]
    sampler = Sampler(params, seen)
    ids, probabilities = sampler.candidates(logits)
    expected = slow_distribution(logits, params, seen)
    # The edge of a nucleus may fall between two tokens of nearly equal weight in f32.
    odd = set(ids.tolist()) ^ set(expected)
    assert len(odd) <= (1 if params.top_p < 1 else 0)
    for i, p in zip(ids.tolist(), probabilities.tolist(), strict=True):
        assert p == pytest.approx(expected.get(i, p), rel=1e-4)
    assert probabilities.sum() == pytest.approx(1)


@pytest.mark.parametrize("cuts", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}], ids=str)
def test_draws_follow_the_distribution(cuts: Any) -> None:
    params = SamplingParams(temperature=1.3, seed=11, **cuts)
    logits = random_logits(30, 3, 1.5)
    sampler = Sampler(params, [])
    draws = 20_000
    counts = np.bincount([sampler.choose(logits) for _ in range(draws)], minlength=30)
    expected = slow_distribution(logits, params, [])
    assert set(np.flatnonzero(counts)) <= set(expected)
    wanted = np.array([expected.get(i, 0.0) * draws for i in range(30)])
    big = wanted > 5
    chi2 = (((counts - wanted) ** 2)[big] / wanted[big]).sum()
    assert chi2 < big.sum() + 4 * math.sqrt(2 * big.sum())  # four sigma, and the seed is fixed


@pytest.mark.parametrize("size", [1, 512, 513, 5000])
def test_pick_is_the_inverse_of_the_cumulative_weights(size: int) -> None:
    weights = np.random.default_rng(size).random(size).astype(np.float32)
    cumulative = weights.astype(np.float64).cumsum() / weights.sum(dtype=np.float64)
    for uniform in [0.0, 1 - 1e-16, *np.random.default_rng(1).random(300)]:
        got = pick(weights, uniform)
        below = cumulative[got - 1] if got else 0.0
        assert below - 1e-6 <= uniform <= cumulative[got] + 1e-6


def test_pick_never_takes_a_weight_of_zero() -> None:
    weights = np.zeros(3000, np.float32)
    weights[1700] = 1
    assert {pick(weights, u) for u in (0.0, 0.3, 1 - 1e-16)} == {1700}


@given(st.integers(1, 4000), st.integers(1, 5000), st.integers(0, 5), st.booleans())
def test_top_equals_a_full_sort(size: int, count: int, seed: int, ties: bool) -> None:
    logits = random_logits(size, seed)
    if ties:
        logits = np.round(logits)
    expected = sorted(range(size), key=lambda i: (-logits[i], i))[:count]
    assert top(logits, count).tolist() == expected


def test_top_copes_with_minus_infinity() -> None:
    logits = np.full(5000, -np.inf, np.float32)
    logits[[7, 4999]] = 1.0
    assert top(logits, 2).tolist() == [7, 4999]
    assert top(logits, 3).tolist() == [7, 4999, 0]


@given(st.integers(1, 4000), st.floats(0.001, 0.999), st.integers(0, 5), st.booleans())
def test_nucleus_is_the_smallest_set(size: int, share: float, seed: int, ties: bool) -> None:
    weights = np.exp(random_logits(size, seed))
    if ties:
        weights = np.ceil(weights)
    kept = nucleus(weights, share)
    mass = weights.sum(dtype=np.float64) * share
    assert weights[kept].sum(dtype=np.float64) >= mass * (1 - 1e-12)
    assert weights[kept].sum(dtype=np.float64) - weights[kept].min() < mass
    best_first = sorted(range(size), key=lambda i: (-weights[i], i))[: len(kept)]
    assert kept.tolist() == sorted(best_first)


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = random_logits(3000)
    sampler = Sampler(SamplingParams(temperature=temperature, seed=1), [])
    assert {sampler.choose(logits) for _ in range(20)} == {int(logits.argmax())}


def test_greedy_takes_the_first_of_equals() -> None:
    logits = np.array([0, 5, 5, 1], np.float32)
    assert Sampler(SamplingParams(), []).choose(logits) == 1
    assert Sampler(SamplingParams(top_k=1, temperature=2.0), []).choose(logits) == 1


def test_greedy_obeys_the_repetition_penalty() -> None:
    logits = np.array([4.0, 3.5, -1.0, -1.1], np.float32)
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), [0])
    assert sampler.choose(logits) == 1  # 4 / 2 < 3.5
    assert sampler.choose(logits) == 0  # now 3.5 / 2 < 4 / 2
    low = Sampler(SamplingParams(repetition_penalty=2.0), [0])
    assert low.choose(np.array([-1.0, -1.5], np.float32)) == 1  # -1 * 2 < -1.5


def test_logits_stay_as_they_are() -> None:
    logits = random_logits(500)
    before = logits.copy()
    params = SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.2, logprobs=3)
    sampler = Sampler(params, [1, 2])
    sampler.logprobs(logits, sampler.choose(logits))
    assert (logits == before).all()


def test_a_seed_repeats_and_two_seeds_differ() -> None:
    logits = random_logits(400, spread=1)

    def run(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), [])
        return [sampler.choose(logits) for _ in range(20)]

    assert run(5) == run(5)
    assert run(5) != run(6)
    assert run(None) != run(None)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_an_error(bad: float, temperature: float) -> None:
    logits = random_logits(100)
    logits[37] = bad
    with pytest.raises(LacewingError, match=r"logits must be finite, got \w+ at token 37"):
        Sampler(SamplingParams(temperature=temperature), []).choose(logits)


def test_logprobs_are_those_of_the_raw_distribution() -> None:
    logits = random_logits(300)
    params = SamplingParams(temperature=0.1, top_k=2, repetition_penalty=3.0, logprobs=4)
    found = Sampler(params, list(range(300))).logprobs(logits, 17)
    exact = logits.astype(np.float64)
    exact = exact - exact.max() - math.log(np.exp(exact - exact.max()).sum())
    best = sorted(range(300), key=lambda i: -logits[i])[:4]
    assert found.token_id == 17
    assert found.logprob == pytest.approx(exact[17], abs=1e-5)
    assert [i for i, _ in found.top] == best
    assert [p for _, p in found.top] == pytest.approx(exact[best].tolist(), abs=1e-5)


def test_log_total_against_float64() -> None:
    logits = random_logits(5003, spread=30)
    exact = logits.astype(np.float64)
    wanted = exact.max() + math.log(np.exp(exact - exact.max()).sum())
    assert log_total(logits) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("max_tokens", None),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("repetition_penalty", math.inf),
        ("seed", -1),
        ("seed", 1.0),
        ("seed", "x"),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop", 3),
        ("stop", b"x"),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", 5),
        ("stop_token_ids", [True]),
        ("ignore_eos", 1),
        ("ignore_eos", None),
        ("logprobs", -1),
        ("logprobs", 101),
        ("logprobs", True),
    ],
)
def test_parameters_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"`SamplingParams.{name}` must be .*, got "):
        SamplingParams(**{name: value})


def test_parameters_of_numpy_are_fine() -> None:
    params = SamplingParams(
        max_tokens=np.int64(3),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        stop="x",
        stop_token_ids=np.array([4, 5]),  # type: ignore[arg-type]
    )
    assert params.stop == ("x",)
    assert params.stop_token_ids == (4, 5)

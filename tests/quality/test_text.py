"""Perplexity: the windows and the figures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from lacewing.errors import RequestError
from lacewing.quality import Perplexity, Text, evaluate, windows
from tests.quality.fakes import FakeScorer, log_probs, louder


def perplexity(scorer: FakeScorer, text: Text, seed: int = 0) -> Perplexity:
    (found,) = evaluate(scorer, [text], seed)
    assert isinstance(found, Perplexity)
    return found


def test_windows_begin_with_the_first_token_and_do_not_overlap() -> None:
    assert windows(FakeScorer(bos=[1]), "abcde", 3, None) == [[1, 97, 98], [1, 99, 100]]
    assert windows(FakeScorer(), "abcde", 3, None) == [[97, 98, 99]]


def test_the_figures_are_those_of_every_token() -> None:
    scorer, text = FakeScorer(bos=[1]), "It was the best of times, it was the worst of times."
    found = perplexity(scorer, Text("two cities", text, window=16))
    logs = [log_probs(scorer, piece) for piece in windows(scorer, text, 16, None)]
    assert found.scored_tokens == 45 == sum(map(len, logs))
    assert found.nll == pytest.approx(-sum(map(sum, logs)), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.nll / 45))
    assert (found.windows, found.window, found.seed) == (3, 16, 0)
    assert found.resampled == "9 blocks of 5 tokens"
    assert found.interval is not None
    assert found.interval.low < found.perplexity < found.interval.high


@pytest.mark.parametrize(("most", "count"), [(1, 1), (15, 15), (16, 16), (99, 45)])
def test_max_tokens_stops_in_the_middle_of_a_window(most: int, count: int) -> None:
    scorer, text = FakeScorer(bos=[1]), "It was the best of times, it was the worst of times."
    found = perplexity(scorer, Text("", text, 16, most))
    pieces = windows(scorer, text, 16, None)
    logs = np.concatenate([log_probs(scorer, piece) for piece in pieces])[:count]
    assert found.scored_tokens == count
    assert found.nll == pytest.approx(-logs.sum(), rel=1e-6)


def test_another_seed_is_another_interval_of_the_same_figure() -> None:
    text = Text("", "It was the best of times, it was the worst of times, it was the age", window=8)
    one, other = perplexity(FakeScorer(), text, 1), perplexity(FakeScorer(), text, 2)
    assert one.perplexity == other.perplexity
    assert one.interval != other.interval
    assert one.resampled == "8 windows"


def test_it_says_its_conditions_in_json() -> None:
    told = perplexity(FakeScorer(louder), Text("name", "abcdefgh", window=4), 7).to_dict()
    assert json.loads(json.dumps(told)) == told
    assert told["seed"] == 7
    assert (told["resamples"], told["confidence"], told["scored_tokens"]) == (1000, 0.95, 6)


def test_a_text_of_no_tokens_and_a_window_too_large() -> None:
    with pytest.raises(RequestError, match="name: the text must have at least 2 tokens, got 1"):
        perplexity(FakeScorer(), Text("name", "a", window=8))
    with pytest.raises(RequestError, match="context of fake, 256 tokens, got 257"):
        perplexity(FakeScorer(), Text("name", "abc", window=257))


def test_logits_that_are_not_finite() -> None:
    bad = FakeScorer(lambda tokens: np.full(256, np.nan, np.float32))
    with pytest.raises(RequestError, match="fake: needs finite logits, got NaN on name"):
        perplexity(bad, Text("name", "abc", window=4))


def test_a_hopeless_model_is_infinitely_perplexed() -> None:
    def rule(tokens: list[int]) -> np.ndarray:
        row = np.zeros(256, np.float32)
        row[0] = 3000
        return row

    assert perplexity(FakeScorer(rule), Text("", "abc", window=4)).perplexity == math.inf


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"abc\xff")
    with pytest.raises(RequestError, match="needs UTF-8 text, got byte 0xff at 3"):
        Text.read(tmp_path / "text")


def test_progress_is_told() -> None:
    steps: list[tuple[float, float]] = []
    text = Text("", "abcdefgh", window=4)
    evaluate(FakeScorer(), [text], 0, lambda done, total, word: steps.append((done, total)))
    assert steps == [(1, 2), (2, 2)]


# -- Windows --------------------------------------------------------------------------------------


def cut(bos: list[int], text: str, window: int, most: int | None = None) -> list[list[int]]:
    return windows(FakeScorer(bos=bos), text, window, most)


def test_windows_do_not_overlap() -> None:
    assert cut([], "abcdefgh", 3) == [[97, 98, 99], [100, 101, 102]]


def test_every_window_begins_with_the_models_first_token() -> None:
    assert cut([1], "abcde", 3) == [[1, 97, 98], [1, 99, 100]]


def test_a_short_text_is_one_window() -> None:
    assert cut([], "ab", 2048) == [[97, 98]]
    assert cut([1], "ab", 2048) == [[1, 97, 98]]


@pytest.mark.parametrize(("most", "count"), [(1, 1), (2, 1), (3, 2), (4, 2), (99, 3)])
def test_max_tokens_bounds_the_windows(most: int, count: int) -> None:
    assert len(cut([], "abcdefghi", 3, most)) == count


def test_no_text() -> None:
    with pytest.raises(RequestError, match="at least 2 tokens"):
        cut([1], "a", 8)


def test_a_window_is_what_all_models_can_read() -> None:
    short, long = FakeScorer(max_context=40), FakeScorer(max_context=4000)
    text = Text("name", "abc")
    assert (text.window_for(short), text.window_for(long)) == (40, 2048)
    assert text.fitting(long, short).window == 40
    assert perplexity(short, Text("name", "ab" * 40)).window == 40
    with pytest.raises(RequestError, match="the context of fake, 40 tokens, got 41"):
        Text("name", "abc", 41).fitting(long, short)


@pytest.mark.parametrize(("window", "most"), [(1, None), (0, None), (8, 0)])
def test_a_text_of_nothing_to_score(window: int, most: int | None) -> None:
    with pytest.raises(RequestError, match="name: "):
        Text("name", "abc", window, most)

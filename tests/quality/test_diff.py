"""Two models side by side: answers, flipped items, prompts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lacewing.errors import RequestError
from lacewing.quality import (
    Accuracy,
    Items,
    LastWord,
    Text,
    compare_answers,
    compare_items,
    cut_prompts,
    evaluate,
    read_prompts,
)
from tests.quality.fakes import FakeScorer, Rule, louder


def says(answer: bytes) -> Rule:
    """A model that answers so to a prompt of three tokens, and ends."""

    def rule(tokens: list[int]) -> np.ndarray:
        row = np.zeros(256, np.float32)
        at = len(tokens) - 3
        row[answer[at] if at < len(answer) else 0] = 1
        return row

    return rule


def test_where_answers_part() -> None:
    a, b = FakeScorer(says(b"yes, it is")), FakeScorer(says(b"yes, we are"))
    found = compare_answers(a, b, ["Q1?", "Q2?"], 20)
    assert (found.prompts, found.asked_tokens, found.same, found.median_at) == (2, 20, 0, 5)
    first = found.partings[0]
    assert (first.prompt, first.at, first.before) == ("Q1?", 5, "Q1?yes, ")
    assert (first.a, first.b, first.tokens) == ("it is\0", "we are\0", 12)


def test_answers_that_never_part() -> None:
    a = FakeScorer(says(b"yes"))
    found = compare_answers(a, FakeScorer(says(b"yes")), ["abc"], 2)
    assert (found.same, found.median_at) == (1, None)
    assert (found.partings[0].at, found.partings[0].tokens) == (None, 2)


def test_an_answer_that_ends_early_parts_there() -> None:
    found = compare_answers(FakeScorer(says(b"ab")), FakeScorer(says(b"abc")), ["abc"], 3)
    assert (found.partings[0].at, found.partings[0].a, found.partings[0].b) == (2, "\0", "c")


def test_answers_need_the_same_tokens_and_a_prompt() -> None:
    with pytest.raises(RequestError, match="same vocabulary"):
        compare_answers(FakeScorer(), FakeScorer(vocab=99), ["a"], 2)
    with pytest.raises(RequestError, match="at least one prompt"):
        compare_answers(FakeScorer(), FakeScorer(), [], 2)
    with pytest.raises(RequestError, match="at least one token, got ''"):
        compare_answers(FakeScorer(), FakeScorer(), ["a", ""], 2)


def test_answers_in_json() -> None:
    told = compare_answers(FakeScorer(), FakeScorer(louder), ["abc"], 4).to_dict()
    assert json.loads(json.dumps(told)) == told


def right(*words: str) -> Rule:
    """A model that completes these words after a passage of one token, and no others."""

    def rule(tokens: list[int]) -> np.ndarray:
        row = np.zeros(256, np.float32)
        word = f" {chr(tokens[0])}" if chr(tokens[0]) in words else "xx"
        row[ord(word[min(len(tokens) - 1, 1)])] = 1
        return row

    return rule


def answers(rule: Rule, seed: int = 3) -> Accuracy:
    items = Items("words", tuple(LastWord(word, word, word) for word in "abcdef"))
    found = evaluate(FakeScorer(rule), [items], seed)[0]
    assert isinstance(found, Accuracy)
    return found


def test_items_that_flip() -> None:
    found = compare_items(answers(right(*"abcd")), answers(right(*"cdf")))
    assert (found.a.acc, found.b.acc) == (4 / 6, 3 / 6)
    assert found.difference == pytest.approx(-1 / 6)
    assert (found.lost, found.gained) == (("a", "b"), ("f",))
    assert found.difference_interval is not None
    assert found.difference_interval.low < -1 / 6 < found.difference_interval.high
    told = found.to_dict()
    assert json.loads(json.dumps(told))["lost"] == ["a", "b"]
    assert (told["items"], told["a"]["seed"]) == (6, 3)


def test_the_difference_is_paired() -> None:
    found = compare_items(answers(right("a", "c")), answers(right("a", "c")))
    assert found.difference_interval is not None
    assert (found.difference_interval.low, found.difference_interval.high) == (0, 0)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    plain, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    plain.write_text("one\n\n two\n")
    lines.write_text('{"prompt": "one"}\n{"turns": ["two", "three"]}\n')
    assert read_prompts(plain) == ["one", " two"]
    assert read_prompts(lines) == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "prompts.jsonl: needs at least one prompt"),
        ("[", "prompts.jsonl:1: needs a JSON object with `prompt`"),
        ('{"prompt": "a"}\n[]', "prompts.jsonl:2: needs a JSON object"),
        ('{"turns": []}', "prompts.jsonl:1: needs"),
        ('{"prompt": 3}', "prompts.jsonl:1: needs"),
    ],
)
def test_prompts_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(RequestError, match=message):
        read_prompts(path)


def test_prompts_of_a_text() -> None:
    text = Text("text", "".join(chr(97 + i % 26) for i in range(100)))
    assert cut_prompts(FakeScorer(), text, 2) == [text.text[:32], text.text[50:82]]
    with pytest.raises(RequestError, match="text: 4 prompts need 128 tokens, got 100"):
        cut_prompts(FakeScorer(), text, 4)


def test_progress_of_answers() -> None:
    told: list[tuple[float, float]] = []
    prompts = [f"prompt {i}" for i in range(11)]
    found = compare_answers(
        FakeScorer(), FakeScorer(), prompts, 2, lambda done, total, _: told.append((done, total))
    )
    assert told == [(8, 11), (11, 11)]
    assert [each.prompt for each in found.partings] == prompts


def test_half_a_character_is_no_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "ok"}\n{"prompt": "\\udc00"}\n')
    with pytest.raises(RequestError, match=r"a.jsonl:2: .* got half a character, U\+DC00"):
        read_prompts(tmp_path / "a.jsonl")

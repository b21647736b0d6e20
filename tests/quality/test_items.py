"""Items: files, how they are cut into tokens, and the figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacewing.errors import RequestError
from lacewing.quality import Accuracy, Choice, Items, LastWord, evaluate, read_items
from lacewing.quality.items import encode_pair
from tests.quality.fakes import FakeScorer, log_probs

CHOICES: list[dict[str, Any]] = [
    {"id": "one", "query": "Q: 2 + 2\nA:", "choices": [" four", " 5"], "gold": 0},
    {"id": "two", "query": "Q: the sky\nA:", "choices": [" a", " blue", " green"], "gold": 1},
    {"id": "three", "query": "Q: no", "choices": [" yes", " no"], "gold": 0},
]
WORDS = [{"id": "w", "context": "once upon a", "target": "time"}]


def write(path: Path, items: list[Any]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def accuracy(scorer: FakeScorer, items: Items, seed: int = 0) -> Accuracy:
    (found,) = evaluate(scorer, [items], seed)
    assert isinstance(found, Accuracy)
    return found


# -- Files ----------------------------------------------------------------------------------------


def test_the_kind_follows_from_the_keys(tmp_path: Path) -> None:
    found = read_items(write(tmp_path / "piqa.jsonl", CHOICES))
    assert found.name == "piqa"
    assert found.items[0] == Choice("one", "Q: 2 + 2\nA:", (" four", " 5"), 0)
    words = read_items(write(tmp_path / "lambada.jsonl", WORDS))
    assert words.items == (LastWord("w", "once upon a", "time"),)


def test_limit_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text("\n\n".join(map(json.dumps, CHOICES)) + "\n\n")
    assert [item.id for item in read_items(path).items] == ["one", "two", "three"]
    assert [item.id for item in read_items(path, 2).items] == ["one", "two"]


def test_an_item_without_id_is_called_by_its_line(tmp_path: Path) -> None:
    item = {key: value for key, value in CHOICES[0].items() if key != "id"}
    path = tmp_path / "items.jsonl"
    path.write_text("\n" + json.dumps(item))
    assert read_items(path).items[0].id == "2"


def test_a_line_separator_in_a_text_ends_no_line(tmp_path: Path) -> None:
    item = json.dumps({**WORDS[0], "context": "a\u2028b"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(item, encoding="utf-8")
    assert read_items(tmp_path / "a.jsonl").items[0].pairs == [("a\u2028b", " time")]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "items.jsonl: needs at least one item, got an empty file"),
        ("\n \n", "an empty file"),
        ('{"a"', r"items.jsonl:1: needs a JSON object on a line: "),
        ("[" * 100_000, r"items.jsonl:1: needs a JSON object on a line: "),
        ("[1]", "items.jsonl:1: needs a JSON object, got list"),
        ("{}", r"misses query, choices, gold"),
        ('{"query": "a", "choices": [" b", " c"]}', r"items.jsonl:1: needs the keys .*misses gold"),
        ('{"context": "a"}', r"misses target"),
        ('{"context": 1, "target": "b"}', r"`context` must be a string, got 1"),
        ('{"context": "a", "target": ""}', r"`target` must be a string that is not empty, got ''"),
        ('{"query": "a", "choices": " b", "gold": 0}', r"`choices` must be a list of two"),
        ('{"query": "a", "choices": [" b"], "gold": 0}', r"`choices` must be a list of two"),
        ('{"query": "a", "choices": [" b", ""], "gold": 0}', r"two strings or more, none empty"),
        ('{"query": "a", "choices": [" b", " c"], "gold": 2}', "below the 2 choices, got 2"),
        ('{"query": "a", "choices": [" b", " c"], "gold": -1}', "an integer from 0, got -1"),
        ('{"query": "a", "choices": [" b", " c"], "gold": true}', "an integer from 0, got True"),
        (
            '{"context": "a", "target": "b"}\n{"query": "a", "choices": [" b", " c"], "gold": 0}',
            "items.jsonl:2: items of one kind make a file, got Choice after LastWord",
        ),
    ],
)
def test_what_is_no_item(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(lines)
    with pytest.raises(RequestError, match=message):
        read_items(path)


def test_a_long_value_is_not_quoted_at_length(tmp_path: Path) -> None:
    path = write(tmp_path / "items.jsonl", [{"context": ["x" * 10_000] * 99, "target": "b"}])
    with pytest.raises(RequestError) as error:
        read_items(path)
    assert len(str(error.value)) < 300


# -- Tokens ---------------------------------------------------------------------------------------


class Merging(FakeScorer):
    """A tokenizer that makes one token, 200, of the two characters "ab"."""

    def encode(self, text: str, add_special: bool) -> list[int]:
        return [*(self.bos if add_special else []), *text.encode().replace(b"ab", b"\xc8")]


@pytest.mark.parametrize(
    ("context", "text", "expected"),
    [
        ("x", " y", ([120], [32, 121])),
        ("x  ", "y", ([120], [32, 32, 121])),  # spaces that end a context go over
        ("x\n", "y", ([120], [10, 121])),
        ("xa", "b", ([120, 97], [])),  # merged away
        ("xa", "bc", ([120, 97], [99])),  # as lm-eval: by the number of tokens of the context
        ("", "xy", ([1], [120, 121])),
        (" ", "y", ([1], [32, 121])),
        ("", "\x01y", ([1], [121])),  # the text begins with the first token itself
    ],
)
def test_a_pair_is_cut_as_lm_eval_does(
    context: str, text: str, expected: tuple[list[int], list[int]]
) -> None:
    assert encode_pair(Merging(), context, text) == expected


def test_the_first_token_stands_before_the_context() -> None:
    assert encode_pair(FakeScorer(bos=[7]), "x", " y") == ([7, 120], [32, 121])


def test_an_empty_context_needs_a_first_token() -> None:
    scorer = FakeScorer()
    scorer.prefix_token = None
    with pytest.raises(RequestError, match="fake has no first token"):
        encode_pair(scorer, "", "a")


def test_an_empty_continuation() -> None:
    items = Items("file", (Choice("id", "xa", ("b", "c"), 0),))
    with pytest.raises(RequestError, match=r"file: item `id`: the continuation needs a token"):
        accuracy(Merging(), items)


def test_an_item_longer_than_the_context() -> None:
    items = Items("file", (LastWord("w", "a" * 250, "123456"),))
    assert accuracy(FakeScorer(), items).items == 1  # 256 read: the last one is only predicted
    items = Items("file", (LastWord("w", "a" * 250, "1234567"),))
    with pytest.raises(RequestError, match=r"item `w` must fit into .* 256 tokens, got 257"):
        accuracy(FakeScorer(), items)


def test_nothing_is_computed_before_every_item_is_looked_at() -> None:
    scorer = FakeScorer()
    items = Items("file", (LastWord("v", "a", "b"), LastWord("w", "a" * 250, "1234567")))
    with pytest.raises(RequestError):
        accuracy(scorer, items)
    assert scorer.rows == []


# -- Figures --------------------------------------------------------------------------------------


def slow(scorer: FakeScorer, query: str, choice: str) -> float:
    ids = scorer.encode(query + choice, True)
    return sum(log_probs(scorer, ids)[len(scorer.encode(query, True)) - 1 :])


def test_multiple_choice_is_the_sum_of_the_tokens(tmp_path: Path) -> None:
    scorer = FakeScorer(bos=[1])
    found = accuracy(scorer, read_items(write(tmp_path / "a.jsonl", CHOICES)), 5)
    right, normed = [], []
    for item, logs in zip(CHOICES, found.log_probs, strict=True):
        expected = [slow(scorer, item["query"], choice) for choice in item["choices"]]
        assert logs == pytest.approx(expected, rel=1e-6)
        right.append(int(np.argmax(expected)) == item["gold"])
        each = [score / len(c) for score, c in zip(expected, item["choices"], strict=True)]
        normed.append(int(np.argmax(each)) == item["gold"])
    assert right != normed, "the seed of this test should tell both apart"
    assert found.right == tuple(right)
    assert (found.acc, found.acc_norm) == (np.mean(right), np.mean(normed))
    assert (found.items, found.seed, found.kind) == (3, 5, "multiple choice")
    assert found.scored_tokens == sum(len(c) for item in CHOICES for c in item["choices"])
    assert found.perplexity is None


def test_only_continuations_are_computed() -> None:
    scorer = FakeScorer()
    accuracy(scorer, Items("", (Choice("", "q" * 100, (" a", " bcdefg"), 0),)))
    assert scorer.rows == [2, 5, 2]


def clever(word: str) -> Any:
    """A model that says `word` for ever."""

    def rule(tokens: list[int]) -> np.ndarray:
        row = np.zeros(256, np.float32)
        text = f"once upon a {word}".encode()
        row[text[len(tokens)] if len(tokens) < len(text) else 0] = 4
        return row

    return rule


def test_every_token_of_a_last_word_has_to_be_right() -> None:
    items = Items("", (LastWord("w", "once upon a", "time"),))
    knows = accuracy(FakeScorer(clever("time")), items)
    nearly = accuracy(FakeScorer(clever("tims")), items)
    assert (knows.acc, nearly.acc, knows.kind) == (1.0, 0.0, "last word")
    each = 4 - math.log(math.exp(4) + 255)
    assert knows.log_probs[0] == pytest.approx((5 * each,))
    assert knows.perplexity == pytest.approx(math.exp(-5 * each))
    assert (knows.scored_tokens, knows.acc_norm) == (5, None)


def test_the_perplexity_of_targets_is_that_of_the_mean() -> None:
    items = Items("", tuple(LastWord(word, "once upon a", word) for word in ("time", "day", "x")))
    found = accuracy(FakeScorer(), items)
    logs = [logs[0] for logs in found.log_probs]
    assert found.perplexity == pytest.approx(math.exp(-np.mean(logs)))
    assert found.perplexity_interval is not None
    assert found.perplexity_interval.low < found.perplexity < found.perplexity_interval.high


def test_it_says_its_conditions_in_json() -> None:
    told = accuracy(FakeScorer(), Items("f", (LastWord("w", "a", "b"),)), 9).to_dict()
    assert json.loads(json.dumps(told)) == told
    assert (told["file"], told["items"], told["seed"], told["resamples"]) == ("f", 1, 9, 1000)
    assert "log_probs" not in told


def test_logits_that_are_not_finite() -> None:
    bad = FakeScorer(lambda tokens: np.full(256, np.inf, np.float32))
    with pytest.raises(RequestError, match="fake: needs finite logits"):
        accuracy(bad, Items("f", (LastWord("w", "a", "b"),)))

"""Needles: where they lie, how many tokens, and how they are counted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from lacewing.errors import RequestError
from lacewing.quality import Needle, Needles, Retrieval, evaluate
from lacewing.quality.needles import DEPTHS
from tests.quality.fakes import FakeScorer

BOOK = "".join(f"Sentence {i} tells of rain. " for i in range(400))


def needles(count: int = 10, context: int = 900, text: str = BOOK) -> Needles:
    return Needles("book", text, context, count)


def scorer(rule: Callable[[list[int]], np.ndarray] | None = None, bos: bool = True) -> FakeScorer:
    more = {} if rule is None else {"rule": rule}
    return FakeScorer(bos=[1] if bos else (), max_context=1024, **more)  # type: ignore[arg-type]


def split(item: Needle) -> tuple[str, str, str]:
    """The haystack before and behind the needle, and the question."""
    text = bytes(item.context).decode()
    opening, fact, question = text.split("\n\n", 1)[0], f" is {item.number}.\n\n", "\n\nQuestion:"
    body, asked = text.removeprefix(opening).rsplit(question, 1)
    before, after = body.split(fact)
    return before.removeprefix("\n\n").rsplit("\n\nThe ", 1)[0], after, asked


# -- Items ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [500, 900, 1024])
@pytest.mark.parametrize("bos", [False, True])
def test_every_item_has_the_tokens_that_were_asked_for(context: int, bos: bool) -> None:
    for item in needles(13, context).items(scorer(bos=bos), 3):
        assert len(item.context) + len(item.targets) == context
        assert (item.context[0] == 1) == bos
        assert bytes(item.targets).decode() == f" {item.number}"
        assert len(item.number) == 5


def test_a_needle_stands_once_between_two_sentences_at_its_depth() -> None:
    found = list(needles(20).items(scorer(), 0))
    assert [item.depth for item in found] == [*DEPTHS[::-1], *DEPTHS[::-1]]
    for item in found:
        before, after, asked = split(item)
        assert bytes(item.context).decode().count(item.number) == 1
        assert before.endswith((".", ". ")) or item.depth == DEPTHS[0]
        assert BOOK.count(before + after) == 1, "the haystack is a piece of the book"
        place = len(before) / len(before + after)
        sentence = 29 / len(before + after)
        assert item.depth - sentence < place <= item.depth
        assert asked.endswith(" is")
        assert item.city in asked


def test_a_round_shares_its_haystack_and_the_next_has_another() -> None:
    found = list(needles(20).items(scorer(), 0))
    texts = ["".join(split(item)[:2]) for item in found]
    shortest = min(map(len, texts))
    assert len({text[:shortest] for text in texts[:10]}) == 1
    assert texts[10][:shortest] != texts[0][:shortest]
    for deeper, item in pairwise(found[:10]):
        shared = len("One important number is hidden in the text below.\n\n") + len(split(item)[0])
        assert item.context[:shared] == deeper.context[:shared]


def test_the_seed_decides_and_nothing_else() -> None:
    again = [list(needles(12).items(scorer(), 7)) for _ in range(2)]
    assert again[0] == again[1]
    other = list(needles(12).items(scorer(), 8))
    assert [item.number for item in other] != [item.number for item in again[0]]
    more = list(needles(20).items(scorer(), 7))
    assert more[:10] == again[0][:10], "asking for more leaves the first round as it is"
    assert len({item.number for item in more}) == 20
    assert len({item.city for item in more}) > 5


@pytest.mark.parametrize(
    ("count", "depths"),
    [(1, [0.55]), (2, [0.75, 0.25]), (5, [0.95, 0.75, 0.55, 0.35, 0.15])],
)
def test_fewer_than_ten_are_spread_evenly(count: int, depths: list[float]) -> None:
    assert [item.depth for item in needles(count).items(scorer(), 0)] == depths


# -- Wrong use ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (needles(context=1025), "book: a haystack must fit into .* 1024 tokens, got 1025"),
        (needles(text="Short. "), "book: haystacks of 900 tokens need a text of as many, got 7"),
        (needles(context=60), r"book: needle and question alone take \d+ tokens, .* of 60"),
    ],
)
def test_what_cannot_be_made(task: Needles, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        evaluate(scorer(), [task])


def test_no_needles() -> None:
    with pytest.raises(RequestError, match="book: needs at least one needle, got 0"):
        needles(0)


# -- Figures --------------------------------------------------------------------------------------


def reader(sees: Callable[[int, int], bool]) -> Callable[[list[int]], np.ndarray]:
    """A model that reads a needle with `sees(tokens before it, tokens in all)`, else says 0."""

    def rule(tokens: list[int]) -> np.ndarray:
        row = np.zeros(256, np.float32)
        text = bytes(tokens)
        at = next((i for i in range(len(text)) if text[i : i + 4] == b" is " and
                   text[i + 4 : i + 9].isdigit()), -1)  # fmt: skip
        said = text.rsplit(b" is", 1)[1]
        answer = text[at + 3 : at + 9] if at >= 0 and sees(at, len(text)) else b" 00000"
        row[answer[len(said)]] = 5
        return row

    return rule


def retrieve(rule: Callable[[list[int]], np.ndarray], count: int = 20) -> Retrieval:
    (found,) = evaluate(scorer(rule), [needles(count)], 0)
    assert isinstance(found, Retrieval)
    return found


def test_all_and_none() -> None:
    sharp, blind = retrieve(reader(lambda at, total: True)), retrieve(reader(lambda *_: False))
    each = 5 - math.log(math.exp(5) + 255)
    assert (sharp.found, sharp.needles, blind.found) == (20, 20, 0)
    assert sharp.log_prob == pytest.approx(6 * each)
    assert blind.log_prob < sharp.log_prob - 5
    assert sharp.right == (True,) * 20
    assert (sharp.context, sharp.seed, sharp.text) == (900, 0, "book")


def test_a_model_that_reads_only_what_is_near() -> None:
    found = retrieve(reader(lambda at, total: at > 0.55 * total))
    right = {each.depth: each.found for each in found.depths}
    assert list(right) == list(DEPTHS)
    assert all(each.needles == 2 for each in found.depths)
    assert right == {depth: 2 if depth > 0.6 else 0 for depth in DEPTHS} | {0.55: right[0.55]}
    assert found.found == sum(right.values()) == sum(found.right)
    assert found.found_interval is not None
    assert found.found_interval.low < found.found / 20 < found.found_interval.high
    logs = {each.depth: each.log_prob for each in found.depths}
    assert logs[0.95] > logs[0.05] + 5
    assert found.log_prob == pytest.approx(np.mean([logs[depth] for depth in DEPTHS]))


def test_every_digit_has_to_be_right() -> None:
    def nearly(tokens: list[int]) -> np.ndarray:
        row = reader(lambda *_: True)(tokens)
        return np.roll(row, 1) if len(bytes(tokens).rsplit(b" is", 1)[1]) == 5 else row

    assert retrieve(nearly, 3).found == 0


def test_it_says_its_conditions_in_json() -> None:
    told = retrieve(reader(lambda *_: True), 3).to_dict()
    assert json.loads(json.dumps(told)) == told
    assert (told["needles"], told["found"], told["resamples"]) == (3, 3, 1000)
    assert [each["depth"] for each in told["depths"]] == [0.15, 0.55, 0.85]

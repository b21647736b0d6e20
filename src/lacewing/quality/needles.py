"""Needles in a haystack: facts planted at known depths of a long text, asked for at its end.

A made-up fact, "The special magic number for Lisbon is 48213.", stands between two sentences of a
book, and the text ends with the words that its number has to follow (Kamradt, "Needle in a
haystack", 2023; the wording is that of RULER, Hsieh et al. 2024, arXiv:2404.06654). The form is a
continuation, not a chat, so that models which only ever saw text can answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lacewing.errors import RequestError
from lacewing.quality.bootstrap import SETTINGS, Interval, as_list, interval
from lacewing.quality.likelihood import continuation
from lacewing.quality.scorer import Scorer
from lacewing.quality.text import Advance, read_utf8

__all__ = ["DEPTHS", "Depth", "Needle", "Needles", "Retrieval"]

DEPTHS = tuple((2 * tenth + 1) / 20 for tenth in range(10))
"""Where needles lie: 0.05, 0.15 .. 0.95 of the haystack."""

_OPENING = "One important number is hidden in the text below.\n\n"
_SUBJECTS = (
    "special magic number for {city}",
    "secret code of {city}",
    "lucky number of {city}",
    "winning ticket of {city}",
)
_FACT = "\n\nThe {subject} is {number}.\n\n"
_QUESTION = "\n\nQuestion: What is the {subject} mentioned in the text?\nAnswer: The {subject} is"
_CITIES = (
    *("Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Dublin", "Prague", "Vienna", "Nairobi"),
    *("Bogota", "Jakarta", "Havana", "Athens", "Toronto", "Warsaw", "Geneva", "Manila"),
    *("Tunis", "Quito", "Riga", "Seoul", "Naples", "Boston", "Hanoi", "Porto"),
)
_SENTENCE_ENDS = (".", "!", "?", "\n")
_LONGEST_SENTENCE = 200  # tokens that are looked at for the end of one


@dataclass(frozen=True)
class Needle:
    """One haystack with its needle, in token ids."""

    depth: float
    """Of the haystack's tokens, what lies before the needle; the end of a sentence before it."""
    city: str
    number: str
    context: list[int]
    """The model's first token, haystack, needle and question."""
    targets: list[int]
    """The space and the five digits that have to follow."""


@dataclass(frozen=True)
class Depth:
    """The needles of one depth."""

    depth: float
    needles: int
    found: int
    log_prob: float
    """Mean natural log-probability of a right answer."""


@dataclass(frozen=True)
class Retrieval:
    """How many needles a model finds."""

    text: str
    context: int
    """Tokens of each item, the answer included."""
    needles: int
    found: int
    """Needles whose space and digits are the most likely tokens, each given those before it."""
    found_interval: Interval | None
    """Of found / needles."""
    log_prob: float
    """Mean natural log-probability of a right answer; the best is 0. It tells models apart that
    find all or none."""
    log_prob_interval: Interval | None
    depths: tuple[Depth, ...]
    seed: int
    right: tuple[bool, ...]
    """Per needle."""
    log_probs: tuple[float, ...]
    """Per needle."""

    def to_dict(self) -> dict[str, Any]:
        """In types that JSON knows."""
        found = {k: as_list(v) if k.endswith("interval") else v for k, v in vars(self).items()}
        singles = {"right": list(self.right), "log_probs": list(self.log_probs)}
        return {**found, **singles, "depths": [asdict(each) for each in self.depths], **SETTINGS}


@dataclass(frozen=True)
class Needles:
    """`count` needles in a text, each in a haystack of its own depth.

    Ten make a round: they share a haystack, cut from a random place of the text, and lie at the
    ten depths, the deepest first, so that an engine that keeps a prefix reads it once; fewer in
    the last round are spread evenly. City, number, wording and place are drawn by the `seed` that
    `run` is given: two models with the same tokens get the same items.

    context: tokens of each item, the answer included. Raises RequestError for less than one needle.
    """

    name: str
    text: str
    context: int
    count: int = 10

    def __post_init__(self) -> None:
        if self.count < 1:
            raise RequestError(f"{self.name}: needs at least one needle, got {self.count}")

    @classmethod
    def read(cls, path: Path, context: int, count: int = 10) -> Needles:
        """In a UTF-8 file. Raises RequestError for anything else, OSError where it cannot be
        read."""
        return cls(path.name, read_utf8(path), context, count)

    def items(self, scorer: Scorer, seed: int) -> Iterator[Needle]:
        """The needles, one by one. Raises RequestError where the text or the model's context is
        too short, or the tokenizer merges the answer into the question."""
        if self.context > scorer.max_context:
            raise RequestError(
                f"{self.name}: a haystack must fit into the context of {scorer.name}, "
                f"{scorer.max_context} tokens, got {self.context}",
                hint="open the model with a larger context (--context)",
            )
        ids = scorer.encode(self.text, False)
        for first in range(0, self.count, len(DEPTHS)):
            number = min(len(DEPTHS), self.count - first)
            place = _random(seed, first, 1).random()
            for index in range(number):
                depth = DEPTHS[(2 * (number - 1 - index) + 1) * len(DEPTHS) // (2 * number)]
                yield self._item(scorer, ids, place, depth, _random(seed, first + index, 0))

    def _item(
        self,
        scorer: Scorer,
        ids: list[int],
        place: float,
        depth: float,
        random: np.random.Generator,
    ) -> Needle:
        city = _CITIES[random.integers(len(_CITIES))]
        number = str(random.integers(10_000, 100_000))
        subject = _SUBJECTS[random.integers(len(_SUBJECTS))].format(city=city)
        question = _QUESTION.format(subject=subject)
        before = [*scorer.bos, *scorer.encode(_OPENING, False)]
        needle = scorer.encode(_FACT.format(subject=subject, number=number), False)
        after = scorer.encode(question, False)
        targets = scorer.encode(f"{question} {number}", False)[len(after) :]
        hay = self._hay(ids, len(before) + len(needle) + len(after) + len(targets), place)
        cut = _sentence_end(scorer, hay, math.floor(depth * len(hay)))
        context = [*before, *hay[:cut], *needle, *hay[cut:], *after]
        return Needle(depth, city, number, context, targets)

    def _hay(self, ids: list[int], rest: int, place: float) -> list[int]:
        """What of the text fills the context up; `place` in 0..1 says from where."""
        count = self.context - rest
        if count < 1:
            raise RequestError(
                f"{self.name}: needle and question alone take {rest} tokens, got a context of "
                f"{self.context}"
            )
        room = len(ids) - self.context  # not of `count`: all of a round begin at the same token
        if room < 0:
            raise RequestError(
                f"{self.name}: haystacks of {self.context} tokens need a text of as many, got "
                f"{len(ids)}",
                hint="name a longer text, or ask for a shorter context",
            )
        start = math.floor(place * (room + 1))
        return ids[start : start + count]

    def run(self, scorer: Scorer, seed: int, advance: Advance) -> Retrieval:
        """Raises RequestError."""
        depths, right, log_probs = [], [], []
        for index, item in enumerate(self.items(scorer, seed)):
            log_prob, greedy = continuation(scorer, item.context, item.targets)
            depths.append(item.depth)
            log_probs.append(log_prob)
            right.append(greedy)
            advance(index + 1, self.count, f"{sum(right)} needles found")
        ones = np.ones(self.count)
        return Retrieval(
            text=self.name,
            context=self.context,
            needles=self.count,
            found=sum(right),
            found_interval=interval(np.array(right, np.float64), ones, seed),
            log_prob=float(np.mean(log_probs)),
            log_prob_interval=interval(np.array(log_probs), ones, seed),
            depths=tuple(_by_depth(depths, right, log_probs)),
            seed=seed,
            right=tuple(right),
            log_probs=tuple(log_probs),
        )


def _random(*numbers: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(numbers))


def _sentence_end(scorer: Scorer, ids: list[int], at: int) -> int:
    """Where the last sentence ends that is whole before token `at`; `at` where there is none."""
    for end in range(at, max(0, at - _LONGEST_SENTENCE), -1):
        if scorer.decode(ids[end - 1 : end]).rstrip(" \"'\u201d").endswith(_SENTENCE_ENDS):
            return end
    return at


def _by_depth(
    depths: Sequence[float], right: Sequence[bool], log_probs: Sequence[float]
) -> Iterator[Depth]:
    for depth in sorted(set(depths)):
        here = [i for i, each in enumerate(depths) if each == depth]
        found = sum(right[i] for i in here)
        yield Depth(depth, len(here), found, float(np.mean([log_probs[i] for i in here])))

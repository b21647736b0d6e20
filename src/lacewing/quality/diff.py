"""Two models side by side: where their answers part, and which items they judge differently."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lacewing.errors import RequestError
from lacewing.quality.bootstrap import SETTINGS, Interval, as_list, interval
from lacewing.quality.divergence import check_same_tokens
from lacewing.quality.items import Accuracy, check_unicode
from lacewing.quality.scorer import Scorer
from lacewing.quality.text import Advance, Text, read_utf8

__all__ = ["Answers", "Flips", "Parting", "compare_answers", "compare_items", "read_prompts"]

_BEFORE, _AFTER = 12, 8  # tokens shown around a parting
_TOGETHER = 8  # prompts that are answered in one batch
_OPENING = 32  # tokens of a prompt that is cut from a text


@dataclass(frozen=True)
class Parting:
    """One prompt, and where the greedy answers of two models part."""

    prompt: str
    tokens: int
    """Of the longer answer."""
    at: int | None
    """Tokens that both say before they part; None: they never do."""
    before: str
    """The text that leads up to it."""
    a: str
    """How each goes on; empty where its answer ends."""
    b: str


@dataclass(frozen=True)
class Answers:
    """Partings of several prompts."""

    prompts: int
    asked_tokens: int
    """Of each answer, at most."""
    same: int
    """Prompts whose answers are the same to the end."""
    median_at: float | None
    """Of the first differing tokens; answers that never part count as longer than all. None: most
    never part."""
    partings: tuple[Parting, ...]

    def to_dict(self) -> dict[str, Any]:
        """In types that JSON knows."""
        return {**vars(self), "partings": [asdict(each) for each in self.partings]}


def compare_answers(
    a: Scorer, b: Scorer, prompts: Sequence[str], count: int, progress: Advance | None = None
) -> Answers:
    """Continues each prompt greedily by up to `count` tokens. `progress` is as in `evaluate`.

    Raises RequestError where there is no prompt, one is empty or too long, or the models do not
    share their tokens."""
    if not prompts:
        raise RequestError("answers are compared on at least one prompt, got none")
    check_same_tokens(a, b, *prompts)
    ids = [a.encode(prompt, True) for prompt in prompts]
    for tokens, prompt in zip(ids, prompts, strict=True):
        if not tokens:
            raise RequestError(f"a prompt must have at least one token, got {prompt!r}")
    found: list[Parting] = []
    for first in range(0, len(ids), _TOGETHER):
        some = ids[first : first + _TOGETHER]
        answers = zip(some, a.generate(some, count), b.generate(some, count), strict=True)
        found += [_parting(a, *each) for each in answers]
        if progress is not None:
            progress(len(found), len(ids), "answers")
    places = [float("inf") if each.at is None else each.at for each in found]
    median = float(np.quantile(places, 0.5, method="higher"))
    return Answers(
        len(found),
        count,
        sum(each.at is None for each in found),
        None if median == float("inf") else median,
        tuple(found),
    )


def _parting(scorer: Scorer, prompt: list[int], a: list[int], b: list[int]) -> Parting:
    pairs = zip(a, b, strict=False)
    at = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(a), len(b)))
    tail = (prompt + a[:at])[-_BEFORE:]
    return Parting(
        scorer.decode(prompt),
        max(len(a), len(b)),
        None if a == b else at,
        scorer.decode(tail),
        scorer.decode(a[at : at + _AFTER]),
        scorer.decode(b[at : at + _AFTER]),
    )


@dataclass(frozen=True)
class Flips:
    """The same items under two models."""

    file: str
    items: int
    a: Accuracy
    b: Accuracy
    difference: float
    """acc of b - acc of a."""
    difference_interval: Interval | None
    """Paired: both models on the same resampled items."""
    lost: tuple[str, ...]
    """Ids of the items that only a gets right."""
    gained: tuple[str, ...]
    """Ids of the items that only b gets right."""

    def to_dict(self) -> dict[str, Any]:
        """In types that JSON knows."""
        found = {**vars(self), "a": self.a.to_dict(), "b": self.b.to_dict(), **SETTINGS}
        return {**found, "difference_interval": as_list(self.difference_interval)}


def compare_items(a: Accuracy, b: Accuracy) -> Flips:
    """Of two results on the same items."""
    assert a.ids == b.ids and a.seed == b.seed
    change = np.array(b.right, np.float64) - np.array(a.right, np.float64)
    return Flips(
        a.file,
        a.items,
        a,
        b,
        float(change.mean()),
        interval(change, np.ones(len(change)), a.seed),
        tuple(name for name, each in zip(a.ids, change, strict=True) if each < 0),
        tuple(name for name, each in zip(a.ids, change, strict=True) if each > 0),
    )


# -- Prompts --------------------------------------------------------------------------------------


def read_prompts(path: Path) -> list[str]:
    """A prompt a line; of a `.jsonl` file the string `prompt`, or the first of `turns`.

    Raises RequestError, OSError.
    """
    lines = [line for line in read_utf8(path).split("\n") if line.strip()]
    if not lines:
        raise RequestError(f"{path.name}: needs at least one prompt, got an empty file")
    if path.suffix != ".jsonl":
        return lines
    return [_prompt(line, f"{path.name}:{number}") for number, line in enumerate(lines, 1)]


def _prompt(line: str, where: str) -> str:
    try:
        item = json.loads(line)
        found = item["prompt"] if "prompt" in item else item["turns"][0]
    except (ValueError, RecursionError, TypeError, LookupError):
        found = None
    if not isinstance(found, str) or not found:
        raise RequestError(f"{where}: needs a JSON object with `prompt`, or `turns`")
    check_unicode(found, where)
    return found


def cut_prompts(scorer: Scorer, text: Text, number: int) -> list[str]:
    """`number` prompts of 32 tokens, evenly from the text. Raises RequestError where it is too
    short."""
    ids = scorer.encode(text.text, False)
    if len(ids) < number * _OPENING:
        raise RequestError(
            f"{text.name}: {number} prompts need {number * _OPENING} tokens, got {len(ids)}"
        )
    step = len(ids) // number
    return [scorer.decode(ids[i * step : i * step + _OPENING]) for i in range(number)]

"""Items with an answer: multiple choice, and the last word of a passage.

A file holds one JSON object a line, all of one kind, which their keys tell:

    {"id", "query", "choices", "gold"}   multiple choice; `gold` counts from 0
    {"id", "context", "target"}          last word (LAMBADA: Paperno et al. 2016, arXiv:1606.06031)

Tokens are cut, and log-probabilities added up, as EleutherAI's lm-eval does it (its
`loglikelihood` requests, 0.4), so that its figures on the same items are these.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from lacewing.errors import RequestError
from lacewing.quality.bootstrap import SETTINGS, Interval, as_list, interval
from lacewing.quality.likelihood import continuation, power
from lacewing.quality.scorer import Scorer
from lacewing.quality.text import Advance, read_utf8

__all__ = ["Accuracy", "Choice", "Items", "LastWord", "encode_pair", "read_items"]


@dataclass(frozen=True)
class Choice:
    """A question and its answers: the likeliest after `query` is the model's."""

    id: str
    query: str
    choices: tuple[str, ...]
    gold: int

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(context, continuation) of what is scored."""
        return [(self.query, choice) for choice in self.choices]


@dataclass(frozen=True)
class LastWord:
    """A passage and the word that ends it, which has to come out greedily."""

    id: str
    context: str
    target: str

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(context, continuation) of what is scored."""
        return [(self.context, f" {self.target}")]


@dataclass(frozen=True)
class Accuracy:
    """How many items a model gets right."""

    file: str
    kind: str
    """"multiple choice" or "last word"."""
    items: int
    scored_tokens: int
    """Of all continuations."""
    acc: float
    """Multiple choice: the gold choice has the highest log-probability. Last word: every token of
    the target is the most likely one."""
    acc_interval: Interval | None
    acc_norm: float | None
    """Multiple choice, with log-probabilities divided by the characters of the choice."""
    acc_norm_interval: Interval | None
    perplexity: float | None
    """Last word: exp of the mean negative log-probability of a target (a word, not a token)."""
    perplexity_interval: Interval | None
    seed: int
    ids: tuple[str, ...]
    right: tuple[bool, ...]
    """Per item, what `acc` counts."""
    log_probs: tuple[tuple[float, ...], ...]
    """Per item, of each continuation."""

    def to_dict(self) -> dict[str, Any]:
        """In types that JSON knows, without the single items."""
        left_out = ("ids", "right", "log_probs")
        shown = {key: value for key, value in vars(self).items() if key not in left_out}
        found = {k: as_list(v) if k.endswith("interval") else v for k, v in shown.items()}
        return {**found, **SETTINGS}


@dataclass(frozen=True)
class Items:
    """Items of one kind, at least one."""

    name: str
    items: tuple[Choice, ...] | tuple[LastWord, ...]

    def run(self, scorer: Scorer, seed: int, advance: Advance) -> Accuracy:
        """Raises RequestError where an item cannot be scored, before the first one is."""
        encoded = [self._encode(scorer, item) for item in self.items]
        log_probs, greedy = [], []
        for index, pairs in enumerate(encoded):
            answers = [continuation(scorer, *each) for each in pairs]
            log_probs.append(tuple(answer[0] for answer in answers))
            greedy.append(answers[0][1])
            advance(index + 1, len(encoded), self.name)
        scored = sum(len(targets) for pairs in encoded for _, targets in pairs)
        if isinstance(self.items[0], LastWord):
            return self._last_words(log_probs, greedy, scored, seed)
        return self._choices(log_probs, scored, seed)

    def _encode(self, scorer: Scorer, item: Choice | LastWord) -> list[tuple[list[int], list[int]]]:
        found = []
        for context, text in item.pairs:
            ids, targets = encode_pair(scorer, context, text)
            if not targets:
                raise RequestError(
                    f"{self.name}: item `{item.id}`: the continuation needs a token of its own, "
                    f"but {text!r} is merged into the context",
                    hint="put the space between both at the beginning of the continuation",
                )
            length = len(ids) + len(targets) - 1  # nothing is predicted from the last one
            if length > scorer.max_context:
                raise RequestError(
                    f"{self.name}: item `{item.id}` must fit into the context of "
                    f"{scorer.max_context} tokens, got {length}",
                    hint="open the model with a larger context (--context), or leave it out",
                )
            found.append((ids, targets))
        return found

    def _choices(self, log_probs: list[tuple[float, ...]], scored: int, seed: int) -> Accuracy:
        right, normed = [], []
        for item, scores in zip(self.items, log_probs, strict=True):
            assert isinstance(item, Choice)
            lengths = [len(choice) for choice in item.choices]
            right.append(int(np.argmax(scores)) == item.gold)
            normed.append(int(np.argmax(np.divide(scores, lengths))) == item.gold)
        found = self._accuracy("multiple choice", log_probs, right, scored, seed)
        norm, spread = _share(normed, seed)
        return replace(found, acc_norm=norm, acc_norm_interval=spread)

    def _last_words(
        self, log_probs: list[tuple[float, ...]], right: list[bool], scored: int, seed: int
    ) -> Accuracy:
        losses = -np.array([scores[0] for scores in log_probs])
        spread = interval(losses, np.ones(len(losses)), seed, power)
        found = self._accuracy("last word", log_probs, right, scored, seed)
        return replace(found, perplexity=power(float(losses.mean())), perplexity_interval=spread)

    def _accuracy(
        self,
        kind: str,
        log_probs: list[tuple[float, ...]],
        right: list[bool],
        scored: int,
        seed: int,
    ) -> Accuracy:
        share, spread = _share(right, seed)
        return Accuracy(
            file=self.name,
            kind=kind,
            items=len(self.items),
            scored_tokens=scored,
            acc=share,
            acc_interval=spread,
            acc_norm=None,
            acc_norm_interval=None,
            perplexity=None,
            perplexity_interval=None,
            seed=seed,
            ids=tuple(item.id for item in self.items),
            right=tuple(right),
            log_probs=tuple(log_probs),
        )


def _share(right: Sequence[bool], seed: int) -> tuple[float, Interval | None]:
    counts = np.array(right, np.float64)
    return float(counts.mean()), interval(counts, np.ones(len(counts)), seed)


def encode_pair(scorer: Scorer, context: str, text: str) -> tuple[list[int], list[int]]:
    """Token ids of `context`, and of `text` after it, as lm-eval cuts them.

    Spaces that end the context go to the continuation; the whole is encoded, and what is longer
    than the context is the continuation. An empty context is the model's first token. Raises
    RequestError where there is none.
    """
    kept = context.rstrip()
    if kept and (ids := scorer.encode(kept, True)):
        return ids, scorer.encode(context + text, True)[len(ids) :]
    targets = scorer.encode(context + text, False)
    if scorer.prefix_token is None:
        raise RequestError(f"{scorer.name} has no first token: an item needs a context")
    if targets[:1] == [scorer.prefix_token]:
        return targets[:1], targets[1:]
    return [scorer.prefix_token], targets


# -- Files ----------------------------------------------------------------------------------------

_Check = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _are_choices(value: Any) -> bool:
    return isinstance(value, list) and len(value) >= 2 and all(map(_is_text, value))


def _is_index(value: Any) -> bool:
    return type(value) is int and value >= 0


_KINDS: tuple[Mapping[str, tuple[str, _Check]], ...] = (
    {
        "query": ("a string", lambda value: isinstance(value, str)),
        "choices": ("a list of two strings or more, none empty", _are_choices),
        "gold": ("an integer from 0", _is_index),
    },
    {
        "context": ("a string", lambda value: isinstance(value, str)),
        "target": ("a string that is not empty", _is_text),
    },
)


def read_items(path: Path, limit: int | None = None) -> Items:
    """The items of a JSONL file, the first `limit` of them; blank lines are skipped.

    Raises RequestError with file and line for what is no item, OSError.
    """
    found: list[Any] = []
    for number, line in enumerate(read_utf8(path).split("\n"), 1):
        if limit is not None and len(found) == limit:
            break
        if line.strip():
            where = f"{path.name}:{number}"
            found.append(_parse(line, where, number))
            check_unicode("".join(chain([found[-1].id], *found[-1].pairs)), where)
            if type(found[-1]) is not type(found[0]):
                raise RequestError(
                    f"{where}: items of one kind make a file, got "
                    f"{type(found[-1]).__name__} after {type(found[0]).__name__}"
                )
    if not found:
        raise RequestError(f"{path.name}: needs at least one item, got an empty file")
    return Items(path.stem, tuple(found))


def _parse(line: str, where: str, number: int) -> Choice | LastWord:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: needs a JSON object on a line: {error}") from None
    if not isinstance(item, dict):
        raise RequestError(f"{where}: needs a JSON object, got {type(item).__name__}")
    kind = max(_KINDS, key=lambda kind: len(kind.keys() & item.keys()))
    if missing := [key for key in kind if key not in item]:
        wanted = " or ".join(f"{{{', '.join(each)}}}" for each in _KINDS)
        raise RequestError(f"{where}: needs the keys {wanted}, misses {', '.join(missing)}")
    for key, (needed, fits) in kind.items():
        if not fits(item[key]):
            raise RequestError(f"{where}: `{key}` must be {needed}, got {reprlib.repr(item[key])}")
    name = str(item.get("id", number))
    if "target" in kind:
        return LastWord(name, item["context"], item["target"])
    if item["gold"] >= len(item["choices"]):
        raise RequestError(
            f"{where}: `gold` must be below the {len(item['choices'])} choices, got {item['gold']}"
        )
    return Choice(name, item["query"], tuple(item["choices"]), item["gold"])


def check_unicode(text: str, where: str) -> None:
    """Raises RequestError for half of a surrogate pair, which JSON may escape and no tokenizer
    takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{where}: needs Unicode text, got half a character, U+{ord(text[error.start]):04X}"
        ) from None

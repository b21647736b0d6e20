"""Perplexity of a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lacewing.errors import RequestError
from lacewing.quality.bootstrap import SETTINGS, Interval, Units, as_list
from lacewing.quality.likelihood import power
from lacewing.quality.scorer import Scorer

__all__ = ["Advance", "Perplexity", "Text", "windows"]

Advance = Callable[[float, float, str], None]
"""Work done, work in all, a word on it."""

WINDOW = 2048


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text."""

    text: str
    """The text's name."""
    perplexity: float
    """exp(nll / scored_tokens)."""
    interval: Interval | None
    nll: float
    """Of all scored tokens together, in nats."""
    scored_tokens: int
    windows: int
    window: int
    resampled: str
    """What the interval is drawn from."""
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """In types that JSON knows."""
        return {**vars(self), "interval": as_list(self.interval), **SETTINGS}


@dataclass(frozen=True)
class Text:
    """A text to predict, in windows that do not overlap (see `windows`).

    `window`: tokens, 2 at least; None: 2048, or the model's context where that is shorter.
    `max_tokens`: stop after this many scored tokens. Raises RequestError for less than one.
    """

    name: str
    text: str
    window: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 2:
            raise RequestError(f"{self.name}: a window has at least 2 tokens, got {self.window}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RequestError(
                f"{self.name}: at least 1 token has to be scored, got max_tokens={self.max_tokens}"
            )

    @classmethod
    def read(cls, path: Path, window: int | None = None, max_tokens: int | None = None) -> Text:
        """Of a UTF-8 file. Raises RequestError for anything else, OSError where it cannot be
        read."""
        return cls(path.name, read_utf8(path), window, max_tokens)

    def window_for(self, *scorers: Scorer) -> int:
        """Tokens of a window that all of them can read. Raises RequestError where one that was
        asked for does not fit."""
        if self.window is None:
            return min(WINDOW, *(scorer.max_context for scorer in scorers))
        for scorer in scorers:
            if self.window > scorer.max_context:
                raise RequestError(
                    f"{self.name}: a window must fit into the context of {scorer.name}, "
                    f"{scorer.max_context} tokens, got {self.window}"
                )
        return self.window

    def fitting(self, *scorers: Scorer) -> Text:
        """The same text in windows that all of them can read. Raises RequestError."""
        return replace(self, window=self.window_for(*scorers))

    def cut(self, scorer: Scorer) -> list[list[int]]:
        """The windows of token ids. Raises RequestError."""
        window = self.window_for(scorer)
        try:
            return windows(scorer, self.text, window, self.max_tokens)
        except RequestError as error:
            raise RequestError(f"{self.name}: {error}", error.hint) from None

    def run(self, scorer: Scorer, seed: int, advance: Advance) -> Perplexity:
        """Raises RequestError."""
        pieces = self.cut(scorer)
        scores: list[Any] = []
        losses: list[float] = []
        count = 0
        for index, piece in enumerate(pieces):
            room = None if self.max_tokens is None else self.max_tokens - count
            scores.append(scorer.score(piece)[:room])
            losses.append(-float(scores[-1].sum(dtype="float64")))
            count += len(scores[-1])
            value = power(sum(losses) / count)
            if math.isnan(value):
                raise RequestError(f"{scorer.name}: needs finite logits, got NaN on {self.name}")
            advance(index + 1, len(pieces), f"perplexity {value:.3f}")
        units = Units.of([len(each) for each in scores])
        values = -np.concatenate(scores).astype(np.float64)
        return Perplexity(
            self.name,
            value,
            units.interval(values, seed, power),
            sum(losses),
            count,
            len(pieces),
            self.window_for(scorer),
            units.name,
            seed,
        )


def windows(scorer: Scorer, text: str, window: int, max_tokens: int | None) -> list[list[int]]:
    """The token windows that score `text`: they do not overlap and begin with the model's first
    token, where it wants one; the last one, if not full, is left out, unless it is the only one.

    Raises RequestError for a text of fewer than 2 tokens.
    """
    first = scorer.bos
    ids = scorer.encode(text, False)
    if len(ids) < 2:
        raise RequestError(f"the text must have at least 2 tokens, got {len(ids)}")
    step = window - len(first)
    found = list(_cut(ids, step)) or [ids]
    if max_tokens is not None:
        found = found[: -(-max_tokens // (window - 1))]
    return [first + piece for piece in found]


def _cut(ids: list[int], step: int) -> Iterator[list[int]]:
    for start in range(0, len(ids) - step + 1, step):
        yield ids[start : start + step]


def read_utf8(path: Path) -> str:
    """The text of a file. Raises RequestError where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path}: needs UTF-8 text, got byte 0x{error.object[error.start]:02x} at {error.start}"
        ) from None

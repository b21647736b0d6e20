"""A model against a reference on the same text: Kullback-Leibler divergence, token by token."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lacewing.errors import RequestError
from lacewing.quality.bootstrap import SETTINGS, Interval, Units, as_list
from lacewing.quality.likelihood import log_softmax, power, rows_of
from lacewing.quality.scorer import Scorer
from lacewing.quality.text import Advance, Text

__all__ = ["Against", "Divergence", "Place", "Range", "check_same_tokens"]

_PLACES = 10
_TOLD = 256  # tokens between two reports of progress
_CONTEXT = 24  # tokens shown before a place
_FIRST_RANGE, _RANGE_STEP = 16, 4  # positions 1-16, 17-64, 65-256, ...

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Range:
    """Places with as many tokens before them in their window."""

    first: int
    last: int
    scored_tokens: int
    kl: float
    """Mean, in nats."""
    kl_p99: float
    kl_max: float
    agreement: float


@dataclass(frozen=True)
class Place:
    """One token of the text, and what both models expected there."""

    kl: float
    window: int
    """From 0."""
    position: int
    """Tokens before it in the window."""
    context: str
    """The text before it."""
    token: str
    """What the text goes on with."""
    reference_token: str
    """What the reference finds most likely."""
    reference_probability: float
    token_by_model: str
    """What the model finds most likely."""
    probability_by_model: float


@dataclass(frozen=True)
class Divergence:
    """How far a model is from its reference on a text. KL(reference || model) is in nats: zero
    where both expect the same, and never below."""

    text: str
    reference: str
    scored_tokens: int
    windows: int
    window: int
    kl: float
    """Mean over the scored tokens."""
    kl_interval: Interval | None
    kl_median: float
    kl_p99: float
    kl_max: float
    agreement: float
    """Share of tokens where both find the same token most likely."""
    agreement_interval: Interval | None
    reference_perplexity: float
    perplexity: float
    perplexity_ratio: float
    """Of the model to the reference."""
    perplexity_ratio_interval: Interval | None
    """Paired: both models on the same resampled text."""
    resampled: str
    """What the intervals are drawn from."""
    seed: int
    ranges: tuple[Range, ...]
    places: tuple[Place, ...]
    """Those of the largest divergence, largest first."""

    def to_dict(self) -> dict[str, Any]:
        """In types that JSON knows."""
        found = {k: as_list(v) if k.endswith("interval") else v for k, v in vars(self).items()}
        found["ranges"] = [asdict(each) for each in self.ranges]
        found["places"] = [asdict(each) for each in self.places]
        return {**found, **SETTINGS}


@dataclass(frozen=True)
class Against:
    """The task: a text, and the model to be measured against."""

    reference: Scorer
    text: Text

    def run(self, scorer: Scorer, seed: int, advance: Advance) -> Divergence:
        """Window by window, both models in turn; holds some chunks of logits and five numbers a
        token. Raises RequestError where the models do not share their tokens."""
        text = self.text.fitting(scorer, self.reference)
        pieces = text.cut(scorer)
        check_same_tokens(self.reference, scorer, text.text)
        places = _Places(self.reference, scorer)
        columns: list[Numbers] = []
        left, said = text.max_tokens, ""

        def tell(share: float) -> None:
            """So much of the window under way is done."""
            advance(len(columns) + share, len(pieces), said)

        for index, piece in enumerate(pieces):
            kept = piece if left is None else piece[: left + 1]
            columns.append(self._window(scorer, index, kept, places, tell))
            left = None if left is None else left - columns[-1].shape[1]
            said = f"KL {np.concatenate([each[0] for each in columns]).mean():.5f}"
            tell(0)
        return self._result(text.window_for(scorer), columns, places, seed)

    def _window(
        self,
        scorer: Scorer,
        index: int,
        piece: list[int],
        places: _Places,
        tell: Callable[[float], None],
    ) -> Numbers:
        """f64 `[5, n - 1]`: KL, agreement, both losses, position."""
        rows = zip(
            rows_of(self.reference.logits(piece[:-1])),
            rows_of(scorer.logits(piece[:-1])),
            piece[1:],
            strict=True,
        )
        found = np.empty((5, len(piece) - 1))
        for i, (before, after, target) in enumerate(rows):
            wanted, got = log_softmax(before), log_softmax(after)
            kl = _kl(wanted, got)
            if math.isnan(kl):
                raise RequestError(
                    f"{self.text.name}: both models need finite logits, got NaN at token {i + 1} "
                    f"of window {index}"
                )
            tops = int(before.argmax()), int(after.argmax())
            found[:, i] = kl, tops[0] == tops[1], -wanted[target], -got[target], i + 1
            places.offer(kl, index, piece, i + 1, tops, (wanted, got))
            if i % _TOLD == _TOLD - 1:
                tell((i + 1) / len(piece))
        return found

    def _result(
        self, window: int, columns: list[Numbers], places: _Places, seed: int
    ) -> Divergence:
        units = Units.of([each.shape[1] for each in columns])
        kl, same, reference_loss, loss, position = np.concatenate(columns, axis=1)
        worse = loss - reference_loss
        return Divergence(
            text=self.text.name,
            reference=self.reference.name,
            scored_tokens=len(kl),
            windows=len(columns),
            window=window,
            kl=float(kl.mean()),
            kl_interval=units.interval(kl, seed),
            kl_median=float(np.median(kl)),
            kl_p99=float(np.quantile(kl, 0.99)),
            kl_max=float(kl.max()),
            agreement=float(same.mean()),
            agreement_interval=units.interval(same, seed),
            reference_perplexity=power(float(reference_loss.mean())),
            perplexity=power(float(loss.mean())),
            perplexity_ratio=power(float(worse.mean())),
            perplexity_ratio_interval=units.interval(worse, seed, power),
            resampled=units.name,
            seed=seed,
            ranges=tuple(_ranges(kl, same, position)),
            places=places.sorted(),
        )


def _kl(wanted: Numbers, got: Numbers) -> float:
    """KL in nats of two rows of log-probabilities; what has no probability adds nothing."""
    there = wanted > -np.inf
    if not there.all():
        wanted, got = wanted[there], got[there]
    # Rounding can leave a trace below zero, where no divergence is.
    return float(np.maximum(np.exp(wanted) @ (wanted - got), 0.0))


def _ranges(kl: Numbers, same: Numbers, position: Numbers) -> Iterator[Range]:
    first, last = 1, _FIRST_RANGE
    while first <= position.max():
        inside = (position >= first) & (position <= last)
        part = kl[inside]
        yield Range(
            first,
            min(last, int(position.max())),
            len(part),
            float(part.mean()),
            float(np.quantile(part, 0.99)),
            float(part.max()),
            float(same[inside].mean()),
        )
        first, last = last + 1, last * _RANGE_STEP


@dataclass
class _Places:
    """The places of the largest divergence so far."""

    reference: Scorer
    scorer: Scorer
    heap: list[tuple[float, int, Place]] = field(default_factory=list)
    order: Iterator[int] = field(default_factory=lambda: count(0, -1))
    """Of equal places, the first one stays."""

    def offer(
        self,
        kl: float,
        window: int,
        piece: list[int],
        position: int,
        tops: tuple[int, int],
        logs: tuple[Numbers, Numbers],
    ) -> None:
        if len(self.heap) == _PLACES and kl <= self.heap[0][0]:
            return
        place = Place(
            kl,
            window,
            position,
            self.scorer.decode(piece[max(0, position - _CONTEXT) : position]),
            self.scorer.decode([piece[position]]),
            self.reference.decode([tops[0]]),
            float(np.exp(logs[0][tops[0]])),
            self.scorer.decode([tops[1]]),
            float(np.exp(logs[1][tops[1]])),
        )
        keep = heapq.heappush if len(self.heap) < _PLACES else heapq.heapreplace
        keep(self.heap, (kl, next(self.order), place))

    def sorted(self) -> tuple[Place, ...]:
        return tuple(place for _, _, place in sorted(self.heap, reverse=True))


def check_same_tokens(reference: Scorer, scorer: Scorer, *texts: str) -> None:
    """Raises RequestError unless both models cut `texts` into the same tokens of one vocabulary."""
    who = f"{reference.name} and {scorer.name}"
    if reference.vocab_size != scorer.vocab_size:
        raise RequestError(
            f"{who} need the same vocabulary to be compared token by token, got "
            f"{reference.vocab_size} and {scorer.vocab_size} tokens"
        )
    if reference.bos != scorer.bos:
        raise RequestError(
            f"{who} need to begin a text alike, got the tokens {reference.bos} and {scorer.bos}"
        )
    for text in texts:
        ours, theirs = (each.encode(text, False) for each in (reference, scorer))
        if ours != theirs:
            raise RequestError(f"{who} need the same tokenizer, got {_difference(ours, theirs)}")


def _difference(ours: Sequence[int], theirs: Sequence[int]) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    tokens = ["the end" if at >= len(ids) else f"token {ids[at]}" for ids in (ours, theirs)]
    return f"{tokens[0]} and {tokens[1]} at place {at} of a text"

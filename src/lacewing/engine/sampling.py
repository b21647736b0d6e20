"""SamplingParams and the sampler: from logits `[vocab]` to the next token.

Order: repetition penalty, temperature, top_k, top_p, min_p. Every sequence has its own generator
and draws once per token, so its tokens do not depend on its neighbours in the batch.

Only a handful of the 50,000 to 260,000 tokens are ever candidates. `top` finds them without
sorting the vocabulary; the slow twin that sorts everything is in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lacewing.errors import LacewingError, RequestError

__all__ = ["Sampler", "SamplingParams", "TokenLogprobs", "log_total", "nucleus", "pick", "top"]

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

MAX_LOGPROBS = 100
_LANES = 64  # `top` looks at the maxima over this many strided rows of the vocabulary
_COLDEST = 1e-20  # below it f32 would overflow; the choice is greedy long before
_NUCLEUS_SIZES = (64, 2048, 16384)  # candidates `nucleus` tries before the whole vocabulary
_BLOCK = 512  # weights `pick` adds up at a time


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Raises `RequestError` for a value out of range.

    - `max_tokens`: output tokens at most (>= 1).
    - `temperature`: 0 takes the most likely token (greedy), else logits are divided by it.
    - `top_k`: only the k most likely tokens; 0 is off.
    - `top_p`: the smallest set of most likely tokens whose probability reaches p; 1 is off.
    - `min_p`: only tokens at least `min_p` times as likely as the most likely one; 0 is off.
    - `repetition_penalty`: divides positive, multiplies negative logits of tokens that occurred
      in the prompt or the output; 1 is off. Applies to greedy choice too.
    - `seed`: the same seed gives the same tokens, whatever else is in the batch; None is random.
    - `stop`: a string or strings that end the output; they are not part of the text.
    - `stop_token_ids`: tokens that end the output, beside the model's own end tokens.
    - `ignore_eos`: go on after the model's end tokens (for benchmarks).
    - `logprobs`: None is off; N gives the log-probability of every output token and of the N most
      likely ones, from the model's own distribution (before penalty, temperature and cuts).
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _integer("max_tokens", self.max_tokens, 1)
        _number("temperature", self.temperature, 0.0, math.inf)
        _integer("top_k", self.top_k, 0)
        _number("top_p", self.top_p, 0.0, 1.0, open_below=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_below=True)
        if self.seed is not None:
            _integer("seed", self.seed, 0)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if not isinstance(self.ignore_eos, (bool, np.bool_)):
            raise _wrong("ignore_eos", "True or False", self.ignore_eos)
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _stop_tokens(self.stop_token_ids))

    @property
    def greedy(self) -> bool:
        """Takes the most likely token (after the repetition penalty)."""
        return self.temperature == 0 or self.top_k == 1


def _wrong(name: str, requirement: str, value: Any) -> RequestError:
    return RequestError(f"`SamplingParams.{name}` must be {requirement}, got {value!r}")


def _integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        limit = f">= {low}" if high is None else f"between {low} and {high}"
        raise _wrong(name, f"an integer {limit}", value)


def _number(name: str, value: Any, low: float, high: float, *, open_below: bool = False) -> None:
    kind = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    above = kind and (value > low if open_below else value >= low)  # NaN fails every comparison
    if not above or value > high or math.isinf(value):
        sign = ">" if open_below else ">="
        limit = f"{sign} {low:g}" + ("" if math.isinf(high) else f" and <= {high:g}")
        raise _wrong(name, f"a finite number {limit}", value)


def _stop_strings(stop: Any) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else _tuple(stop)
    if stops is None or not all(isinstance(s, str) and s for s in stops):
        raise _wrong("stop", "a non-empty string or a list of them", stop)
    return stops


def _stop_tokens(ids: Any) -> tuple[int, ...]:
    tokens = _tuple(ids)
    if tokens is None or not all(
        isinstance(t, (int, np.integer)) and not isinstance(t, bool) and t >= 0 for t in tokens
    ):
        raise _wrong("stop_token_ids", "a list of token ids", ids)
    return tuple(int(t) for t in tokens)


def _tuple(value: Any) -> tuple[Any, ...] | None:
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, bytes) else None


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities at one output position, from the model's own distribution."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The most likely tokens and their log-probabilities, best first."""


def log_total(logits: Floats) -> float:
    """log(sum(exp(logits))) of f32 `[vocab]`: what turns a logit into a log-probability."""
    peak = logits.max()
    weights = logits - peak
    np.exp(weights, out=weights)
    return float(peak) + math.log(float(weights.sum(dtype=np.float64)))


def top(logits: Floats, count: int) -> Ids:
    """Ids of the `count` largest of `logits` f32 `[vocab]`: largest first, equal ones by id."""
    ids = np.flatnonzero(logits >= _reach(logits, count))
    order = np.argsort(-logits[ids], kind="stable")
    return ids[order[:count]]


def nucleus(weights: Floats, share: float) -> Ids:
    """Indices, ascending, of the largest of `weights` f32 `[n]`, as few as reach `share` of their
    sum. Of equal weights the earlier ones are taken."""
    mass = share * float(weights.sum(dtype=np.float64))
    for count in (*_NUCLEUS_SIZES, len(weights)):
        ids = np.flatnonzero(weights >= _reach(weights, count))
        values = weights[ids]
        largest = np.sort(values)[::-1]
        cumulative = largest.astype(np.float64).cumsum()
        if cumulative[-1] >= mass:
            break
    before = min(int(cumulative.searchsorted(mass)), len(largest) - 1)
    above = ids[values > largest[before]]
    level = ids[values == largest[before]][: before + 1 - len(above)]
    return np.sort(np.concatenate([above, level]))


def _reach(values: Floats, count: int) -> Any:
    """A value that at least `count` of `values` reach, and not many more.

    The k-th largest maximum over any partition of the values is at most the k-th largest value.
    So one pass of wide maxima replaces a selection over the whole vocabulary.
    """
    size = len(values)
    if count >= size:
        return values.min()
    lanes = min(_LANES, size // (4 * count))
    if lanes > 1:
        size //= lanes
        values = values[: size * lanes].reshape(lanes, size).max(axis=0)
    return np.partition(values, size - count)[size - count]


def pick(weights: Floats, uniform: float) -> int:
    """Index chosen with probability `weights[i] / sum` by `uniform` in [0, 1)."""
    if len(weights) <= _BLOCK:
        cumulative = weights.astype(np.float64).cumsum()
        at = int(cumulative.searchsorted(uniform * cumulative[-1], side="right"))
        return min(at, len(weights) - 1)
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK)).astype(np.float64)
    before = np.concatenate([[0.0], sums.cumsum()])
    target = uniform * before[-1]
    block = min(int(before.searchsorted(target, side="right")) - 1, len(sums) - 1)
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK]
    return block * _BLOCK + pick(inside, min((target - before[block]) / sums[block], 1.0))


class Sampler:
    """Chooses the tokens of one sequence: its parameters, its generator, the tokens it has seen."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int]) -> None:
        self.params = params
        self._rng = None if params.greedy else np.random.default_rng(params.seed)
        self._penalizes = params.repetition_penalty != 1
        self._seen = set(prompt) if self._penalizes else set()
        self._seen_ids = list(self._seen)

    def choose(self, logits: Floats) -> int:
        """The next token from logits f32 `[vocab]` (left as they are).

        Raises `LacewingError` if they are not numbers: the weights, or a bug, are broken then.
        """
        logits = self._penalize(logits)
        best = int(logits.argmax())
        peak = float(logits[best])
        if not math.isfinite(peak):
            raise LacewingError(
                f"logits must be finite, got {peak} at token {best}",
                hint="a weight of the model is not finite or out of range",
            )
        token = best if self._rng is None else self._draw(logits, peak, self._rng.random())
        if self._penalizes and token not in self._seen:
            self._seen.add(token)
            self._seen_ids.append(token)
        return token

    def candidates(self, logits: Floats) -> tuple[Ids, NDArray[np.float64]]:
        """The tokens that `choose` draws from (not greedy), and their probabilities."""
        logits = self._penalize(logits)
        ids, weights = self._weights(logits, float(logits.max()))
        exact = weights.astype(np.float64)
        return np.arange(len(logits)) if ids is None else ids, exact / exact.sum()

    def logprobs(self, logits: Floats, token: int) -> TokenLogprobs:
        """Log-probabilities of `token` and of the most likely ones, from logits f32 `[vocab]`."""
        total = log_total(logits)
        count = self.params.logprobs or 0
        ids = top(logits, count).tolist() if count else []
        best = tuple((int(i), float(logits[i]) - total) for i in ids)
        return TokenLogprobs(token, float(logits[token]) - total, best)

    def _penalize(self, logits: Floats) -> Floats:
        if not self._seen_ids:
            return logits
        penalty = np.float32(self.params.repetition_penalty)
        logits = logits.copy()
        values = logits[self._seen_ids]
        logits[self._seen_ids] = np.where(values > 0, values / penalty, values * penalty)
        return logits

    def _draw(self, logits: Floats, peak: float, uniform: float) -> int:
        ids, weights = self._weights(logits, peak)
        at = pick(weights, uniform)
        return at if ids is None else int(ids[at])

    def _weights(self, logits: Floats, peak: float) -> tuple[Ids | None, Floats]:
        """Candidates (None: the whole vocabulary) and how likely they are; the best one has 1."""
        params = self.params
        ids = None
        if params.top_k and params.top_k < len(logits):
            ids = top(logits, params.top_k)
            logits = logits[ids]
        weights = logits - np.float32(peak)
        weights /= np.float32(max(params.temperature, _COLDEST))
        np.exp(weights, out=weights)
        for kept in self._cuts(weights):
            ids = kept if ids is None else ids[kept]
            weights = weights[kept]
        return ids, weights

    def _cuts(self, weights: Floats) -> Iterator[Ids]:
        kept: Ids | slice = slice(None)
        if self.params.top_p < 1:
            kept = nucleus(weights, self.params.top_p)
            yield kept
        if self.params.min_p > 0:
            yield np.flatnonzero(weights[kept] >= self.params.min_p)

"""From logits to log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from lacewing.errors import RequestError
from lacewing.quality.scorer import Floats, Ids, Scorer

__all__ = ["continuation", "log_softmax", "power", "rows_of", "token_log_probs"]


def log_softmax(row: Floats) -> NDArray[np.float64]:
    """Natural log-probabilities f64 `[vocab]` of logits f32 `[vocab]`."""
    logs = row.astype(np.float64)
    with np.errstate(invalid="ignore"):  # of infinite logits comes NaN, which the callers refuse
        logs -= logs.max()
        logs -= np.log(np.exp(logs).sum())
    return logs


def rows_of(chunks: Iterable[Floats]) -> Iterator[Floats]:
    """The rows of chunks `[rows, vocab]`, one by one."""
    for chunk in chunks:
        yield from chunk


def token_log_probs(chunks: Iterable[Floats], targets: Ids) -> Floats:
    """Natural log-probability f32 `[n]` of `targets`, each by its row of logits."""
    pairs = zip(rows_of(chunks), targets, strict=True)
    return np.array([_log_prob(row, target) for row, target in pairs], np.float32)


def continuation(scorer: Scorer, context: Ids, targets: Ids) -> tuple[float, bool]:
    """(log p(targets | context), whether each of the targets is the most likely token there)."""
    ids = [*context, *targets]
    total, greedy = 0.0, True
    rows = rows_of(scorer.logits(ids[:-1], len(context) - 1))
    for row, target in zip(rows, targets, strict=True):
        total += _log_prob(row, target)
        greedy = greedy and int(row.argmax()) == target
    if math.isnan(total):
        raise RequestError(f"{scorer.name}: needs finite logits, got NaN")
    return total, greedy


def _log_prob(row: Floats, target: int) -> float:
    peak = row.max()
    with np.errstate(invalid="ignore"):  # as above
        total = np.exp(row - peak).sum(dtype=np.float64)
        return float(row[target] - peak - np.log(total))


def power(exponent: float) -> float:
    """e to the `exponent`; infinity where a float cannot hold it."""
    return math.exp(exponent) if exponent < 709 else math.inf

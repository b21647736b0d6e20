"""A language model whose logits are known in advance, for what is counted from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lacewing.errors import RequestError
from lacewing.quality.likelihood import token_log_probs
from lacewing.quality.scorer import Floats, Ids
from tests.engine.fakes import VOCAB, logits_after

Rule = Callable[[list[int]], Floats]
"""Logits `[vocab]` after some tokens."""


class FakeScorer:
    """Tokens are bytes. Logits come from a rule; by default a hash of all tokens so far."""

    def __init__(
        self,
        rule: Rule = logits_after,
        name: str = "fake",
        bos: Sequence[int] = (),
        max_context: int = 256,
        vocab: int = VOCAB,
    ) -> None:
        self.rule = rule
        self.name = name
        self.bos = list(bos)
        self.prefix_token: int | None = 1
        self.max_context = max_context
        self.vocab_size = vocab
        self.rows: list[int] = []
        """Of every chunk that was asked for."""

    def encode(self, text: str, add_special: bool) -> list[int]:
        return [*(self.bos if add_special else []), *text.encode()]

    def decode(self, ids: Ids) -> str:
        return bytes(ids).decode(errors="replace")

    def logits(self, ids: Ids, start: int = 0) -> Iterator[Floats]:
        if not 1 <= len(ids) <= self.max_context or not 0 <= start < len(ids):
            raise RequestError(f"{len(ids)} tokens from {start}")
        for first in range(start, len(ids), 5):
            last = min(first + 5, len(ids))
            self.rows.append(last - first)
            yield np.stack([self.rule(list(ids[: i + 1])) for i in range(first, last)])

    def score(self, ids: Ids) -> Floats:
        return token_log_probs(self.logits(ids[:-1]), ids[1:])

    def generate(self, prompts: Sequence[Ids], count: int) -> list[list[int]]:
        answers = []
        for prompt in prompts:
            tokens = list(prompt)
            while len(tokens) < len(prompt) + count and tokens[-1:] != [0]:
                tokens.append(int(self.rule(tokens).argmax()))
            answers.append(tokens[len(prompt) :])
        return answers


def log_probs(scorer: FakeScorer, ids: Sequence[int]) -> list[float]:
    """Of every token but the first, the long way round."""
    found = []
    for i in range(1, len(ids)):
        row = scorer.rule(list(ids[:i])).astype(np.float64)
        found.append(float(row[ids[i]] - np.log(np.exp(row).sum())))
    return found


def silent(done: float, total: float, text: str) -> None:
    """Nobody watches."""


def louder(tokens: list[int]) -> Floats:
    """Another model than `logits_after`, but like it."""
    other = logits_after([*tokens, 1])
    return np.asarray(logits_after(tokens) + np.float32(0.2) * other, np.float32)

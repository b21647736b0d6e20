"""What a model has to offer to be judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "Ids", "Scorer"]

Floats = NDArray[np.float32]
Ids = Sequence[int]


class Scorer(Protocol):
    """A language model and its tokenizer: `lacewing.engine.scorer.LLMScorer` around the engine,
    `lacewing.nn.scorer.TorchScorer` around a model of transformers.

    A method raises `RequestError` for no tokens, ids outside the vocabulary, and more tokens than
    `max_context`.
    """

    @property
    def name(self) -> str:
        """For messages and tables."""

    @property
    def max_context(self) -> int:
        """Tokens that can be read at once."""

    @property
    def vocab_size(self) -> int:
        """The width of `logits`."""

    @property
    def bos(self) -> list[int]:
        """What the model wants in front of every text: its beginning-of-sequence token, or
        nothing."""

    @property
    def prefix_token(self) -> int | None:
        """What a text is predicted from that has nothing before it: the beginning-of-sequence
        token, wanted or not; without one, an end token."""

    def encode(self, text: str, add_special: bool) -> list[int]:
        """Token ids, behind `bos` if `add_special`; never twice."""

    def decode(self, ids: Ids) -> str:
        """The text of `ids` that go on from others; half a character is U+FFFD."""

    def logits(self, ids: Ids, start: int = 0) -> Iterator[Floats]:
        """Logits of what follows each of the tokens `[start, n)`, in chunks f32 `[rows, vocab]` of
        bounded memory. Calls that begin with the same tokens before `start` may share them."""

    def score(self, ids: Ids) -> Floats:
        """Natural log-probability f32 `[n - 1]` of every token but the first."""

    def generate(self, prompts: Sequence[Ids], count: int) -> list[list[int]]:
        """The `count` most likely tokens after each prompt, one by one; fewer where the model ends
        (the end token is the last one)."""

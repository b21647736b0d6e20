"""The engine as `lacewing.quality` judges it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lacewing.engine.llm import LLM
from lacewing.engine.sampling import SamplingParams
from lacewing.quality.scorer import Floats, Ids

__all__ = ["LLMScorer"]


class LLMScorer:
    """A `lacewing.quality.Scorer` around an `LLM`."""

    def __init__(self, llm: LLM, name: str = "the model") -> None:
        self.llm = llm
        self.name = name

    @property
    def max_context(self) -> int:
        return self.llm.max_context

    @property
    def vocab_size(self) -> int:
        return self.llm.spec.vocab_size

    @property
    def bos(self) -> list[int]:
        return self.llm.text.encode("")

    @property
    def prefix_token(self) -> int | None:
        bos = self.llm.text.bos_token_id
        return min(self.llm.text.eos_token_ids, default=None) if bos is None else bos

    def encode(self, text: str, add_special: bool) -> list[int]:
        return self.llm.text.encode(text, add_special=add_special)

    def decode(self, ids: Ids) -> str:
        return self.llm.text.decode(ids, skip_special=False, continues=True)

    def logits(self, ids: Ids, start: int = 0) -> Iterator[Floats]:
        return self.llm.logits(ids, start)

    def score(self, ids: Ids) -> Floats:
        return self.llm.score(ids)

    def generate(self, prompts: Sequence[Ids], count: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=count, temperature=0.0)
        return [result.token_ids for result in self.llm.generate(list(prompts), params)]

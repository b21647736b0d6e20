"""A causal language model of transformers as `lacewing.quality` judges it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lacewing.errors import LacewingError, RequestError
from lacewing.quality.likelihood import token_log_probs
from lacewing.quality.scorer import Floats, Ids

__all__ = ["TorchScorer", "open_scorer"]

_LOGITS_BYTES = 64 << 20  # held at once
_CONTEXT = 4096  # where the configuration sets no limit


class TorchScorer:
    """A `lacewing.quality.Scorer` around a causal language model and its tokenizer, as they are or
    after `replace_linear`; one that changes later needs a new scorer. The model is put into `eval`
    mode.

    max_context: tokens read at once; None is what the configuration says.
    """

    def __init__(
        self, model: Any, tokenizer: Any, name: str = "the model", max_context: int | None = None
    ) -> None:
        config = model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        self.name = name
        self.max_context: int = max_context or limit or _CONTEXT
        self.vocab_size: int = config.vocab_size
        self.bos: list[int] = _bos(tokenizer)
        first = [tokenizer.bos_token_id, tokenizer.eos_token_id]
        self.prefix_token: int | None = next((t for t in first if t is not None), None)
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._ends = _ends(model, tokenizer)
        # Of tokens that are only read, the head need not see all.
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._only_last = {"logits_to_keep": 1} if keeps else {}
        self._read: tuple[list[int], Any] = ([], None)  # tokens, and their keys and values

    def encode(self, text: str, add_special: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special)
        twice = bool(self.bos) and ids[:2] == self.bos * 2
        return ids[1:] if add_special and twice else ids

    def decode(self, ids: Ids) -> str:
        text: str = self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        return text

    def logits(self, ids: Ids, start: int = 0) -> Iterator[Floats]:
        return self._logits(self._checked(ids, start), start)

    def score(self, ids: Ids) -> Floats:
        if len(ids) < 2:
            raise RequestError(f"{self.name}: `score` takes at least 2 tokens, got {len(ids)}")
        return token_log_probs(self.logits(ids[:-1]), ids[1:])

    def generate(self, prompts: Sequence[Ids], count: int) -> list[list[int]]:
        return [self._generate(self._checked(prompt), count) for prompt in prompts]

    def _generate(self, prompt: list[int], count: int) -> list[int]:
        """Step by step: what the model's own settings want of `generate` is not greedy."""
        if len(prompt) >= self.max_context:
            raise RequestError(
                f"{self.name}: a prompt must be shorter than the context of {self.max_context} "
                f"tokens, got {len(prompt)}"
            )
        cache, read = self._after(prompt[:-1]), prompt[-1:]
        answer: list[int] = []
        while len(answer) < min(count, self.max_context - len(prompt)):
            logits, cache = self._forward(read, cache)
            read = [int(logits[0, -1].argmax())]
            answer += read
            if read[0] in self._ends:
                break
        return answer

    def _logits(self, ids: list[int], start: int) -> Iterator[Floats]:
        cache = self._after(ids[:start])
        for first in range(start, len(ids), self._rows):
            logits, cache = self._forward(ids[first : first + self._rows], cache)
            yield logits[0].float().cpu().numpy()

    def _after(self, ids: list[int]) -> Any:
        """The cache that has read `ids`, the caller's own; kept for a next call with the same."""
        if not ids:
            return None
        if self._read[0] != ids:
            cache = None
            for first in range(0, len(ids), self._rows):
                part = ids[first : first + self._rows]
                _, cache = self._forward(part, cache, **self._only_last)
            self._read = ids, cache
        return copy.deepcopy(self._read[1])

    @property
    def _rows(self) -> int:
        return max(16, _LOGITS_BYTES // (4 * self.vocab_size))

    def _forward(self, ids: list[int], cache: Any, **options: int) -> tuple[torch.Tensor, Any]:
        """Logits `[1, rows, vocab]` and the cache with `ids` in it."""
        with torch.inference_mode():
            found = self._model(
                input_ids=self._tensor(ids), past_key_values=cache, use_cache=True, **options
            )
        cache = getattr(found, "past_key_values", None)
        if cache is None:
            raise RequestError(
                f"{self.name}: needs a model with a cache of keys and values "
                f"(`past_key_values`), {type(self._model).__name__} returns none"
            )
        return found.logits, cache

    def _checked(self, ids: Ids, start: int = 0) -> list[int]:
        tokens = [int(token) for token in ids]
        if not 1 <= len(tokens) <= self.max_context:
            raise RequestError(
                f"{self.name} reads 1 to {self.max_context} tokens (the context), got {len(tokens)}"
            )
        if not 0 <= start < len(tokens):
            raise RequestError(f"`start` must be in [0, {len(tokens)}), the tokens, got {start}")
        if min(tokens) < 0 or max(tokens) >= self.vocab_size:
            raise RequestError(
                f"{self.name}: token ids must be in [0, {self.vocab_size}), the vocabulary, "
                f"got {min(tokens)} to {max(tokens)}"
            )
        return tokens

    def _tensor(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor([ids], device=self._model.device)


def _bos(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts in front of every text, if it does."""
    first: list[int] = tokenizer.encode("", add_special_tokens=True)[:1]
    return first if first == [tokenizer.bos_token_id] else []


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer, as the tokenizer and the model's settings have them."""
    settings = getattr(model, "generation_config", None)
    more = getattr(settings, "eos_token_id", None)
    found = [*(more if isinstance(more, (list, tuple)) else [more]), tokenizer.eos_token_id]
    return frozenset(token for token in found if token is not None)


def open_scorer(
    path: Path, format: str | None = None, max_context: int | None = None
) -> TorchScorer:
    """The language model of a Hugging Face directory (its weights in safetensors), in float32; no
    code of it is run.

    format: pack the linear layers into it (`replace_linear`). max_context: as in `TorchScorer`,
    never more than the configuration says. Raises RequestError where
    transformers cannot open it, LacewingError where it is absent.
    """
    try:
        import transformers
    except ImportError as error:
        raise LacewingError(
            f"{path}: a Hugging Face directory needs transformers, which is not installed",
            hint="pip install transformers",
        ) from error
    if not path.is_dir():
        raise RequestError(f"{path}: with PyTorch, a model is a Hugging Face directory")
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        safe = {"local_files_only": True, "trust_remote_code": False}
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **safe)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, **safe
        )
    except Exception as error:  # a stranger's files make it, and what it calls, raise anything
        raise RequestError(f"{path}: transformers cannot open it: {error}") from error
    if format is not None:
        from lacewing.nn.replace import replace_linear

        replace_linear(model, format)
    found = TorchScorer(model, tokenizer, path.name)
    if max_context is not None:
        found.max_context = min(found.max_context, max_context)
    return found

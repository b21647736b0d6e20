"""Sequence: one request on its way from prompt to finish."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal

from lacewing.engine.sampling import Sampler, SamplingParams, TokenLogprobs
from lacewing.engine.stops import Writer
from lacewing.kv.blocks import BLOCK_SIZE, Tables, blocks_for
from lacewing.kv.choice import MERGE_ROWS

__all__ = ["FinishReason", "Sequence", "Timings"]

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Timings:
    """How long a request took. Times in seconds, rates in tokens per second."""

    prompt_tokens: int
    output_tokens: int
    ttft: float
    """From the request to its first token (waiting in the queue included)."""
    total: float
    """From the request to its last token."""

    @property
    def tokens_per_second(self) -> float:
        """Decode rate: tokens after the first over the time after the first; 0 if there is none."""
        decode = self.total - self.ttft
        return (self.output_tokens - 1) / decode if self.output_tokens > 1 and decode > 0 else 0.0

    @property
    def prompt_tokens_per_second(self) -> float:
        """Prompt tokens over the time to the first token."""
        return self.prompt_tokens / self.ttft if self.ttft > 0 else 0.0


@dataclass(eq=False)
class Sequence:
    """One request. `tokens` (prompt, then output) is the whole truth: everything in the KV cache
    can be computed again from it, which is what preemption does."""

    tokens: list[int]
    params: SamplingParams
    sampler: Sampler
    writer: Writer | None
    """Turns output tokens into text; None where nobody reads it."""
    max_tokens: int
    """Output tokens at which it ends: the request's limit or what the context leaves."""
    prompt_tokens: int = 0
    keep: int = 0
    """Tokens to which the prompt's cache shrinks when it is complete; 0: it stays."""
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    merged: int = 0
    """By how many tokens it has shrunk: token t is in the cache at t - merged."""
    tables: Tables = field(default_factory=Tables)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    """The text so far, in the pieces in which it may be shown."""
    preemptions: int = 0
    arrived: float = field(default_factory=perf_counter)
    first_token: float = 0.0
    last_token: float = 0.0

    @classmethod
    def start(
        cls,
        prompt: Ids[int],
        params: SamplingParams,
        writer: Writer | None,
        max_context: int,
        keep: int = 0,
    ) -> Sequence:
        """A new request; `prompt` is already checked to leave room for an output token."""
        tokens = list(prompt)
        room = min(params.max_tokens, max_context - len(tokens))
        sampler = Sampler(params, tokens)
        return cls(tokens, params, sampler, writer, room, prompt_tokens=len(tokens), keep=keep)

    @property
    def output(self) -> list[int]:
        """The tokens generated so far, the ending one included."""
        return self.tokens[self.prompt_tokens :]

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def room(self, tokens: int) -> int:
        """Tokens for which the cache needs blocks while the sequence is computed up to `tokens`:
        when its prompt is merged, what it was and what stays are both there."""
        if self.merged or not self.keep:
            return tokens - self.merged
        prompt = blocks_for(self.prompt_tokens) * BLOCK_SIZE
        return max(prompt + self.keep, tokens - (self.prompt_tokens - self.keep))

    def rows(self, most: int) -> int:
        """Rows of its next chunk, `most` being left or fitting. A prompt that is to be merged ends
        a chunk, with its last `MERGE_ROWS` rows in it, whether they fit or not."""
        left = self.prompt_tokens - self.computed
        if not self.keep or left <= 0 or left - most >= MERGE_ROWS:
            return most
        return left if left <= max(most, MERGE_ROWS) else left - MERGE_ROWS

    def forget(self) -> None:
        """Nothing of it is in the cache any more."""
        self.computed = self.merged = 0

    def append(self, token: int) -> None:
        """Takes the next output token and its time."""
        self.tokens.append(token)
        self.last_token = perf_counter()
        if not self.first_token:
            self.first_token = self.last_token

    def write(self, token: int | None) -> bool:
        """Adds the text of an output token (None: what was held back); True at a stop string."""
        if self.writer is None:
            return False
        text, met = self.writer.flush() if token is None else self.writer.push(token)
        if text:
            self.pieces.append(text)
        return met

    def timings(self) -> Timings:
        """What it took so far."""
        return Timings(
            prompt_tokens=self.prompt_tokens,
            output_tokens=len(self.tokens) - self.prompt_tokens,
            ttft=max(self.first_token - self.arrived, 0.0),
            total=max(self.last_token - self.arrived, 0.0),
        )

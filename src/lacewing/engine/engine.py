"""Engine: requests in, steps, text out. One thread at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from collections.abc import Sequence as Ids
from operator import index

import numpy as np
from numpy.typing import NDArray

from lacewing.engine.runner import Runner
from lacewing.engine.sampling import Sampler, SamplingParams, log_total
from lacewing.engine.scheduler import Chunk, Scheduler
from lacewing.engine.sequence import FinishReason, Sequence
from lacewing.engine.stops import Decoder, Writer
from lacewing.errors import RequestError
from lacewing.kv.blocks import BLOCK_SIZE, BlockManager
from lacewing.kv.choice import MERGE_ROWS, kept_tokens

__all__ = ["Engine", "Logits"]

Logits = Generator[NDArray[np.float32], None, None]
"""Chunks f32 `[rows, vocab]`."""

_SCORE_BYTES = 64 << 20  # of logits that `score` holds at once


class Engine:
    """Drives the scheduler and the runner.

    - `runner`: the model.
    - `new_decoder`: makes the token-to-text decoder of one sequence.
    - `eos_token_ids`: tokens that end an output.
    - `token_budget`: tokens computed in one step; `max_sequences`: sequences decoding together.
    """

    def __init__(
        self,
        runner: Runner,
        new_decoder: Callable[[], Decoder],
        eos_token_ids: Collection[int] = (),
        token_budget: int = 512,
        max_sequences: int = 64,
    ) -> None:
        self.runner = runner
        blocks = BlockManager(runner.stores, runner.step_tokens)
        self.scheduler = Scheduler(blocks, token_budget, max_sequences)
        self._new_decoder = new_decoder
        self._eos = frozenset(eos_token_ids)
        # What `logits` has read last. It is no request: a step takes its blocks back.
        self._held = Sequence([], SamplingParams(), Sampler(SamplingParams(), []), None, 0)

    def check(self, prompt: Ids[int]) -> list[int]:
        """The prompt as a list of ints. Raises `RequestError` if it cannot be served: empty,
        token ids outside the vocabulary, no room for an output token."""
        tokens = self._check_ids(prompt)
        limit = self.runner.max_context
        if len(tokens) >= limit:
            raise RequestError(
                f"the prompt must be shorter than the context of {limit} tokens, "
                f"got {len(tokens)} tokens",
                hint="shorten it, or open the model with a larger `max_context`",
            )
        return tokens

    def request(self, prompt: Ids[int], params: SamplingParams) -> Sequence:
        """A new request, not queued yet. Raises `RequestError` as `check` does."""
        tokens = self.check(prompt)
        writer = Writer(self._new_decoder(), params.stop)
        keep = kept_tokens(len(tokens), self.runner.merge)
        return Sequence.start(tokens, params, writer, self.runner.max_context, keep)

    def add(self, sequence: Sequence) -> None:
        """Queues a request; `step` works on it until it is finished or aborted."""
        self.scheduler.add(sequence)

    def step(self) -> None:
        """Computes one step and hands every sequence that got a token its text.

        Whatever interrupts it (Ctrl-C, an error of the model) leaves the engine usable: all
        sequences are computed again from their tokens.
        """
        self._let_go()
        try:
            chunks = self.scheduler.schedule()
            if not chunks:
                return
            logits = self.runner.step(chunks)
            self.scheduler.commit(chunks)
            for sequence, row in zip(
                (c.sequence for c in chunks if c.samples), logits, strict=True
            ):
                self._advance(sequence, row)
        except BaseException:
            self.scheduler.preempt_all()
            raise

    def abort(self, sequence: Sequence) -> None:
        """Ends a request where it is and frees its blocks. Finished already: no change."""
        if not sequence.finished:
            sequence.finish_reason = "abort"
            self.scheduler.remove(sequence)

    def score(self, tokens: Ids[int]) -> NDArray[np.float32]:
        """Log-probability f32 `[n - 1]` of every token but the first, given those before it.

        Nothing is a prompt here: with `merge`, nothing is merged. Memory is bounded: some 64 MiB of
        logits at a time. Raises `RequestError` for fewer than two tokens, more than the context
        holds, ids outside the vocabulary.
        """
        ids = self._check_ids(tokens)
        if not 2 <= len(ids) <= self.runner.max_context:
            raise RequestError(
                f"`score` takes 2 to {self.runner.max_context} tokens (the context), "
                f"got {len(ids)}",
                hint="score a longer text in windows",
            )
        try:
            rows = (row for chunk in self._logits(ids[:-1], 0) for row in chunk)
            scores = [float(row[t]) - log_total(row) for row, t in zip(rows, ids[1:], strict=True)]
            return np.array(scores, np.float32)
        finally:
            self._let_go()

    def logits(self, tokens: Ids[int], start: int = 0) -> Logits:
        """Logits of what follows each of the tokens `[start, n)`: f32 chunks `[rows, vocab]`.

        The tokens before `start` are the prompt: with `merge`, they are merged when they are
        complete, and what follows reads what is left of them; with `start` 0, nothing is merged.
        Memory is bounded as in `score`. Keys and values of the last call stay in the cache until
        the next step, so tokens before `start` that both calls begin with are not computed again;
        closing the iterator before its end lets go of them. Steps, and other calls, in between
        chunks are fine. Requests under way are never computed again for it: where they leave too
        few blocks, a chunk waits for them and runs their steps.

        Raises `RequestError` for no tokens, more than the context holds, ids outside the
        vocabulary, `start` outside of the tokens.
        """
        ids = self._check_ids(tokens)
        if len(ids) > self.runner.max_context:
            raise RequestError(
                f"`logits` takes 1 to {self.runner.max_context} tokens (the context), "
                f"got {len(ids)}",
                hint="read a longer text in windows",
            )
        if not 0 <= start < len(ids):
            raise RequestError(f"`start` must be in [0, {len(ids)}), the tokens, got {start}")
        return self._logits(ids, start)

    def _logits(self, ids: list[int], start: int) -> Logits:
        rows = max(BLOCK_SIZE, _SCORE_BYTES // (4 * self.runner.vocab_size))
        rows = min(rows, self.runner.step_tokens)
        try:
            for first in range(start, len(ids), rows):
                self._recall(ids, first, start)
                yield self._read(first, min(first + rows, len(ids)))
        except GeneratorExit:
            if self._held.tokens is ids:  # and not those of another call
                self._let_go()
            raise

    def _recall(self, ids: list[int], first: int, start: int) -> None:
        """Keeps what `ids` up to `first` have in the cache from the call before, if it is what the
        prompt `ids[:start]` leaves there."""
        held = self._held
        keep = kept_tokens(start, self.runner.merge)
        shared = _shared(held.tokens[: held.computed], ids[:first])
        if keep and not held.merged:  # the queries that merge it are to be computed
            shared = min(shared, start - MERGE_ROWS)
        same = start == held.prompt_tokens <= shared
        blocks = self.scheduler.blocks
        rewinds = shared == held.computed or blocks.may_rewind(held.tables, shared - held.merged)
        if not rewinds or (held.merged and not same):
            self._let_go()
        held.tokens, held.prompt_tokens, held.keep = ids, start, keep
        held.computed = min(shared, held.computed)
        blocks.rewind(held.tables, held.computed - held.merged)

    def _read(self, first: int, stop: int) -> NDArray[np.float32]:
        """Logits after the tokens `[first, stop)` of what is held; those before them get into the
        cache first, where they are not there."""
        held = self._held
        try:
            while not self.scheduler.blocks.reserve(held.tables, held.room(stop)):
                self.step()  # what was asked before ends, and gives its blocks back
            while held.computed < first:
                most = min(
                    first - held.computed, self.scheduler.token_budget, self.runner.step_tokens
                )
                self._run(Chunk(held, held.computed, held.rows(most), False))
            return self._run(Chunk(held, first, stop - first, False), every_row=True)
        except BaseException:
            self._let_go()
            self.scheduler.preempt_all()
            raise

    def _run(self, chunk: Chunk, every_row: bool = False) -> NDArray[np.float32]:
        self.scheduler.place(chunk)
        logits = self.runner.step([chunk], every_row=every_row)
        self.scheduler.commit([chunk])
        return logits

    def _let_go(self) -> None:
        """Forgets what `logits` has left in the cache."""
        self._held.forget()
        self.scheduler.blocks.release(self._held.tables)

    def _check_ids(self, tokens: Ids[int]) -> list[int]:
        try:
            if isinstance(tokens, (str, bytes)):
                raise TypeError(f"got {type(tokens).__name__}")
            ids = [index(token) for token in tokens]
        except TypeError as error:
            raise RequestError(
                f"a prompt must be a string or a list of token ids: {error}"
            ) from error
        if not ids:
            raise RequestError("the prompt is empty: at least one token is needed")
        if min(ids) < 0 or max(ids) >= self.runner.vocab_size:
            wrong = next(t for t in ids if not 0 <= t < self.runner.vocab_size)
            raise RequestError(
                f"token ids must be in [0, {self.runner.vocab_size}), the vocabulary, got {wrong}"
            )
        return ids

    def _advance(self, sequence: Sequence, logits: NDArray[np.float32]) -> None:
        """Chooses the next token, and finishes the sequence if it is the last one."""
        params = sequence.params
        token = sequence.sampler.choose(logits)
        if params.logprobs is not None:
            sequence.logprobs.append(sequence.sampler.logprobs(logits, token))
        sequence.append(token)
        if token in params.stop_token_ids or (token in self._eos and not params.ignore_eos):
            self._finish(sequence, "stop")
            return
        if sequence.write(token):
            self._finish(sequence, "stop", flush=False)
        elif len(sequence.tokens) - sequence.prompt_tokens >= sequence.max_tokens:
            self._finish(sequence, "length")

    def _finish(self, sequence: Sequence, reason: FinishReason, *, flush: bool = True) -> None:
        if flush and sequence.write(None):
            reason = "stop"  # a stop string came out of the bytes held back
        sequence.finish_reason = reason
        self.scheduler.remove(sequence)


def _shared(tokens: Ids[int], others: Ids[int]) -> int:
    """How many tokens both begin with."""
    pairs = zip(tokens, others, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(others)))

"""Scheduler: which tokens of which sequences the next step computes.

Continuous batching. A step computes, for some of the running sequences, the next tokens that are
not yet in the KV cache; a sequence whose last token is among them gets a new one. So prompt,
piece of a prompt, decoding and recomputing after preemption are all the same thing: a chunk.

- Decoding sequences come first, one token each, all in one batch; prompts share what the token
  budget leaves, oldest first.
- A sequence is admitted when blocks for all its tokens are free, and takes them at once, so a
  prompt never gets stuck half way. Only decoding asks for more.
- A prompt that is to be merged ends a chunk that has its last `MERGE_ROWS` rows, whatever the
  budget, also when it is computed again: so the same is merged however the work is cut.
- When blocks run out, the sequence admitted last gives its blocks back and waits, first in the
  queue, to be computed again. The oldest one is never preempted and always fits alone, therefore
  every sequence finishes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from lacewing.engine.sequence import Sequence
from lacewing.kv.blocks import BlockManager

__all__ = ["Chunk", "Scheduler"]


@dataclass(slots=True)
class Chunk:
    """Tokens `[start, start + count)` of a sequence, computed in the next step."""

    sequence: Sequence
    start: int
    count: int
    samples: bool
    """The chunk holds the sequence's last token: its logits choose the next one."""

    @property
    def cached(self) -> int:
        """Tokens of the sequence that are in the cache before the step."""
        return self.start - self.sequence.merged

    @property
    def keep(self) -> int:
        """Tokens to which the step merges the sequence's prompt; 0: it does not."""
        ends = self.start + self.count == self.sequence.prompt_tokens
        return self.sequence.keep if ends else 0


class Scheduler:
    """Queue, running set and preemption over a `BlockManager`.

    `token_budget`: tokens of one step; `max_sequences`: sequences decoding together (never more
    than the budget). Any single sequence must fit into the blocks: the caller checks it.
    """

    def __init__(
        self, blocks: BlockManager, token_budget: int = 512, max_sequences: int = 64
    ) -> None:
        self.blocks = blocks
        self.token_budget = token_budget
        self.max_sequences = min(max_sequences, token_budget)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def __len__(self) -> int:
        """Sequences not finished."""
        return len(self.waiting) + len(self.running)

    def add(self, sequence: Sequence) -> None:
        """Puts a new sequence last in the queue."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out (finished or aborted) and frees its blocks. Unknown: no change."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.blocks.release(sequence.tables)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks, at most one per sequence. Empty only if nothing is left."""
        chunks, preempted = self._decode()
        if not preempted:  # what was just taken away must not be handed out again at once
            self._admit()
        self._prefill(chunks)
        for chunk in chunks:
            self.place(chunk)
        return chunks

    def place(self, chunk: Chunk) -> None:
        """Gives a chunk's tokens their blocks, of those that its sequence has reserved."""
        tables, start = chunk.sequence.tables, chunk.cached
        self.blocks.place(tables, start, start + chunk.count)
        if chunk.keep:
            self.blocks.begin_merge(tables, chunk.keep)

    def commit(self, chunks: list[Chunk]) -> None:
        """The step was computed: its tokens are in the cache."""
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.computed += chunk.count
            if chunk.keep:
                sequence.merged = sequence.prompt_tokens - chunk.keep
                self.blocks.end_merge(sequence.tables, sequence.room(len(sequence.tokens)))

    def preempt_all(self) -> None:
        """Takes every block back; all sequences wait to be computed again, in their old order.

        Also the way out of an interrupted step, whatever state it left: ownership of the blocks is
        rebuilt from nothing.
        """
        for sequence in reversed(self.running):
            if sequence not in self.waiting:
                self.waiting.appendleft(sequence)
        self.running.clear()
        for sequence in self.waiting:
            sequence.forget()
        self.blocks.reset([sequence.tables for sequence in self.waiting])

    def _decode(self) -> tuple[list[Chunk], bool]:
        chunks: list[Chunk] = []
        preempted = False
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            length = len(sequence.tokens)
            if sequence.computed == length - 1:
                if not self.blocks.reserve(sequence.tables, sequence.room(length), 1):
                    self._preempt()  # the last one: `sequence` itself, or one not looked at yet
                    preempted = True
                    continue
                chunks.append(Chunk(sequence, length - 1, 1, True))
            index += 1
        return chunks, preempted

    def _preempt(self) -> None:
        sequence = self.running.pop()
        self.blocks.release(sequence.tables)
        sequence.forget()
        sequence.preemptions += 1
        self.waiting.appendleft(sequence)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            if not self.blocks.reserve(sequence.tables, sequence.room(len(sequence.tokens))):
                return
            self.running.append(self.waiting.popleft())

    def _prefill(self, chunks: list[Chunk]) -> None:
        budget = self.token_budget - len(chunks)
        decoding = {id(chunk.sequence) for chunk in chunks}
        for sequence in self.running:
            if budget <= 0:
                return
            if id(sequence) in decoding:
                continue
            left = len(sequence.tokens) - sequence.computed
            count = sequence.rows(min(left, budget, self.blocks.step_tokens))
            chunks.append(Chunk(sequence, sequence.computed, count, count == left))
            budget -= count

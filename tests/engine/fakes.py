"""A native model and a tokenizer that are small, deterministic, and check what they are given."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lacewing.engine.engine import Engine
from lacewing.engine.llm import LLM
from lacewing.engine.runner import Runner
from lacewing.engine.sampling import SamplingParams
from lacewing.engine.sequence import Sequence
from lacewing.kv.blocks import BLOCK_SIZE, Store
from lacewing.kv.choice import MERGE_ROWS

VOCAB = 256  # one token per byte
EOS = 0


class FakeModel:
    """Keeps tokens where a real model keeps keys and values. The logits of a row depend on every
    token that its sequence has in the cache, read through the block table: a wrong slot, a block
    used twice or a token not computed again after preemption changes what comes out."""

    def __init__(self, kv_blocks: int, vocab: int = VOCAB) -> None:
        self.cache = np.full(kv_blocks * BLOCK_SIZE, -1, np.int64)
        self.vocab = vocab
        self.steps: list[list[int]] = []  # tokens of each sequence, per step
        self.shrunk: dict[int, int] = {}  # by how many tokens, by a sequence's first block
        self.fail_at: int | None = None
        self.error: BaseException = RuntimeError("the fake model was told to fail")

    def step(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        cached: NDArray[np.int32],
        block_tables: NDArray[np.int32],
        cu_seqlens: NDArray[np.int32],
        logit_rows: NDArray[np.int32],
        *merges: NDArray[np.int32],
    ) -> NDArray[np.float32]:
        for array in (tokens, positions, cached, block_tables, cu_seqlens, logit_rows, *merges):
            assert array.dtype == np.int32
            assert array.flags.c_contiguous
        assert len(tokens) == len(positions) == cu_seqlens[-1]
        (tables,) = block_tables
        for table, at, length in zip(tables, cu_seqlens, cached, strict=False):
            if length == 0:
                self.shrunk.pop(int(table[0]), None)
            assert length + self.shrunk.get(int(table[0]), 0) == positions[at]
        owner = np.repeat(np.arange(len(cu_seqlens) - 1), np.diff(cu_seqlens))
        places = positions - (positions[cu_seqlens[:-1]] - cached)[owner]
        slots = tables[owner, places // BLOCK_SIZE] * BLOCK_SIZE + places % BLOCK_SIZE
        assert len(set(slots.tolist())) == len(slots), "a slot is written twice in one step"
        if self.fail_at is not None and len(self.steps) >= self.fail_at:
            self.fail_at = None
            raise self.error
        self.steps.append(np.diff(cu_seqlens).tolist())
        self.cache[slots] = tokens
        rows = [self._row(tables[owner[r]], int(places[r])) for r in logit_rows]
        if merges:
            self._merge(tables, cached, np.diff(cu_seqlens), *merges)
        return np.array(rows, np.float32).reshape(len(rows), self.vocab)

    def _row(self, table: NDArray[np.int32], place: int) -> NDArray[np.float32]:
        return logits_after(self._history(table, place + 1), self.vocab)

    def _slots(self, table: NDArray[np.int32], count: int) -> NDArray[np.int32]:
        where = np.arange(count)
        return table[where // BLOCK_SIZE] * BLOCK_SIZE + where % BLOCK_SIZE

    def _history(self, table: NDArray[np.int32], count: int) -> list[int]:
        found: list[int] = self.cache[self._slots(table, count)].tolist()
        return found

    def _merge(
        self,
        tables: NDArray[np.int32],
        cached: NDArray[np.int32],
        rows: NDArray[np.int64],
        keep: NDArray[np.int32],
        merged_tables: NDArray[np.int32],
    ) -> None:
        used: set[int] = set()
        for table, count in zip(tables, cached + rows, strict=True):
            used |= set(table[: -(-count // BLOCK_SIZE)].tolist())
        for b in np.flatnonzero(keep):
            assert rows[b] >= MERGE_ROWS, "the queries that matter are not all in the step"
            count, stays = int(cached[b] + rows[b]), int(keep[b])
            blocks = merged_tables[b, : -(-stays // BLOCK_SIZE)].tolist()
            assert used.isdisjoint(blocks), "what stays overwrites what is merged"
            used |= set(blocks)
            merged = merged_after(self._history(tables[b], count), stays)
            self.cache[self._slots(merged_tables[b], stays)] = merged
            self.shrunk[blocks[0]] = count - stays


def logits_after(tokens: list[int], vocab: int = VOCAB) -> NDArray[np.float32]:
    """The fake model's logits after `tokens`."""
    digest = hashlib.sha256(np.array(tokens, np.int64).tobytes()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    return rng.standard_normal(vocab).astype(np.float32) * 3


def merged_after(prompt: list[int], keep: int) -> list[int]:
    """What the fake model keeps of a prompt: `keep` numbers that depend on all of it."""
    rng = np.random.default_rng([*prompt, keep])
    merged: list[int] = rng.integers(1 << 20, 1 << 30, keep).tolist()
    return merged


class ScriptedModel(FakeModel):
    """Says `script`, token by token, after a prompt of any length of tokens above 0."""

    def __init__(self, kv_blocks: int, script: list[int], prompt: int) -> None:
        super().__init__(kv_blocks)
        self.script = script
        self.prompt = prompt

    def _row(self, table: NDArray[np.int32], place: int) -> NDArray[np.float32]:
        row = np.zeros(self.vocab, np.float32)
        at = place + 1 - self.prompt
        row[self.script[at] if at < len(self.script) else EOS] = 10
        return row


class ByteDecoder:
    """Bytes to text; half a character waits."""

    def __init__(self) -> None:
        self.held = b""

    def push(self, token: int) -> str:
        self.held += bytes([token])
        try:
            text = self.held.decode()
        except UnicodeDecodeError as error:
            if error.end < len(self.held) or error.reason != "unexpected end of data":
                return self.flush()
            return ""
        self.held = b""
        return text

    def flush(self) -> str:
        held, self.held = self.held, b""
        return held.decode(errors="replace")


class FakeText:
    """A tokenizer whose tokens are bytes."""

    eos_token_ids = (EOS,)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: Any) -> list[int]:
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages))

    def stream_decoder(self, continues: bool = False) -> ByteDecoder:
        assert continues, "an answer continues its prompt"
        return ByteDecoder()


def fake_engine(
    kv_blocks: int = 64,
    max_context: int = 256,
    model: FakeModel | None = None,
    merge: float | None = None,
    **options: int,
) -> Engine:
    model = model or FakeModel(kv_blocks)
    runner = Runner(model, model.vocab, max_context, [Store(kv_blocks)], merge=merge)
    return Engine(runner, ByteDecoder, (EOS,), **options)


def fake_llm(
    kv_blocks: int = 64, max_context: int = 256, model: FakeModel | None = None, **options: int
) -> LLM:
    model = model or FakeModel(kv_blocks)
    runner = Runner(model, model.vocab, max_context, [Store(kv_blocks)])
    return LLM.from_parts(runner, FakeText(), **options)


def ask(engine: Engine, prompt: list[int], params: SamplingParams) -> Sequence:
    """Queues a request."""
    sequence = engine.request(prompt, params)
    engine.add(sequence)
    return sequence


def said(text: str, prompt: str = "hi", ends: bool = True, **options: int) -> LLM:
    """An LLM that answers `text` to `prompt`."""
    script = list(text.encode()) + ([EOS] if ends else [])
    return fake_llm(64, 256, ScriptedModel(64, script, len(prompt.encode())), **options)


def continuation(
    prompt: list[int], count: int, ignore_eos: bool = False, keep: int = 0
) -> list[int]:
    """What the fake model says greedily, computed without an engine. keep: tokens that stay of the
    prompt (0: all)."""
    tokens: list[int] = []
    past = prompt
    while len(tokens) < count:
        tokens.append(int(logits_after([*past, *tokens]).argmax()))
        past = merged_after(prompt, keep) if keep else prompt
        if tokens[-1] == EOS and not ignore_eos:
            break
    return tokens

"""A native model and a tokenizer that are small, deterministic, and check what they are given."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lacewing.engine.blocks import BLOCK_SIZE, Store
from lacewing.engine.engine import Engine
from lacewing.engine.llm import LLM
from lacewing.engine.runner import Runner
from lacewing.engine.sampling import SamplingParams
from lacewing.engine.sequence import Sequence

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
    ) -> NDArray[np.float32]:
        for array in (tokens, positions, cached, block_tables, cu_seqlens, logit_rows):
            assert array.dtype == np.int32
            assert array.flags.c_contiguous
        assert len(tokens) == len(positions) == cu_seqlens[-1]
        assert cached.tolist() == [positions[at] for at in cu_seqlens[:-1]]
        (tables,) = block_tables
        owner = np.repeat(np.arange(len(cu_seqlens) - 1), np.diff(cu_seqlens))
        slots = tables[owner, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        assert len(set(slots.tolist())) == len(slots), "a slot is written twice in one step"
        if self.fail_at is not None and len(self.steps) >= self.fail_at:
            self.fail_at = None
            raise self.error
        self.steps.append(np.diff(cu_seqlens).tolist())
        self.cache[slots] = tokens
        rows = [self._row(tables[owner[r]], int(positions[r])) for r in logit_rows]
        return np.array(rows, np.float32).reshape(len(rows), self.vocab)

    def _row(self, table: NDArray[np.int32], position: int) -> NDArray[np.float32]:
        where = np.arange(position + 1)
        history = self.cache[table[where // BLOCK_SIZE] * BLOCK_SIZE + where % BLOCK_SIZE]
        return logits_after(history.tolist(), self.vocab)


def logits_after(tokens: list[int], vocab: int = VOCAB) -> NDArray[np.float32]:
    """The fake model's logits after `tokens`."""
    digest = hashlib.sha256(np.array(tokens, np.int64).tobytes()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    return rng.standard_normal(vocab).astype(np.float32) * 3


class ScriptedModel(FakeModel):
    """Says `script`, token by token, after a prompt of any length of tokens above 0."""

    def __init__(self, kv_blocks: int, script: list[int], prompt: int) -> None:
        super().__init__(kv_blocks)
        self.script = script
        self.prompt = prompt

    def _row(self, table: NDArray[np.int32], position: int) -> NDArray[np.float32]:
        row = np.zeros(self.vocab, np.float32)
        at = position + 1 - self.prompt
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
    kv_blocks: int = 64, max_context: int = 256, model: FakeModel | None = None, **options: int
) -> Engine:
    model = model or FakeModel(kv_blocks)
    runner = Runner(model, model.vocab, max_context, [Store(kv_blocks)])
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


def continuation(prompt: list[int], count: int, ignore_eos: bool = False) -> list[int]:
    """What the fake model says greedily, computed without an engine."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(int(logits_after(tokens).argmax()))
        if tokens[-1] == EOS and not ignore_eos:
            break
    return tokens[len(prompt) :]

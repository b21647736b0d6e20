"""KV caches of several stores: what a head keeps and reads, the same however the work is cut.

Every way of storing and reading, through the block manager and the native model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lacewing import _C
from lacewing.checkpoint.kvplan import KvPlan, Labels, Span
from lacewing.engine.blocks import BlockManager, Tables
from lacewing.engine.kv import kv_formats, parse_kv
from lacewing.engine.layout import lay_out
from lacewing.engine.runner import build_model
from lacewing.formats import pack
from lacewing.models import DecoderSpec
from tests.isas import USABLE, exact_isa
from tests.reference import Reference, dequantized
from tests.tiny import tiny_spec, tiny_tokens, tiny_weights

Array = np.ndarray[Any, Any]

STEP, CONTEXT = 96, 1024
NAMES = ["llama", "gemma3"]  # gemma3: layers with a window of 32, and without


def plan_of(spec: DecoderSpec, everything: bool = False) -> KvPlan:
    """Spans of every kind for the layers without a window, and labels."""
    kinds = [Span(16, 48), Span(), Span(0, 16), Span(32, 32, 3, 1)]
    spans, next_kind = [], 0
    for layer in spec.layers:
        spans.append([])
        for _ in range(spec.n_kv_heads):
            free = not layer.window and not everything
            spans[-1].append(kinds[next_kind % len(kinds)] if free else Span())
            next_kind += free
    rng = np.random.default_rng(3)
    shape = (spec.n_layers, spec.n_kv_heads, 8)
    channels = np.argsort(rng.random((*shape[:2], spec.head_dim)), axis=-1)[..., :8]
    return KvPlan({}, Labels(channels.astype(np.int32), np.full(shape, 0.03, np.float32)), spans)


class Feeder:
    """Sequences over the stores of `kv`, as the engine feeds them."""

    def __init__(
        self,
        name: str,
        kv: str,
        plan: KvPlan | None = None,
        isa: str | None = None,
        threads: int = 2,
    ) -> None:
        spec = tiny_spec(name)
        layout = lay_out(spec, parse_kv(kv), plan or plan_of(spec), CONTEXT)
        stores = layout.sizes(3, CONTEXT, STEP)
        weights = tiny_weights(name)
        tensors = {k: pack(w, "w8a8g32") if w.ndim == 2 else w for k, w in weights.items()}
        self.model: Any = build_model(
            spec, tensors, CONTEXT, layout, stores, isa or exact_isa("w8a8g32"), threads
        )
        self.blocks = BlockManager(stores, STEP)
        self.sequences: dict[int, tuple[Tables, int]] = {}

    def step(self, *pieces: tuple[int, list[int]]) -> list[Array]:
        """Feeds (sequence, its next tokens); logits of every token, by piece."""
        tokens, positions, cached, bounds, tables = [], [], [], [0], []
        for number, piece in pieces:
            owned, at = self.sequences.get(number, (Tables(), 0))
            end = at + len(piece)
            assert self.blocks.reserve(owned, end, len(piece))
            self.blocks.place(owned, at, end)
            self.sequences[number] = owned, end
            tokens += piece
            positions += range(at, end)
            cached.append(at)
            bounds.append(len(tokens))
            tables.append(owned.tables)
        widest = max(len(table) for each in tables for table in each)
        flat = np.zeros((len(tables[0]), len(pieces), widest), np.int32)
        for b, each in enumerate(tables):
            for s, table in enumerate(each):
                flat[s, b, : len(table)] = table
        lists = [np.array(x, np.int32) for x in (tokens, positions, cached, bounds)]
        rows = np.arange(len(tokens), dtype=np.int32)
        logits = self.model.step(*lists[:3], flat, lists[3], rows)
        return np.split(logits, bounds[1:-1])

    def feed(self, tokens: list[int], cuts: list[int]) -> Array:
        """The tokens of sequence 0 in pieces; at most STEP at once."""
        found, at = [], 0
        for cut in cuts:
            for begin in range(at, at + cut, STEP):
                piece = tokens[begin : min(begin + STEP, at + cut)]
                found += self.step((0, piece))
            at += cut
        assert at == len(tokens)
        return np.concatenate(found)


KVS = [*kv_formats(), "f16+plan:x", "int8+plan:x", "int8+topk:1/8", "f16+topk:1/8"]


def long_enough(kv: str) -> int:
    """Tokens after which blocks are left out: `topk` reads 32 at least."""
    return 620 if "topk" in kv else 150


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kv", KVS)
def test_steps_of_any_size(name: str, kv: str) -> None:
    """Growing one token at a time equals prefilling at once, to the bit."""
    count = long_enough(kv)
    tokens = tiny_tokens(count)
    expected = Feeder(name, kv).feed(tokens, [count])
    assert np.isfinite(expected).all()
    for cuts in ([17, 1, 30, count - 48], [count - 40, *([1] * 40)]):
        assert (Feeder(name, kv).feed(tokens, cuts) == expected).all(), str(cuts)


@pytest.mark.parametrize("kv", [kv for kv in KVS if "topk" not in kv])
def test_one_token_at_a_time(kv: str) -> None:
    tokens = tiny_tokens(100)
    expected = Feeder("llama", kv).feed(tokens, [100])
    assert (Feeder("llama", kv).feed(tokens, [1] * 100) == expected).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kv", KVS)
def test_batched_equals_alone(name: str, kv: str) -> None:
    count = long_enough(kv)
    long, short = tiny_tokens(count), tiny_tokens(70, seed=5)
    alone = [Feeder(name, kv).feed(t, [len(t)]) for t in (long, short)]
    together = Feeder(name, kv)
    together.feed(long[:-20], [count - 20])
    together.step((1, short[:50]))
    found: list[list[Array]] = [[], []]
    for i in range(20):
        rows = together.step((0, [long[count - 20 + i]]), (1, [short[50 + i]]))
        for to, row in zip(found, rows, strict=True):
            to.append(row)
    for to, want in zip(found, alone, strict=True):
        assert (np.concatenate(to) == want[-20:]).all()


@pytest.mark.parametrize("kv", KVS)
def test_isas_and_threads(kv: str) -> None:
    count = long_enough(kv)
    tokens = tiny_tokens(count)
    expected = Feeder("llama", kv, threads=1).feed(tokens, [count - 3, 1, 1, 1])
    for isa, threads in [(None, 3), *((isa, 2) for isa in USABLE)]:
        found = Feeder("llama", kv, isa=isa, threads=threads).feed(tokens, [count - 3, 1, 1, 1])
        assert (found == expected).all(), f"{isa}, {threads}"


@pytest.mark.parametrize("kv", ["f16", "int8"])
def test_a_plan_of_everything_is_the_whole_cache(kv: str) -> None:
    tokens = tiny_tokens(140)
    plan = plan_of(tiny_spec("llama"), everything=True)
    expected = Feeder("llama", kv).feed(tokens, [100, *([1] * 40)])
    assert (
        Feeder("llama", f"{kv}+plan:x", plan).feed(tokens, [100, *([1] * 40)]) == expected
    ).all()


@pytest.mark.parametrize("kv", ["f16", "int8"])
def test_a_short_text_reads_all_of_it(kv: str) -> None:
    """Up to 32 blocks nothing is left out."""
    tokens = tiny_tokens(510)
    expected = Feeder("llama", kv).feed(tokens, [510])
    found = Feeder("llama", f"{kv}+topk:1/8").feed(tokens, [510])
    assert (found == expected).all()


class Masked(Reference):
    """The reference, its heads reading the spans of a plan."""

    plan: KvPlan
    layer = -1

    def attend(self, i: int, *arrays: Any) -> Array:
        self.layer = i
        return super().attend(i, *arrays)

    def mix(self, q: Array, keys: Array, values: Array, window: int) -> Array:
        assert self.plan.spans is not None
        if window:
            return super().mix(q, keys, values, window)
        out = np.empty_like(q)
        group = q.shape[1] // keys.shape[1]
        first = len(keys) - len(q)
        for h, span in enumerate(self.plan.spans[self.layer]):
            for r in range(len(q)):
                seen = [j for j in range(first + r + 1) if span.reads((first + r) // 16, j // 16)]
                for j in range(h * group, (h + 1) * group):
                    score = keys[seen, h] @ q[r, j] * self.spec.attention_scale
                    weight = np.exp(score - score.max())
                    out[r, j] = weight / weight.sum() @ values[seen, h]
        return out


@pytest.mark.parametrize("name", NAMES)
def test_heads_read_their_spans(name: str) -> None:
    """Against numpy in float64 over the same weights; f32 keys and values."""
    spec, tokens = tiny_spec(name), tiny_tokens(120)
    plan = plan_of(spec)
    weights = tiny_weights(name)
    tensors = {k: pack(w, "bf16") if w.ndim == 2 else w for k, w in weights.items()}
    layout = lay_out(spec, parse_kv("f32+plan:x"), plan, CONTEXT)
    stores = layout.sizes(1, CONTEXT, STEP)
    feeder = Feeder(name, "f32+plan:x", plan)
    feeder.model = build_model(spec, tensors, CONTEXT, layout, stores, None, 2)
    found = feeder.feed(tokens, [120])
    exact = {k: v.astype(np.float64) for k, v in dequantized(tensors).items()}
    masked = Masked(spec, exact, dtype=np.float64)
    masked.plan = plan
    want = masked.logits(tokens)
    plain = Reference(spec, exact, dtype=np.float64).logits(tokens)
    error, matters = np.abs(found - want).max(), np.abs(plain - want).max()
    assert error < 2e-3 * np.abs(want).max()  # bf16 inputs are products of f32: rounding only
    assert matters > 20 * error


def test_a_span_keeps_little() -> None:
    """What no head reads is not stored: 1 + 3 blocks, and those of the step."""
    spec = tiny_spec("llama")
    spans = [[Span(16, 48)] * spec.n_kv_heads for _ in spec.layers]
    layout = lay_out(spec, parse_kv("f16+plan:x"), KvPlan({}, None, spans), 16384)
    (store,) = layout.sizes(1, 16384, 512)
    assert store.total == 1 + 3 + 512 // 16 + 1
    whole = lay_out(spec, parse_kv("f16"), None, 16384)
    assert layout.bytes([store]) * 27 < whole.bytes(whole.sizes(1, 16384, 512))


def test_what_is_sealed_is_small() -> None:
    spec = tiny_spec("llama")
    for kv in _C.KV_SEALED_FROM:
        layout = lay_out(spec, parse_kv(kv), None, 16384)
        growing, sealed = layout.sizes(1, 16384, 512)
        assert (growing.total, sealed.total) == (2 + 512 // 16 + 1, 1024)

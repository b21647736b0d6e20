"""KV caches of several stores: what a head keeps and reads, the same however the work is cut.

Every way of storing and reading, through the block manager and the native model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lacewing import _C
from lacewing.checkpoint.kvplan import KvPlan, Labels, Span
from lacewing.engine.runner import build_model
from lacewing.errors import RequestError
from lacewing.formats import pack
from lacewing.kv.blocks import BlockManager, Tables, blocks_for
from lacewing.kv.choice import KvChoice, kept_tokens, kv_formats, parse_kv
from lacewing.kv.layout import lay_out
from lacewing.models import DecoderSpec
from tests.isas import USABLE, exact_isa
from tests.native.test_merge import anchors, buckets, importance
from tests.reference import Cache, Reference, dequantized
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
        self.sequences: dict[int, tuple[Tables, int, int]] = {}

    def step(
        self, *pieces: tuple[int, list[int]], keep: dict[int, int] | None = None
    ) -> list[Array]:
        """Feeds (sequence, its next tokens); logits of every token, by piece. keep: tokens to which
        sequences are merged then."""
        keep = keep or {}
        tokens, positions, cached, bounds, tables = [], [], [], [0], []
        for number, piece in pieces:
            owned, at, merged = self.sequences.get(number, (Tables(), 0, 0))
            end, stays = at + len(piece), keep.get(number, 0)
            assert self.blocks.reserve(owned, blocks_for(end - merged) * 16 + stays, len(piece))
            self.blocks.place(owned, at - merged, end - merged)
            self.blocks.begin_merge(owned, stays)
            self.sequences[number] = owned, end, merged
            tokens += piece
            positions += range(at, end)
            cached.append(at - merged)
            bounds.append(len(tokens))
            tables.append(owned.tables)
        widest = max(len(table) for each in tables for table in each)
        flat = np.zeros((len(tables[0]), len(pieces), widest), np.int32)
        for b, each in enumerate(tables):
            for s, table in enumerate(each):
                flat[s, b, : len(table)] = table
        lists = [np.array(x, np.int32) for x in (tokens, positions, cached, bounds)]
        rows = np.arange(len(tokens), dtype=np.int32)
        merges = self.merges([number for number, _ in pieces], keep) if keep else ()
        logits = self.model.step(*lists[:3], flat, lists[3], rows, *merges)
        for number, stays in keep.items():
            owned, end, _ = self.sequences[number]
            self.blocks.end_merge(owned, stays)
            self.sequences[number] = owned, end, end - stays
        return np.split(logits, bounds[1:-1])

    def merges(self, numbers: list[int], keep: dict[int, int]) -> tuple[Array, Array]:
        """What a step is told of merging."""
        tables = [self.sequences[number][0].merged for number in numbers]
        padded = np.zeros((len(tables), max(len(table) for table in tables)), np.int32)
        for row, table in zip(padded, tables, strict=True):
            row[: len(table)] = table
        return np.array([keep.get(number, 0) for number in numbers], np.int32), padded

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


# ---- prompts that are merged

GROWING = [kv for kv in kv_formats() if kv not in _C.KV_SEALED_FROM]


def merged(feeder: Feeder, prompt: list[int], keep: int, rest: list[int], cuts: list[int]) -> Array:
    """Logits of the prompt's last 32 tokens and of the rest, fed in pieces of `cuts` tokens at most
    (the last of them again and again); the prompt is merged with its last piece."""
    at, found = 0, []
    while at < len(prompt) + len(rest):
        cut = cuts[0] if len(cuts) == 1 else cuts.pop(0)
        end = min(at + cut, len(prompt) if at < len(prompt) else len(prompt) + len(rest))
        done = end == len(prompt)
        found += feeder.step((0, [*prompt, *rest][at:end]), keep={0: keep} if done else None)
        at = end
    return np.concatenate(found)[len(prompt) - 32 :]


@pytest.mark.parametrize("kv", GROWING)
def test_a_merge_however_cut(kv: str) -> None:
    """What stays does not depend on the pieces of the prompt, nor of what follows."""
    prompt, rest = tiny_tokens(150), tiny_tokens(40, seed=9)
    expected = merged(Feeder("llama", kv), prompt, 60, rest, [150, 40])
    whole = Feeder("llama", kv).feed([*prompt, *rest], [190])[150 - 32 :]
    assert (expected[:32] == whole[:32]).all(), "the prompt itself reads all of it"
    assert not (expected[32:] == whole[32:]).any(axis=1).all()
    for cuts in ([118, 32, 40], [17, 1, 30, 70, 32, 1], [100, 50, 7]):
        assert (merged(Feeder("llama", kv), prompt, 60, rest, cuts) == expected).all()


@pytest.mark.parametrize("kv", GROWING)
def test_a_merge_on_every_isa(kv: str) -> None:
    prompt, rest = tiny_tokens(150), tiny_tokens(5, seed=9)
    expected = merged(Feeder("llama", kv, threads=1), prompt, 60, rest, [150, 1])
    for isa, threads in [(None, 3), *((isa, 2) for isa in USABLE)]:
        feeder = Feeder("llama", kv, isa=isa, threads=threads)
        assert (merged(feeder, prompt, 60, rest, [150, 1]) == expected).all(), f"{isa}, {threads}"


def test_merges_of_a_batch() -> None:
    """Sequences beside each other, and one whose last rows fall to two chunks of 512 rows."""
    prompts, keep = [tiny_tokens(n, seed=n) for n in (300, 230, 90)], [37, 80, 90]
    rest = tiny_tokens(20, seed=9)
    alone = [
        merged(Feeder("llama", "f16"), p, k, rest, [300, 1])
        for p, k in zip(prompts, keep, strict=True)
    ]
    feeder = Feeder("llama", "f16")
    feeder.step((3, tiny_tokens(40)))
    for number in range(2):  # the second time with blocks that others have left
        sequences = [number * 10 + i for i in range(3)]
        pieces = list(zip(sequences, prompts, strict=True))
        kept = dict(zip(sequences, keep, strict=True))
        found = [[rows[-32:]] for rows in feeder.step(*pieces[:2], (3, [5]), pieces[2], keep=kept)]
        del found[2]
        for token in rest:
            rows = feeder.step((3, [7]), *((each, [token]) for each in sequences))
            for to, row in zip(found, rows[1:], strict=True):
                to.append(row)
        for to, want in zip(found, alone, strict=True):
            assert (np.concatenate(to) == want).all()
        for each in sequences:
            feeder.blocks.release(feeder.sequences.pop(each)[0])


def test_nothing_is_merged_where_all_stays() -> None:
    prompt, rest = tiny_tokens(100), tiny_tokens(20, seed=9)
    found = merged(Feeder("llama", "f32"), prompt, 100, rest, [100, 20])
    assert (found == Feeder("llama", "f32").feed([*prompt, *rest], [120])[68:]).all()


class Merged(Reference):
    """The reference; its queries are there to see."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.queries: list[Array] = []

    def mix(self, q: Array, keys: Array, values: Array, window: int) -> Array:
        self.queries.append(q)
        return super().mix(q, keys, values, window)

    def merge(self, cache: Cache, keep: int) -> None:
        group = self.spec.n_heads // self.spec.n_kv_heads
        for i, q in enumerate(self.queries):
            means = []
            for h in range(self.spec.n_kv_heads):
                k, v = cache.keys[i][:, h], cache.values[i][:, h]
                heads = q[-32:, h * group : (h + 1) * group]
                kept = anchors(importance(heads, k, self.spec.attention_scale), keep)
                taken = buckets(kept, len(k))
                means.append([[part[each].mean(axis=0) for each in taken] for part in (k, v)])
            cache.keys[i], cache.values[i] = np.array(means).transpose(1, 2, 0, 3)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_what_follows_reads_merged_keys(name: str) -> None:
    """Against numpy in float64 over the same weights; f32 keys and values."""
    spec, prompt, rest = tiny_spec(name), tiny_tokens(150, seed=7), tiny_tokens(20, seed=9)
    tensors = {k: pack(w, "bf16") if w.ndim == 2 else w for k, w in tiny_weights(name).items()}
    feeder = Feeder(name, "f32")
    layout = lay_out(spec, parse_kv("f32"), None, CONTEXT)
    stores = layout.sizes(3, CONTEXT, STEP)
    feeder.model = build_model(spec, tensors, CONTEXT, layout, stores, exact_isa("bf16"), 2)
    found = merged(feeder, prompt, 60, rest, [150, 1])[32:]
    exact = {k: v.astype(np.float64) for k, v in dequantized(tensors).items()}
    reference, cache = Merged(spec, exact, dtype=np.float64), Cache()
    reference.hidden([(prompt, cache)])
    reference.merge(cache, 60)
    want = reference.head(reference.hidden([(rest, cache)]))
    plain = Reference(spec, exact, dtype=np.float64).logits([*prompt, *rest])[150:]
    error, matters = np.abs(found - want).max(), np.abs(plain - want).max()
    assert error < 2e-3 * np.abs(want).max()  # bf16 inputs are products of f32: rounding only
    assert matters > 20 * error


MERGE_ERRORS = [
    ("llama", 0, 36, r"keep\[0\] must be 0, or in 37..70, the tokens in the cache, got 36"),
    ("llama", 0, 71, r"keep\[0\] must be 0, or in 37..70, the tokens in the cache, got 71"),
    ("llama", 0, -1, r"keep\[0\] must be 0, or in 37..70, the tokens in the cache, got -1"),
    ("llama", 1, 40, r"sequence 1, which keep\[1\] merges, at least 32 tokens, got 31"),
    ("llama", 0, 65, r"merged_tables must have at least 5 columns for 65 tokens, got 4"),
    ("gemma3", 0, 40, "keep needs a model with one store, all of which is read"),
]


@pytest.mark.parametrize(("name", "sequence", "keep", "message"), MERGE_ERRORS)
def test_a_wrong_keep(name: str, sequence: int, keep: int, message: str) -> None:
    feeder = Feeder(name, "f16")
    numbers = np.zeros(2, np.int32)
    numbers[sequence] = keep
    feeder.merges = lambda *_: (numbers, np.zeros((2, 4), np.int32))  # type: ignore[method-assign]
    feeder.step((1, tiny_tokens(40)))
    with pytest.raises(ValueError, match=message):
        feeder.step((0, tiny_tokens(70)), (1, tiny_tokens(31)), keep={9: 0})


@pytest.mark.parametrize(
    ("keep", "tables", "message"),
    [
        ([40], [[0, 1, 9999]], r"merged_tables\[0, 2\] must be in 0..191, got 9999"),
        ([40], [[0, -1, 2]], r"merged_tables\[0, 1\] must be in 0..191, got -1"),
        ([40, 0], [[0, 1, 2]], r"one row per sequence \(1\), got 2 and \[1, 3\]"),
        ([40], [[0, 1, 2]] * 2, r"one row per sequence \(1\), got 1 and \[2, 3\]"),
    ],
)
def test_wrong_merged_tables(keep: list[int], tables: list[list[int]], message: str) -> None:
    feeder = Feeder("llama", "f16")
    arrays = np.array(keep, np.int32), np.array(tables, np.int32)
    feeder.merges = lambda *_: arrays  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=message):
        feeder.step((0, tiny_tokens(70)), keep={9: 0})
    feeder.merges = lambda *_: arrays[:1]  # type: ignore[assignment,method-assign,return-value]
    with pytest.raises(ValueError, match="keep and merged_tables go together"):
        feeder.step((0, tiny_tokens(70)), keep={9: 0})


@pytest.mark.parametrize("kv", ["f16+merge:0.2", "int8+merge:.5"])
def test_room_for_a_prompt_and_what_stays(kv: str) -> None:
    layout = lay_out(tiny_spec("llama"), parse_kv(kv), None, 1000)
    (store,) = layout.sizes(1, 1000, 512)
    assert store.total == 63 + {"f16+merge:0.2": 13, "int8+merge:.5": 32}[kv]


def test_what_cannot_be_merged() -> None:
    spec = tiny_spec("llama")
    with pytest.raises(RequestError, match="tokens as they come, got `int8_sp70`") as error:
        lay_out(spec, parse_kv("int8_sp70+merge:0.2"), None, CONTEXT)
    assert error.value.hint == "`int8+merge:0.2`"
    for choice in (KvChoice("f16", topk=8, merge=0.2), KvChoice("f16", spans=True, merge=0.2)):
        with pytest.raises(RequestError, match="goes together with neither `topk` nor `plan`"):
            lay_out(spec, choice, plan_of(spec), CONTEXT)
    with pytest.raises(RequestError, match="read everything, 6 of 7 have a sliding window"):
        lay_out(tiny_spec("gemma3"), parse_kv("merge:0.2"), None, CONTEXT)
    assert lay_out(tiny_spec("gemma3"), parse_kv("merge:0.2"), None, 7).merge == 0.2


@pytest.mark.parametrize(
    ("prompt", "share", "keep"),
    [(999, None, 0), (63, 0.1, 0), (64, 0.1, 37), (64, 0.99, 0), (100, 0.99, 99), (1001, 0.2, 201)],
)
def test_how_much_stays(prompt: int, share: float | None, keep: int) -> None:
    assert kept_tokens(prompt, share) == keep

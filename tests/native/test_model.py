"""`_C.Model`: the same bits however the work is cut, and every wrong argument refused.

That the logits are the right ones is tested in tests/engine/test_models.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacewing import _C, formats
from lacewing.engine.runner import build_model, native_spec
from lacewing.formats import FORMATS
from lacewing.kv.blocks import Store
from lacewing.kv.choice import parse_kv
from lacewing.kv.layout import lay_out
from lacewing.models import DecoderSpec
from lacewing.native import tensor
from tests.isas import USABLE, exact_isa, promises_same_bits
from tests.tiny import VOCAB, tiny_spec, tiny_tokens, tiny_weights

Array = np.ndarray[Any, Any]

CONTEXT, BLOCKS = 96, 40
# The biased, the windowed with sandwich norms, the one with q and k norms.
ARCHITECTURES = ["qwen2", "gemma3", "qwen3"]


def packed_weights(name: str, format: str) -> dict[str, Any]:
    def pack(weight: Array) -> Any:
        sparsity = 0.5 if formats.FORMATS[format].sparse else None
        return formats.pack(weight, format, sparsity=sparsity)

    return {k: pack(w) if w.ndim == 2 else w for k, w in tiny_weights(name).items()}


class Feeder:
    """A model with one block table, out of order, per sequence."""

    def __init__(
        self,
        name: str = "llama",
        format: str = "w8a8g32",
        isa: str | None = None,
        threads: int = 2,
        context: int = CONTEXT,
        seed: int = 0,
        kv: str = "f16",
    ) -> None:
        rows = -(-context // 16)
        blocks = max(BLOCKS, 3 * rows)
        spec = tiny_spec(name)
        layout = lay_out(spec, parse_kv(kv), None, 0)  # in one store
        stores = [Store(blocks, plan.block_tokens) for plan in layout.stores]
        self.model: Any = build_model(
            spec,
            packed_weights(name, format),
            context,
            layout,
            stores,
            isa or exact_isa(format),
            threads,
        )
        order = np.random.default_rng(seed).permutation(blocks)
        self.tables = order[: 3 * rows].reshape(3, rows).astype(np.int32)

    def arguments(
        self, pieces: list[tuple[int, int, list[int]]], rows: list[int] | None = None
    ) -> list[Array]:
        """Arguments of a step over pieces (sequence, first position, tokens)."""
        tokens = [t for _, _, piece in pieces for t in piece]
        places = [(s, p) for s, first, piece in pieces for p in range(first, first + len(piece))]
        bounds = np.cumsum([0, *(len(piece) for _, _, piece in pieces)])
        wanted = range(len(tokens)) if rows is None else rows
        cached = [first for _, first, _ in pieces]
        lists = tokens, [p for _, p in places], cached, bounds, list(wanted)
        flat = [np.array(each, np.int32) for each in lists]
        return [*flat[:3], self.tables[None, [s for s, _, _ in pieces]].copy(), *flat[3:]]

    def step(
        self, pieces: list[tuple[int, int, list[int]]], rows: list[int] | None = None
    ) -> Array:
        logits: Array = self.model.step(*self.arguments(pieces, rows))
        return logits


def whole(tokens: list[int], **options: Any) -> Array:
    return Feeder(**options).step([(0, 0, tokens)])


# ---- the same bits


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("format", FORMATS)
def test_every_isa_and_thread_count(name: str, format: str) -> None:
    tokens = tiny_tokens(21)
    expected = whole(tokens, name=name, format=format, isa="scalar", threads=1)
    assert np.isfinite(expected).all()
    for isa in USABLE:
        want = expected
        if not promises_same_bits(format, isa):  # tests/engine/test_models.py: that they are right
            want = whole(tokens, name=name, format=format, isa=isa, threads=1)
        for threads in (1, 2, 3):
            logits = whole(tokens, name=name, format=format, isa=isa, threads=threads)
            assert (logits == want).all(), f"{isa}, {threads} threads"


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("format", ["bf16", "w8a8g64", "w4a8g32z", "w4a8g64_sp"])
def test_pieces_of_a_prompt(name: str, format: str) -> None:
    tokens = tiny_tokens(50)
    expected = whole(tokens, name=name, format=format)
    for cuts in ([1] * 50, [17, 33], [3, 1, 8, 9, 29]):
        feeder, at, found = Feeder(name, format, seed=1), 0, []
        for count in cuts:
            found.append(feeder.step([(0, at, tokens[at : at + count])]))
            at += count
        assert (np.concatenate(found) == expected).all(), str(cuts)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("format", ["bf16", "w8a8g64", "w4a8g32z", "w4a8g64_sp"])
def test_alone_and_in_a_batch(name: str, format: str) -> None:
    prompts = [tiny_tokens(30, 1), tiny_tokens(5, 2), tiny_tokens(19, 3)]
    alone = [whole(prompt, name=name, format=format) for prompt in prompts]
    together = Feeder(name, format)
    # Prefill with prefill, prefill with decode, decode with decode.
    first = together.step([(0, 0, prompts[0]), (1, 0, prompts[1][:4])])
    assert (first == np.concatenate([alone[0], alone[1][:4]])).all()
    second = together.step([(2, 0, prompts[2][:18]), (1, 4, prompts[1][4:])])
    assert (second == np.concatenate([alone[2][:18], alone[1][4:]])).all()
    more = [(0, 30, [1]), (1, 5, [2]), (2, 18, prompts[2][18:])]
    third = together.step(more)
    assert (third[2] == alone[2][18]).all()
    assert (third[0] == whole([*prompts[0], 1], name=name, format=format)[-1]).all()
    assert (third[1] == whole([*prompts[1], 2], name=name, format=format)[-1]).all()


@pytest.mark.parametrize("kv", [kv for kv in _C.KV_FORMATS if kv not in _C.KV_SEALED_FROM])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_kv_format_and_thread_count(name: str, kv: str) -> None:
    """A prompt, then single tokens at positions where one sequence's attention is cut for several
    threads: the same bits as the whole prompt with one thread."""
    tokens = tiny_tokens(1300, 1)
    expected = whole(tokens, name=name, kv=kv, context=1312, threads=1)
    assert np.isfinite(expected).all()
    for threads in (2, 3):
        feeder = Feeder(name, kv=kv, context=1312, threads=threads, seed=1)
        first = feeder.step([(0, 0, tokens[:1290])])
        assert (first == expected[:1290]).all()
        for at, count in ((1290, 1), (1291, 2), (1293, 1)):
            found = feeder.step([(0, at, tokens[at : at + count])])
            assert (found == expected[at : at + count]).all(), f"{threads} threads, at {at}"


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_more_rows_than_are_computed_at_once(name: str) -> None:
    """1100 tokens of two sequences: chunks of 512 rows end inside both."""
    long, short = tiny_tokens(700, 1), tiny_tokens(400, 2)
    spec = tiny_spec(name)
    assert spec.max_context < 700
    together = Feeder(name, context=704).step([(0, 0, long), (1, 0, short)])
    feeder = Feeder(name, context=704)
    cut = [feeder.step([(0, at, long[at : at + 100])]) for at in range(0, 700, 100)]
    assert (together[:700] == np.concatenate(cut)).all()
    assert (together[700:] == whole(short, name=name, context=704)).all()


def test_logit_rows_in_any_order() -> None:
    tokens = tiny_tokens(600)
    expected = whole(tokens, context=640)
    for rows in ([599], [0, 511, 512, 599], [598, 3, 3, 3, 2], [], list(range(599, -1, -1))):
        logits = Feeder(context=640).step([(0, 0, tokens)], rows)
        assert logits.shape == (len(rows), VOCAB)
        assert (logits == expected[rows]).all()


def test_nothing_to_do() -> None:
    feeder = Feeder()
    assert feeder.step([]).shape == (0, VOCAB)
    tokens = tiny_tokens(3)
    logits = feeder.step([(1, 0, []), (0, 0, tokens), (2, 0, [])])
    assert (logits == whole(tokens)).all()


def test_mixed_formats_in_one_layer() -> None:
    """Layers that share an input may want it on different grids."""
    spec, weights = tiny_spec("llama"), tiny_weights("llama")
    names = list(FORMATS)
    tensors, used = {}, 0
    for key, weight in weights.items():
        if weight.ndim == 2:
            used += 1
        tensors[key] = formats.pack(weight, names[used % 6]) if weight.ndim == 2 else weight
    layout = lay_out(spec, parse_kv("f16"), None, 0)
    table = np.arange(4, dtype=np.int32)[None, None]
    tokens, at = np.array(tiny_tokens(20), np.int32), np.arange(20, dtype=np.int32)
    found = []
    for isa in [isa for isa in USABLE if promises_same_bits("bf16", isa)]:
        model = build_model(spec, tensors, 64, layout, [Store(4)], isa, 2)
        bounds = np.array([0, 20], np.int32)
        found.append(model.step(tokens, at, at[:1], table, bounds, at.copy()))
        ones = [
            model.step(
                tokens[i : i + 1], at[i : i + 1], at[i : i + 1], table, bounds[:2] // 20, at[:1]
            )
            for i in range(20)
        ]
        assert (np.concatenate(ones) == found[-1]).all()
    assert all((each == found[0]).all() for each in found)


# ---- wrong arguments

GOOD: list[tuple[int, int, list[int]]] = [(0, 0, [1, 2, 3]), (1, 20, [4, 5])]


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, (0, -1), r"tokens\[0\] must be in 0\.\.130, got -1"),
        (0, (4, VOCAB), r"tokens\[4\] must be in 0\.\.130, got 131"),
        (1, (0, 5), "positions of sequence 0 must be consecutive, got 1 after 5"),
        (1, (3, -1), r"positions\[3\] must be in 0\.\.95, got -1"),
        (1, (4, 23), "positions of sequence 1 must be consecutive, got 23 after 20"),
        (2, (1, 21), r"cached\[1\] must be in 0\.\.20, got 21"),
        (2, (0, -1), r"cached\[0\] must be in 0\.\.0, got -1"),
        (3, ((0, 0, 0), -1), r"block_tables\[0, 0, 0\] must be in 0\.\.39, got -1"),
        (3, ((0, 1, 1), BLOCKS), r"block_tables\[0, 1, 1\] must be in 0\.\.39, got 40"),
        (4, (0, 1), "cu_seqlens must start at 0, got 1"),
        (4, (1, -3), "cu_seqlens must not decrease, got -3 after 0"),
        (4, (1, 9), "cu_seqlens must not decrease, got 5 after 9"),
        (4, (2, 4), r"cu_seqlens must end at the number of tokens \(5\), got 4"),
        (5, (0, -1), r"logit_rows\[0\] must be in 0\.\.4, got -1"),
        (5, (0, 5), r"logit_rows\[0\] must be in 0\.\.4, got 5"),
    ],
)
def test_an_index_out_of_range(index: int, change: tuple[Any, int], message: str) -> None:
    feeder = Feeder()
    arguments = feeder.arguments(GOOD)
    arguments[index][change[0]] = change[1]
    with pytest.raises(ValueError, match=message):
        feeder.model.step(*arguments)
    assert np.isfinite(feeder.step(GOOD)).all()


def test_lengths_and_types() -> None:
    feeder = Feeder()
    good = feeder.arguments(GOOD)

    def refused(index: int, value: Array, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            feeder.model.step(*good[:index], value, *good[index + 1 :])

    refused(1, good[1][:4], ValueError, "tokens and positions must have the same length")
    refused(2, good[2][:1], ValueError, r"cached must have one value per sequence \(2\), got 1")
    refused(3, good[3][:, :1], ValueError, "cu_seqlens must have one value more than block_tables")
    refused(3, good[3][:0], ValueError, r"must be \[1, sequences, blocks\], got \[0, 2, 6\]")
    refused(3, good[3][:, :, :1].copy(), ValueError, "block_tables must have at least 2 columns")
    for index in range(6):
        refused(index, good[index].astype(np.int64), TypeError, "incompatible function arguments")
        refused(index, good[index].astype(np.float32), TypeError, "incompatible")
    refused(3, good[3][:, :, ::2], TypeError, "incompatible")


def test_a_position_beyond_the_context() -> None:
    feeder = Feeder()
    late = feeder.arguments([(0, 94, [1, 2])])
    late[1] += 1
    with pytest.raises(ValueError, match=r"positions\[1\] must be in 0\.\.95, got 96"):
        feeder.model.step(*late)


def cache(blocks: int = BLOCKS, kv: str = "f16", **changes: Any) -> dict[str, Any]:
    """What is said of the cache of `parts_of_a_model`."""
    heads = np.array([[0, i, -1, 0, -1, 0, 0, 0, 0, 0] for i in range(6)], np.int32)
    return {"stores": [(kv, blocks, 6)], "heads": heads, "topk": 0} | changes


def heads(field: int, value: int) -> Array:
    """Heads as in `cache`, but for one field of the last."""
    found: Array = cache()["heads"]
    found[-1, field] = value
    return found


def parts_of_a_model() -> tuple[DecoderSpec, dict[str, Any], dict[str, Any]]:
    spec = tiny_spec("qwen3")
    packed = packed_weights("qwen3", "w8a8g32")
    tensors = {k: tensor(v) if tiny_weights("qwen3")[k].ndim == 2 else v for k, v in packed.items()}
    return spec, native_spec(spec, CONTEXT), tensors


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"head_dim": 31}, ValueError, "`head_dim` must be even and at most 512, got 31"),
        ({"head_dim": 1024}, ValueError, "`head_dim` must be even and at most 512, got 1024"),
        ({"n_heads": 5}, ValueError, r"`n_heads` must be a multiple of `n_kv_heads` \(2\), got 5"),
        ({"hidden_size": 0}, ValueError, r"`hidden_size` must be in 1\.\.16777216, got 0"),
        ({"hidden_size": 2**60}, ValueError, "`hidden_size` must be in"),
        ({"hidden_size": "96"}, TypeError, "`hidden_size` must be an integer"),
        ({"activation": "relu"}, ValueError, "`activation` must be `silu` or `gelu_tanh`"),
        ({"attention_scale": 0.0}, ValueError, "`attention_scale` must be positive"),
        ({"attention_scale": float("nan")}, ValueError, "`attention_scale` must be positive"),
        ({"norm_eps": -1.0}, ValueError, "`norm_eps` must be in"),
        ({"embedding_scale": float("inf")}, ValueError, "`embedding_scale` must be finite"),
        ({"layers": []}, ValueError, "`layers` must not be empty"),
        ({"layers": [(1, 0)]}, ValueError, r"`layers\[0\]`: rope must be in 0\.\.0, got 1"),
        ({"layers": [(0, -1)]}, ValueError, r"`layers\[0\]`: window must be in"),
        ({"layers": [0]}, TypeError, r"`layers\[0\]` must be a tuple"),
        ({"layers": [(0, 0)] * 4}, ValueError, "needs the tensor `model.layers.3.self_attn.q_proj"),
        ({"ropes": []}, ValueError, r"`layers\[0\]`: rope must be in"),
        ({"ropes": [3]}, TypeError, r"`ropes\[0\]` must be a tuple"),
        ({"ropes": [(np.zeros((4, 8)),) * 2]}, TypeError, r"`ropes\[0\]` must be two contiguous"),
        (
            {"ropes": [(np.zeros((4, 8), np.float32),) * 2]},
            ValueError,
            r"`ropes\[0\]` must be two arrays \[positions, 16\], got \[4, 8\]",
        ),
        ({"vocab_size": 130}, ValueError, r"embed_tokens.weight` must be \[130, 96\], got \[131, "),
    ],
)
def test_a_wrong_spec(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    _, native, tensors = parts_of_a_model()
    with pytest.raises(error, match=message):
        _C.Model(native | changes, tensors, cache())


def test_wrong_tensors() -> None:
    _, native, tensors = parts_of_a_model()
    with pytest.raises(ValueError, match="spec needs `qk_norm`"):
        _C.Model({k: v for k, v in native.items() if k != "qk_norm"}, tensors, cache())
    for key, value, error, message in [
        ("model.norm.weight", np.zeros(95, np.float32), ValueError, r"must be \[96\], got \[95\]"),
        ("model.norm.weight", np.zeros(96), TypeError, "must be a contiguous f32 1-D array"),
        ("model.layers.0.mlp.up_proj.weight", np.zeros(96), TypeError, "must be a Tensor"),
        ("model.layers.0.mlp.up_proj.bias", np.zeros(9, np.float32), ValueError, r"\[160\]"),
    ]:
        with pytest.raises(error, match=message):
            _C.Model(native, tensors | {key: value}, cache())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kv": cache(0)}, ValueError, r"blocks must be in 1\.\.134217727, got 0"),
        ({"kv": cache(2**40)}, ValueError, "blocks must be in"),
        ({"kv": cache(kv="int9")}, ValueError, "Model: kv must be one of `f16`"),
        ({"kv": cache(stores=[])}, ValueError, "`kv.stores` must not be empty"),
        ({"kv": cache(stores=[3])}, TypeError, "`kv.stores` must be tuples of three"),
        ({"kv": cache(stores=[("f16", 4)])}, ValueError, "`kv.stores` must be tuples"),
        ({"kv": cache(stores=[("labels", 4, 6)])}, ValueError, "must be of a format that grows"),
        ({"kv": cache(stores=[("f16", 4, 5)])}, ValueError, r"index must be in 0\.\.4, got 5"),
        ({"kv": cache(heads=heads(0, 1))}, ValueError, r"store must be in 0\.\.0, got 1"),
        ({"kv": cache(heads=heads(0, -1))}, ValueError, r"store must be in 0\.\.0, got -1"),
        ({"kv": cache(heads=heads(2, 0))}, ValueError, "must be sealed from the first"),
        ({"kv": cache(heads=heads(4, 0))}, ValueError, "third store must be labels"),
        ({"kv": cache(heads=heads(7, -1))}, ValueError, "a span must not be negative"),
        ({"kv": cache(heads=heads(0, 0)[:5])}, ValueError, r"must be an i32 array \[6, 10\]"),
        ({"kv": cache(topk=16)}, ValueError, "`kv.topk` and labels go together"),
        ({"kv": cache(topk=-1)}, ValueError, "`kv.topk` must be in"),
        ({"kv": {}}, ValueError, "needs `stores`"),
        ({"kv": cache(), "threads": -1}, ValueError, r"threads must be in 0\.\.1024, got -1"),
        ({"kv": cache(), "isa": "neon"}, ValueError, "isa must be one of"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    _, native, tensors = parts_of_a_model()
    with pytest.raises(error, match=message):
        _C.Model(native, tensors, **options)


@pytest.mark.skipif(
    Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "1",
    reason="the kernel promises any amount of memory (vm.overcommit_memory = 1)",
)
def test_a_cache_larger_than_memory() -> None:
    _, native, tensors = parts_of_a_model()
    with pytest.raises(MemoryError):
        _C.Model(native, tensors, cache(2**27 - 1))


def test_the_model_keeps_its_weights() -> None:
    expected = whole(tiny_tokens(9), name="qwen3")
    feeder = Feeder("qwen3")  # nothing else refers to its tensors now
    junk = [np.full(1 << 16, 255, np.uint8) for _ in range(64)]
    assert (feeder.step([(0, 0, tiny_tokens(9))]) == expected).all()
    assert len(junk) == 64


def test_properties() -> None:
    feeder = Feeder(threads=3)
    assert (feeder.model.threads, feeder.model.context) == (3, CONTEXT)

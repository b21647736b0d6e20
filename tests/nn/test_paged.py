"""One layer's cache in PyTorch models: each sequence is what it is alone, to the bit, however its
tokens were cut into steps, whatever stands beside it, and with every way of storing and reading."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest

from lacewing import _C
from lacewing.checkpoint.kvplan import KvPlan, Labels, Span
from lacewing.errors import CheckpointError, RequestError
from lacewing.kv.choice import block_bytes, kept_tokens, kv_formats, parse_kv, sealed_from
from tests.isas import USABLE, exact_isa

pytest.importorskip("torch", reason="lacewing.nn needs PyTorch")
from lacewing.kv.layout import LayerShape
from lacewing.nn import paged
from lacewing.nn.paged import PagedLayer

Array = np.ndarray[Any, Any]

KV_HEADS, HEADS, D = 2, 6, 20  # 20: no multiple of 16
SCALE = D**-0.5
GROWING = [kv for kv in kv_formats() if sealed_from(kv) is None]
KVS = [*kv_formats(), "f16+plan:x", "int4+plan:x", "int8+topk:1/8", "int4+topk:1/8"]

every_kv = pytest.mark.parametrize("kv", KVS)


def plan_of(model: dict[str, Any] | None = None) -> KvPlan:
    channels = np.argsort(np.random.default_rng(3).random((1, KV_HEADS, D)), axis=-1)[..., :8]
    scales = np.full(channels.shape, 0.03, np.float32)
    spans = [[Span(16, 48), Span(32, 32, 3, 1)]]
    return KvPlan(model or {}, Labels(channels.astype(np.int32), scales), spans)


def layer(kv: str, batch: int = 1, window: int = 0, **options: Any) -> PagedLayer:
    shape = LayerShape("llama", KV_HEADS, D, window)
    plan = plan_of()
    plan = KvPlan({}, plan.labels, plan.spans if "plan" in kv else None)
    return PagedLayer(shape, parse_kv(kv), plan, batch, **options)


def numbers(count: int, tokens: int) -> tuple[Array, Array, Array]:
    """q, k, v `[count, tokens, heads, D]`."""
    rng = np.random.default_rng(0)
    shapes = [(count, tokens, heads, D) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return q, k, v


def tokens_of(kv: str) -> int:
    """So many that blocks are left out: `topk` reads 32 at least."""
    return 620 if "topk" in kv else 150


def feed(
    made: PagedLayer,
    all_of: tuple[Array, Array, Array],
    begin: int,
    stop: int,
    starts: list[int] | None = None,
    threads: int = 1,
) -> Array:
    """The columns [begin, stop)."""
    here = slice(begin, stop)
    return made.step(
        *(each[:, here] for each in all_of), starts or [0] * made.batch, SCALE, threads
    )


# -- What is computed -----------------------------------------------------------------------------


@pytest.mark.parametrize("isa", USABLE)
@pytest.mark.parametrize("window", [0, 9, 40])
@pytest.mark.parametrize("kv", GROWING)
def test_it_is_attention(kv: str, window: int, isa: str) -> None:
    """`_C.attention`, which is compared with float64 in test_attention. With a window, labels
    choose nothing."""
    q, k, v = numbers(3, 70)
    starts = [0, 21, 3]
    policy = "+topk:1/8" if window else ""
    found = feed(layer(kv + policy, 3, window, isa=isa), (q, k, v), 0, 70, starts)
    for b, start in enumerate(starts):
        alone = [each[b, start:] for each in (q, k, v)]
        table = np.arange(5, dtype=np.int32)
        assert (found[b, start:] == _C.attention(*alone, table, SCALE, window, isa, kv)).all()
        assert not found[b, :start].any()


@every_kv
def test_steps_are_the_prompt_at_once(kv: str) -> None:
    count = tokens_of(kv)
    given = numbers(2, count)
    starts = [5, 0]
    whole = feed(layer(kv, 2), given, 0, count, starts)
    assert np.isfinite(whole).all()
    for cuts in ([17, 1, 30, count - 48], [count - 40, *[1] * 40]):
        made, at = layer(kv, 2), 0
        for cut in cuts:
            found = feed(made, given, at, at + cut, starts)
            at += cut
            assert (found == whole[:, at - cut : at]).all()
            assert made.length == at


@every_kv
def test_a_batch_is_its_sequences(kv: str) -> None:
    count = tokens_of(kv)
    given, starts = numbers(3, count), [0, 77, 3]
    found = feed(layer(kv, 3), given, 0, count, starts)
    for b, start in enumerate(starts):
        one = tuple(each[b : b + 1] for each in given)
        alone = feed(layer(kv), (one[0][:, start:], *(e[:, start:] for e in one[1:])), 0, count)
        assert (found[b, start:] == alone[0]).all()


@every_kv
def test_isas_and_threads(kv: str) -> None:
    """Integer codecs to the bit on every ISA; all of them for every number of threads."""
    count = 1100 if "topk" not in kv else 620
    given = numbers(1, count)

    def last(isa: str | None, threads: int) -> Array:
        made = layer(kv, isa=isa)
        feed(made, given, 0, count - 2, threads=threads)
        return feed(made, given, count - 2, count, threads=threads)

    expected = last(exact_isa("w8a8g32"), 1)
    for isa in [exact_isa("w8a8g32"), *(USABLE if kv.startswith("int") else ())]:
        assert (last(isa, 3) == expected).all(), isa


@every_kv
def test_prompts_are_computed_in_pieces(kv: str) -> None:
    """Of 512 columns; in one where other layers attend the same keys."""
    given = numbers(2, 700)
    starts = [0, 600]
    expected = feed(layer(kv, 2, whole=True), given, 0, 700, starts)
    assert (feed(layer(kv, 2), given, 0, 700, starts) == expected).all()


def test_a_sequence_of_padding_alone_begins_later() -> None:
    given = numbers(2, 70)
    made = layer("int4", 2)
    assert not feed(made, given, 0, 10, [0, 10])[1].any()
    assert not feed(made, given, 10, 20, [0, 30])[1].any()
    found = feed(made, given, 20, 70, [0, 30])
    one = tuple(each[1:, 30:] for each in given)
    assert (found[1, 10:] == feed(layer("int4"), one, 0, 40)[0]).all()


# -- Going back, copies ---------------------------------------------------------------------------


@every_kv
def test_what_was_cropped_was_never_there(kv: str) -> None:
    """Inside of what the last step added, with every codec."""
    count = tokens_of(kv)
    given, starts = numbers(2, count), [0, 2]
    expected = feed(layer(kv, 2), given, 0, count, starts)
    other = numbers(2, count + 8)
    for kept in (0, 1, 15, 30):
        made = layer(kv, 2)
        begin = count - 30
        feed(made, given, 0, begin, starts)
        feed(made, tuple(np.concatenate([g[:, :kept], o[:, kept:30]], 1) for g, o in zip(
            (each[:, begin:] for each in given), other, strict=True)), 0, 30, starts)  # fmt: skip
        made.crop(begin + kept)
        assert made.length == begin + kept
        found = feed(made, given, begin + kept, count, starts)
        assert (found == expected[:, begin + kept :]).all()


@pytest.mark.parametrize("kv", GROWING)
def test_what_grows_goes_back_anywhere(kv: str) -> None:
    given = numbers(1, 150)
    expected = feed(layer(kv), given, 0, 150)
    made = layer(kv)
    for begin in range(0, 150, 10):
        feed(made, given, begin, begin + 10)
    for length in (99, 32, 7, 0):
        made.crop(length)
        assert (feed(made, given, length, 150) == expected[:, length:]).all()


@pytest.mark.parametrize("kv", ["int4", "int8_sp70", "f16+plan:x", "int8+merge:0.5"])
def test_what_was_let_go_of_does_not_come_back(kv: str) -> None:
    given = numbers(1, 200)
    made = layer(kv)
    feed(made, given, 0, 150)
    feed(made, given, 150, 200)
    with pytest.raises(RequestError, match="of 200 tokens cannot go back to 90"):
        made.crop(90)
    assert made.length == 200
    made.crop(0)
    again = feed(made, given, 0, 150)
    assert (again == feed(layer(kv), given, 0, 150)).all()


@every_kv
@pytest.mark.parametrize("rows", [[1, 0, 2], [2, 2], [0, 0, 1, 1, 2, 2], [1]])
def test_sequences_are_reordered_copied_and_left_out(kv: str, rows: list[int]) -> None:
    count = tokens_of(kv)
    given, starts = numbers(3, count), [0, 17, 4]
    expected = feed(layer(kv, 3), given, 0, count, starts)[rows, count - 30 :]
    made = layer(kv, 3)
    feed(made, given, 0, count - 30, starts)
    made.select(rows)
    assert made.batch == len(rows)
    chosen = tuple(each[rows] for each in given)
    found = feed(made, chosen, count - 30, count, [starts[row] for row in rows])
    assert (found == expected).all()


def test_copies_go_their_own_ways() -> None:
    given = numbers(2, 90)
    made = layer("int4")
    one = tuple(each[:1] for each in given)
    feed(made, one, 0, 40)
    made.select([0, 0])
    found = feed(made, given, 40, 90)
    for b in range(2):
        mixed = tuple(np.concatenate([e[:1, :40], e[b : b + 1, 40:]], 1) for e in given)
        assert (found[b] == feed(layer("int4"), mixed, 0, 90)[0, 40:]).all()


@every_kv
def test_a_deep_copy_goes_its_own_way(kv: str) -> None:
    count = tokens_of(kv)
    given, other = numbers(1, count), tuple(-each for each in numbers(1, count))
    made = layer(kv)
    feed(made, given, 0, count - 40)
    twin = deepcopy(made)
    feed(twin, other, count - 40, count)
    expected = feed(layer(kv), given, 0, count)[:, count - 40 :]
    assert (feed(made, given, count - 40, count) == expected).all()
    twin.crop(count - 40)
    assert (feed(twin, given, count - 40, count) == expected).all()


@pytest.mark.parametrize("kv", ["f16", "int4", "int8+topk:1/8"])
def test_other_queries_over_the_same_keys(kv: str) -> None:
    q, k, v = numbers(2, 90)
    other = q[:, ::-1].copy()
    made, expected = layer(kv, 2), feed(layer(kv, 2), (other, k, v), 0, 90, [0, 9])
    feed(made, (q, k, v), 0, 60, [0, 9])
    assert (made.attend(other[:, :60], SCALE, 3) == expected[:, :60]).all()
    feed(made, (q, k, v), 60, 90, [0, 9])
    assert (made.attend(other[:, 60:], SCALE, 1) == expected[:, 60:]).all()


def test_other_queries_come_too_late_for_a_window() -> None:
    q, k, v = numbers(1, 700)
    made = layer("f16", window=30)
    feed(made, (q, k, v), 0, 700)
    with pytest.raises(RequestError, match="let go of keys that another layer still attends"):
        made.attend(q, SCALE, 1)
    whole = layer("f16", window=30, whole=True)
    expected = feed(whole, (q, k, v), 0, 700)
    assert (whole.attend(q, SCALE, 1) == expected).all()


# -- Merging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [100, 530])
def test_a_prompt_is_merged_when_it_is_complete(count: int) -> None:
    """530: in pieces; the last 32 rows stay together."""
    q, k, v = numbers(2, count + 3)
    starts = [0, 20]
    made = layer("f16+merge:0.5", 2)
    found = feed(made, (q, k, v), 0, count, starts)
    assert (found == feed(layer("f16", 2), (q, k, v), 0, count, starts)).all()
    size = made.bytes
    for i in range(3):
        found = feed(made, (q, k, v), count + i, count + i + 1, starts)
        for b, start in enumerate(starts):
            expected = after_merge(*(e[b, start : count + i + 1] for e in (q, k, v)), count - start)
            assert (found[b, 0] == expected).all()
    assert made.bytes == size  # its blocks have room again


def after_merge(q: Array, k: Array, v: Array, count: int) -> Array:
    """Attention of the last row, the first `count` tokens being merged."""
    keep = kept_tokens(count, 0.5)
    blocks = np.arange(-(-count // 16), dtype=np.int32)
    out = np.arange(-(-keep // 16), dtype=np.int32)
    heads = []
    for h in range(KV_HEADS):
        group = slice(h * HEADS // KV_HEADS, (h + 1) * HEADS // KV_HEADS)
        given = q[count - 32 : count, group], k[:count, h], v[:count, h]
        merged = _C.merge(*map(np.ascontiguousarray, given), blocks, out, SCALE, keep, "f16")
        keys = np.concatenate([merged[0], k[count:, h]])
        values = np.concatenate([merged[1], v[count:, h]])
        queries = np.zeros((len(keys), HEADS // KV_HEADS, D), np.float32)
        queries[-1] = q[-1, group]
        table = np.arange(-(-len(keys) // 16), dtype=np.int32)
        args = queries, keys[:, None], values[:, None], table, SCALE, 0, None, "f16"
        heads.append(_C.attention(*args)[-1])
    return np.concatenate(heads)


def test_short_prompts_are_not_merged() -> None:
    given = numbers(1, 70)
    made, plain = layer("f16+merge:0.5"), layer("f16")
    for begin, stop in ((0, 60), (60, 70)):
        found = feed(made, given, begin, stop)
        assert (found == feed(plain, given, begin, stop)).all()


def test_a_merge_that_fails_is_taken_back() -> None:
    given = numbers(1, 110)
    made = layer("f16+merge:0.5")
    with pytest.raises(RequestError, match="scale must be positive"):
        made.step(*(each[:, :100] for each in given), [0], float("nan"), 1)
    assert made.length == 0
    found = feed(made, given, 0, 100), feed(made, given, 100, 110)
    other = layer("f16+merge:0.5")
    assert (found[0] == feed(other, given, 0, 100)).all()
    assert (found[1] == feed(other, given, 100, 110)).all()


def test_other_queries_that_fail_change_nothing() -> None:
    given = numbers(1, 60)
    made = layer("int4")
    feed(made, given, 0, 40)
    with pytest.raises(RequestError, match="scale must be positive"):
        made.attend(given[0][:, :40], 0.0, 1)
    assert made.length == 40
    expected = feed(layer("int4"), given, 0, 60)[:, 40:]
    assert (feed(made, given, 40, 60) == expected).all()


# -- Memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ["f16", "int8", "int4", "int8_sp70"])
def test_memory_is_what_the_format_says(kv: str) -> None:
    """Plus a 16th, 8 blocks, and of sealed codecs those that grow."""
    count = 4000
    given = numbers(1, count + 200)
    made = layer(kv)
    feed(made, given, 0, count)
    for i in range(200):
        feed(made, given, count + i, count + i + 1)
    growing = sealed_from(kv)
    most = block_bytes(kv, D) * (263 * 17 // 16 + 8)
    if growing:
        most += block_bytes(growing, D) * (2 + 32 + 1 + 1 + 8)
    assert block_bytes(kv, D) * 263 * KV_HEADS <= made.bytes <= most * KV_HEADS


def test_a_window_keeps_no_more_than_it() -> None:
    given = numbers(1, 3000)
    made = layer("f16", window=64)
    feed(made, given, 0, 3000)
    assert made.bytes < 64 * block_bytes("f16", D) * KV_HEADS


def test_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    given = numbers(2, 1000)
    made, expected = layer("f16", 2), feed(layer("f16", 2), given, 0, 300)
    feed(made, given, 0, 200)
    monkeypatch.setattr(paged, "available_memory", lambda: 40_000)
    with pytest.raises(RequestError, match=r"is to grow to \d+ MiB, only 0 MiB are available"):
        feed(made, given, 200, 1000)
    with pytest.raises(RequestError, match="is to grow to"):
        made.select([0, 0, 1, 1, 0, 1])
    monkeypatch.undo()
    assert (made.length, made.batch) == (200, 2)
    assert (feed(made, given, 200, 300) == expected[:, 200:]).all()


# -- Wrong use ------------------------------------------------------------------------------------


def test_where_sequences_begin() -> None:
    given = numbers(2, 40)
    made = layer("f16", 2)
    feed(made, given, 0, 4, [0, 2])
    for starts in ([1, 2], [0, 1], [0, 3]):
        with pytest.raises(RequestError, match=r"sequence \d began at"):
            feed(made, given, 4, 5, starts)
    assert made.length == 4
    feed(made, given, 4, 5, [0, 2])


def test_rows_that_are_not_there() -> None:
    made = layer("f16", 2)
    feed(made, numbers(2, 4), 0, 4)
    for rows in ([2], [], [-1]):
        with pytest.raises(RequestError, match=r"rows must be some of 0\.\.1"):
            made.select(rows)


def test_a_plan_of_another_layer() -> None:
    for model, heads in (({"head_dim": 64}, 2), ({"type": "qwen2"}, 2), ({}, 3)):
        with pytest.raises(CheckpointError, match="a plan of another"):
            PagedLayer(LayerShape("llama", heads, D, 0), parse_kv("f16"), plan_of(model), 1)
    with pytest.raises(CheckpointError, match="the layer has a window of its own"):
        layer("f16+plan:x", window=30)


def test_kv_that_a_layer_cannot_have() -> None:
    shape = LayerShape("llama", KV_HEADS, D, 30)
    with pytest.raises(RequestError, match="everything, 1 of 1 have a sliding window"):
        PagedLayer(shape, parse_kv("merge:0.5"), None, 1)
    with pytest.raises(RequestError, match="needs the labels of this model"):
        PagedLayer(shape, parse_kv("topk:1/8"), None, 1)
    with pytest.raises(RequestError, match="head_dim must be in"):
        PagedLayer(LayerShape("llama", 1, 1024, 0), parse_kv("f16"), None, 1)

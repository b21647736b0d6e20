"""The KV cache of PyTorch models: each sequence is what `attention` computes of it alone, to the
bit, however its tokens were cut into steps and whatever stands beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lacewing import _C

Array = np.ndarray[Any, Any]

ISAS = [isa["name"] for isa in _C.isas() if isa["usable"]]
KV_HEADS, HEADS, D = 2, 6, 20  # 20: no multiple of 16
TOKENS = 70  # the blocks of a sequence double twice

every_kv = pytest.mark.parametrize("kv", ["f16", "bf16", "f32", "int8"])


def normal(*shape: int, seed: int) -> Array:
    rng = np.random.default_rng([seed, *shape])
    return rng.standard_normal(shape).astype(np.float32)


def batch(count: int, tokens: int = TOKENS) -> tuple[Array, Array, Array]:
    """q, k, v `[count, tokens, heads, D]`."""
    return (
        normal(count, tokens, HEADS, D, seed=1),
        normal(count, tokens, KV_HEADS, D, seed=2),
        normal(count, tokens, KV_HEADS, D, seed=3),
    )


def alone(q: Array, k: Array, v: Array, kv: str, isa: str | None = None, window: int = 0) -> Array:
    """Attention of one sequence, `[tokens, heads, D]`."""
    table = np.arange(-(-len(k) // 16), dtype=np.int32)
    return _C.attention(q, k, v, table, D**-0.5, window, isa, kv)


def cache(kv: str = "f16", count: int = 1, isa: str | None = None) -> Any:
    return _C.KvCache(kv, count, KV_HEADS, D, isa)


def at(*starts: int) -> Array:
    return np.array(starts, np.int32)


def step(
    made: Any, q: Array, k: Array, v: Array, starts: Array, window: int = 0, threads: int = 1
) -> Array:
    made.append(*map(np.ascontiguousarray, (k, v)), starts, threads)
    return made.attend(np.ascontiguousarray(q), D**-0.5, window, threads)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", [0, 9])
@every_kv
def test_a_batch_is_its_sequences(kv: str, window: int, isa: str) -> None:
    q, k, v = batch(3)
    starts = at(0, 21, 3)
    found = step(cache(kv, 3, isa), q, k, v, starts, window)
    for b, start in enumerate(starts):
        expected = alone(q[b, start:], k[b, start:], v[b, start:], kv, isa, window)
        assert np.array_equal(found[b, start:], expected)
        assert not found[b, :start].any()


@pytest.mark.parametrize("cuts", [(1,) * TOKENS, (20, 1, 49), (69, 1), (16, 16, 38)])
@every_kv
def test_steps_are_the_prompt_at_once(kv: str, cuts: tuple[int, ...]) -> None:
    q, k, v = batch(2)
    starts = at(5, 0)
    whole = step(cache(kv, 2), q, k, v, starts)
    made, done = cache(kv, 2), 0
    for count in cuts:
        span = slice(done, done + count)
        found = step(made, q[:, span], k[:, span], v[:, span], starts)
        assert np.array_equal(found, whole[:, span])
        done += count
        assert made.length == done


@pytest.mark.parametrize("tokens", [1100, 1500])
def test_threads_cut_long_contexts_into_segments(tokens: int) -> None:
    q, k, v = batch(1, tokens)
    expected = alone(q[0, -2:], k[0], v[0], "int8")
    for threads in (1, 2, 3):
        made = cache("int8")
        made.append(k, v, at(0), threads)
        found = made.attend(np.ascontiguousarray(q[:, -2:]), D**-0.5, 0, threads)
        assert np.array_equal(found[0], expected)


def test_cropped_is_never_appended() -> None:
    q, k, v = batch(2)
    starts = at(0, 2)
    expected = step(cache(count=2), q[:, :40], k[:, :40], v[:, :40], starts)
    made = cache(count=2)
    step(made, q[:, :30], k[:, :30], v[:, :30], starts)
    step(made, q[:, 50:], k[:, 50:], v[:, 50:], starts)
    made.crop(30)
    found = step(made, q[:, 30:40], k[:, 30:40], v[:, 30:40], starts)
    assert np.array_equal(found, expected[:, 30:])


@pytest.mark.parametrize("rows", [[1, 0, 2], [2, 2], [0, 0, 1, 1, 2, 2], [1]])
def test_sequences_are_reordered_copied_and_left_out(rows: list[int]) -> None:
    q, k, v = batch(3)
    starts = at(0, 17, 4)
    expected = step(cache(count=3), q, k, v, starts)[rows, 40:]
    made = cache(count=3)
    step(made, q[:, :40], k[:, :40], v[:, :40], starts)
    made.select(np.array(rows))
    assert made.batch == len(rows)
    found = step(made, q[rows, 40:], k[rows, 40:], v[rows, 40:], starts[rows])
    assert np.array_equal(found, expected)


def test_a_sequence_of_padding_alone_begins_later() -> None:
    q, k, v = batch(2)
    made = cache(count=2)
    first = step(made, q[:, :10], k[:, :10], v[:, :10], at(0, 10))
    assert not first[1].any()
    found = step(made, q[:, 10:], k[:, 10:], v[:, 10:], at(0, 30))
    assert np.array_equal(found[1, 20:], alone(q[1, 30:], k[1, 30:], v[1, 30:], "f16"))
    assert not found[1, :20].any()


def test_memory_grows_by_doubling() -> None:
    _, k, v = batch(1)
    made = cache()
    assert made.bytes == 0
    sizes = []
    for i in range(TOKENS):
        made.append(k[:, i : i + 1].copy(), v[:, i : i + 1].copy(), at(0))
        sizes.append(made.bytes // (KV_HEADS * _C.kv_block_bytes("f16", D)))
    assert sorted(set(sizes)) == [4, 8]
    assert sizes[63:65] == [4, 8]


def test_wrong_arguments() -> None:
    q, k, v = batch(2, 4)
    made = cache(count=2)
    for arguments, message in (
        (
            (k[:1].copy(), v[:1].copy(), at(0)),
            r"k must be \[2, tokens, 2, 20\], got \[1, 4, 2, 20\]",
        ),
        ((k, v[:, :3].copy(), at(0, 0)), "k and v must have the same shape"),
        ((k, v, at(0)), r"starts must be \[2\], got \[1\]"),
        ((k, v, at(0, -1)), "sequence 1 began at 0, not at -1"),
        ((k, v, at(0, 0), -1), "threads must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            made.append(*arguments)
    assert made.length == 0
    with pytest.raises(ValueError, match=r"q must be \[2, at most 0, a multiple of 2, 20\]"):
        made.attend(q, 1.0)
    made.append(k, v, at(0, 2))
    for starts in (at(1, 2), at(0, 1), at(0, 3)):
        with pytest.raises(ValueError, match=r"sequence \d began at"):
            made.append(k, v, starts)
    for wrong in (q[:, :, :5].copy(), q[:, :, :, :8].copy(), normal(2, 5, HEADS, D, seed=0)):
        with pytest.raises(ValueError, match="q must be"):
            made.attend(wrong, 1.0)
    with pytest.raises(ValueError, match="window must be in"):
        made.attend(q, 1.0, -1)
    with pytest.raises(ValueError, match=r"length must be in 0\.\.4, got 5"):
        made.crop(5)
    for rows, message in (([2], "sequence must be in .*, got 2"), ([], "at least one sequence")):
        with pytest.raises(ValueError, match=message):
            made.select(np.array(rows, np.int64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int7", 1, 1, 16), "kv must be one of"),
        (("int4", 1, 1, 16), "kv must store token by token, got `int4`"),
        (("f16", 0, 1, 16), "batch must be in"),
        (("f16", 1, 0, 16), "n_kv_heads must be in"),
        (("f16", 1, 1, 1024), "head_dim must be in"),
    ],
)
def test_a_cache_that_cannot_be(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.KvCache(*arguments)

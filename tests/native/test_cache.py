"""The native half of a PyTorch layer's cache: its blocks, and no argument that leaves its memory.

What it computes: tests/nn/test_paged.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lacewing import _C

Array = np.ndarray[Any, Any]

KV_HEADS, HEADS, D = 2, 4, 20
WHOLE = (-1, 0, -1, 0, 0, 0, 0, 0)  # neither sealed nor labels, and everything is read


def layout(blocks: int = 4, **changes: Any) -> dict[str, Any]:
    heads = np.array([(0, h, *WHOLE) for h in range(KV_HEADS)], np.int32)
    return {"stores": [("f16", blocks, KV_HEADS)], "heads": heads, "topk": 0, **changes}


def labelled(count: int, channel: int = 0, scale: float = 1.0) -> dict[str, Any]:
    """Heads that read what labels of `count` channels choose."""
    heads = np.array([(0, h, -1, 0, 1, h, 0, 0, 0, 0) for h in range(KV_HEADS)], np.int32)
    return {
        "stores": [("f16", 4, KV_HEADS), ("labels", 1, KV_HEADS)],
        "heads": heads,
        "topk": 8,
        "channels": np.full((KV_HEADS, count), channel, np.int32),
        "scales": np.full((KV_HEADS, count), scale, np.float32),
    }


def numbers(tokens: int) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(1)
    shapes = [(100, heads, D) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (rng.standard_normal(shape).astype(np.float32)[:tokens] for shape in shapes)
    return q, k, v


def ints(*values: int) -> Array:
    return np.array(values, np.int32)


def arguments(tokens: int, cached: int, *blocks: int) -> dict[str, Any]:
    q, k, v = numbers(cached + tokens)
    return {
        "q": q[cached:], "k": k[cached:], "v": v[cached:], "scale": 0.2, "window": 0,
        "cached": ints(cached), "block_tables": ints(*blocks).reshape(1, 1, -1),
        "cu_seqlens": ints(0, tokens),
    }  # fmt: skip


def test_blocks_stay_when_it_grows_and_are_copied() -> None:
    made = _C.KvCache(layout(2), KV_HEADS, D)
    assert made.bytes == 2 * KV_HEADS * _C.kv_block_bytes("f16", D)
    made.step(**arguments(20, 0, 1, 0))
    made.grow([5])
    assert made.bytes == 5 * KV_HEADS * _C.kv_block_bytes("f16", D)
    expected = made.step(**arguments(1, 20, 1, 0))
    made.copy(0, ints(1, 0), ints(3, 4))
    made.copy(0, ints(2, 2), ints(1, 0))  # what nobody wrote
    assert (made.step(**arguments(1, 20, 3, 4)) == expected).all()
    q, k, v = numbers(21)
    table = ints(0, 1)
    assert (expected == _C.attention(q, k, v, table, 0.2, 0, None, "f16")[-1:]).all()


def test_keys_that_are_there_already() -> None:
    made = _C.KvCache(layout(2), KV_HEADS, D)
    given = arguments(20, 0, 1, 0)
    expected = made.step(**given)
    assert (made.step(**{**given, "k": None, "v": None}) == expected).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.zeros((3, 3, D), np.float32)}, r"q must be \[rows, a multiple of 2, 20\]"),
        ({"q": np.zeros((3, 4, 8), np.float32)}, r"q must be .*, got \[3, 4, 8\]"),
        ({"k": np.zeros((2, 2, D), np.float32)}, r"k and v must be \[3, 2, 20\], got \[2, 2, 20\]"),
        ({"v": np.zeros((3, 1, D), np.float32)}, r"k and v must be \[3, 2, 20\], got \[3, 1, 20\]"),
        ({"v": None}, "k and v go together"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"scale": float("nan")}, "scale must be positive"),
        ({"window": -1}, "window must be in"),
        ({"threads": -1}, "threads must be in"),
        ({"cached": ints(-1)}, r"cached\[0\] must be in"),
        ({"cached": ints(40)}, "block_tables must have at least 3 columns for 43 tokens"),
        ({"cached": ints(0, 0)}, "cached must have one value per sequence"),
        ({"cu_seqlens": ints(0, 2)}, r"must end at the number of tokens \(3\), got 2"),
        ({"cu_seqlens": ints(1, 3)}, "must start at 0"),
        ({"block_tables": ints(0, 4).reshape(1, 1, 2), "cached": ints(14)},
         r"block_tables\[0, 0, 1\] must be in 0\.\.3, got 4"),
        ({"block_tables": ints(0, 0).reshape(2, 1, 1)}, r"must be \[1, sequences, blocks\]"),
        ({"keep": ints(0)}, "keep and merged_tables go together"),
        ({"keep": ints(40), "merged_tables": ints(1).reshape(1, 1)}, "at least 32 tokens, got 3"),
    ],
)  # fmt: skip
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    made = _C.KvCache(layout(), KV_HEADS, D)
    with pytest.raises(ValueError, match=message):
        made.step(**{**arguments(3, 0, 0, 1), **change})


@pytest.mark.parametrize(
    ("kv", "tables", "message"),
    [
        (labelled(8), [[0, 1], [1, 0]], r"block_tables\[1, 0, 0\] must be in 0\.\.0, got 1"),
        (
            layout(
                stores=[("int8", 4, KV_HEADS), ("int4", 2, KV_HEADS)],
                heads=np.array([(0, h, 1, h, -1, 0, 0, 0, 0, 0) for h in (0, 1)], np.int32),
            ),
            [[0, 1], [0, 2]],
            r"block_tables\[1, 0, 1\] must be in 0\.\.1, got 2",
        ),
    ],
)
def test_wrong_tables(kv: dict[str, Any], tables: list[list[int]], message: str) -> None:
    made = _C.KvCache(kv, KV_HEADS, D)
    given = arguments(20, 0, 0, 1)
    with pytest.raises(ValueError, match=message):
        made.step(**{**given, "block_tables": np.array(tables, np.int32)[:, None]})


def test_wrong_merged_tables() -> None:
    made = _C.KvCache(layout(6), KV_HEADS, D)
    given = arguments(70, 0, 0, 1, 2, 3, 4)
    for keep, table, message in (
        (40, [5, 5], r"merged_tables must have at least 3 columns for 40 tokens, got 2"),
        (40, [5, 5, 6], r"merged_tables\[0, 2\] must be in 0\.\.5, got 6"),
        (36, [5, 5, 5], r"keep\[0\] must be 0, or in 37\.\.70"),
        (71, [5] * 5, r"keep\[0\] must be 0, or in 37\.\.70"),
    ):
        with pytest.raises(ValueError, match=message):
            made.step(**given, keep=ints(keep), merged_tables=np.array([table], np.int32))


def test_wrong_blocks() -> None:
    made = _C.KvCache(layout(), KV_HEADS, D)
    for blocks, message in (
        ([3], r"blocks\[0\] must be in 4\.\."),
        ([4, 4], "one number per store"),
    ):
        with pytest.raises(ValueError, match=message):
            made.grow(blocks)
    for store, source, target, message in (
        (1, ints(0), ints(1), "store must be in"),
        (0, ints(4), ints(1), "block must be in"),
        (0, ints(0), ints(-1), "block must be in"),
        (0, ints(0), ints(1, 2), "same length"),
    ):
        with pytest.raises(ValueError, match=message):
            made.copy(store, source, target)


def test_no_memory_changes_nothing() -> None:
    kv = layout(stores=[("f16", 2, 1000)])  # heads that nobody reads
    made = _C.KvCache(kv, KV_HEADS, D)
    expected = made.step(**arguments(20, 0, 1, 0))
    with pytest.raises(MemoryError):
        made.grow([(1 << 27) - 1])  # more than addresses have room for
    again = made.step(**{**arguments(20, 0, 1, 0), "k": None, "v": None})
    assert (again == expected).all()


@pytest.mark.parametrize(
    ("kv", "heads", "head_dim", "message"),
    [
        (layout(stores=[("int7", 4, 2)]), 2, D, "must be one of"),
        (layout(stores=[("int4", 4, 2)]), 2, D, "the first store must be of a format that grows"),
        (layout(stores=[("f16", 4, 1)]), 2, D, "index must be in"),
        (layout(stores=[]), 2, D, "must not be empty"),
        (layout(topk=8), 2, D, "`kv.topk` and labels go together"),
        (labelled(68), 2, 80, r"a multiple of 4 up to head_dim and 64\], got \[2, 68\]"),
        (labelled(6), 2, D, "a multiple of 4 up to head_dim"),
        (labelled(8, channel=20), 2, D, "`kv.channels` must be in 0..19, got 20"),
        (labelled(8, scale=0.0), 2, D, "`kv.scales` must be positive and finite"),
        (layout(), 3, D, r"must be an i32 array \[3, 10\]"),
        (layout(), 0, D, "n_kv_heads must be in"),
        (layout(), 2, 1024, "head_dim must be in"),
        ({}, 2, D, "KvCache: kv needs `stores`"),
    ],
)
def test_a_cache_that_cannot_be(
    kv: dict[str, Any], heads: int, head_dim: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _C.KvCache(kv, heads, head_dim)

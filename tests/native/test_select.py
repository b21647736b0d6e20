"""Choosing blocks by labels: against numpy in float64, and the same blocks on every ISA.

Importance in f32 is off by a few roundings (EPS: half the distance of 1.0 to the next float), so a
block that is left out may be so much more important than one that is chosen, and no more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacewing import _C
from tests.native.labels import BLOCK, block_importance, label_codes

Array = np.ndarray[Any, Any]

EPS = 2.0**-24
ISAS = [isa["name"] for isa in _C.isas() if isa["usable"]]


def case(heads: int, tokens: int, d: int, r: int, seed: int = 0) -> tuple[Array, ...]:
    """q, k, a label table out of order with holes, channels out of order and their scales."""
    rng = np.random.default_rng([heads, tokens, d, r, seed])
    q = rng.standard_normal((heads, d)).astype(np.float32)
    k = rng.standard_normal((tokens, d)).astype(np.float32)
    groups = -(-tokens // 256)
    table = rng.permutation(groups + 2)[:groups].astype(np.int32)
    channels = rng.permutation(d)[:r].astype(np.int32)
    scales = (rng.uniform(1.5, 4, r) / 127).astype(np.float32)  # some keys are clipped
    return q, k, table, channels, scales


def choose(
    arrays: tuple[Array, ...],
    last: int,
    limits: tuple[int, int, int] = (1, 4, 8),
    scale: float = 0.2,
) -> Array:
    """What every ISA chooses."""
    chosen = [_C.select_blocks(*arrays, scale, last, *limits, isa) for isa in ISAS]
    for isa, each in zip(ISAS, chosen, strict=True):
        assert each.dtype == np.int32
        assert (each == chosen[0]).all(), isa
    return chosen[0]


def check(
    arrays: tuple[Array, ...], last: int, limits: tuple[int, int, int], scale: float = 0.2
) -> None:
    """The choice is one that exact importance allows."""
    q, k, _, channels, scales = arrays
    sinks, recent, budget = limits
    blocks = last // BLOCK + 1
    chosen = choose(arrays, last, limits, scale)
    assert len(chosen) == min(budget, blocks)
    assert (np.diff(chosen) > 0).all()
    assert chosen[0] >= 0
    assert chosen[-1] < blocks
    if budget >= blocks:
        return
    assert set(range(sinks)) <= set(chosen)
    assert set(range(blocks - recent, blocks)) <= set(chosen)
    importance = block_importance(q, k, channels, scales, scale, last)
    between = np.arange(sinks, blocks - recent)
    taken = np.isin(between, chosen)
    # Of every addend: its exponent, at most 125, the factor in it and the power; the sum over
    # blocks, 16 side by side, and its inverse. Powers below 2^-125 are zero.
    relative = 2 * (4 * 125 + 5 + blocks / 16 + 8 + len(q)) * EPS
    if taken.any() and not taken.all():
        most = importance[between[~taken]].max()
        assert importance[between[taken]].min() >= most * (1 - relative) - len(q) * 2.0**-124


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 255, 256, 257, 272, 511, 513, 4097])
@pytest.mark.parametrize("heads", range(1, 9))
def test_lengths_and_groups(tokens: int, heads: int) -> None:
    check(case(heads, tokens, 64, 16), tokens - 1, (1, 2, max(3, tokens // 40)))


@pytest.mark.parametrize("r", [4, 8, 12, 16, 20, 24, 28, 32, 64])
def test_channels(r: int) -> None:
    check(case(3, 700, max(r, 40), r), 699, (1, 4, 12))


@given(st.data())
def test_any_choice(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 900))
    d = data.draw(st.sampled_from([8, 24, 80]))
    r = 4 * data.draw(st.integers(1, min(d // 4, 16)))
    arrays = case(data.draw(st.integers(1, 9)), tokens, d, r)
    budget = data.draw(st.integers(1, 60))
    sinks = data.draw(st.integers(0, budget))
    recent = data.draw(st.integers(0, budget - sinks))
    last = data.draw(st.integers(0, tokens - 1))
    arrays[1][last + 1 :] *= 10  # would be chosen if they counted
    scale = data.draw(st.sampled_from([1e-3, 0.1, 5.0]))
    check(arrays, last, (sinks, recent, budget), scale)


def test_a_long_context() -> None:
    check(case(4, 70_000, 16, 8), 69_990, (1, 4, 280))


def test_later_tokens_do_not_matter() -> None:
    q, k, *rest = case(4, 600, 32, 8)
    k[350:] *= 100
    for last in (255, 256, 300, 319, 320, 349):
        seen = choose((q, k[: last + 1], *rest), last, (1, 0, 8))
        assert (choose((q, k, *rest), last, (1, 0, 8)) == seen).all()


def test_the_one_token_that_matters() -> None:
    q, k, table, channels, scales = case(2, 2000, 32, 8)
    for place in (40, 255, 256, 1000, 1800):
        needle = k * np.float32(0.5)
        needle[place] = q[0]
        assert place // BLOCK in choose((q[:1], needle, table, channels, scales), 1999)


def test_equally_important_blocks() -> None:
    """The lower ones."""
    q, k, *rest = case(3, 640, 32, 8)
    assert (choose((q * 0, k, *rest), 639) == [0, 1, 2, 3, 36, 37, 38, 39]).all()
    pattern = np.tile(k[:48], (14, 1))[:640]  # blocks 0, 3, 6, .. are alike
    importance = block_importance(q, pattern, *rest[1:], 0.2, 639)
    best = int(importance[:3].argmax())
    between = [b for b in range(1, 36) if b % 3 == best][:3]
    assert (choose((q, pattern, *rest), 639) == [0, *between, 36, 37, 38, 39]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_numbers_that_are_none(bad: float) -> None:
    q, k, *rest = case(3, 640, 32, 8)
    k[100], k[200:220, ::2] = bad, bad
    clipped = (q, np.clip(np.nan_to_num(k, nan=-1e6), -1e6, 1e6), *rest)
    check(clipped, 639, (1, 4, 8))
    assert (choose((q, k, *rest), 639) == choose(clipped, 639)).all()
    q[1, ::3] = bad
    chosen = choose((q, k, *rest), 639)
    assert len(chosen) == 8
    assert (np.diff(chosen) > 0).all()


def test_codes_are_rounded_and_clipped() -> None:
    k = np.array([[0.5, 1.5, -2.5, 1000]], np.float32)
    codes = label_codes(k, np.arange(4), np.ones(4, np.float32))
    assert (codes == [[0, 2, -2, 127]]).all()


def test_wrong_arguments() -> None:
    arrays = case(2, 300, 16, 8)
    q, k, table, channels, scales = arrays

    def refused(match: str, given: tuple[Array, ...], *rest: Any) -> None:
        with pytest.raises(ValueError, match=match):
            _C.select_blocks(*given, *rest)

    refused("channels must be a multiple of 4, at most 64, got 7",
            (q, k, table, channels[:7], scales), 0.1, 299, 1, 4, 8)  # fmt: skip
    refused(r"channels must be in 0\.\.15, got 16",
            (q, k, table, channels * 0 + 16, scales), 0.1, 299, 1, 4, 8)  # fmt: skip
    refused("scales must have 8 values, got 3",
            (q, k, table, channels, scales[:3]), 0.1, 299, 1, 4, 8)  # fmt: skip
    refused("label_table must have at least 2 values, got 1",
            (q, k, table[:1], channels, scales), 0.1, 299, 1, 4, 8)  # fmt: skip
    refused(r"q must be \[heads, 16\]",
            (q[:, :8].copy(), k, table, channels, scales), 0.1, 299, 1, 4, 8)  # fmt: skip
    refused(r"last must be in 0\.\.299, got 300", arrays, 0.1, 300, 1, 4, 8)
    refused(r"recent must be in 0\.\.2, got 4", arrays, 0.1, 299, 1, 4, 3)

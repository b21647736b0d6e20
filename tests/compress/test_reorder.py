"""Channel order: what it is sorted by, that it pays where sizes differ, and only there."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="compression needs PyTorch")

from lacewing.compress.decoder import STAGES  # noqa: E402
from lacewing.compress.folds import input_order  # noqa: E402
from lacewing.compress.reorder import KEYS, Reader, reorder_stage  # noqa: E402
from lacewing.compress.rounding import error, nearest, round_activations  # noqa: E402
from lacewing.formats import get_format  # noqa: E402
from tests.compress.blocks import input_width, inputs_of, outliers, tiny_block  # noqa: E402


def weights(block, stage: int) -> list:
    return [block.linear(name).weight.detach() for name in STAGES[stage]]


def weight(n: int, k: int, seed: int = 0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["w8a8g32", "w4a8g32", "w2a8g64"])
def test_outliers_come_together_and_the_error_falls(name: str) -> None:
    """Weights of small inputs are large, so that all channels matter, and the large ones are as
    many as a group of 32 has: on tokens not seen before."""
    block, plain = tiny_block("llama"), tiny_block("llama")
    for b in (block, plain):
        weights(b, 3)[0][:, ::5] /= 50
    seen, held = (outliers(256, 160, every=5, size=50.0, seed=s) for s in (1, 2))
    format = get_format(name)
    found = reorder_stage(block, 3, [format], inputs_of(seen))
    assert found.key is not None
    large = torch.isin(found.order, torch.arange(0, 160, 5))
    assert bool(large[:32].all() or large[-32:].all())

    def measured(w, order) -> float:
        x, y = held[:, order], held[:, order] @ w.T
        rounded = nearest(w, format, seen.square().mean(0)[order])
        return float((round_activations(x, format) @ rounded.T - y).square().sum())

    before = measured(weights(plain, 3)[0], torch.arange(160))
    assert measured(weights(block, 3)[0], found.order) < before / 2


@pytest.mark.parametrize("name", ["w8a8g32", "w4a8g32", "w3a8g64"])
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("size", [1.0, 8.0])
def test_the_record_is_true_and_never_worse(size: float, stage: int, name: str) -> None:
    block, plain = tiny_block("qwen3"), tiny_block("qwen3")
    x = outliers(256, input_width(block, stage), every=9, size=size)
    inputs, chosen = inputs_of(x), [get_format(name)]
    found = reorder_stage(block, stage, chosen, inputs)
    assert found.before == error(weights(plain, stage), chosen, inputs)
    order = input_order(block.spec, stage, found.order)
    again = error(weights(block, stage), chosen, inputs.ordered(order))
    assert found.after == pytest.approx(again, rel=1e-4)  # the outputs' energy, once more in f32
    if found.key is None:
        assert torch.equal(found.order, torch.arange(len(found.order)))
        assert all(
            torch.equal(a, b) for a, b in zip(block.parameters(), plain.parameters(), strict=True)
        )
    else:
        assert found.after < found.before


def test_values_stay_in_their_head_and_are_sorted_there() -> None:
    block = tiny_block("gemma3")  # 4 query heads of 32 channels read one KV head
    x = outliers(256, 128, every=1, size=1.0)
    x.view(256, 4, 32)[:, :, 5] *= 300
    x.view(256, 4, 32)[:, :, 17] *= 100
    found = reorder_stage(block, 1, [get_format("w4a8g64")], inputs_of(x))
    assert found.order.sort().values.tolist() == list(range(32))
    if found.key in ("rms", "absmax", "joint"):
        assert found.order[:2].tolist() == [5, 17]


def test_ties_keep_their_places_and_equal_channels_their_order() -> None:
    block = tiny_block("llama")
    weights(block, 3)[0].fill_(1)
    found = reorder_stage(block, 3, [get_format("w4a8g32")], inputs_of(torch.ones(64, 160)))
    assert found.key is None
    assert found.order.tolist() == list(range(160))


@pytest.mark.parametrize("name", ["w8a8", "bf16", "w1.6a8"])
def test_one_group_has_no_order(name: str) -> None:
    x = outliers(64, 160, every=7, size=30.0)
    found = reorder_stage(tiny_block("llama"), 3, [get_format(name)], inputs_of(x))
    assert found.key is None and found.before == found.after


def test_dead_channels_are_sorted_to_the_end() -> None:
    block = tiny_block("llama")
    weights(block, 3)[0][:, ::7] /= 60
    x = outliers(128, 160, every=7, size=60.0)
    x[:, 20:40] = 0
    found = reorder_stage(block, 3, [get_format("w8a8g32")], inputs_of(x))
    assert found.key in KEYS
    assert found.after < found.before
    if found.key != "weight":
        assert sorted(found.order[-20:].tolist()) == list(range(20, 40))


def test_magnitudes_by_their_definitions() -> None:
    x, w, v = outliers(64, 32, every=5, size=9.0), weight(4, 32), weight(12, 32, seed=1)
    found = Reader([w, v], [get_format("w4a8g32")] * 2, inputs_of(x)).magnitudes()
    rows = torch.cat([w, v])
    for j in range(32):
        rms = float(x[:, j].square().mean()) ** 0.5
        of_weights = float(rows[:, j].square().mean()) ** 0.5
        assert float(found["rms"][j]) == pytest.approx(rms, rel=1e-5)
        assert float(found["absmax"][j]) == float(x[:, j].abs().max())
        assert float(found["weight"][j]) == pytest.approx(of_weights, rel=1e-5)
        assert float(found["joint"][j]) == pytest.approx(rms * of_weights, rel=1e-5)


def test_reordering_is_repeatable() -> None:
    x = outliers(256, 160, every=16, size=50.0)
    a, b = (
        reorder_stage(tiny_block("llama"), 3, [get_format("w8a8g32")], inputs_of(x))
        for _ in range(2)
    )
    assert torch.equal(a.order, b.order)
    assert (a.key, a.before, a.after) == (b.key, b.before, b.after)

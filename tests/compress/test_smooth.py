"""Smoothing against the papers' formulas, and what it must never do."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="compression needs PyTorch")

from lacewing.compress import smooth  # noqa: E402
from lacewing.compress.decoder import STAGES  # noqa: E402
from lacewing.compress.folds import expand  # noqa: E402
from lacewing.compress.rounding import error, nearest, round_activations  # noqa: E402
from lacewing.compress.smooth import ALPHAS, METHODS, candidate, smooth_stage  # noqa: E402
from lacewing.errors import RecipeError  # noqa: E402
from lacewing.formats import get_format  # noqa: E402
from tests.compress.blocks import input_width, inputs_of, outliers, tiny_block  # noqa: E402

STAGE_NUMBERS = range(len(STAGES))


def formats(stage: int, name: str) -> list:
    return [get_format(name)] * len(STAGES[stage])


def weights(block, stage: int) -> list:
    return [block.linear(name).weight.detach() for name in STAGES[stage]]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_scales_are_those_of_the_papers(alpha: float) -> None:
    """Up to a factor for all channels, which rounding does not see."""
    x, w = outliers(64, 48, every=5, size=30.0), torch.randn(20, 48).abs() + 0.01
    naive_awq = [
        float(x[:, j].abs().mean()) ** alpha / float(w[:, j].mean()) ** (1 - alpha)
        for j in range(48)
    ]
    naive_smoothquant = [
        float(x[:, j].abs().max()) ** alpha / float(w[:, j].max()) ** (1 - alpha) for j in range(48)
    ]
    found_awq = candidate(x.abs().mean(0), w.mean(0), alpha)
    found_smoothquant = candidate(x.abs().amax(0), w.amax(0), alpha)
    for found, naive in ((found_awq, naive_awq), (found_smoothquant, naive_smoothquant)):
        ratio = found / torch.tensor(naive)
        # Sums, a logarithm and an exponential in f32: some 20 roundings of relative 2^-24, and the
        # logarithms, below 8, add theirs absolutely.
        torch.testing.assert_close(ratio, ratio[0].expand(48), rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", STAGE_NUMBERS)
def test_magnitudes_are_those_of_the_method(method: str, stage: int) -> None:
    """The chosen scales, from the statistics spelled out; value channels over their query heads."""
    block, plain = tiny_block("llama"), tiny_block("llama")
    x = outliers(200, input_width(block, stage), every=7, size=40.0)
    found = smooth_stage(block, stage, formats(stage, "w8a8"), inputs_of(x, 200), method)
    assert found.alpha is not None
    w = torch.cat(weights(plain, stage)).abs()
    if method == "awq":
        a, b = x.abs().mean(0), w.mean(0)
    else:
        a, b = x.abs().amax(0), w.amax(0)
    if stage == 1:
        a, b = a.view(2, 3, 16), b.view(2, 3, 16)
        a, b = (a.mean(1), b.mean(1)) if method == "awq" else (a.amax(1), b.amax(1))
    assert torch.equal(found.scales, candidate(a.flatten(), b.flatten(), found.alpha))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["w8a8", "w8a8g64", "w4a8g32", "w2a8g64"])
@pytest.mark.parametrize("stage", STAGE_NUMBERS)
def test_the_record_is_true_and_never_worse(stage: int, name: str, method: str) -> None:
    block, plain = tiny_block("llama-bias"), tiny_block("llama-bias")
    x = outliers(200, input_width(block, stage), every=11, size=6.0)
    inputs, chosen = inputs_of(x), formats(stage, name)
    found = smooth_stage(block, stage, chosen, inputs, method)
    assert found.after <= found.before
    assert found.before == error(weights(plain, stage), chosen, inputs)
    wide = expand(block.spec, stage, found.scales)
    again = error(weights(block, stage), chosen, inputs.divided(wide))
    assert found.after == pytest.approx(again, rel=1e-4)  # the outputs' energy, once more in f32
    if found.alpha is None:
        assert found.after == found.before
        assert all(
            torch.equal(a, b) for a, b in zip(block.parameters(), plain.parameters(), strict=True)
        )


def test_all_alphas_are_tried() -> None:
    """The winner of the search is the winner of an exhaustive naive one."""
    block = tiny_block("llama")
    x = outliers(200, 96, every=11, size=20.0)
    inputs, chosen = inputs_of(x, 200), formats(0, "w8a8")
    ws = weights(tiny_block("llama"), 0)
    found = smooth_stage(block, 0, chosen, inputs, "smoothquant")
    losses = {}
    for alpha in ALPHAS:
        s = candidate(inputs.absmax, torch.cat(ws).abs().amax(0), alpha)
        losses[alpha] = error([w * s for w in ws], chosen, inputs.divided(s))
    assert found.alpha == min(losses, key=losses.__getitem__)
    assert found.after == pytest.approx(min(losses.values()), rel=1e-4)


def output_error(block, stage: int, x, name: str, importance) -> float:
    """Of the first layer, measured on x token by token."""
    w, format = weights(block, stage)[0], get_format(name)
    y = x @ w.T
    lost = round_activations(x, format) @ nearest(w, format, importance).T - y
    return float(lost.square().sum() / y.square().sum())


@pytest.mark.parametrize("stage", STAGE_NUMBERS)
def test_smoothquant_halves_the_error_that_outliers_make(stage: int) -> None:
    """One scale per token, one channel in sixteen a hundred times the others: judged on tokens
    that it has not seen."""
    block = tiny_block("llama")
    for layer in weights(block, stage):
        layer[:, ::16] /= 100  # or their outputs would drown the others', and so the error
    k = input_width(block, stage)
    seen, held = (outliers(256, k, every=16, size=100.0, seed=s) for s in (1, 2))
    before = output_error(block, stage, held, "w8a8", seen.square().mean(0))
    found = smooth_stage(block, stage, formats(stage, "w8a8"), inputs_of(seen), "smoothquant")
    wide = expand(block.spec, stage, found.scales)
    after = output_error(block, stage, held / wide, "w8a8", (seen / wide).square().mean(0))
    assert after < before / 2


def test_awq_keeps_the_weights_of_large_inputs() -> None:
    """Few bits, one large channel in every group of 32, weights of one size."""
    block = tiny_block("llama")
    seen, held = (outliers(256, 96, every=32, size=100.0, seed=s) for s in (1, 2))
    before = output_error(block, 0, held, "w4a8g32", seen.square().mean(0))
    found = smooth_stage(block, 0, formats(0, "w4a8g32"), inputs_of(seen), "awq")
    after = output_error(
        block, 0, held / found.scales, "w4a8g32", (seen / found.scales).square().mean(0)
    )
    assert after < before / 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", STAGE_NUMBERS)
def test_dead_channels_and_columns_stay_as_they_are(stage: int, method: str) -> None:
    block = tiny_block("qwen2")
    x = outliers(200, input_width(block, stage), every=7, size=40.0)
    dead = torch.zeros(input_width(block, stage), dtype=torch.bool)
    dead.view(-1, 16)[:, 3] = True  # of every head
    zero = dead.roll(1)
    x[:, dead] = 0
    for layer in weights(block, stage):
        layer[:, zero] = 0
    found = smooth_stage(block, stage, formats(stage, "w8a8"), inputs_of(x), method)
    wide = expand(block.spec, stage, found.scales)
    assert found.alpha is not None
    assert bool((wide[dead | zero] == 1).all())
    assert all(bool(p.isfinite().all()) for p in block.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", STAGE_NUMBERS)
@pytest.mark.parametrize("size", [1e-30, 1e12])
def test_extreme_channels_leave_everything_in_the_range_of_f16(
    size: float, stage: int, method: str
) -> None:
    block = tiny_block("gemma3")
    x = outliers(200, input_width(block, stage), every=13, size=size)
    found = smooth_stage(block, stage, formats(stage, "w8a8"), inputs_of(x), method)
    assert bool((found.scales >= 1 / 1024).all() and (found.scales <= 1024).all())
    assert all(float(p.detach().abs().max()) < 65504 for p in block.parameters())


def test_what_f16_cannot_hold_is_no_candidate() -> None:
    block = tiny_block("llama")
    norm = block.norm("input_layernorm").detach()
    norm.fill_(6e4)
    x = outliers(200, 96, every=7, size=40.0)
    found = smooth_stage(block, 0, formats(0, "w8a8"), inputs_of(x), "smoothquant")
    assert float(norm.abs().max()) <= 65504
    free = smooth_stage(tiny_block("llama"), 0, formats(0, "w8a8"), inputs_of(x), "smoothquant")
    assert free.after < found.after


def test_nothing_lives() -> None:
    block = tiny_block("llama")
    found = smooth_stage(block, 0, formats(0, "w8a8"), inputs_of(torch.zeros(20, 96)), "awq")
    assert (found.alpha, found.before, found.after) == (None, 0.0, 0.0)
    assert torch.equal(candidate(torch.zeros(4), torch.ones(4), 0.5), torch.ones(4))


def test_smoothing_is_repeatable() -> None:
    x = outliers(200, 96, every=7, size=40.0)
    a, b = (tiny_block("llama") for _ in range(2))
    one, two = (smooth_stage(c, 2, formats(2, "w8a8"), inputs_of(x)) for c in (a, b))
    assert torch.equal(one.scales, two.scales)
    assert (one.alpha, one.before, one.after) == (two.alpha, two.before, two.after)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_layers_of_a_stage_may_have_formats_of_their_own() -> None:
    block = tiny_block("llama")
    chosen = [get_format(name) for name in ("w8a8", "bf16", "w4a8g32")]
    x = outliers(200, 96, every=7, size=40.0)
    found = smooth_stage(block, 0, chosen, inputs_of(x))
    assert found.after < found.before


def test_methods_are_known() -> None:
    with pytest.raises(RecipeError, match="one of awq, smoothquant, got `magic`"):
        smooth_stage(tiny_block("llama"), 0, [], inputs_of(torch.ones(2, 96)), "magic")
    assert smooth.METHODS == ("awq", "smoothquant")

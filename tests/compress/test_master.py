"""Masters: what is trained behind a weight on a grid, and what never changes."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from lacewing.compress.master import LowRank, Master, Trainer, solution_of  # noqa: E402
from lacewing.formats import FORMATS, get_format  # noqa: E402
from tests.compress.training import FAMILIES, compressed  # noqa: E402

N, K = 33, 104  # no whole strips, a short last group


def weight(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((N, K)).astype(np.float32)


def trained(master: Master, steps: int = 12, rate: float = 0.1) -> Master:
    """Pulled towards another weight by steps far larger than usual."""
    target = torch.from_numpy(weight(1))
    trainer, out = Trainer({"layer": master}), torch.empty(N, K)
    for _ in range(steps):
        master.write(out)
        master.take(out - target)
        trainer.step(rate)
    return master


@pytest.mark.parametrize("format", FORMATS)
def test_a_packed_weight_is_read_without_loss(format: str) -> None:
    packed = compressed(weight(), format)
    solution = solution_of(packed)
    kind = get_format(format)
    assert np.array_equal(solution.values().numpy(), kind.dequantize(packed))
    again = kind.pack(solution.grid.codes(solution.levels, solution.scales))
    assert all(np.array_equal(again.parts[p], packed.parts[p]) for p in packed.parts)


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_a_master_begins_as_the_weight_it_stands_for(format: str, near: bool) -> None:
    solution = solution_of(compressed(weight(), format))
    original = torch.from_numpy(weight()) if near else None
    for master in (
        Master(solution, near=original, learn_scales=True),
        LowRank(solution, 3, 0, near=original, learn_scales=True),
    ):
        out = torch.empty(N, K)
        master.write(out)
        assert torch.equal(out, solution.values())
        assert torch.equal(master.solution().values(), solution.values())


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("format", FAMILIES)
def test_masks_and_grids_are_kept(format: str, low_rank: bool) -> None:
    """Under steps that change most levels: no absent weight appears, every level is a code, and
    scales are those that f16 has."""
    solution = solution_of(compressed(weight(), format))
    master = LowRank(solution, 4, 0) if low_rank else Master(solution)
    found = trained(master).solution()
    assert not torch.equal(found.levels, solution.levels)
    if FORMATS[format].sparse:
        assert not found.levels[solution.levels == 0].any()
    for a, b in zip(found.scales, solution.scales, strict=True):
        assert (a.scale is None) if b.scale is None else torch.equal(a.scale, b.scale)
    kind = FORMATS[format]
    packed = kind.pack(found.grid.codes(found.levels, found.scales))
    assert np.array_equal(kind.dequantize(packed), found.values().numpy())


@pytest.mark.parametrize("format", [f for f in FAMILIES if f != "bf16_sp"])
def test_learned_scales_are_what_f16_holds(format: str) -> None:
    solution = solution_of(compressed(weight(), format))
    found = trained(Master(solution, learn_scales=True)).solution()
    assert any(
        not torch.equal(a.scale, b.scale)
        for a, b in zip(found.scales, solution.scales, strict=True)
    )
    for scales in found.scales:
        for values in (scales.scale, scales.base):
            assert values is None or torch.equal(values, values.half().float())


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("format", FAMILIES)
def test_training_comes_nearer(format: str, near: bool) -> None:
    """A weight on a grid, pulled towards another one, ends nearer to it than it began."""
    solution = solution_of(compressed(weight(), format))
    original = torch.from_numpy(weight()) if near else None
    target = torch.from_numpy(weight(1))
    before = (solution.values() - target).square().sum()
    for master in (Master(solution, near=original), LowRank(solution, 8, 0, near=original)):
        after = (trained(master, 40).solution().values() - target).square().sum()
        assert after < 0.95 * before


@pytest.mark.parametrize("format", ["bf16_sp", "w4a8g32", "w4a8g32z", "w3a8g64", "w8a8_b16x1"])
def test_gradients_are_straight_through(format: str) -> None:
    """The gradient of the master is that of the same layer with its rounding taken out, and those
    of scales are exact: finite differences of the loss, with levels held fixed."""
    solution = solution_of(compressed(weight(), format))
    master = Master(solution, learn_scales=True)
    out = torch.empty(N, K)
    master.write(out)
    x = torch.from_numpy(np.random.default_rng(2).standard_normal((7, K)).astype(np.float32))
    gradient = 2 * (x @ out.T).T @ x  # of |x W'^T|^2
    master.take(gradient)
    mask = (solution.levels != 0) if FORMATS[format].sparse else torch.ones(N, K)
    found = master._rows(master.weight.grad)
    assert torch.equal(found, gradient * mask)
    if master.gain is None:
        return

    def loss(scale: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
        levels = master._levels().double()
        values = levels * scale[:, None] + (0 if base is None else base[:, None])
        return (x.double() @ master._rows(values).T).square().sum()

    start = master._start
    scale = start.scale.double()
    base = None if start.base is None else start.base.double()
    step = 1e-5
    for i in (0, 5, len(scale) - 1):
        nudge = torch.zeros_like(scale)
        nudge[i] = step * scale[i]
        slope = (loss(scale + nudge, base) - loss(scale - nudge, base)) / (2 * step)
        # The difference is exact for a parabola; f32 sums of N * K terms are not.
        assert master.gain.grad[i].item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-3)
        if base is not None:
            slope = (loss(scale, base + nudge) - loss(scale, base - nudge)) / (2 * step)
            assert master.offset.grad[i].item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-3)


def test_gradients_of_a_low_rank_are_those_of_autograd() -> None:
    solution = solution_of(compressed(weight(), "w8a8g64_sp"))
    master = LowRank(solution, 3, 0)
    master.b.normal_(generator=torch.Generator().manual_seed(1))
    gradient = torch.from_numpy(weight(4))
    master.take(gradient)
    a, b = (t.clone().requires_grad_() for t in (master.a, master.b))
    ((b @ a) * (solution.levels != 0) * gradient).sum().backward()
    torch.testing.assert_close(master.a.grad, a.grad)
    torch.testing.assert_close(master.b.grad, b.grad)


def test_gradients_add_up_over_calls() -> None:
    solution = solution_of(compressed(weight(), "w4a8g32"))
    whole, parts = Master(solution, learn_scales=True), Master(solution, learn_scales=True)
    g = torch.from_numpy(weight(4))
    whole.take(3 * g)
    parts.take(g)
    parts.take(2 * g)
    for a, b in zip(whole.parameters, parts.parameters, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    master = Master(solution_of(compressed(weight(), "w4a8g32")))
    before = master.weight.clone()
    trainer = Trainer({"layer": master})
    master.take(torch.full((N, K), torch.nan))
    assert not np.isfinite(trainer.step(0.1))
    assert torch.equal(master.weight, before)


def test_steps_are_shares_of_the_root_mean_square() -> None:
    """Adam's first step is the rate itself: every weight moves by rate * rms, whatever the scale of
    the gradients."""
    master = Master(solution_of(compressed(weight(), "w4a8g32")))
    before, rms = master.weight.clone(), master.rates()[0]
    master.take(1e-3 * torch.from_numpy(weight(2)))
    Trainer({"layer": master}).step(0.01)
    moved = (master.weight - before).abs()
    used = moved[moved > 0]
    torch.testing.assert_close(used, torch.full_like(used, 0.01 * rms), rtol=1e-3, atol=0)

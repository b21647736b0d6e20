"""Reconstruction of one block: it helps, it never hurts, and it says which."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from lacewing.compress.reconstruct import reconstruct  # noqa: E402
from lacewing.errors import RecipeError  # noqa: E402
from lacewing.formats import FORMATS  # noqa: E402
from tests.compress.training import FAMILIES, LAYERS, block_of, solutions_of, weights  # noqa: E402


def flow(windows: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """What block 0 reads, and what the dense one returns."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(windows, 96, 48, generator=generator)
    with torch.no_grad():
        return x, block_of(weights())(x)


@pytest.mark.parametrize("format", FAMILIES)
def test_it_lowers_the_error(format: str) -> None:
    x, y = flow()
    block, solutions = block_of(weights()), solutions_of(weights(), format)
    near = {name: block.linear(name).weight.detach().clone() for name in LAYERS}
    found = reconstruct(block, solutions, x, y, steps=60, rate=1e-3, seed=0, masks={}, near=near)
    assert found.after < 0.99 * found.before
    for name, solution in found.solutions.items():
        if FORMATS[format].sparse:
            assert not solution.levels[solutions[name].levels == 0].any()
        assert torch.equal(block.linear(name).weight, solution.values())
    with torch.no_grad():
        lost = (block(x[8:]) - y[8:]).square().sum(-1) / y[8:].square().sum(-1)
    assert lost.mean().item() == pytest.approx(found.after, rel=1e-3)


def test_it_never_makes_a_block_worse() -> None:
    """With steps so large that they destroy: what it was given comes back, and it says so."""
    x, y = flow()
    block, solutions = block_of(weights()), solutions_of(weights(), "w4a8g32")
    found = reconstruct(block, solutions, x, y, steps=5, rate=10.0, seed=0, masks={}, near={})
    assert found.after == found.before
    for name in LAYERS:
        assert torch.equal(found.solutions[name].levels, solutions[name].levels)
        assert torch.equal(block.linear(name).weight, solutions[name].values())


def test_it_is_reproducible() -> None:
    x, y = flow()
    runs = [
        reconstruct(
            *(block_of(weights()), solutions_of(weights(), "w3a8g64"), x, y),
            **{"steps": 6, "rate": 2e-3, "seed": seed, "masks": {}, "near": {}},
        )
        for seed in (1, 1, 2)
    ]
    assert runs[0].after == runs[1].after != runs[2].after
    for name in LAYERS:
        assert torch.equal(runs[0].solutions[name].values(), runs[1].solutions[name].values())


def test_bad_input_has_a_name() -> None:
    x, y = flow()
    block, solutions = block_of(weights()), solutions_of(weights(), "w4a8g32")
    given = {"steps": 1, "rate": 2e-3, "seed": 0, "masks": {}, "near": {}}
    with pytest.raises(RecipeError, match="at least 2 windows, got 1"):
        reconstruct(block, solutions, x[:1], y[:1], **given)
    with pytest.raises(RecipeError, match=r"block 0: .* finite targets, got NaN"):
        reconstruct(block, solutions, x, y * torch.nan, **given)
    with pytest.raises(RecipeError, match=r"block 0: .* finite inputs, got NaN"):
        reconstruct(block, solutions, x * torch.nan, y, **given)

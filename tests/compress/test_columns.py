"""The column solver against the papers' formulas, in every kind of format."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from lacewing.compress.columns import solve_columns  # noqa: E402
from lacewing.compress.masks import Choice, choose_mask, magnitude, obs, wanda  # noqa: E402
from lacewing.compress.problem import Problem, check_hessian  # noqa: E402
from lacewing.errors import RecipeError  # noqa: E402
from lacewing.formats import FORMATS, get_format  # noqa: E402
from tests.compress import naive  # noqa: E402

SPARSE = ["w8a8g64_sp", "w4a8g64_sp", "bf16_sp", "w8a8g64_24", "w4a8g64_24", "w8a8_b16x1"]
PRUNABLE = [name for name in FORMATS if FORMATS[name].holds_zero]


def solve(p, name, mask=None, act_order=False):
    return solve_columns(p, naive.Watched(name), mask, act_order)


def test_the_naive_inverses():
    h = naive.damped(naive.problem(1, 20))
    for i, row in enumerate(naive.inverses(h)):
        np.testing.assert_allclose(row, np.linalg.inv(h[i:, i:])[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act order"])
@pytest.mark.parametrize("name", FORMATS)
def test_gptq(name, act_order):
    p = naive.problem(6, 150)  # more than a block, no multiple of any group
    solution = solve(p, name, act_order=act_order)
    assert (solution.levels.numpy() == naive.gptq(p, solution, act_order).levels).all()


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act order"])
@pytest.mark.parametrize("name", ["w4a8g32", "w8a8_b16x1", "bf16_sp", "w1.6a8"])
def test_a_mask_that_is_given(name, act_order):
    p = naive.problem(17, 70)
    mask = choose_mask(obs(p.weight, p.inverse_factor), get_format(name), 0.4)
    solution = solve(p, name, mask, act_order)
    sweep = naive.gptq(p, solution, act_order, mask.numpy())
    assert (solution.levels.numpy() == sweep.levels).all()
    assert (solution.levels[~mask] == 0).all()


@pytest.mark.parametrize("name", [*SPARSE, "w3a8g64", "w1.6a8"])
def test_sparsegpt(name):
    p = naive.problem(20, 150)
    sparsity = 0.5 if name.endswith("_24") else 0.37
    solution = solve(p, name, Choice(get_format(name), sparsity))
    sweep = naive.sparsegpt(p, solution, sparsity)
    assert (solution.levels.numpy() == sweep.levels).all()
    assert (solution.levels.numpy()[~sweep.kept] == 0).all()


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act order"])
@pytest.mark.parametrize("name", SPARSE)
def test_as_many_weights_go_as_asked_for(name, act_order):
    p = naive.problem(40, 300)
    format = get_format(name)
    if name.endswith("_24"):
        solution = solve(p, name, Choice(format, 0.0), act_order)
        fours = (solution.levels.reshape(40, -1, 4) != 0).sum(-1)
        assert fours.max() == 2
    else:
        solution = solve(p, name, Choice(format, 0.9), act_order)
        gone = (solution.levels == 0).sum().item()
        assert gone >= (40 * 270 if name.endswith("_b16x1") else 40 * 300 * 9 // 10)
        assert gone <= 40 * 300 * 0.93  # what rounds to zero without a mask
    if name.endswith("_b16x1"):
        strips = (solution.levels[:32].reshape(2, 16, 300) != 0).any(1).sum(1)
        assert strips.tolist() == [30, 30]


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act order"])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_packed_is_what_was_solved(name, act_order):
    p = naive.problem(19, 100)
    mask = Choice(get_format(name), 0.0) if name in PRUNABLE else None
    solution = solve(p, name, mask, act_order)
    format = get_format(name)
    packed = format.pack(solution.grid.codes(solution.levels, solution.scales))
    assert (format.dequantize(packed) == solution.values().numpy()).all()


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act order"])
@pytest.mark.parametrize("name", FORMATS)
def test_better_than_rounding_to_nearest(name, act_order):
    p = naive.problem(32, 200)
    format = get_format(name)
    mask = Choice(format, 0.5) if format.sparse else None
    nearest = format.dequantize(format.round(p.weight.numpy(), 0.5 if format.sparse else None))
    assert naive.error(p, solve(p, name, mask, act_order).values()) < naive.error(p, nearest)


@pytest.mark.parametrize("name", ["w4a8g64_sp", "w4a8g64_24", "w3a8g64"])
def test_pruning_and_rounding_at_once_is_better_than_one_after_the_other(name):
    p = naive.problem(32, 256)
    format = get_format(name)
    mask = Choice(format, 0.5)
    pruned = solve(p, "bf16", mask).values()
    rounded = format.dequantize(format.round(pruned.numpy()))
    assert naive.error(p, solve(p, name, mask).values()) < naive.error(p, rounded)


def test_masks_that_know_more_are_better():
    p = naive.problem(32, 256)
    format = get_format("bf16_sp")
    masks = {
        "magnitude": choose_mask(magnitude(p.weight), format, 0.5),
        "wanda": choose_mask(wanda(p.weight, p.diagonal), format, 0.5),
        "sparsegpt": Choice(format, 0.5),
    }
    alone = [naive.error(p, p.weight * masks[name]) for name in ("magnitude", "wanda")]
    solved = [naive.error(p, solve(p, "bf16_sp", mask).values()) for mask in masks.values()]
    assert solved[2] < solved[1] < solved[0] < alone[0]
    assert alone[1] < alone[0]


def dead_inputs(k):
    x = naive.inputs(4 * k, k)
    x[:, 3] = x[:, k - 1] = 0
    return x


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act order"])
@pytest.mark.parametrize(
    "x",
    [dead_inputs(96), naive.inputs(10, 96), np.zeros((4, 96)), np.ones((4, 96))],
    ids=["dead inputs", "few tokens", "all dead", "all the same"],
)
@pytest.mark.parametrize("name", ["w4a8g32", "w4a8g32z", "bf16_sp", "w8a8_b16x1", "w4a8g64_24"])
def test_poor_calibration(name, x, act_order):
    p = naive.problem(17, 96, x=x)
    p.weight[5] = 0
    mask = Choice(get_format(name), 0.5) if get_format(name).sparse else None
    values = solve(p, name, mask, act_order).values()
    assert values.isfinite().all()
    assert (values[5] == 0).all()
    # Nothing is lost where the inputs span less than the weights: the outputs are the dense ones.
    lost = naive.error(p, values) / max(naive.error(p, 0 * p.weight), 1e-30)
    assert lost < (0.6 if mask else 0.02)


@pytest.mark.parametrize("where", [(4, 4), (4, 9)], ids=["diagonal", "beside it"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_hessian_is_refused(where, bad):
    p = naive.problem(8, 64)
    p.hessian[where] = p.hessian[where[::-1]] = bad
    with pytest.raises(RecipeError, match="`layer`"):
        solve(p, "w4a8g32")
    if where == (4, 4):
        with pytest.raises(RecipeError, match=r"`layer`: .* input 4"):
            check_hessian("layer", p.hessian)


def test_a_hessian_that_is_not_positive_is_refused():
    p = naive.problem(8, 64)
    p.hessian[4, 9] = p.hessian[9, 4] = 1e6
    with pytest.raises(RecipeError, match="`layer`: needs a positive definite Hessian"):
        solve(p, "w4a8g32")


def test_damping_grows_until_it_is_enough():
    p = naive.problem(8, 64)
    slightly = torch.linalg.eigvalsh(p.hessian.double())[0] + 0.05 * p.hessian.diagonal().mean()
    p = Problem("layer", p.weight, p.hessian - slightly.float() * torch.eye(64), p.tokens)
    assert p.inverse_factor.isfinite().all()


@pytest.mark.parametrize("name", ["w4a8g32", "w4a8g64_sp", "w4a8g64_24"])
def test_the_same_twice(name):
    mask = Choice(get_format(name), 0.5) if get_format(name).sparse else None
    first, second = (solve(naive.problem(40, 200), name, mask, True).values() for _ in range(2))
    assert (first == second).all()


def test_neither_weight_nor_hessian_nor_mask_is_changed():
    p = naive.problem(16, 64)
    mask = choose_mask(magnitude(p.weight), get_format("w4a8g32"), 0.5)
    before = [t.clone() for t in (p.weight, p.hessian, mask)]
    solve(p, "w4a8g32", mask)
    solve(p, "w4a8g32", Choice(get_format("w4a8g32"), 0.5), act_order=True)
    for old, new in zip(before, (p.weight, p.hessian, mask), strict=True):
        assert (old == new).all()

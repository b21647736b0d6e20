"""The judge of smoothing and reordering: activations as the formats read them, and the error."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compression needs PyTorch")

from lacewing.compress.columns import solve_columns  # noqa: E402
from lacewing.compress.grid import Grid  # noqa: E402
from lacewing.compress.problem import Problem  # noqa: E402
from lacewing.compress.rounding import (  # noqa: E402
    Inputs,
    conditional_variance,
    error,
    nearest,
    round_activations,
    sample,
    scale_hessian,
)
from lacewing.formats import FORMATS, get_format, quantize_rows  # noqa: E402
from tests.compress.blocks import inputs_of, outliers  # noqa: E402


@pytest.mark.parametrize("name", ["w8a8", "w8a8g32", "w4a8g64", "w4a8g128", "w1.6a8"])
def test_activations_are_those_of_the_kernels(name: str) -> None:
    x = outliers(9, 96, every=10, size=50.0)  # 96: groups of 64 and 128 are not whole
    x[2] = 0
    x[3, :64] = 1e-40
    format = get_format(name)
    group = format.group(96)
    q, scale, _ = quantize_rows(x.numpy(), group)
    values = q.reshape(9, -1, group).astype(np.float32) * scale[:, :, None]
    expected = values.reshape(9, -1)[:, :96]
    assert np.array_equal(round_activations(x, format).numpy(), expected)


def test_floats_are_read_as_they_are() -> None:
    x = outliers(3, 16, every=5, size=9.0)
    assert round_activations(x, get_format("bf16")) is x


@pytest.mark.parametrize("name", ["w8a8", "w4a8g32", "w2a8g64", "bf16"])
def test_nearest_is_what_the_codes_mean(name: str) -> None:
    format = get_format(name)
    w = torch.randn(16, 96, generator=torch.Generator().manual_seed(1))
    importance = torch.rand(96, generator=torch.Generator().manual_seed(2))
    grid, size = Grid(format), Grid(format).group_size(96)
    scales, levels = [], []
    for part, weight in zip(w.split(size, 1), importance.split(size), strict=True):
        scales.append(grid.fit(part, weight))
        levels.append(grid.levels(part, scales[-1]))
    codes = grid.codes(torch.cat(levels, 1), scales)
    assert np.array_equal(nearest(w, format, importance).numpy(), format.dequantize(codes))


def test_the_hessian_of_divided_inputs() -> None:
    x = outliers(50, 32, every=7, size=20.0)
    scales = torch.rand(32, generator=torch.Generator().manual_seed(4)) + 0.5
    found = scale_hessian(x.T @ x / 50, scales)
    divided = x / scales
    # 50 products are summed in f32 on both sides: 50 * 2^-24 of the sum of magnitudes.
    bound = 2 * 50 * 2**-24 * (divided.abs().T @ divided.abs() / 50)
    assert bool(((found - divided.T @ divided / 50).abs() <= bound).all())
    inputs = inputs_of(x).divided(scales)
    assert torch.equal(inputs.hessian, found)
    assert torch.equal(inputs.rows, divided)


@pytest.mark.parametrize("name", ["w8a8", "w4a8g32"])
def test_the_error_is_that_of_the_outputs(name: str) -> None:
    """Against outputs computed token by token. Both roundings are independent to within chance:
    over 4096 tokens and 64 outputs the product of the two is a few percent of them at most."""
    x = outliers(4096, 64, every=9, size=4.0)
    weights = [torch.randn(64, 64, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    format = get_format(name)
    expected = 0.0
    for w in weights:
        rounded = nearest(w, format, x.square().mean(0))
        lost = round_activations(x, format) @ rounded.T - x @ w.T
        expected += float(lost.square().sum() / (x @ w.T).square().sum()) / 2
    found = error(weights, [format, format], inputs_of(x, rows=4096))
    assert found == pytest.approx(expected, rel=0.05)


def test_the_error_without_rounded_activations_is_the_form_of_the_hessian() -> None:
    x = outliers(256, 32, every=9, size=4.0)
    w = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    inputs, format = inputs_of(x), get_format("bf16")
    lost = (nearest(w, format, inputs.absmax) - w).double()
    h = inputs.hessian.double()
    expected = torch.trace(lost @ h @ lost.T) / torch.trace(w.double() @ h @ w.double().T)
    # tr of an 8 x 8 matrix by sums of 32 in f32, all terms of like size
    assert error([w], [format], inputs) == pytest.approx(float(expected), rel=1e-4)


def test_dead_layers_and_infinities() -> None:
    x = outliers(64, 32, every=9, size=4.0)
    w = torch.ones(4, 32)
    format = FORMATS["w4a8g32"]
    assert error([torch.zeros(4, 32)], [format], inputs_of(x)) == 0.0
    assert error([w], [format], inputs_of(torch.zeros(64, 32))) == 0.0
    assert error([w * 1e30], [format], inputs_of(x * 1e10)) == float("inf")


def test_a_sample_is_spread_over_the_outputs() -> None:
    w = torch.arange(10.0)[:, None]
    assert sample([w], 4)[0].flatten().tolist() == [0, 3, 6, 9]
    assert torch.equal(sample([w], 99)[0], w)


def correlated(tokens: int, k: int) -> torch.Tensor:
    """Inputs that share eight directions."""
    generator = torch.Generator().manual_seed(6)
    shared = torch.randn(tokens, 8, generator=generator) @ torch.randn(8, k, generator=generator)
    return shared + torch.randn(tokens, k, generator=generator)


def test_what_the_column_solver_will_leave_is_foretold() -> None:
    """The solver's error is within a fifth of the prediction, and rounding to nearest is not: its
    errors add up along the shared directions."""
    x, w = correlated(4096, 128), torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    format = get_format("w4a8g32")
    problem = Problem("layer", w, x.T @ x / 4096, 4096)
    left = problem.error(solve_columns(problem, Grid(format)).values())
    without_rows = Inputs(problem.hessian, x.abs().amax(0), torch.zeros(1, 128))
    known = Inputs(
        problem.hessian, x.abs().amax(0), torch.zeros(1, 128), conditional_variance(problem)
    )
    assert error([w], [format], known) == pytest.approx(left, rel=0.2)
    assert error([w], [format], without_rows) > 2 * left


def test_conditional_variances_are_those_of_regressions() -> None:
    x = correlated(4096, 32).double()
    hessian = x.T @ x / 4096
    problem = Problem("layer", torch.zeros(1, 32), hessian.float(), 4096)
    found, damped = conditional_variance(problem), problem.damped.double()
    for j in (0, 17, 31):
        later = damped[j + 1 :, j + 1 :]
        cross = damped[j, j + 1 :]
        explained = cross @ torch.linalg.solve(later, cross) if j < 31 else 0.0
        assert float(found[j]) == pytest.approx(float(damped[j, j] - explained), rel=1e-4)
    scales = torch.full((32,), 2.0)
    inputs = Inputs(problem.hessian, torch.ones(32), torch.ones(1, 32), found)
    assert torch.equal(inputs.divided(scales).conditional, found / 4)
    assert inputs.ordered(torch.arange(32)).conditional is None

"""`quantize_rows` at its corners; the general case is in test_properties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lacewing.errors import FormatError
from lacewing.formats import quantize_rows

MAX = np.finfo(np.float32).max


def one_group(values: Any, group: int = 32) -> tuple[list[int], float, int]:
    x = np.zeros((1, group), np.float32)
    x[0, : len(values)] = values
    q, scale, total = quantize_rows(x, group)
    return q[0, : len(values)].tolist(), scale[0, 0], total[0, 0]


def test_types_and_shapes() -> None:
    q, scale, total = quantize_rows(np.ones((3, 65)), 64)
    assert (q.dtype, scale.dtype, total.dtype) == (np.int8, np.float32, np.int32)
    assert (q.shape, scale.shape, total.shape) == ((3, 128), (3, 2), (3, 2))
    assert total.tolist() == [[64 * 127, 127]] * 3
    assert not q[:, 65:].any()


def test_zeros() -> None:
    assert one_group([0.0, -0.0]) == ([0, 0], 0.0, 0)


def test_exact_halves_go_to_even() -> None:
    q, scale, _ = one_group([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5])
    assert scale == 1.0
    assert q == [127, 0, 2, 2, 0, -2, -2, 126]


def test_the_extreme_is_127_of_either_sign() -> None:
    for amax in np.float32([1, 3.3, 1e-30, 1e30, MAX]):
        assert one_group([amax, -amax, amax / 2])[0][:2] == [127, -127]


def test_amax_too_tiny_to_invert_counts_as_zero() -> None:
    limit = np.float32(127) / MAX
    below = np.nextafter(limit, np.float32(0))
    with np.errstate(over="ignore"):
        assert np.isinf(np.float32(127) / below)
    assert one_group([below, -below]) == ([0, 0], 0.0, 0)
    assert one_group([1e-45]) == ([0], 0.0, 0)
    above = np.nextafter(limit, np.float32(1)) * np.float32(1.001)
    q, scale, total = one_group([above])
    assert (q, total) == ([127], 127)
    assert scale == above / np.float32(127)
    assert scale > 0


def test_denormals_beside_normal_values_are_zero() -> None:
    assert one_group([1.0, 1e-40])[0] == [127, 0]


def test_groups_have_scales_of_their_own() -> None:
    x = np.ones((1, 64), np.float32)
    x[0, 32:] = 1000
    _, scale, _ = quantize_rows(x, 32)
    assert scale[0].tolist() == [
        np.float32(1) / np.float32(127),
        np.float32(1000) / np.float32(127),
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(value: float) -> None:
    with pytest.raises(FormatError, match="must be finite"):
        quantize_rows(np.array([[1.0, value]], np.float32), 32)


@pytest.mark.parametrize("shape", [(32,), (0, 32), (1, 0), (1, 1, 32)])
def test_wrong_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(FormatError, match=r"non-empty \[m, k\] array"):
        quantize_rows(np.zeros(shape), 32)


def test_wrong_group() -> None:
    with pytest.raises(FormatError, match="group must be positive, got 0"):
        quantize_rows(np.zeros((1, 32)), 0)

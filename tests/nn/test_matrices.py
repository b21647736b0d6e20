"""Matrices cut out of tensors, a few rows at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="lacewing.nn needs PyTorch")

from lacewing.checkpoint import SourceTensor  # noqa: E402
from lacewing.formats import Codes, get_format  # noqa: E402
from lacewing.nn.matrices import (  # noqa: E402
    Cut,
    DenseMatrix,
    FileMatrix,
    Matrix,
    RowsOfTwo,
    cut_tensor,
)

RANGES = [(0, None), (0, 3), (2, 9), (5, 12), (4, 6), (11, 12), (5, 5)]


class Stored(SourceTensor):
    """A tensor of a file."""

    name, dtype, nbytes = "stored", "F32", 0

    def __init__(self, values: Any) -> None:
        self.values = np.asarray(values, np.float32)
        self.shape = self.values.shape

    def dequantize(self, begin: int = 0, end: int | None = None) -> Any:
        return self.values[begin:end]


class Quantized(Stored):
    """On a grid of ours, with scales and minima."""

    own_format = "w4a8g32z"

    def codes(self, begin: int = 0, end: int | None = None) -> tuple[str, Codes]:
        return self.own_format, get_format(self.own_format).round(self.values[begin:end])

    near_codes = codes


CUTS = {
    "whole": (Cut(), (12, 8)),
    "a kernel": (Cut(), (12, 8, 1, 1)),
    "rows": (Cut(rows=(4, 16)), (20, 8)),
    "transposed": (Cut(transposed=True), (8, 12)),
    "an expert": (Cut(expert=2), (3, 12, 8)),
    "a transposed expert": (Cut(expert=1, transposed=True), (3, 8, 12)),
}


@pytest.mark.parametrize("name", CUTS)
def test_the_same_rows_from_model_and_file(name: str) -> None:
    cut, shape = CUTS[name]
    tensor = torch.randn(shape)
    matrix = Matrix("weight", tensor, cut)
    assert matrix.shape == (12, 8)
    dense = DenseMatrix("weight", matrix.view())
    stored = Stored(tensor.numpy())
    file = cut_tensor(stored, matrix)
    assert (file is stored) == (name == "whole")
    for begin, end in RANGES[:-1]:
        want = matrix.view()[begin:end].numpy()
        assert (dense.dequantize(begin, end) == want).all()
        assert (file.dequantize(begin, end) == want).all()
    file.release()
    assert (file.dequantize() == matrix.view().numpy()).all()


def test_bits_of_bfloat16() -> None:
    weight = torch.randn(12, 8).bfloat16()
    found = DenseMatrix("weight", weight.T).codes(2, 5)
    assert found is not None
    want = weight.T[2:5].float().numpy()
    assert found[0] == "bf16"
    assert ((found[1].q.astype(np.uint32) << 16).view(np.float32) == want).all()
    assert DenseMatrix("weight", weight.float()).codes() is None


@pytest.mark.parametrize(("begin", "end"), RANGES[:-1])
def test_rows_of_two(begin: int, end: int | None) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((12, 64), np.float32)
    both = RowsOfTwo(Quantized(values[:5]), Quantized(values[5:]))
    assert both.shape == (12, 64)
    assert both.own_format == "w4a8g32z"
    assert (both.dequantize(begin, end) == values[begin:end]).all()
    want = get_format("w4a8g32z").round(values[begin:end])
    for found in (both.codes(begin, end), both.near_codes(begin, end)):
        assert found is not None
        assert found[0] == "w4a8g32z"
        for key in ("q", "scales", "mins"):
            assert (getattr(found[1], key) == getattr(want, key)).all()


def test_rows_of_two_kinds_have_no_codes() -> None:
    values = np.ones((6, 64), np.float32)
    both = RowsOfTwo(Quantized(values), Stored(values))
    assert both.own_format is None
    assert both.codes() is None
    assert both.codes(0, 6) is not None


def test_a_file_matrix_says_what_it_is() -> None:
    file = FileMatrix(Stored(np.ones((8, 12))), Cut(transposed=True), (12, 8))
    assert file.shape == (12, 8)
    assert file.name == "stored"

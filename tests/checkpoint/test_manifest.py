"""Packed directories that disagree with themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacewing.checkpoint import load_packed, open_source, write_packed
from lacewing.checkpoint.safetensors import SafetensorsWriter, read_safetensors
from tests.checkpoint.build import tiny_gguf
from tests.checkpoint.hostile import refused

UP, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files of a packed directory per format."""
    place = tmp_path_factory.mktemp("packed")
    gguf = tiny_gguf("Q4_1").write(place / "model.gguf")
    for format in ("auto", "w8a8g64_sp", "w4a8g64_sp"):
        sparsity = 0.6 if format.endswith("_sp") else None
        write_packed(gguf, place / format, format, sparsity)
    return {
        folder.name: {file.name: file.read_bytes() for file in folder.iterdir()}
        for folder in place.iterdir()
        if folder.is_dir()
    }


def lay_out(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir()
    for name, raw in files.items():
        (path / name).write_bytes(raw)
    return path


def edit(*keys: str, to: Any) -> Damage:
    """Sets a place in the manifest; `...` takes it out."""

    def damage(path: Path) -> None:
        document = json.loads((path / "lacewing.json").read_text())
        place = document
        for key in keys[:-1]:
            place = place[key]
        if to is ...:
            del place[keys[-1]]
        else:
            place[keys[-1]] = to
        (path / "lacewing.json").write_text(json.dumps(document))

    return damage


def store(name: str, raw: bytes) -> Damage:
    return lambda path: (path / name).write_bytes(raw) and None


def drop(name: str) -> Damage:
    return lambda path: (path / name).unlink()


def part(name: str, change: Callable[[Any], Any]) -> Damage:
    """Changes one tensor of model.safetensors; None takes it out."""

    def damage(path: Path) -> None:
        file = read_safetensors(path / "model.safetensors")
        arrays: dict[str, Any] = {n: file.array(n).copy() for n in file.tensors}
        arrays[name] = change(arrays.get(name))
        (path / "model.safetensors").unlink()
        with SafetensorsWriter(path / "model.safetensors", list(arrays), {}) as out:
            for n, array in arrays.items():
                if array is not None:
                    out.add(n, array)

    return damage


def put(index: int, value: Any) -> Callable[[Any], Any]:
    def change(array: Any) -> Any:
        array.reshape(-1)[index] = value
        return array

    return change


M = "lacewing.json"
LIES: dict[str, tuple[Damage, str]] = {
    "no weights": (drop("model.safetensors"), "model.safetensors"),
    "no tokenizer": (drop("tokenizer.json"), "tokenizer.json"),
    "an empty manifest": (store(M, b""), M),
    "a cut manifest": (store(M, b'{"lacewing": 1, "config": {'), M),
    "a list": (store(M, b"[1]"), M),
    "no text": (store(M, b"\xff"), M),
    "nested without end": (store(M, b'{"lacewing":' * 90_000), M),
    "a key twice": (store(M, b'{"lacewing": 1, "lacewing": 1}'), "twice"),
    "no version": (edit("lacewing", to=...), "version 1"),
    "version 0": (edit("lacewing", to=0), "version 1"),
    "version 2": (edit("lacewing", to=2), "version 1"),
    "version true": (edit("lacewing", to=True), "version 1"),
    "version as text": (edit("lacewing", to="1"), "version 1"),
    "no config": (edit("config", to=...), "`config`"),
    "config is a list": (edit("config", to=[]), "`config`"),
    "an empty config": (edit("config", to={}), "model_type"),
    "another architecture": (edit("config", "model_type", to="mamba"), "mamba"),
    "another width": (edit("config", "hidden_size", to=512), "embed_tokens"),
    "another vocabulary": (edit("config", "vocab_size", to=95), "embed_tokens"),
    "more layers": (edit("config", "num_hidden_layers", to=3), "layers.2"),
    "fewer layers": (edit("config", "num_hidden_layers", to=1), "layers.1"),
    "no tokenizer key": (edit("tokenizer", to=...), "`tokenizer`"),
    "end ids as a number": (edit("tokenizer", "eos_token_ids", to=2), "eos_token_ids"),
    "end ids as texts": (edit("tokenizer", "eos_token_ids", to=["2"]), "eos_token_ids"),
    "negative end ids": (edit("tokenizer", "eos_token_ids", to=[-1]), "eos_token_ids"),
    "template is a number": (edit("tokenizer", "chat_template", to=1), "chat_template"),
    "bos id as text": (edit("tokenizer", "bos_token_id", to="1"), "bos_token_id"),
    "bos id is true": (edit("tokenizer", "bos_token_id", to=True), "bos_token_id"),
    "bos id beyond the vocabulary": (edit("tokenizer", "bos_token_id", to=96), "bos_token_id"),
    "end id beyond the vocabulary": (edit("tokenizer", "eos_token_ids", to=[96]), "eos_token_ids"),
    "add_bos is a number": (edit("tokenizer", "add_bos", to=1), "add_bos"),
    "no add_bos": (edit("tokenizer", "add_bos", to=...), "add_bos"),
    "no tensors": (edit("tensors", to=...), "`tensors`"),
    "tensors are a list": (edit("tensors", to=[]), "`tensors`"),
    "no tensor at all": (edit("tensors", to={}), "owner"),
    "a tensor is null": (edit("tensors", UP, to=None), UP),
    "no format": (edit("tensors", UP, to={"shape": [256, 256]}), UP),
    "a format nobody knows": (edit("tensors", UP, "format", to="w3a8g32"), UP),
    "a format of a list": (edit("tensors", UP, "format", to=["w8a8g32"]), UP),
    "another format": (edit("tensors", UP, "format", to="w8a8g32"), UP),
    "another format with other parts": (edit("tensors", UP, "format", to="bf16"), UP),
    "no shape": (edit("tensors", UP, "shape", to=...), UP),
    "shape as text": (edit("tensors", UP, "shape", to="256,256"), UP),
    "a shape of floats": (edit("tensors", UP, "shape", to=[256.0, 256]), UP),
    "a shape of bools": (edit("tensors", UP, "shape", to=[True, 256]), UP),
    "a shape of zero": (edit("tensors", UP, "shape", to=[0, 256]), UP),
    "a negative shape": (edit("tensors", UP, "shape", to=[-256, -256]), UP),
    "a shape of one": (edit("tensors", UP, "shape", to=[65536]), UP),
    "an empty shape": (edit("tensors", UP, "shape", to=[]), UP),
    "experts": (edit("tensors", UP, "shape", to=[4, 64, 256]), UP),
    "a huge shape": (edit("tensors", UP, "shape", to=[1 << 62, 1 << 62]), UP),
    "a large shape": (edit("tensors", UP, "shape", to=[(1 << 31) - 1, (1 << 31) - 1]), UP),
    "more rows": (edit("tensors", UP, "shape", to=[272, 256]), UP),
    "more rows in the same strip": (edit("tensors", UP, "shape", to=[255, 256]), "up_proj"),
    "more inputs": (edit("tensors", UP, "shape", to=[256, 288]), UP),
    "a matrix as f32": (edit("tensors", UP, "format", to="f32"), UP),
    "a vector as a matrix": (edit("tensors", NORM, to={"format": "bf16", "shape": [1, 256]}), NORM),
    "a longer vector": (edit("tensors", NORM, "shape", to=[257]), NORM),
    "a tensor nobody has": (edit("tensors", "x", to={"format": "f32", "shape": [1]}), "`x`"),
    "a tensor is not listed": (edit("tensors", UP, to=...), UP),
    "a part is missing": (part(f"{UP}.scales", lambda a: None), f"{UP}"),
    "a part nobody owns": (part("spare", lambda a: np.zeros(4)), "spare"),
    "a part of another type": (part(f"{UP}.codes", lambda a: a.view(np.int8)), UP),
    "a part of another shape": (part(f"{UP}.codes", lambda a: a.reshape(-1)), UP),
    "a part cut short": (part(f"{UP}.codes", lambda a: a[:-1]), UP),
    "scales of another width": (part(f"{UP}.scales", lambda a: a.astype(np.float32)), UP),
    "a vector of another type": (part(NORM, lambda a: a.astype(np.float16)), NORM),
    "a vector with NaN": (part(NORM, put(7, np.nan)), NORM),
    "a vector with infinity": (part(NORM, put(7, -np.inf)), NORM),
    "another file of weights": (store("model.safetensors", b"GGUF" + bytes(100)), "header"),
}


@pytest.mark.parametrize("name", LIES)
def test_lies_are_refused(tmp_path: Path, packed: Any, name: str) -> None:
    damage, place = LIES[name]
    path = lay_out(tmp_path / "model", packed["auto"])
    damage(path)
    refused(load_packed, path, place)


def test_the_sound_directory_is_sound(tmp_path: Path, packed: Any) -> None:
    for name, files in packed.items():
        load_packed(lay_out(tmp_path / name, files))


OFFSETS: dict[str, Callable[[Any], Any]] = {
    "not from zero": put(0, 64),
    "negative": put(1, -64),
    "decreasing": put(1, 1 << 40),
    "not a multiple of 64": put(1, 1),
    "past the stream": put(-1, 1 << 20),
    "past everything": put(-1, np.iinfo(np.int64).max // 64 * 64),
    "short of the stream": put(-1, 0),
    "wrapping around": lambda a: np.array(
        [0, *(i << 60 for i in (2, 4, 6, -8, -6, -4, -2)), *a[8:]], np.int64
    ),
    "too few": lambda a: a[:-1],
    "too many": lambda a: np.append(a, a[-1]),
    "of another type": lambda a: a.astype(np.int32),
    "none": lambda a: a[:0],
}
STREAMS: dict[str, Callable[[Any], Any]] = {
    "empty": lambda a: a[:0],
    "a byte short": lambda a: a[:-1],
    "64 bytes short": lambda a: a[:-64],
    "64 bytes long": lambda a: np.append(a, np.zeros(64, np.uint8)),
    "of another type": lambda a: a.view(np.uint16),
    "of two dimensions": lambda a: a.reshape(-1, 64),
}


@pytest.mark.parametrize("format", ["w8a8g64_sp", "w4a8g64_sp"])
@pytest.mark.parametrize("name", OFFSETS)
def test_offsets_that_lie(tmp_path: Path, packed: Any, format: str, name: str) -> None:
    path = lay_out(tmp_path / "model", packed[format])
    part(f"{UP}.offsets", OFFSETS[name])(path)
    refused(load_packed, path, UP)


@pytest.mark.parametrize("format", ["w8a8g64_sp", "w4a8g64_sp"])
@pytest.mark.parametrize("name", STREAMS)
def test_streams_that_lie(tmp_path: Path, packed: Any, format: str, name: str) -> None:
    path = lay_out(tmp_path / "model", packed[format])
    part(f"{UP}.stream", STREAMS[name])(path)
    refused(load_packed, path, UP)


@pytest.mark.parametrize("format", ["w8a8g64_sp", "w4a8g64_sp"])
@pytest.mark.parametrize("fill", [0x00, 0xFF, 0x55])
def test_bitmaps_that_lie_are_found_on_reading(
    tmp_path: Path, packed: Any, format: str, fill: int
) -> None:
    """Loading reads no weight, so content is checked by whoever reads it: here, and before any
    kernel does, by the compiled module."""
    path = lay_out(tmp_path / "model", packed[format])

    def smear(stream: Any) -> Any:
        stream[32 : 32 + 128] = fill
        return stream

    part(f"{UP}.stream", smear)(path)
    source = open_source(path)
    refused(lambda _: source.tensors[UP].dequantize(), path, format)


def test_a_newer_version_says_to_update(tmp_path: Path, packed: Any) -> None:
    path = lay_out(tmp_path / "model", packed["auto"])
    edit("lacewing", to=2)(path)
    error = refused(load_packed, path)
    assert error.hint is not None
    assert "update" in error.hint


def test_weights_cut_anywhere_are_refused(tmp_path: Path, packed: Any) -> None:
    path = lay_out(tmp_path / "model", packed["auto"])
    whole = packed["auto"]["model.safetensors"]
    for length in [*range(0, len(whole) - 1, 9973), len(whole) - 1]:
        (path / "model.safetensors").write_bytes(whole[:length])
        refused(load_packed, path, "model.safetensors")


def test_other_keys_are_left_alone(tmp_path: Path, packed: Any) -> None:
    path = lay_out(tmp_path / "model", packed["auto"])
    edit("recipe", to={"sparsity": 0.5})(path)
    load_packed(path)

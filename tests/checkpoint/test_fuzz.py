"""Bytes flipped at random: whatever comes, nothing but Lacewing's own errors, and no crash."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lacewing.checkpoint import describe, load_model, open_source, write_packed
from lacewing.errors import LacewingError
from tests.checkpoint.build import config, random_weights, tiny_gguf, write_hub

TYPES = ["F32", "BF16", "Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q6_K"]
SMALL = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
Flips = list[tuple[float, int]]

settings.register_profile("fuzz", deadline=None, suppress_health_check=list(HealthCheck))
fuzz = settings(settings.get_profile("fuzz"), max_examples=150)


def flips(most: int = 4) -> st.SearchStrategy[Flips]:
    """(place as a share of the file's head, new byte)."""
    return st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=most)


def flip(raw: bytes, head: int, changes: Iterable[tuple[float, int]]) -> bytes:
    out = bytearray(raw)
    for place, byte in changes:
        out[min(int(place * head), len(out) - 1)] = byte
    return bytes(out)


def survives(open_it: Callable[[], Any]) -> None:
    with suppress(LacewingError):
        open_it()


@cache
def gguf_bytes(type: str) -> tuple[bytes, int]:
    """A tiny file, and the length of what comes before its data."""
    file = tiny_gguf(type, **({} if type.endswith("_K") else SMALL))
    raw = file.bytes()
    return raw, len(raw) - len(file.data)


@pytest.mark.parametrize("type", TYPES)
@fuzz
@given(data=st.data())
def test_gguf(type: str, data: st.DataObject) -> None:
    raw, head = gguf_bytes(type)
    where = data.draw(st.sampled_from([head, head, len(raw)]))
    changes = data.draw(flips())
    with TemporaryDirectory() as place:
        path = Path(place) / "model.gguf"
        path.write_bytes(flip(raw, where, changes))
        survives(lambda: load_model(path))
        survives(lambda: describe(path))


@fuzz
@given(st.binary(max_size=200), st.booleans())
def test_gguf_of_random_bytes(tail: bytes, versioned: bool) -> None:
    with TemporaryDirectory() as place:
        path = Path(place) / "model.gguf"
        path.write_bytes(b"GGUF" + (b"\3\0\0\0" if versioned else b"") + tail)
        survives(lambda: load_model(path))


@cache
def hub_files() -> dict[str, bytes]:
    with TemporaryDirectory() as place:
        made = config(**SMALL)
        path = write_hub(Path(place) / "model", made, random_weights(made), "BF16", shards=2)
        return {file.name: file.read_bytes() for file in path.iterdir()}


@cache
def packed_files() -> dict[str, bytes]:
    with TemporaryDirectory() as place:
        made = config(**SMALL)
        path = write_hub(Path(place) / "model", made, random_weights(made))
        write_packed(path, Path(place) / "packed", "w4a8g64_sp", 0.6)
        return {file.name: file.read_bytes() for file in (Path(place) / "packed").iterdir()}


def heads(files: dict[str, bytes]) -> dict[str, int]:
    """How much of each file is worth flipping: headers more than weights."""
    return {name: min(len(raw), 4096) for name, raw in files.items()}


def lay_out(place: str, files: dict[str, bytes], name: str, changes: Flips) -> Path:
    path = Path(place) / "model"
    path.mkdir()
    for other, raw in files.items():
        changed = flip(raw, heads(files)[name], changes) if other == name else raw
        (path / other).write_bytes(changed)
    return path


@fuzz
@given(data=st.data())
def test_hugging_face(data: st.DataObject) -> None:
    files = hub_files()
    name = data.draw(st.sampled_from(sorted(files)))
    with TemporaryDirectory() as place:
        path = lay_out(place, files, name, data.draw(flips()))
        survives(lambda: load_model(path))
        survives(lambda: describe(path))


def read_all(path: Path) -> None:
    source = open_source(path)
    for name in source.spec.tensor_shapes():
        source.tensors[name].dequantize()


@fuzz
@given(data=st.data())
def test_packed(data: st.DataObject) -> None:
    files = packed_files()
    name = data.draw(st.sampled_from(sorted(files)))
    with TemporaryDirectory() as place:
        path = lay_out(place, files, name, data.draw(flips()))
        survives(lambda: load_model(path))
        survives(lambda: read_all(path))
        survives(lambda: describe(path))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def places(document: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a document, but for long lists' tails."""
    found = [at] if at else []
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(document, dict):
        items = list(document.items())[:12]
    elif isinstance(document, list):
        items = list(enumerate(document))[:3]
    for key, value in items:
        found += places(value, (*at, key))
    return found


@fuzz
@given(data=st.data())
def test_json_of_any_shape(data: st.DataObject) -> None:
    """A value of any type anywhere in any of the JSON documents."""
    files = data.draw(st.sampled_from([hub_files(), packed_files()]))
    name = data.draw(st.sampled_from(sorted(n for n in files if n.endswith(".json"))))
    document = json.loads(files[name])
    at = data.draw(st.sampled_from(places(document)))
    inner = document
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = data.draw(JSON)
    with TemporaryDirectory() as place:
        path = lay_out(place, {**files, name: json.dumps(document).encode()}, name, [])
        survives(lambda: load_model(path))
        survives(lambda: describe(path))

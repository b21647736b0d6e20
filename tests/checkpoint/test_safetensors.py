"""The safetensors container: round trips, alignment, and every lie refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lacewing.checkpoint.safetensors import (
    ALIGNMENT,
    SafetensorsWriter,
    read_safetensors,
)
from lacewing.errors import CheckpointError
from tests.checkpoint.build import safetensors_bytes, u64
from tests.checkpoint.hostile import refused

Arrays = dict[str, np.ndarray[Any, Any]]


def write(path: Path, arrays: Arrays) -> Path:
    with SafetensorsWriter(path, list(arrays), {"format": "lacewing"}) as out:
        for name, array in arrays.items():
            out.add(name, array)
    return path


def some_arrays() -> Arrays:
    rng = np.random.default_rng(0)
    arrays: Arrays = {
        f"t.{dtype}": rng.integers(0, 2, (3, 5)).astype(dtype)
        for dtype in ("?", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8")
    }
    return arrays | {
        "empty": np.empty((0, 7), np.float32),
        "scalar": np.array(3.5, np.float32),
        "ünïcode.weight": np.arange(100, dtype=np.uint8),
        "turned": np.arange(12, dtype=np.int64).reshape(3, 4).T,
    }


def test_what_is_written_is_read(tmp_path: Path) -> None:
    arrays = some_arrays()
    file = read_safetensors(write(tmp_path / "a.safetensors", arrays))
    assert file.metadata == {"format": "lacewing"}
    assert list(file.tensors) == list(arrays)
    for name, array in arrays.items():
        found = file.array(name)
        assert found.dtype == array.dtype
        assert np.array_equal(found, array)
        assert not found.flags.writeable or found.size == 0


def test_every_tensor_begins_on_a_cache_line(tmp_path: Path) -> None:
    file = read_safetensors(write(tmp_path / "a.safetensors", some_arrays()))
    for name, entry in file.tensors.items():
        assert entry.begin % ALIGNMENT == 0
        assert file.array(name).ctypes.data % ALIGNMENT == 0 or entry.nbytes == 0


def test_the_official_reader_reads_it(tmp_path: Path) -> None:
    """Padding is tensors of its own, so the file has no holes."""
    official = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    arrays = some_arrays()
    found = official.load_file(write(tmp_path / "a.safetensors", arrays))
    assert {name for name in found if not name.startswith("__padding__.")} == set(arrays)
    for name, array in arrays.items():
        assert np.array_equal(found[name], array)


def test_the_official_writer_is_read(tmp_path: Path) -> None:
    official = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    arrays = {name: np.ascontiguousarray(array) for name, array in some_arrays().items()}
    official.save_file(arrays, tmp_path / "a.safetensors")
    file = read_safetensors(tmp_path / "a.safetensors")
    for name, array in arrays.items():
        assert np.array_equal(file.array(name), array)


@settings(max_examples=50)
@given(
    st.dictionaries(
        st.text(st.characters(categories=("L", "N", "P"), exclude_characters="_"), min_size=1),
        hnp.arrays(
            st.sampled_from([np.uint8, np.float16, np.float32, np.int64]),
            hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9),
        ),
        max_size=6,
    )
)
def test_any_arrays_round_trip(tmp_path_factory: pytest.TempPathFactory, arrays: Arrays) -> None:
    path = write(tmp_path_factory.mktemp("any") / "a.safetensors", arrays)
    file = read_safetensors(path)
    assert file.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        assert file.array(name).tobytes() == array.tobytes()


def test_an_unfinished_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(KeyboardInterrupt), SafetensorsWriter(path, ["a"], {}) as out:  # noqa: PT012
        out.add("a", np.zeros(1000))
        raise KeyboardInterrupt
    refused(read_safetensors, path, "header length")


# -- files that lie -------------------------------------------------------------------------------

A = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
B = {"dtype": "U8", "shape": [16], "data_offsets": [16, 32]}


def header(**changes: Any) -> bytes:
    """Tensors `a` and `b` over 32 bytes, with fields of `a` changed or dropped."""
    entry = {key: value for key, value in (A | changes).items() if value is not ...}
    return safetensors_bytes({"a": entry, "b": B}, bytes(32))


LIES: dict[str, tuple[bytes, str]] = {
    "one byte": (b"\0", "header length"),
    "seven bytes": (b"\0" * 7, "header length"),
    "no header": (u64(0), "header length"),
    "a header of one byte": (u64(1) + b"{", "header length"),
    "a header longer than the file": (u64(1000) + b"{}", "header length"),
    "a header of 2^64 - 1": (u64((1 << 64) - 1) + b"{}", "header length"),
    "a header of 2^63": (u64(1 << 63) + b"{}", "header length"),
    "a header of 101 MB": (u64(101_000_000) + b"{}", "header length"),
    "no JSON": (safetensors_bytes(b"{nonsense}"), "header"),
    "cut JSON": (safetensors_bytes(b'{"a": {"dtype"'), "header"),
    "a list": (safetensors_bytes([]), "header"),
    "a number": (safetensors_bytes(b"12"), "header"),
    "spaces": (safetensors_bytes(b"  {}"), "header"),
    "no UTF-8": (safetensors_bytes(b'{"\xff": 1}'), "header"),
    "zeros": (bytes(64), "header length"),
    "JSON nested 100,000 deep": (safetensors_bytes(b'{"a":' * 100_000), "header"),
    "lists nested 100 deep": (
        safetensors_bytes(b'{"a":' + b"[" * 100 + b"]" * 100 + b"}"),
        "header",
    ),
    "a key twice": (
        safetensors_bytes(
            b'{"a":' + json.dumps(A).encode() + b',"a":' + json.dumps(A).encode() + b"}", bytes(16)
        ),
        "twice",
    ),
    "a field twice": (
        safetensors_bytes(b'{"a":{"dtype":"U8","dtype":"F32","shape":[],"data_offsets":[0,4]}}'),
        "twice",
    ),
    "metadata of numbers": (safetensors_bytes({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata of lists": (safetensors_bytes({"__metadata__": []}), "__metadata__"),
    "an empty name": (safetensors_bytes({"": A}, bytes(16)), "printable"),
    "a name with an escape": (safetensors_bytes({"a\x1b[2J": A}, bytes(16)), "printable"),
    "a number of 5000 digits": (
        safetensors_bytes(b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b"]}}"),
        "header",
    ),
    "a tensor is null": (safetensors_bytes({"a": None}), "`a`"),
    "a tensor is a list": (safetensors_bytes({"a": [1]}), "`a`"),
    "no dtype": (header(dtype=...), "`a`"),
    "no shape": (header(shape=...), "`a`"),
    "no offsets": (header(data_offsets=...), "`a`"),
    "one field more": (header(extra=1), "`a`"),
    "dtype is null": (header(dtype=None), "dtype"),
    "dtype is a list": (header(dtype=["F32"]), "dtype"),
    "dtype nobody knows": (header(dtype="F4"), "dtype"),
    "dtype in small letters": (header(dtype="f32"), "dtype"),
    "a dtype of another size": (header(dtype="F64"), "bytes"),
    "shape is a number": (header(shape=4), "shape"),
    "a negative length": (header(shape=[-2, -2]), "shape"),
    "a fractional length": (header(shape=[2.0, 2.0]), "shape"),
    "a true length": (header(shape=[True, 4]), "shape"),
    "a length as text": (header(shape=["2", 2]), "shape"),
    "a length of 2^63": (header(shape=[1 << 63]), "shape"),
    "lengths that overflow": (header(shape=[1 << 62, 1 << 62]), "bytes"),
    "lengths that overflow to 16 bytes": (header(shape=[1 << 32, 1 << 32, 4]), "bytes"),
    "a hundred lengths": (header(shape=[1] * 100), "shape"),
    "a longer shape than data": (header(shape=[2, 3]), "bytes"),
    "a shorter shape than data": (header(shape=[2, 1]), "bytes"),
    "no bytes for a shape": (header(data_offsets=[0, 0]), "bytes"),
    "three offsets": (header(data_offsets=[0, 16, 32]), "offsets"),
    "one offset": (header(data_offsets=[0]), "offsets"),
    "offsets as text": (header(data_offsets="0,16"), "offsets"),
    "offsets in the wrong order": (header(data_offsets=[16, 0]), "offsets"),
    "a negative offset": (header(data_offsets=[-16, 0]), "offsets"),
    "a fractional offset": (header(data_offsets=[0.0, 16.0]), "offsets"),
    "offsets of 2^64": (header(data_offsets=[1 << 64, (1 << 64) + 16]), "offsets"),
    "offsets near 2^63": (header(data_offsets=[(1 << 63) - 17, (1 << 63) - 1]), "file of"),
    "offsets past the end": (header(data_offsets=[32, 48]), "file of"),
    "overlap": (header(data_offsets=[8, 24]), "overlap"),
    "the same data twice": (header(data_offsets=[16, 32]), "no hole"),
    "a hole in front": (
        safetensors_bytes({"b": B}, bytes(32)),
        "no hole",
    ),
    "a hole between": (
        safetensors_bytes({"a": A, "b": B | {"data_offsets": [20, 36]}}, bytes(36)),
        "no hole",
    ),
    "data behind the last tensor": (safetensors_bytes({"a": A, "b": B}, bytes(33)), "no tensor"),
    "data without tensors": (safetensors_bytes({}, bytes(1)), "no tensor"),
    "a byte too few": (safetensors_bytes({"a": A, "b": B}, bytes(31)), "file of"),
    "an empty tensor out of place": (
        safetensors_bytes(
            {"a": A, "b": B, "c": {"dtype": "U8", "shape": [0], "data_offsets": [7, 7]}}, bytes(32)
        ),
        "overlap",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_lies_are_refused(tmp_path: Path, name: str) -> None:
    raw, place = LIES[name]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(raw)
    refused(read_safetensors, path, "hostile.safetensors", place)


def test_the_sound_file_is_sound(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(header())
    assert list(read_safetensors(tmp_path / "a").tensors) == ["a", "b"]


def test_an_empty_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    refused(read_safetensors, tmp_path / "empty", "empty")
    refused(read_safetensors, tmp_path, str(tmp_path))
    refused(read_safetensors, tmp_path / "absent", "absent")


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.safetensors", some_arrays()).read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in [*range(0, len(whole) - 1, 41), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(read_safetensors, path, "cut.safetensors")


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_flipped_bytes_raise_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]
) -> None:
    raw = bytearray(header())
    for at, value in flips:
        raw[at % len(raw)] = value
    path = tmp_path_factory.mktemp("flip") / "a.safetensors"
    path.write_bytes(raw)
    try:
        file = read_safetensors(path)
    except CheckpointError:
        return
    for name in file.tensors:
        file.array(name).sum()

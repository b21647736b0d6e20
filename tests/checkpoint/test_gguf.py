"""The GGUF container: what is written is read, and what lies is refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacewing.checkpoint import load_model
from lacewing.checkpoint.gguf import read_gguf
from lacewing.errors import LacewingError
from tests.checkpoint.build import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    STRING,
    TOKENS,
    U8,
    U16,
    U32,
    U64,
    Gguf,
    entry,
    random_rows,
    string,
    tiny_gguf,
    u32,
    u64,
)
from tests.checkpoint.hostile import refused

VALUES = {
    U8: 200,
    I8: -100,
    U16: 60000,
    I16: -30000,
    U32: 4_000_000_000,
    I32: -2_000_000_000,
    F32: 0.5,
    BOOL: True,
    STRING: "naïve 🐜",
    U64: 1 << 63,
    I64: -(1 << 62),
    F64: 0.1,
}


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("kind", VALUES)
def test_values_and_arrays_of_every_type(tmp_path: Path, kind: int, version: int) -> None:
    file = Gguf(version=version)
    file.put("one", kind, VALUES[kind])
    file.put("some", ARRAY, (kind, [VALUES[kind]] * 3))
    file.put("none", ARRAY, (kind, []))
    file.put("nested", ARRAY, (ARRAY, [(kind, [VALUES[kind]]), (kind, [])]))
    found = read_gguf(file.write(tmp_path / "a.gguf")).metadata
    assert found["one"] == VALUES[kind]
    assert type(found["one"]) is type(VALUES[kind])
    assert list(found["some"]) == [VALUES[kind]] * 3
    assert list(found["none"]) == []
    assert [list(inner) for inner in found["nested"]] == [[VALUES[kind]], []]


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_tensors_lie_where_the_table_says(tmp_path: Path, alignment: int) -> None:
    file = Gguf(alignment=alignment)
    file.put("general.alignment", U32, alignment)
    rows = {name: random_rows(name, 3, 64, seed=i) for i, name in enumerate(("F32", "Q4_1"))}
    for name, data in rows.items():
        file.tensor(name, (3, 64), name, data.tobytes())
    opened = read_gguf(file.write(tmp_path / "a.gguf"))
    for name, data in rows.items():
        assert opened.tensors[name].shape == (3, 64)
        assert np.array_equal(opened.rows(opened.tensors[name]), data)


def test_a_file_may_end_with_padding(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(tiny_gguf().bytes() + bytes(31))
    read_gguf(path)


def test_the_tiny_model_is_sound(tmp_path: Path) -> None:
    assert len(load_model(tiny_gguf().write(tmp_path / "a.gguf")).tensors) == 20


# -- files that lie -------------------------------------------------------------------------------

Damage = Callable[[Gguf], None]
LIES: dict[str, tuple[Damage, tuple[str, ...]]] = {}


def lie(name: str, *places: str) -> Callable[[Damage], Damage]:
    def add(damage: Damage) -> Damage:
        assert name not in LIES
        LIES[name] = (damage, places)
        return damage

    return add


def setter(**changes: Any) -> Damage:
    def damage(file: Gguf) -> None:
        for name, value in changes.items():
            setattr(file, name, value)

    return damage


for magic in (b"GGML", b"\0\0\0\0", b"PK\3\4", b"FUGG"):
    lie(f"magic {magic!r}", "first four bytes")(setter(magic=magic))
for version in (0, 1, 4, 1 << 24, 3 << 24, 0xFFFFFFFF):
    lie(f"version {version}", "version")(setter(version=version))
for count in (50, 1 << 20, 1 << 32, (1 << 64) - 1):
    lie(f"{count} tensors", "tensor")(setter(n_tensors=count))
    lie(f"{count} entries", "metadata")(setter(n_entries=count))
lie("no tensors", "token_embd.weight")(setter(n_tensors=0, infos={}, data=b""))


def put(key: str, kind: int, item: Any) -> Damage:
    return lambda file: file.put(key, kind, item)


def raw_entry(raw: bytes) -> Damage:
    def damage(file: Gguf) -> None:
        file.entries["hostile"] = raw

    return damage


for value in (0, 1, 7, 33, 96, (1 << 21)):
    lie(f"alignment {value}", "general.alignment")(put("general.alignment", U32, value))
lie("alignment true", "general.alignment")(put("general.alignment", BOOL, True))
lie("alignment as text", "general.alignment")(put("general.alignment", STRING, "32"))
lie("alignment as array", "general.alignment")(put("general.alignment", ARRAY, (U32, [32])))
lie("a bool of 2", "`x`")(raw_entry(string("x") + u32(BOOL) + b"\2"))
lie("an array of bools with 2", "`x`")(
    raw_entry(string("x") + u32(ARRAY) + u32(BOOL) + u64(2) + b"\1\2")
)
for kind in (13, 255, 0xFFFFFFFF):
    lie(f"value type {kind}", "`x`")(raw_entry(string("x") + u32(kind)))
    lie(f"element type {kind}", "`x`")(raw_entry(string("x") + u32(ARRAY) + u32(kind) + u64(1)))
for kind in (U8, F32, U64, STRING, ARRAY):
    for count in (1 << 31, 1 << 61, (1 << 64) - 1):
        lie(f"array of {count} of type {kind}", "`x`")(
            raw_entry(string("x") + u32(ARRAY) + u32(kind) + u64(count))
        )
for length in (1 << 31, 1 << 63, (1 << 64) - 1):
    lie(f"string of {length}", "`x`")(raw_entry(string("x") + u32(STRING) + u64(length)))
    lie(f"key of {length}", "metadata key")(raw_entry(u64(length)))
    lie(f"element of {length}", "`x`[1]")(
        raw_entry(string("x") + u32(ARRAY) + u32(STRING) + u64(2) + string("a") + u64(length))
    )
lie("key of 65536 bytes", "metadata key")(raw_entry(entry("x" * 65536, U8, 1)))
lie("an empty key", "metadata key")(raw_entry(entry("", U8, 1)))
lie("a key that is no text", "metadata key")(raw_entry(entry(b"\xff\xfe", U8, 1)))
lie("a value that is no text", "`x`")(raw_entry(entry("x", STRING, b"\xc3")))
lie("an element that is no text", "`x`[1]")(
    raw_entry(entry("x", ARRAY, (STRING, [b"a", b"\xc3(", b"b"])))
)
lie("arrays nested without end", "`x`", "nested")(
    raw_entry(string("x") + u32(ARRAY) + (u32(ARRAY) + u64(1)) * 5000)
)
lie("the same key twice", "general.architecture", "twice")(
    raw_entry(entry("general.architecture", STRING, "llama"))
)


@lie("five million empty strings", "`x`")
def _(file: Gguf) -> None:
    count = 5_000_000
    file.entries["x"] = string("x") + u32(ARRAY) + u32(STRING) + u64(count) + bytes(8 * count)


def change(tensor: str, **changes: Any) -> Damage:
    """Changes a line of the tensor table."""

    def damage(file: Gguf) -> None:
        for key, value in changes.items():
            setattr(file.infos[tensor], key, value)

    return damage


Q, NORM, DOWN = "blk.0.attn_q.weight", "output_norm.weight", "blk.1.ffn_down.weight"
for n_dims in (0, 5, 1 << 31, (1 << 32) - 1):
    lie(f"{n_dims} dimensions", Q)(change(Q, n_dims=n_dims))
for dims in ([0, 256], [256, 0], [1 << 63, 2], [1 << 32, 1 << 32], [(1 << 64) - 32, 256]):
    lie(f"dimensions {dims}", Q)(change(Q, dims=dims))
lie("rows that end inside a block", Q, "blocks")(change(Q, dims=[255, 256]))
lie("a wider tensor than its data", "overlap")(change(Q, dims=[256, 512]))
lie("more rows than the file has", Q)(change(Q, dims=[256, 1 << 30]))
for number in (4, 5, 31, 36, 255, (1 << 32) - 1):
    lie(f"tensor type {number}", Q, "type")(change(Q, type=number))
lie("a type that Lacewing cannot read", "model.norm", "I32")(change(NORM, type=26))
for offset in (1, 16, 31):
    lie(f"offset {offset}", Q, "multiple")(change(Q, offset=offset))
for offset in (0, 32):
    lie(f"overlap at {offset}", "overlap")(change(Q, offset=offset))
for offset in (1 << 30, 1 << 63, (1 << 64) - 32):
    lie(f"offset {offset}", Q, "file of")(change(Q, offset=offset))
lie("an empty name", "name of tensor")(change(Q, name=""))
lie("a name that is no text", "name of tensor")(change(Q, name=b"\xff"))
lie("a name with an escape", "name of tensor")(change(Q, name="blk\x1b[31m"))
lie("a name of 65 bytes", "name of tensor")(change(Q, name="x" * 65))
lie("the same name twice", NORM, "twice")(change(Q, name=NORM))
lie("two tensors under one name", "self_attn.k_proj")(change(Q, name="blk.00.attn_k.weight"))
lie("a tensor of another layer", "layers.0.self_attn.q_proj")(change(Q, name="blk.7.attn_q.weight"))
lie("a vector where a matrix belongs", "q_proj")(change(Q, dims=[65536]))
lie("a matrix where a vector belongs", "model.norm")(change(NORM, dims=[128, 2]))
lie("a matrix of another shape", "q_proj")(change(Q, dims=[512, 128]))
lie("an embedding of one dimension", "token_embd")(
    change("token_embd.weight", dims=[256 * len(TOKENS)])
)


@lie("a gap between tensors", DOWN, "gap")
def _(file: Gguf) -> None:
    names = list(file.infos)
    for name in names[names.index(DOWN) :]:
        file.infos[name].offset += 64
    file.data += bytes(64)


for name, place in (("blk.0.attn_rot.weight", "attn_rot"), ("blk.7.attn_q.weight", "layers.7")):

    def add(file: Gguf, name: str = name) -> None:
        file.tensor(name, (256, 256), "Q4_1", random_rows("Q4_1", 256, 256).tobytes())

    lie(f"superfluous {name}", place)(add)


for key in (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
):

    def drop(file: Gguf, key: str = f"llama.{key}") -> None:
        del file.entries[key]

    lie(f"no {key}", key)(drop)
    lie(f"{key} is text", key)(put(f"llama.{key}", STRING, "many"))
for key in ("block_count", "attention.head_count", "attention.head_count_kv", "context_length"):
    for number in (0, (1 << 32) - 1):
        lie(f"{key} is {number}")(put(f"llama.{key}", U32, number))
    lie(f"{key} is negative", key)(put(f"llama.{key}", I32, -1))
lie("per-layer heads", "head_count_kv")(put("llama.attention.head_count_kv", ARRAY, (U32, [2, 4])))
lie("no heads", "head_count")(put("llama.attention.head_count", ARRAY, (U32, [])))
lie("epsilon NaN", "epsilon")(put("llama.attention.layer_norm_rms_epsilon", F32, float("nan")))
lie("epsilon beyond f32", "epsilon")(put("llama.attention.layer_norm_rms_epsilon", F64, 1e300))
lie("rope base 0", "rope_theta")(put("llama.rope.freq_base", F32, 0.0))
lie("rope base infinite", "freq_base")(put("llama.rope.freq_base", F32, float("inf")))
lie("half a rope", "rotary")(put("llama.rope.dimension_count", U32, 32))
lie("rope scaling of no type", "rope.scaling.type")(put("llama.rope.scaling.type", U32, 1))
lie("rope scaling nobody knows", "rope_type", "spiral")(
    put("llama.rope.scaling.type", STRING, "spiral")
)
lie("wider values than keys", "keys and values")(put("llama.attention.value_length", U32, 32))
lie("experts", "experts")(put("llama.expert_count", U32, 8))
lie("one part of two", "one file")(put("split.count", U16, 2))
for item in ("mamba", "", "llama\x00", "x" * 1000):
    lie(f"architecture {item[:8]!r}", "general.architecture")(
        put("general.architecture", STRING, item)
    )
lie("architecture is a number", "general.architecture")(put("general.architecture", U32, 1))
lie("tokens are numbers", "tokenizer.ggml.tokens")(
    put("tokenizer.ggml.tokens", ARRAY, (U32, [1] * len(TOKENS)))
)
lie("tokens are arrays", "tokenizer.ggml.tokens")(
    put("tokenizer.ggml.tokens", ARRAY, (ARRAY, [(U8, [])] * len(TOKENS)))
)
lie("a token too many", "tokens")(put("tokenizer.ggml.tokens", ARRAY, (STRING, [*TOKENS, "zz"])))
lie("a token too few", "token")(put("tokenizer.ggml.tokens", ARRAY, (STRING, TOKENS[:-1])))
lie("a token twice", "tokenizer.ggml.tokens")(
    put("tokenizer.ggml.tokens", ARRAY, (STRING, [*TOKENS[:-1], TOKENS[0]]))
)
lie("types too few", "token_type")(put("tokenizer.ggml.token_type", ARRAY, (I32, [1])))
lie("a tokenizer nobody knows", "tokenizer.ggml.model")(put("tokenizer.ggml.model", STRING, "t5"))
lie("a word rule nobody knows", "tokenizer.ggml.pre")(put("tokenizer.ggml.pre", STRING, "klingon"))
for name in ("bos_token_id", "eos_token_id"):
    lie(f"{name} beyond the vocabulary", name)(put(f"tokenizer.ggml.{name}", U32, len(TOKENS)))
    lie(f"{name} is text", name)(put(f"tokenizer.ggml.{name}", STRING, "</s>"))
lie("eot beyond the vocabulary", "eot_token_id")(put("tokenizer.ggml.eot_token_id", I32, -1))


def poison(name: str, at: int, raw: bytes) -> Damage:
    def damage(file: Gguf) -> None:
        begin = file.infos[name].offset + at
        file.data = file.data[:begin] + raw + file.data[begin + len(raw) :]

    return damage


for label, number in (("NaN", float("nan")), ("infinite", float("inf"))):
    lie(f"a scale is {label}", "layers.0.self_attn.q_proj", "finite")(
        poison(Q, 20 * 100, struct.pack("<e", number))
    )
    lie(f"a minimum is {label}", "layers.1.mlp.down_proj", "finite")(
        poison(DOWN, 2, struct.pack("<e", number))
    )
    lie(f"a norm is {label}", "model.norm", "finite")(poison(NORM, 8, struct.pack("<f", number)))


@pytest.mark.parametrize("name", LIES)
def test_lies_are_refused(tmp_path: Path, name: str) -> None:
    damage, places = LIES[name]
    file = tiny_gguf()
    damage(file)
    refused(load_model, file.write(tmp_path / "hostile.gguf"), *places)


def test_there_are_many_lies() -> None:
    assert len(LIES) >= 100


@pytest.mark.parametrize("type", ["F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("format", ["auto", "bf16", "w8a8g64"])
def test_bytes_that_are_no_numbers_are_refused(tmp_path: Path, type: str, format: str) -> None:
    """0xff everywhere is NaN in every type."""
    file = tiny_gguf(type)
    begin = file.infos[Q].offset
    size = len(random_rows(type, 256, 256).tobytes())
    file.data = file.data[:begin] + b"\xff" * size + file.data[begin + size :]
    path = file.write(tmp_path / "hostile.gguf")
    refused(lambda p: load_model(p, format), path, "layers.0.self_attn.q_proj", "finite")


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = tiny_gguf().bytes()
    path = tmp_path / "cut.gguf"
    lengths = {*range(0, 200), *range(200, len(whole) - 1, 1009), len(whole) - 1}
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        refused(load_model, path, "cut.gguf")


def test_other_things_than_files_are_refused(tmp_path: Path) -> None:
    refused(load_model, tmp_path / "absent.gguf", "absent.gguf")
    refused(load_model, Path("/dev/null"), "/dev/null")
    refused(load_model, tmp_path, str(tmp_path))
    (tmp_path / "link.gguf").symlink_to(tmp_path / "nowhere")
    refused(load_model, tmp_path / "link.gguf", "link.gguf")


def test_a_link_to_a_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link.gguf").symlink_to(tiny_gguf().write(tmp_path / "a.gguf"))
    load_model(tmp_path / "link.gguf")


def test_errors_say_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf().bytes()[:5000])
    with pytest.raises(LacewingError) as caught:
        load_model(path)
    assert caught.value.hint is not None

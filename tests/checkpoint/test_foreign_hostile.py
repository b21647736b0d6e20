"""Compressed checkpoints that lie, and damaged ones: a typed error, never anything else."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lacewing.checkpoint import open_source, open_weights
from lacewing.errors import CheckpointError, LacewingError, UnsupportedModelError
from tests.checkpoint.foreign import Array, group, write_quantized
from tests.checkpoint.hostile import refused
from tests.checkpoint.test_foreign_gptq import naive_words

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
A = "model.layers.0.mlp.up_proj"
N, K = 24, 64

Parts = dict[str, Array]
Config = dict[str, Any]


def read_all(path: Path) -> None:
    """Everything that is ever asked of a tensor."""
    for tensor in open_weights(path).values():
        tensor.check_type()
        _ = tensor.own_format
        for begin, end in ((0, None), (3, 7)):
            tensor.dequantize(begin, end)
            if len(tensor.shape) == 2 and not tensor.codes(begin, end):
                tensor.near_codes(begin, end)
        tensor.release()


def packed() -> tuple[Config, Parts]:
    """An asymmetric pack-quantized weight of 4 bits."""
    rng = np.random.default_rng(0)
    parts = {
        "weight_packed": naive_words(rng.integers(0, 16, (N, K)), 4),
        "weight_shape": np.array([N, K]),
        "weight_scale": rng.uniform(0.001, 0.02, (N, K // 32)).astype(np.float16),
        "weight_zero_point": naive_words(rng.integers(0, 16, (K // 32, N)), 4).T,
    }
    options = {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 32}
    return group(**options), parts


def int8() -> tuple[Config, Parts]:
    rng = np.random.default_rng(0)
    parts = {
        "weight": rng.integers(-128, 128, (N, K)).astype(np.int8),
        "weight_scale": rng.uniform(0.001, 0.02, (N, 1)).astype(np.float32),
    }
    config = group(num_bits=8, symmetric=True, strategy="channel")
    return config | {"format": "int-quantized"}, parts


def bitmask() -> tuple[Config, Parts]:
    rng = np.random.default_rng(0)
    present = rng.random((N, K)) < 0.3
    counts = present.sum(axis=1)
    parts = {
        "compressed": rng.standard_normal(int(counts.sum())).astype(np.float16),
        "bitmask": np.packbits(present, axis=1, bitorder="little"),
        "shape": np.array([N, K]),
        "row_offsets": np.cumsum(counts) - counts,
    }
    return {"quant_method": "compressed-tensors", "sparsity_config": {}}, parts


def two_of_four() -> tuple[Config, Parts]:
    parts = {
        "compressed": np.ones((N, K // 2), np.float16),
        "bitmask": np.full((N, K // 8), 0x33, np.uint8),
        "shape": np.array([[N], [K]]),
    }
    return {"quant_method": "compressed-tensors", "sparsity_config": {}}, parts


KINDS: dict[str, Callable[[], tuple[Config, Parts]]] = {
    "packed": packed,
    "int8": int8,
    "bitmask": bitmask,
    "two_of_four": two_of_four,
}


def written(path: Path, config: Config, parts: Parts) -> Path:
    return write_quantized(path, config, {f"{A}.{name}": part for name, part in parts.items()})


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_read_as_they_are(tmp_path: Path, kind: str) -> None:
    read_all(written(tmp_path / "model", *KINDS[kind]()))


def put(part: str, value: Any) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts[part] = value(parts[part]) if callable(value) else np.asarray(value)

    return change


def drop(part: str) -> Callable[[Parts], None]:
    return lambda parts: parts.__delitem__(part)


def bit_beyond(bits: Array) -> Array:
    bits[3, 0] ^= 1
    return bits


def swapped(offsets: Array) -> Array:
    offsets[3], offsets[4] = offsets[4], offsets[3]
    return offsets


LIES: dict[str, tuple[str, Callable[[Parts], None], str]] = {
    "more rows": ("packed", put("weight_shape", [N + 1, K]), "weight_scale"),
    "fewer rows": ("packed", put("weight_shape", [N - 1, K]), "weight_scale"),
    "more inputs": ("packed", put("weight_shape", [N, 2 * K]), "weight_scale"),
    "some more inputs": ("packed", put("weight_shape", [N, K + 32]), "weight_scale"),
    "a few inputs less": ("packed", put("weight_shape", [N, K - 8]), "weight_packed"),
    "a huge shape": ("packed", put("weight_shape", [1 << 40, 1 << 40]), "weight_shape"),
    "2^31 rows": ("packed", put("weight_shape", [(1 << 31) - 1] * 2), "weight_scale"),
    "a negative shape": ("packed", put("weight_shape", [-1, K]), "weight_shape"),
    "no rows": ("packed", put("weight_shape", [0, K]), "weight_shape"),
    "three lengths": ("packed", put("weight_shape", [1, N, K]), "weight_shape"),
    "a shape of floats": ("packed", put("weight_shape", np.float32([N, K])), "weight_shape"),
    "no shape": ("packed", drop("weight_shape"), "weight_shape"),
    "no scales": ("packed", drop("weight_scale"), "weight_scale"),
    "no zero points": ("packed", drop("weight_zero_point"), "weight_zero_point"),
    "zero points of int8": ("packed", put("weight_zero_point", np.int8), "weight_zero_point"),
    "zero points cut": ("packed", put("weight_zero_point", lambda a: a[:-1]), "weight_zero_point"),
    "codes of int8": ("packed", put("weight_packed", np.int8), "weight_packed"),
    "codes in a row": ("packed", put("weight_packed", np.ravel), "weight_packed"),
    "a code of no dimension": ("packed", put("weight_packed", np.int32(1)), "weight_packed"),
    "scales of integers": ("packed", put("weight_scale", np.int32), "weight_scale"),
    "scales of one row": ("packed", put("weight_scale", lambda a: a[:1]), "weight_scale"),
    "groups without end": ("packed", put("weight_g_idx", np.full(K, 7)), "weight_g_idx"),
    "a group of one": ("packed", put("weight_g_idx", np.zeros(1, np.int32)), "weight_g_idx"),
    "one group is not set": (
        "packed",
        put("weight_g_idx", np.repeat(np.int32([-1, 1]), 32)),
        "weight_g_idx",
    ),
    "float codes": ("int8", put("weight", np.float32), "int8 codes"),
    "codes of three dimensions": ("int8", put("weight", lambda a: a[None]), "int8 codes"),
    "no codes": ("int8", drop("weight"), "weight"),
    "scales of groups": ("int8", put("weight_scale", np.ones((N, 2), np.float32)), "weight_scale"),
    "symmetric, but not": (
        "int8",
        put("weight_zero_point", np.ones((N, 1), np.int8)),
        "weight_zero_point",
    ),
    "a bit too many": ("bitmask", put("bitmask", bit_beyond), "bitmask"),
    "a wide bitmask": ("bitmask", put("bitmask", lambda a: np.pad(a, (0, 1))), "bitmask"),
    "a bitmask of int8": ("bitmask", put("bitmask", lambda a: a.view(np.int8)), "bitmask"),
    "another shape": ("bitmask", put("shape", [K, N]), "bitmask"),
    "a value less": ("bitmask", put("compressed", lambda a: a[:-1]), "bitmask"),
    "a value more": ("bitmask", put("compressed", lambda a: np.append(a, a[:1])), "bitmask"),
    "no values": ("bitmask", put("compressed", lambda a: a[:0]), "row_offsets"),
    "values of int32": ("bitmask", put("compressed", np.int32), "compressed"),
    "too many values": ("bitmask", put("compressed", np.ones(N * K + 1, np.float16)), "compressed"),
    "offsets that fall": ("bitmask", put("row_offsets", swapped), "row_offsets"),
    "offsets below zero": ("bitmask", put("row_offsets", lambda a: a - 5), "row_offsets"),
    "offsets from 1 on": ("bitmask", put("row_offsets", lambda a: a + 1), "row_offsets"),
    "offsets beyond": ("bitmask", put("row_offsets", lambda a: a << 40), "row_offsets"),
    "offsets of floats": ("bitmask", put("row_offsets", np.float32), "row_offsets"),
    "an offset less": ("bitmask", put("row_offsets", lambda a: a[:-1]), "row_offsets"),
    "three of four": ("two_of_four", put("bitmask", lambda a: a | 4), "bitmask"),
    "inputs in no fours": ("two_of_four", put("shape", [N, 62]), "shape"),
    "half the values": ("two_of_four", put("compressed", lambda a: a[:, ::2]), "compressed"),
}


@pytest.mark.parametrize("case", LIES)
def test_parts_that_lie(tmp_path: Path, case: str) -> None:
    kind, change, place = LIES[case]
    config, parts = KINDS[kind]()
    change(parts)
    error = refused(read_all, written(tmp_path / "model", config, parts), A, place)
    assert error.hint


def test_a_bit_beyond_the_last_input(tmp_path: Path) -> None:
    parts = {
        "compressed": np.ones(8, np.float32),
        "bitmask": np.array([[1, 0b10000000]] * 8, np.uint8),
        "shape": np.array([8, 12]),
        "row_offsets": np.arange(8),
    }
    place = written(tmp_path / "model", bitmask()[0], parts)
    refused(read_all, place, "bitmask", "no bit beyond input 11")
    parts["bitmask"][:, 1] = 0
    read_all(written(tmp_path / "right", bitmask()[0], parts))


def weights(**changes: Any) -> Callable[[Config], None]:
    return lambda config: config["config_groups"]["group_0"]["weights"].update(changes)


def top(**changes: Any) -> Callable[[Config], None]:
    return lambda config: config.update(changes)


def groups(**changes: Any) -> Callable[[Config], None]:
    return lambda config: config["config_groups"]["group_0"].update(changes)


CONFIGS: dict[str, tuple[Callable[[Config], None], type[LacewingError], str]] = {
    "fp8": (top(format="float-quantized"), UnsupportedModelError, "float-quantized"),
    "nvfp4": (groups(format="nvfp4-pack-quantized"), UnsupportedModelError, "nvfp4"),
    "mxfp4": (top(format="mxfp4-pack-quantized"), UnsupportedModelError, "mxfp4"),
    "marlin": (top(format="marlin-24"), UnsupportedModelError, "marlin-24"),
    "unknown": (top(format="next-quantized"), UnsupportedModelError, "next-quantized"),
    "a list": (top(format=["x"]), UnsupportedModelError, "format"),
    "floats": (weights(type="float"), UnsupportedModelError, "type"),
    "1 bit": (weights(num_bits=1), UnsupportedModelError, "2 to 8 bits"),
    "16 bits": (weights(num_bits=16), UnsupportedModelError, "2 to 8 bits"),
    "bits in words": (weights(num_bits="four"), UnsupportedModelError, "2 to 8 bits"),
    "blocks": (weights(strategy="block"), UnsupportedModelError, "strategy"),
    "rotated": (top(transform_config={"a": 1}), UnsupportedModelError, "transform_config"),
    "sparse": (top(sparsity_config={"format": "csr"}), UnsupportedModelError, "csr"),
    "sparse list": (top(sparsity_config=["csr"]), UnsupportedModelError, "csr"),
    "method": (top(quant_method="fp8"), UnsupportedModelError, "fp8"),
    "method 7": (top(quant_method=7), UnsupportedModelError, "quant_method"),
    "no group": (top(config_groups={}), CheckpointError, "config_groups"),
    "groups of text": (top(config_groups="x"), CheckpointError, "config_groups"),
    "group of text": (top(config_groups={"a": "x"}), CheckpointError, "config_groups"),
    "no weights": (groups(weights=None), CheckpointError, "config_groups"),
    "weights of text": (groups(weights="W4A16"), CheckpointError, "weights"),
    "no targets": (groups(targets=None), CheckpointError, "targets"),
    "targets of 1": (groups(targets=[1]), CheckpointError, "targets"),
    "another target": (groups(targets=["re:.*down_proj"]), CheckpointError, A),
    "an embedding": (groups(targets=["Embedding"]), CheckpointError, A),
    "no expression": (groups(targets=["re:("]), CheckpointError, "config_groups"),
    "an evil target": (groups(targets=["re:(.+)+x"]), UnsupportedModelError, "config_groups"),
    "group_size 0": (weights(group_size=0), CheckpointError, "group_size"),
    "group_size -2": (weights(group_size=-2), CheckpointError, "group_size"),
    "group_size none": (weights(group_size=None), CheckpointError, "group_size"),
    "group_size 1.5": (weights(group_size=32.5), CheckpointError, "group_size"),
    "group_size 2^40": (weights(group_size=1 << 40), CheckpointError, "group_size"),
    "half the groups": (weights(group_size=64), CheckpointError, "weight_scale"),
    "channels": (weights(strategy="channel"), CheckpointError, "weight_scale"),
    "one scale": (weights(strategy="tensor"), CheckpointError, "weight_scale"),
    "symmetric 1": (weights(symmetric=1), CheckpointError, "symmetric"),
    "8 bits": (weights(num_bits=8), CheckpointError, "weight_packed"),
    "3 bits": (weights(num_bits=3), CheckpointError, "weight_packed"),
    "in an order": (weights(actorder="group"), CheckpointError, "weight_g_idx"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_lie(tmp_path: Path, case: str) -> None:
    change, kind, place = CONFIGS[case]
    config, parts = packed()
    change(config)
    error = refused(read_all, written(tmp_path / "model", config, parts), place)
    assert type(error) is kind
    assert error.hint or kind is CheckpointError


def test_groups_that_contradict_each_other(tmp_path: Path) -> None:
    config, parts = packed()
    other = copy.deepcopy(config["config_groups"]["group_0"])
    other["weights"]["num_bits"] = 8
    config["config_groups"]["group_1"] = other
    refused(read_all, written(tmp_path / "model", config, parts), "one group", A)
    other["targets"] = [f"{A}x", "re:.*down_proj"]
    read_all(written(tmp_path / "other", config, parts))


def modules_of(config: Config, modules: dict[str, Parts], path: Path) -> dict[str, str]:
    """Module -> how its weight is rounded, as the file's reader says."""
    tensors = {
        f"{m}.{part}": array for m, parts in modules.items() for part, array in parts.items()
    }
    found = open_weights(write_quantized(path, config, tensors))
    return {name.removesuffix(".weight"): tensor.dtype.split()[1] for name, tensor in found.items()}


def eight_bits(parts: Parts) -> Parts:
    words = naive_words(np.zeros((N, K), np.int64), 8)
    return {key: parts[key] for key in ("weight_shape", "weight_scale")} | {"weight_packed": words}


def test_targets_that_are_names_and_classes(tmp_path: Path) -> None:
    """`lm_head` is stored, so it is no class; a name goes before an expression, and that before a
    class."""
    config, parts = packed()
    options = {"num_bits": 8, "symmetric": True, "strategy": "group", "group_size": 32}
    config["config_groups"]["group_1"] = {"targets": ["lm_head"], "weights": options}
    modules = {A: parts, "lm_head": eight_bits(parts)}
    found = modules_of(config, modules, tmp_path / "model")
    assert found == {A: "int4", "lm_head": "int8"}
    config["config_groups"]["group_0"]["targets"] = ["Linear", "re:.*lm_head.*"]
    assert modules_of(config, modules, tmp_path / "model") == found


def test_embeddings(tmp_path: Path) -> None:
    """GPT-NeoX calls its head `embed_out`: a linear layer where no group is for embeddings."""
    config, parts = packed()
    modules: dict[str, Parts] = {"gpt_neox.embed_in": parts, "embed_out": parts}
    assert len(modules_of(config, modules, tmp_path / "model")) == 2
    options = {"num_bits": 8, "symmetric": True, "strategy": "group", "group_size": 32}
    config["config_groups"]["group_1"] = {"targets": ["Embedding"], "weights": options}
    modules = {A: parts, "embed_out": parts}
    modules |= {"model.embed_tokens": eight_bits(parts), "wte": eight_bits(parts)}
    found = modules_of(config, modules, tmp_path / "model")
    assert found == {A: "int4", "embed_out": "int4", "model.embed_tokens": "int8", "wte": "int8"}


def test_codes_beyond_their_bits(tmp_path: Path) -> None:
    config, parts = int8()
    config["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    refused(read_all, written(tmp_path / "model", config, parts), A, "codes from 120 to 135")


@pytest.mark.parametrize("zero", [-9, 8, 127])
def test_zero_points_beyond_their_bits(tmp_path: Path, zero: int) -> None:
    config, parts = int8()
    config["config_groups"]["group_0"]["weights"] |= {"num_bits": 4, "symmetric": False}
    parts["weight"] >>= 4
    parts["weight_zero_point"] = np.full((N, 1), zero, np.int8)
    refused(read_all, written(tmp_path / "model", config, parts), "weight_zero_point", "-8 to 7")


def test_a_width_that_fits_two_packings(tmp_path: Path) -> None:
    """12 values of 3 bits are two words either way: only the version tells which."""
    codes = np.random.default_rng(0).integers(0, 8, (4, 12))
    parts = {
        "weight_packed": naive_words(codes, 3),
        "weight_shape": np.array([4, 12]),
        "weight_scale": np.ones((4, 1), np.float32),
    }
    config = group(num_bits=3, strategy="channel", symmetric=True)
    stream = open_weights(written(tmp_path / "stream", config, parts))[f"{A}.weight"]
    assert np.array_equal(stream.dequantize(), codes - 4)
    padded = [naive_words(codes[:, :10], 3), naive_words(codes[:, 10:], 3)]
    parts["weight_packed"] = np.concatenate(padded, axis=1)
    old = config | {"version": "0.17.1"}
    tensor = open_weights(written(tmp_path / "padded", old, parts))[f"{A}.weight"]
    assert np.array_equal(tensor.dequantize(), codes - 4)
    error = refused(read_all, written(tmp_path / "none", config | {"version": None}, parts), A)
    assert "quantization_config.version" in str(error.hint)


def test_scales_that_are_no_numbers(tmp_path: Path) -> None:
    """Whoever packs the weights refuses them."""
    from lacewing.formats import get_format

    for wrong in (np.nan, np.inf):
        config, parts = packed()
        parts["weight_scale"][3, 1] = wrong
        place = written(tmp_path / str(wrong), config, parts)
        tensor = open_weights(place)[f"{A}.weight"]
        assert not np.isfinite(tensor.dequantize()).all()
        assert tensor.codes() is None
        assert tensor.near_codes() is None
        with pytest.raises(LacewingError, match="finite"):
            get_format("w4a8g32z").round(tensor.dequantize())


# -- bytes ----------------------------------------------------------------------------------------

CASES = sorted(path for name in ("foreign", "foreign_gptq") for path in (FIXTURES / name).iterdir())


@settings(max_examples=400)
@given(data=st.data())
def test_flipped_bytes(data: st.DataObject) -> None:
    source = data.draw(st.sampled_from(CASES))
    name = data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    raw = bytearray((source / name).read_bytes())
    header = len(raw) if name == "config.json" else 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        upto = data.draw(st.sampled_from([header, len(raw)]))
        raw[data.draw(st.integers(0, upto - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(source, place, dirs_exist_ok=True)
        (Path(place) / name).write_bytes(raw)
        damaged_or_fine(Path(place))


_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@settings(max_examples=400)
@given(data=st.data())
def test_other_values_in_configs(data: st.DataObject) -> None:
    source = data.draw(st.sampled_from(CASES))
    config = json.loads((source / "config.json").read_text())
    places = list(leaves(config["quantization_config"]))
    parent, key = data.draw(st.sampled_from(places))
    parent[key] = data.draw(_VALUES)
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(source, place, dirs_exist_ok=True)
        (Path(place) / "config.json").write_text(json.dumps(config))
        damaged_or_fine(Path(place))


def leaves(value: dict[str, Any]) -> Any:
    for key, child in value.items():
        yield value, key
        if isinstance(child, dict):
            yield from leaves(child)


def damaged_or_fine(place: Path) -> None:
    with suppress(LacewingError):
        read_all(place)
        _ = open_source(place).config

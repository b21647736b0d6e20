"""GPTQ, AWQ and auto-round: files that their own packers made (tests/fixtures/make_foreign_gptq.py)
against what their own code makes of them, and other shapes against a naive packer from the
published layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacewing.checkpoint import load_model, open_source, open_weights
from lacewing.errors import CheckpointError, UnsupportedModelError
from lacewing.formats import PackedTensor, get_format
from tests.checkpoint.build import config, random_weights, write_hub
from tests.checkpoint.foreign import Array, write_quantized

FOREIGN = Path(__file__).resolve().parents[1] / "fixtures" / "foreign_gptq"
CASES = sorted(place.name for place in FOREIGN.iterdir())
MODULE = "model.layers.0.mlp.up_proj"
WEIGHT = f"{MODULE}.weight"


def test_every_case_is_there() -> None:
    assert len(CASES) == 35


@pytest.mark.parametrize("case", CASES)
def test_weights_are_the_librarys(case: str) -> None:
    """The libraries multiply in f16: what they get is the exact product, rounded once."""
    expected = np.load(FOREIGN / case / "expected.npy")
    weights = open_weights(FOREIGN / case)
    assert list(weights) == [WEIGHT]
    tensor = weights[WEIGHT]
    assert tensor.shape == expected.shape
    assert np.array_equal(tensor.dequantize().astype(np.float16), expected)
    for begin, end in ((0, 1), (7, 13), (16, 32)):
        rows = tensor.dequantize(begin, end).astype(np.float16)
        assert np.array_equal(rows, expected[begin:end])


OWN = {
    "gptqmodel-gptq-4-sym": "w4a8g32",
    "gptqmodel-gptq-3-sym": "w4a8g32",
    "gptqmodel-gptq-4-asym": "w4a8g32z",
    "gptqmodel-gptq-4-asym-actorder": None,
    "gptqmodel-gptq-5-asym": "w5a8g32z",
    "gptqmodel-gptq-7-asym": "w8a8g32",
    "gptqmodel-gptq-8-asym": None,
    "autoawq-gemm": "w4a8g32z",
    "auto-round-auto_round-3": "w4a8g32",
}


@pytest.mark.parametrize("case", OWN)
def test_own_formats(case: str) -> None:
    tensor = open_weights(FOREIGN / case)[WEIGHT]
    assert tensor.own_format == OWN[case]
    found = tensor.codes(5, 21) or tensor.near_codes(5, 21)
    assert (found is None) == (OWN[case] is None)
    if found is None:
        return
    name, codes = found
    assert name == OWN[case]
    kind = get_format(name)
    weights = kind.dequantize(codes)
    if kind.asymmetric:
        assert codes.mins is not None
        off = np.abs(weights - tensor.dequantize(5, 21)).max()
        assert off <= np.abs(codes.mins).max() * 2.0**-11
    else:
        assert np.array_equal(weights, tensor.dequantize(5, 21))


# -- other shapes ---------------------------------------------------------------------------------


def naive_words(codes: Array, bits: int) -> Array:
    """`codes` `[.., count]` along the last axis, bit by bit: value i begins at bit i * bits."""
    count = codes.shape[-1]
    words = np.zeros((*codes.shape[:-1], -(-count * bits // 32)), np.uint64)
    for i in range(count):
        for bit in range(bits):
            word, shift = divmod(i * bits + bit, 32)
            one = (codes[..., i].astype(np.uint64) >> np.uint64(bit)) & np.uint64(1)
            words[..., word] |= one << np.uint64(shift)
    return words.astype(np.uint32).view(np.int32)


def random_gptq(
    bits: int,
    n: int,
    k: int,
    group: int,
    offset: int = 1,
    actorder: bool = False,
    seed: int = 0,
) -> tuple[dict[str, Array], Array]:
    rng = np.random.default_rng([bits, n, seed])
    groups = -(-k // group)
    g_idx = np.arange(k) // group
    if actorder:
        g_idx = rng.permutation(g_idx)
    codes = rng.integers(0, 1 << bits, (k, n))
    zeros = rng.integers(1, 1 << bits, (groups, n))
    scales = rng.uniform(0.001, 0.02, (groups, n)).astype(np.float16)
    parts = {
        "qweight": naive_words(codes.T, bits).T,
        "qzeros": naive_words(zeros - offset, bits),
        "scales": scales,
        "g_idx": g_idx.astype(np.int32),
    }
    weight = (codes - zeros[g_idx]).astype(np.float32) * scales[g_idx].astype(np.float32)
    return {f"{MODULE}.{name}": part for name, part in parts.items()}, weight.T


def gptq(bits: int = 4, group: int = 32, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group} | more


@pytest.mark.parametrize("actorder", [False, True])
@pytest.mark.parametrize(("n", "k", "group"), [(8, 64, 32), (40, 160, 64), (24, 96, -1)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_shapes(tmp_path: Path, bits: int, n: int, k: int, group: int, actorder: bool) -> None:
    parts, weight = random_gptq(bits, n, k, k if group == -1 else group, actorder=actorder)
    stated = gptq(bits, group, desc_act=actorder)
    tensor = open_weights(write_quantized(tmp_path / "model", stated, parts))[WEIGHT]
    assert np.array_equal(tensor.dequantize(), weight)
    assert np.array_equal(tensor.dequantize(3, 7), weight[3:7])
    if actorder and group != -1:
        assert tensor.own_format is None


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.uint16])
def test_types_of_scales(tmp_path: Path, dtype: Any) -> None:
    parts, _ = random_gptq(4, 16, 64, 32)
    scales = parts[f"{MODULE}.scales"].astype(np.float32)
    raw = scales.view(np.uint32) >> 16
    parts[f"{MODULE}.scales"] = (
        raw.astype(np.uint16) if dtype == np.uint16 else scales.astype(dtype)
    )
    if dtype == np.uint16:
        scales = (raw << 16).view(np.float32)
    tensor = open_weights(write_quantized(tmp_path / "model", gptq(), parts))[WEIGHT]
    zeros = naive_zeros(parts)
    codes = naive_codes(parts)
    assert np.array_equal(tensor.dequantize(), ((codes - zeros) * np.repeat(scales, 32, 0)).T)


def naive_codes(parts: dict[str, Array]) -> Array:
    words = parts[f"{MODULE}.qweight"].view(np.uint32)
    rows = [(words[i // 8] >> (4 * (i % 8))) & 15 for i in range(len(words) * 8)]
    return np.array(rows, np.float32)


def naive_zeros(parts: dict[str, Array]) -> Array:
    words = parts[f"{MODULE}.qzeros"].view(np.uint32)
    columns = [((words[:, i // 8] >> (4 * (i % 8))) & 15) + 1 for i in range(words.shape[1] * 8)]
    return np.repeat(np.array(columns, np.float32).T, 32, 0)


def test_rules_for_single_modules(tmp_path: Path) -> None:
    parts, weight = random_gptq(8, 16, 64, 64)
    rule = {r"+:model\.layers\.[0-9]\.mlp.*": {"bits": 8, "group_size": 64}, "-:lm_head": {}}
    place = write_quantized(tmp_path / "model", gptq(dynamic=rule), parts)
    assert np.array_equal(open_weights(place)[WEIGHT].dequantize(), weight)


@pytest.mark.parametrize("key", [MODULE, r".*layers\.0\.mlp.*", "up_proj"])
def test_auto_round_rules(tmp_path: Path, key: str) -> None:
    parts, weight = random_gptq(3, 32, 64, 64)
    del parts[f"{MODULE}.g_idx"]
    config = gptq(4, 128, packing_format="auto_round:auto_gptq") | {
        "quant_method": "auto-round",
        "extra_config": {"lm_head": {"bits": 16}, key: {"bits": 3, "group_size": 64}},
    }
    place = write_quantized(tmp_path / "model", config, parts)
    assert np.array_equal(open_weights(place)[WEIGHT].dequantize(), weight)


def test_auto_round_names_are_no_expressions(tmp_path: Path) -> None:
    """A rule for one module is not one for others whose names begin like its own."""
    parts, weight = random_gptq(4, 32, 64, 32)
    more, other = random_gptq(3, 32, 64, 64)
    parts |= {part.replace("up_proj", "up_proj_b"): array for part, array in more.items()}
    config = gptq(3, 64) | {"quant_method": "auto-round"}
    config["extra_config"] = {MODULE: {"bits": 4, "group_size": 32}}
    weights = open_weights(write_quantized(tmp_path / "model", config, parts))
    assert np.array_equal(weights[WEIGHT].dequantize(), weight)
    assert np.array_equal(weights[f"{MODULE}_b.weight"].dequantize(), other)


def test_an_old_file_beside_the_config(tmp_path: Path) -> None:
    parts, weight = random_gptq(4, 16, 64, 32)
    place = write_quantized(tmp_path / "model", None, parts)
    (place / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32}))
    assert np.array_equal(open_weights(place)[WEIGHT].dequantize(), weight)


def test_a_file_with_a_name_of_its_own(tmp_path: Path) -> None:
    """AutoGPTQ's. Of two files none is the model."""
    parts, weight = random_gptq(4, 32, 128, 128)
    place = write_quantized(tmp_path / "model", {}, parts)
    (place / "quantize_config.json").write_text(json.dumps(gptq(4, 128)))
    named = place / "gptq_model-4bit-128g.safetensors"
    (place / "model.safetensors").rename(named)
    assert np.array_equal(open_weights(place)[WEIGHT].dequantize(), weight)
    (place / "other.safetensors").write_bytes(named.read_bytes())
    with pytest.raises(CheckpointError, match=r"needs model\.safetensors"):
        open_weights(place)


@pytest.mark.parametrize("value", [0, 1])
def test_biases_of_zeros(tmp_path: Path, value: int) -> None:
    """AutoGPTQ has saved a bias of zeros with every weight, whether the model has biases or not."""
    stated = config()
    weights = random_weights(stated)
    place = write_hub(tmp_path / "model", stated, weights)
    tensors: dict[str, Array] = {}
    for seed, (name, weight) in enumerate(weights.items()):
        if weight.ndim == 1 or "layers" not in name:
            tensors[name] = weight
            continue
        n, k = weight.shape
        module = name.removesuffix(".weight")
        parts, weights[name] = random_gptq(4, n, k, 32, seed=seed)
        tensors |= {part.replace(MODULE, module): array for part, array in parts.items()}
        tensors[f"{module}.bias"] = np.full(n, value, np.float16)
    write_quantized(place, gptq(), tensors, **stated)
    source = open_source(place)
    if value:
        with pytest.raises(CheckpointError, match="no such tensor"):
            _ = source.spec
        return
    assert source.spec.tensor_shapes().keys() == source.tensors.keys() == weights.keys()
    model = load_model(place)
    packed = model.tensors[WEIGHT]
    assert isinstance(packed, PackedTensor)
    assert packed.format == "w4a8g32z"
    off = np.abs(get_format(packed.format).dequantize(packed) - weights[WEIGHT])
    assert off.max() <= 16 * 0.02 * 2.0**-11


# -- AWQ ------------------------------------------------------------------------------------------

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def awq_words(codes: Array) -> Array:
    words = np.zeros((len(codes), codes.shape[1] // 8), np.uint32)
    for place, output in enumerate(ORDER):
        words |= codes[:, output::8].astype(np.uint32) << np.uint32(4 * place)
    return words.view(np.int32)


@pytest.mark.parametrize(("n", "k", "group"), [(8, 64, 32), (40, 256, 128), (24, 96, -1)])
def test_awq_shapes(tmp_path: Path, n: int, k: int, group: int) -> None:
    rng = np.random.default_rng(n)
    size = k if group == -1 else group
    codes = rng.integers(0, 16, (k, n))
    zeros = rng.integers(0, 16, (k // size, n))
    scales = rng.uniform(0.001, 0.02, (k // size, n)).astype(np.float16)
    parts = {"qweight": awq_words(codes), "qzeros": awq_words(zeros), "scales": scales}
    named = {f"{MODULE}.{name}": part for name, part in parts.items()}
    config = {"quant_method": "awq", "w_bit": 4, "q_group_size": group, "version": "GEMM"}
    tensor = open_weights(write_quantized(tmp_path / "model", config, named))[WEIGHT]
    wide = [np.repeat(part.astype(np.float32), size, 0) for part in (zeros, scales)]
    weight = ((codes - wide[0]).astype(np.float32) * wide[1]).T
    assert np.array_equal(tensor.dequantize(), weight)
    for begin, end in ((1, 3), (7, 8), (5, n)):
        assert np.array_equal(tensor.dequantize(begin, end), weight[begin:end])


# -- refused --------------------------------------------------------------------------------------


def copied(tmp_path: Path, case: str, **changes: Any) -> Path:
    place = tmp_path / "model"
    shutil.copytree(FOREIGN / case, place)
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"] |= changes
    (place / "config.json").write_text(json.dumps(config))
    return place


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "marlin": ("gptqmodel-gptq-4-sym", {"checkpoint_format": "marlin"}, "checkpoint_format"),
    "is_marlin": ("gptqmodel-gptq-4-sym", {"is_marlin_format": True}, "checkpoint_format"),
    "pack_dtype": ("gptqmodel-gptq-4-sym", {"pack_dtype": "int16"}, "pack_dtype"),
    "one bit": ("gptqmodel-gptq-4-sym", {"bits": 1}, "2 to 8 bits"),
    "no bits": ("gptqmodel-gptq-4-sym", {"bits": None}, "2 to 8 bits"),
    "true": ("gptqmodel-gptq-4-sym", {"bits": True}, "2 to 8 bits"),
    "gemv": ("autoawq-gemm", {"version": "gemv"}, "version"),
    "awq of 8 bits": ("autoawq-gemm", {"bits": 8}, "4 bits"),
    "fp8": ("auto-round-auto_round-4", {"packing_format": "auto_round:fp8_static"}, "packing"),
    "data_type": ("auto-round-auto_round-4", {"data_type": "mx_fp"}, "data_type"),
    "act_bits": ("auto-round-auto_round-4", {"act_bits": 8}, "act_bits"),
    "rotation": ("auto-round-auto_round-4", {"rotation_config": {"a": 1}}, "rotation_config"),
    "method": ("autoawq-gemm", {"quant_method": "bitsandbytes"}, "bitsandbytes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_implemented(tmp_path: Path, case: str) -> None:
    source, changes, place = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=place) as caught:
        open_weights(copied(tmp_path, source, **changes))
    assert caught.value.hint


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "group_size 0": ("gptqmodel-gptq-4-sym", {"group_size": 0}, "group_size"),
    "group_size of text": ("gptqmodel-gptq-4-sym", {"group_size": "32"}, "group_size"),
    "another group_size": ("gptqmodel-gptq-4-sym", {"group_size": 16}, "scales"),
    "other bits": ("gptqmodel-gptq-4-sym", {"bits": 8}, "qweight"),
    "other bits, no g_idx": ("auto-round-auto_round-4", {"bits": 8}, "scales"),
    "dynamic": ("gptqmodel-gptq-4-sym", {"dynamic": [1]}, "dynamic"),
    "a rule": ("gptqmodel-gptq-4-sym", {"dynamic": {"a": 1}}, "dynamic"),
    "no expression": ("gptqmodel-gptq-4-sym", {"dynamic": {"+:(": {}}}, "dynamic"),
    "awq groups": ("autoawq-gemm", {"group_size": 64}, "scales"),
}


@pytest.mark.parametrize("case", WRONG)
def test_configs_that_lie(tmp_path: Path, case: str) -> None:
    source, changes, place = WRONG[case]
    with pytest.raises(CheckpointError, match=place):
        open_weights(copied(tmp_path, source, **changes))


EVIL = ["(a+)+$", "(a|aa)*b", r"(.)\1*", "a*a*a*a*a*b", "((a{1,9}){1,9}){1,9}", "(?P<x>.)(?P=x)*"]


@pytest.mark.parametrize("pattern", EVIL)
def test_expressions_that_could_take_for_ever(tmp_path: Path, pattern: str) -> None:
    place = copied(tmp_path, "gptqmodel-gptq-4-sym", dynamic={pattern: {}})
    with pytest.raises(UnsupportedModelError, match="dynamic"):
        open_weights(place)


def parts_of(**changes: Array) -> dict[str, Array]:
    parts, _ = random_gptq(4, 16, 64, 32)
    return parts | {f"{MODULE}.{name}": part for name, part in changes.items()}


def test_an_order_that_was_never_written(tmp_path: Path) -> None:
    """Some writers leave `g_idx` at zero where nothing is reordered."""
    parts, weight = random_gptq(4, 32, 128, 32)
    parts[f"{MODULE}.g_idx"] = np.zeros(128, np.int32)
    place = write_quantized(tmp_path / "a", gptq(desc_act=False), parts)
    tensor = open_weights(place)[f"{MODULE}.weight"]
    assert np.array_equal(tensor.dequantize(), weight)
    assert tensor.own_format is not None
    with pytest.raises(CheckpointError, match=r"g_idx.*activation order"):
        open_weights(write_quantized(tmp_path / "b", gptq(desc_act=True), parts))


def test_zero_points_on_which_readers_differ(tmp_path: Path) -> None:
    parts = parts_of(qzeros=np.full((2, 2), -1, np.int32))
    tensor = open_weights(write_quantized(tmp_path / "v1", gptq(), parts))[WEIGHT]
    with pytest.raises(CheckpointError, match="zero points up to 15") as caught:
        tensor.dequantize()
    assert "gptq_v2" in str(caught.value.hint)
    config = gptq(checkpoint_format="gptq_v2")
    tensor = open_weights(write_quantized(tmp_path / "v2", config, parts))[WEIGHT]
    assert tensor.dequantize().max() <= 0


@pytest.mark.parametrize("group", [-1, 2, 2**31 - 1, -(2**31)])
def test_groups_that_do_not_exist(tmp_path: Path, group: int) -> None:
    g_idx = np.arange(64, dtype=np.int32) // 32
    g_idx[5] = group
    with pytest.raises(CheckpointError, match="g_idx"):
        open_weights(write_quantized(tmp_path / "model", gptq(), parts_of(g_idx=g_idx)))


BROKEN: dict[str, tuple[str, Callable[[Array], Array] | None, str]] = {
    f"{part} {name}": (part, change, place or part)
    for part in ("qweight", "qzeros", "scales", "g_idx")
    for name, change, place in (
        ("of another type", lambda a: a.astype(np.int8), ""),
        ("too short", lambda a: a[..., :-9], MODULE),
        ("empty", lambda a: a[:0], MODULE),
        ("of three dimensions", lambda a: a[None, None], ""),
    )
}
BROKEN["qzeros missing"] = ("qzeros", None, "qzeros")
BROKEN["scales missing"] = ("scales", None, "scales")


@pytest.mark.parametrize("case", BROKEN)
def test_parts_that_do_not_fit(tmp_path: Path, case: str) -> None:
    part, change, place = BROKEN[case]
    parts = parts_of()
    array = parts.pop(f"{MODULE}.{part}")
    if change is not None:
        parts[f"{MODULE}.{part}"] = change(array)
    with pytest.raises(CheckpointError, match=place):
        open_weights(write_quantized(tmp_path / "model", gptq(), parts))


def test_a_dense_weight_beside_its_parts(tmp_path: Path) -> None:
    parts = {**parts_of(), WEIGHT: np.zeros((16, 64), np.float32)}
    with pytest.raises(CheckpointError, match="one weight"):
        open_weights(write_quantized(tmp_path / "model", gptq(), parts))

"""compressed-tensors: the library itself (0.20) is the oracle of what its files mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacewing.checkpoint import describe, load_model, open_source, open_weights
from lacewing.checkpoint.grid import own_format
from lacewing.formats import get_format
from lacewing.formats.base import ROW
from tests.checkpoint.build import config, tokenizer_document
from tests.checkpoint.foreign import Array, group, numpy_of, write_quantized

torch = pytest.importorskip("torch")
pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import BaseCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationScheme  # noqa: E402

N, K = 48, 256
NAME = "model.layers.0.self_attn.q_proj"
WEIGHT = f"{NAME}.weight"


def compressed(
    format: str, dtype: Any, n: int = N, k: int = K, seed: int = 0, **weights: Any
) -> tuple[dict[str, Array], Array]:
    """The library's parts of a random weight, and what it makes of them in f32."""
    rng = np.random.default_rng(seed)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    args = scheme.weights
    half = 1 << (args.num_bits - 1)
    groups = {"group": k // (args.group_size or k), "channel": 1, "tensor": 1}[args.strategy]
    shape = (1,) if args.strategy == "tensor" else (n, groups)
    scale = torch.tensor(rng.uniform(0.001, 0.02, shape), dtype=dtype)
    state = {"weight": None, "weight_scale": scale}
    zero: Any = 0
    if not args.symmetric:
        zero = torch.tensor(rng.integers(-half, half, shape), dtype=torch.int8)
        state["weight_zero_point"] = zero
        zero = zero.repeat_interleave(k // groups, 1) if zero.ndim == 2 else zero
    codes = torch.tensor(rng.integers(-half, half, (n, k)))
    wide = scale.repeat_interleave(k // groups, 1) if scale.ndim == 2 else scale
    # In float64 the library's own rounding finds these codes again.
    state["weight"] = (codes - zero).double() * wide.double()
    state["weight_scale"] = scale.double()
    compressor = BaseCompressor.get_value_from_registry(format)
    parts = compressor.compress(state, scheme)
    parts["weight_scale"] = scale
    oracle = compressor.decompress({**parts, "weight_scale": scale.float()}, scheme)["weight"]
    assert torch.equal(oracle, (codes - zero).float() * wide.float())
    return {f"{NAME}.{part}": numpy_of(value) for part, value in parts.items()}, oracle.numpy()


def opened(path: Path, config: Any, parts: dict[str, Array]) -> Any:
    return open_weights(write_quantized(path, config, parts))[WEIGHT]


CASES = [
    ("pack-quantized", {"num_bits": bits, "strategy": "group", "group_size": size})
    for bits in range(2, 9)
    for size in (32, 64, 128)
]
CASES += [("pack-quantized", {"num_bits": bits, "strategy": "channel"}) for bits in range(2, 9)]
CASES += [
    ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    ("int-quantized", {"num_bits": 8, "strategy": "tensor"}),
    ("int-quantized", {"num_bits": 8, "strategy": "group", "group_size": 64}),
    ("int-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("format", "weights"), CASES, ids=str)
def test_weights_are_the_librarys(
    tmp_path: Path, format: str, weights: dict[str, Any], symmetric: bool
) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        args = {**weights, "symmetric": symmetric}
        parts, oracle = compressed(format, dtype, **args)
        tensor = opened(tmp_path / str(dtype), {**group(**args), "format": format}, parts)
        assert tensor.shape == (N, K)
        assert np.array_equal(tensor.dequantize(), oracle)
        assert np.array_equal(tensor.dequantize(16, 35), oracle[16:35])


@pytest.mark.parametrize(("n", "k"), [(9, 64), (33, 96), (17, 160)])
@pytest.mark.parametrize("bits", range(2, 9))
def test_odd_shapes(tmp_path: Path, bits: int, n: int, k: int) -> None:
    args = {"num_bits": bits, "strategy": "group", "group_size": 32, "symmetric": False}
    parts, oracle = compressed("pack-quantized", torch.float16, n, k, **args)
    tensor = opened(tmp_path / "model", group(**args), parts)
    assert np.array_equal(tensor.dequantize(), oracle)
    assert np.array_equal(tensor.dequantize(0, 1), oracle[:1])


EXACT = [
    (2, 64, True, "w3a8g64"),
    (2, 32, True, "w4a8g32"),
    (2, 64, False, "w3a8g64"),
    (3, 128, True, "w3a8g64"),
    (3, 32, False, "w4a8g32"),
    (4, 32, True, "w4a8g32"),
    (4, 64, True, "w4a8g64"),
    (4, 128, True, "w4a8g128"),
    (4, 256, True, "w4a8g128"),
    (4, None, True, "w4a8g128"),
    (5, 32, True, "w5a8g32z"),
    (6, 64, True, "w8a8g64"),
    (7, 32, False, "w8a8g32"),
    (8, 32, True, "w8a8g32"),
    (8, 128, True, "w8a8g64"),
    (8, None, True, "w8a8"),
]


@pytest.mark.parametrize(("bits", "size", "symmetric", "format"), EXACT)
def test_codes_without_loss(
    tmp_path: Path, bits: int, size: int | None, symmetric: bool, format: str
) -> None:
    args: dict[str, Any] = {"num_bits": bits, "symmetric": symmetric}
    args |= {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    parts, oracle = compressed("pack-quantized", torch.float16, **args)
    tensor = opened(tmp_path / "model", group(**args), parts)
    assert tensor.own_format == format
    found = tensor.codes(16, 48)
    assert found is not None
    assert found[0] == format
    kind = get_format(format)
    assert np.array_equal(kind.dequantize(found[1]), oracle[16:48])
    assert np.array_equal(kind.dequantize(kind.pack(found[1])), oracle[16:48])


@pytest.mark.parametrize("bits", [4, 5])
def test_asymmetric_codes_are_kept(tmp_path: Path, bits: int) -> None:
    """A minimum is -scale * zero_point: a float16 where it fits, else the nearest one."""
    args = {"num_bits": bits, "symmetric": False, "strategy": "group", "group_size": 64}
    parts, oracle = compressed("pack-quantized", torch.float16, **args)
    tensor = opened(tmp_path / "near", group(**args), parts)
    assert tensor.own_format == f"w{bits}a8g32z"
    assert tensor.codes() is None
    name, codes = tensor.near_codes()
    off = np.abs(get_format(name).dequantize(codes) - oracle)
    # Half a unit in the last place of the minimum, of 11 bits.
    assert (off <= np.abs(codes.mins).max() * 2.0**-11).all()
    scale = parts[f"{NAME}.weight_scale"]
    parts[f"{NAME}.weight_scale"] = (scale.view(np.uint16) & 0xFFC0).view(np.float16)
    tensor = opened(tmp_path / "exact", group(**args), parts)
    found = tensor.codes()
    assert found is not None
    assert np.array_equal(get_format(name).dequantize(found[1]), tensor.dequantize())


def test_scales_that_are_no_float16(tmp_path: Path) -> None:
    args = {"num_bits": 4, "strategy": "group", "group_size": 64}
    parts, oracle = compressed("pack-quantized", torch.float32, **args)
    tensor = opened(tmp_path / "model", group(**args), parts)
    assert tensor.codes() is None
    name, codes = tensor.near_codes()
    rounded = get_format(name).dequantize(codes)
    assert np.abs(rounded - oracle).max() <= np.abs(oracle).max() * 2.0**-11


# -- whole models ---------------------------------------------------------------------------------


def saved_by_the_library(path: Path, groups: dict[str, Any]) -> Path:
    """A tiny Llama, rounded to nearest, compressed and saved by the library."""
    transformers = pytest.importorskip("transformers")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    torch.manual_seed(0)
    stated = config(architectures=["LlamaForCausalLM"], tie_word_embeddings=False)
    model_type = stated.pop("model_type")
    made = transformers.AutoConfig.for_model(model_type, **stated)
    model = transformers.AutoModelForCausalLM.from_config(made).to(torch.bfloat16)
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        args = scheme.weights
        rows = module.weight.data.unflatten(1, (-1, args.group_size or module.weight.shape[1]))
        scale, zero = calculate_qparams(rows.amin(-1), rows.amax(-1), args)
        module.weight_scale.data = scale
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data = zero
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(str(path))
    (path / "tokenizer.json").write_text(json.dumps(tokenizer_document()))
    return path


def read_by_the_library(path: Path) -> dict[str, Array]:
    import transformers
    from compressed_tensors.compressors import ModelCompressor

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    stated = model.config.quantization_config
    ModelCompressor.from_compression_config(stated).decompress_model(model)
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def taken_apart_by_the_library(path: Path, scheme: dict[str, Any]) -> dict[str, Array]:
    """Module by module, since transformers 5 cannot load packed zero points ("size mismatch")."""
    from safetensors.torch import load_file

    stored = load_file(path / "model.safetensors")
    found = {name: value.float().numpy() for name, value in stored.items()}
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    for name in stored:
        module, _, part = name.rpartition(".")
        if part == "weight_packed":
            own = {n.removeprefix(f"{module}."): v for n, v in stored.items() if module in n}
            own["weight_scale"] = own["weight_scale"].float()
            made = compressor.decompress(own, QuantizationScheme(**scheme))
            found[f"{module}.weight"] = made["weight"].numpy()
    return found


ASYMMETRIC = {"symmetric": False}
PER_TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
MODELS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "W4A16": (
        {"a": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 128}}},
        {"w4a8g128"},
    ),
    "W4A16_ASYM": (
        {"a": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 64, **ASYMMETRIC}}},
        {"w4a8g32z"},
    ),
    "W8A8": (
        {
            "a": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "strategy": "channel"},
                "input_activations": PER_TOKEN,
            }
        },
        {"w8a8"},
    ),
    "mixed": (
        {
            "a": {"targets": ["re:.*down_proj"], "weights": {"num_bits": 8, "group_size": 32}},
            "b": {"targets": ["re:.*self_attn.*"], "weights": {"num_bits": 3, "group_size": 64}},
            "c": {
                "targets": ["model.layers.1.mlp.up_proj"],
                "weights": {"num_bits": 4, "group_size": 32},
            },
        },
        {"w8a8g32", "w3a8g64", "w4a8g32"},
    ),
}


def test_rows_too_long_for_one_scale() -> None:
    """w8a8 adds up whole rows in 32 bits."""
    assert own_format(8, None, -128, 127, ROW) == "w8a8"
    assert own_format(8, None, -128, 127, ROW + 64) == "w8a8g64"


@pytest.mark.parametrize("name", MODELS)
def test_models_of_the_library(tmp_path: Path, name: str) -> None:
    groups, formats = MODELS[name]
    place = saved_by_the_library(tmp_path / "model", groups)
    source = open_source(place)
    if name == "W4A16_ASYM":
        expected = taken_apart_by_the_library(place, groups["a"])
    else:
        expected = read_by_the_library(place)
    assert source.spec.tensor_shapes().keys() == source.tensors.keys() <= expected.keys()
    for tensor in source.tensors.values():
        assert np.array_equal(tensor.dequantize(), expected[tensor.name]), tensor.name
    model = load_model(place)
    reports = {report.name: report for report in model.reports}
    rounded = {n: r for n, r in reports.items() if n.startswith("model.layers") and r.shape[1:]}
    own = {r.format for r in rounded.values() if "quantized" in r.source}
    assert own == formats
    for report in rounded.values():
        # bf16 scales and codes are kept; only minima may be rounded.
        near = report.format.endswith("z")
        dense = "quantized" not in report.source
        assert report.exact or near or dense, report
        assert dense or report.error <= 2.0**-11
    assert "quantization_config" not in model.config
    notes = describe(place)["notes"]
    assert len(notes) == (name == "W8A8")

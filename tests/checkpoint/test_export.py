"""Directories that others open: read back by our own reader, and by transformers with
compressed-tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacewing.checkpoint import (
    load_model,
    load_packed,
    open_source,
    open_weights,
    write_compressed_tensors,
    write_packed,
)
from lacewing.checkpoint.export import EXPORT
from lacewing.errors import CheckpointError, FormatError
from lacewing.formats import PackedTensor, get_format
from lacewing.models import get_spec
from tests.checkpoint import build
from tests.checkpoint.build import config, random_weights, tiny_gguf, write_hub
from tests.checkpoint.foreign import write_quantized
from tests.checkpoint.test_foreign_gptq import gptq, random_gptq

Q = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
SYMMETRIC = [
    "w8a8",
    "w8a8g32",
    "w8a8g64",
    "w4a8g32",
    "w4a8g64",
    "w4a8g128",
    "w3a8g64",
    "w2a8g64",
    "w1.6a8",
]
SPARSE = ["w8a8g64_sp", "w4a8g64_sp", "w8a8g64_24", "w4a8g64_24", "w8a8_b16x1"]


def made(path: Path, dtype: str = "BF16", **changes: Any) -> Path:
    stated = config(**changes) | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
    return write_hub(path / "source", stated, random_weights(stated), dtype)


def dequantized(path: Path, format: str, **options: Any) -> dict[str, np.ndarray[Any, Any]]:
    """What we make of the source in this format."""
    tensors = load_model(path, format, **options).tensors
    return {
        name: get_format(value.format).dequantize(value)
        if isinstance(value, PackedTensor)
        else value
        for name, value in tensors.items()
    }


@pytest.mark.parametrize("format", [*SYMMETRIC, *SPARSE])
def test_read_back(tmp_path: Path, format: str) -> None:
    """Every weight is the one that we packed, on the same grid."""
    source = made(tmp_path)
    sparsity = 0.5 if get_format(format).sparse else None
    reports = write_compressed_tensors(source, tmp_path / "out", format, sparsity)
    expected = dequantized(source, format, sparsity=sparsity)
    floats = open_source(source)
    again = open_source(tmp_path / "out")
    assert again.spec.tensor_shapes().keys() == again.tensors.keys()
    for name, tensor in again.tensors.items():
        weight = floats.tensors[name].dequantize() if name == EMBEDDING else expected[name]
        assert np.array_equal(tensor.dequantize(), weight), name
    found = again.tensors[Q].codes()
    assert found is not None
    assert np.array_equal(get_format(found[0]).dequantize(found[1]), expected[Q])
    assert {report.name: report.format for report in reports}[Q] == format


def test_auto_goes_back_to_the_same_codes(tmp_path: Path) -> None:
    """Out and in again: not a bit of the packed weights is another one."""
    source = made(tmp_path)
    for format in ("w4a8g64", "w8a8", "w4a8g128"):
        write_packed(source, tmp_path / format, format)
        write_compressed_tensors(tmp_path / format, tmp_path / f"{format}-out")
        write_packed(tmp_path / f"{format}-out", tmp_path / f"{format}-again")
        first = load_packed(tmp_path / format).tensors
        last = load_packed(tmp_path / f"{format}-again").tensors
        assert first.keys() == last.keys()
        for name, value in first.items():
            other = last[name]
            if not isinstance(value, PackedTensor):
                assert np.array_equal(value, other)
                continue
            assert isinstance(other, PackedTensor)
            if name == EMBEDDING:
                continue
            assert other.format == value.format == format
            for part, array in value.parts.items():
                assert np.array_equal(array, other.parts[part])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("format", [*SYMMETRIC, "w4a8g64_24"])
def test_transformers_open_it(tmp_path: Path, format: str, tied: bool) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    source = made(tmp_path, tie_word_embeddings=tied)
    write_compressed_tensors(source, tmp_path / "out", format)
    expected = dequantized(source, format)
    floats = open_source(source)
    model = opened_by_transformers(transformers, tmp_path / "out")
    state = {name: value.detach() for name, value in model.state_dict().items()}
    for name, weight in expected.items():
        tables = name in (EMBEDDING, "lm_head.weight")
        right = floats.tensors[name].dequantize() if tables else weight
        assert state[name].dtype == torch.float32
        assert np.array_equal(state[name].numpy(), right), name
    answer = model(torch.tensor([[1, 7, 30, 12]]))
    assert torch.isfinite(answer.logits).all()


def opened_by_transformers(transformers: Any, path: Path) -> Any:
    """The model with its weights dequantized, as the configuration says."""
    from compressed_tensors.compressors import ModelCompressor

    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert isinstance(model, transformers.LlamaForCausalLM)
    stated = model.config.quantization_config
    ModelCompressor.from_compression_config(stated).decompress_model(model)
    return model


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    source = made(tmp_path)
    (source / "modeling_evil.py").write_text("raise SystemExit")
    (source / "vocab.json").mkdir()
    write_compressed_tensors(source, tmp_path / "out", "w4a8g64")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert files == {*wanted, "generation_config.json", EXPORT}
    assert open_source(tmp_path / "out").tokenizer == open_source(source).tokenizer


@pytest.mark.parametrize("packed", [False, True])
def test_from_gguf(tmp_path: Path, packed: bool) -> None:
    """The grid of Q4_0 goes over; embeddings, of a grid too, are written out in f32."""
    source = tiny_gguf("Q4_0").write(tmp_path / "model.gguf")
    start = source
    if packed:
        start = tmp_path / "packed"
        write_packed(source, start)
    write_compressed_tensors(start, tmp_path / "out")
    expected = open_source(source)
    again = open_source(tmp_path / "out")
    assert again.spec.tensor_shapes() == expected.spec.tensor_shapes()
    for name, tensor in again.tensors.items():
        assert np.array_equal(tensor.dequantize(), expected.tensors[name].dequantize()), name
    assert again.tensors[Q].own_format == "w4a8g32"
    ours, theirs = again.tokenizer, expected.tokenizer
    assert (ours.bos_token_id, ours.eos_token_ids) == (theirs.bos_token_id, theirs.eos_token_ids)
    assert ours.chat_template == theirs.chat_template


@pytest.mark.parametrize("packed", [False, True])
def test_gemma_norms(tmp_path: Path, packed: bool) -> None:
    """Hugging Face's files have them less one, packed directories have not."""
    stated = config(
        "gemma3_text",
        query_pre_attn_scalar=64,
        sliding_window=8,
        rope_local_base_freq=1e4,
        hidden_activation="gelu_pytorch_tanh",
    )
    source = write_hub(tmp_path / "source", stated, random_weights(stated))
    start = source
    if packed:
        start = tmp_path / "packed"
        write_packed(source, start, "w8a8")
    write_compressed_tensors(start, tmp_path / "out", "w8a8")
    first, last = open_source(source).tensors, open_source(tmp_path / "out").tensors
    norms = [name for name in first if name.endswith("norm.weight")]
    assert norms
    for name in norms:
        assert np.array_equal(first[name].dequantize(), last[name].dequantize())


def test_weights_of_every_kind_of_file(tmp_path: Path) -> None:
    """By the same names and with the same values, whatever holds them."""
    source = tiny_gguf("Q4_0").write(tmp_path / "model.gguf")
    write_packed(source, tmp_path / "packed")
    write_compressed_tensors(source, tmp_path / "out")
    weights = [open_weights(place) for place in (source, tmp_path / "packed", tmp_path / "out")]
    assert weights[0].keys() == weights[1].keys() == weights[2].keys()
    for name in (Q, "model.norm.weight"):
        assert all(
            np.array_equal(each[name].dequantize(), weights[0][name].dequantize())
            for each in weights
        )
    (tmp_path / "out" / "config.json").unlink()
    assert f"{Q}_packed" in open_weights(tmp_path / "out")
    with pytest.raises(CheckpointError, match="nothing at that path"):
        open_weights(tmp_path / "none")


def test_several_formats_are_groups(tmp_path: Path) -> None:
    """Weights of one model may have different grids: each group names its modules."""
    file = build.Gguf()
    build.put_metadata(file, "llama", config())
    for seed, (name, shape) in enumerate(get_spec(config()).tensor_shapes().items()):
        kind = "F32" if len(shape) == 1 else "Q8_0" if "up_proj" in name else "Q4_0"
        n, k = shape if len(shape) == 2 else (1, *shape)
        rows = build.random_rows(kind, n, k, seed).tobytes()
        file.tensor(build.gguf_name(name), shape, kind, rows)
    source = file.write(tmp_path / "model.gguf")
    write_compressed_tensors(source, tmp_path / "out")
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    targets = [group["targets"] for group in stated["config_groups"].values()]
    assert sorted(map(len, targets)) == [2, 12]
    again = open_weights(tmp_path / "out")
    for name, tensor in open_source(source).tensors.items():
        assert np.array_equal(again[name].dequantize(), tensor.dequantize()), name


@pytest.mark.parametrize("bits", [4, 5])
def test_minima_that_are_zero_points(tmp_path: Path, bits: int) -> None:
    """Asymmetric weights go over where every minimum is a whole number of steps."""
    source = made(tmp_path)
    format = f"w{bits}a8g32z"
    with pytest.raises(FormatError, match="zero points") as caught:
        write_compressed_tensors(source, tmp_path / "out", format)
    assert "w4a8g64" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()
    steps = snapped(tmp_path, bits)
    write_compressed_tensors(steps, tmp_path / "out", format)
    expected = dequantized(steps, format)
    again = open_weights(tmp_path / "out")
    assert again[Q].own_format == format
    assert np.array_equal(again[Q].dequantize(), expected[Q])
    assert np.array_equal(by_the_library(tmp_path / "out", Q), expected[Q])


def test_zero_points_of_others_go_over(tmp_path: Path) -> None:
    """Codes, scales and zero points of GPTQ, whose minima are not whole steps as float16."""
    stated = config(num_hidden_layers=1)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for seed, (name, weight) in enumerate(random_weights(stated).items()):
        if weight.ndim == 1 or name == EMBEDDING:
            tensors[name] = weight
            continue
        parts, _ = random_gptq(4, *weight.shape, 32, seed=seed)
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{key.rpartition('.')[2]}": part for key, part in parts.items()}
    source = write_hub(tmp_path / "source", stated, {})
    write_quantized(source, gptq(4, 32), tensors, **stated)
    write_compressed_tensors(source, tmp_path / "out")
    ours, again = open_weights(source), open_weights(tmp_path / "out")
    assert again[Q].own_format == ours[Q].own_format == "w4a8g32z"
    for name, tensor in ours.items():
        assert np.array_equal(again[name].dequantize(), tensor.dequantize()), name


@pytest.mark.parametrize("format", ["bf16", "bf16_sp"])
def test_a_packed_embedding_of_bf16_stays_one(tmp_path: Path, format: str) -> None:
    source = made(tmp_path)
    write_packed(source, tmp_path / "packed", "w4a8g64", head_format=format)
    write_compressed_tensors(tmp_path / "packed", tmp_path / "out")
    weights = open_weights(tmp_path / "out")
    assert weights[EMBEDDING].dtype == "BF16"
    assert np.array_equal(
        weights[EMBEDDING].dequantize(), open_weights(source)[EMBEDDING].dequantize()
    )


def test_zeros_are_not_looked_for(tmp_path: Path) -> None:
    """They would be written out, and groups of 32 inputs would be lost for it."""
    stated = config()
    weights = random_weights(stated)
    for weight in weights.values():
        if weight.ndim == 2:
            weight.reshape(len(weight), -1, 4)[:, :, 1:3] = 0
    source = write_hub(tmp_path / "source", stated, weights)
    reports = write_compressed_tensors(source, tmp_path / "out", machine="avx512")
    assert {report.name: report.format for report in reports}[Q] == "w8a8g32"


def by_the_library(path: Path, name: str) -> Any:
    """One weight by compressed-tensors itself: transformers 5 cannot load packed zero points."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    stated = json.loads((path / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig(**stated).config_groups["group_0"]
    module = name.removesuffix("weight")
    stored = load_file(path / "model.safetensors")
    parts = {n.removeprefix(module): v for n, v in stored.items() if n.startswith(module)}
    parts["weight_scale"] = parts["weight_scale"].float()
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    return compressor.decompress(parts, scheme)["weight"].numpy()


def snapped(tmp_path: Path, bits: int) -> Path:
    """Weights that are codes of every group's own scale, a power of two."""
    stated = config()
    rng = np.random.default_rng(3)
    weights = random_weights(stated)
    for name, weight in weights.items():
        if weight.ndim == 2 and name != EMBEDDING:
            n, k = weight.shape
            codes = rng.integers(0, 1 << bits, (n, k // 32, 32))
            codes[..., 0], codes[..., 1] = 0, (1 << bits) - 1
            zeros = rng.integers(0, 1 << bits, (n, k // 32, 1))
            weights[name] = ((codes - zeros) / 256).reshape(n, k).astype(np.float32)
    return write_hub(tmp_path / "snapped", stated, weights)


def test_groups_that_do_not_divide_the_inputs(tmp_path: Path) -> None:
    stated = config(intermediate_size=160)
    source = write_hub(tmp_path / "source", stated, random_weights(stated))
    with pytest.raises(FormatError, match=r"down_proj.*divisible by the group size 64"):
        write_compressed_tensors(source, tmp_path / "out", "w4a8g64")
    write_compressed_tensors(source, tmp_path / "out", "w4a8g32")


def test_floats_alone(tmp_path: Path) -> None:
    source = made(tmp_path)
    write_compressed_tensors(source, tmp_path / "out", "bf16")
    stated = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in stated
    first, last = open_weights(source), open_weights(tmp_path / "out")
    for name, tensor in first.items():
        assert np.array_equal(tensor.dequantize(), last[name].dequantize())


def test_what_is_there_stays(tmp_path: Path) -> None:
    """Only what an earlier export has written is replaced, and only when that is asked for."""
    source = made(tmp_path)
    write_compressed_tensors(source, tmp_path / "out", "w8a8")
    with pytest.raises(CheckpointError, match="free"):
        write_compressed_tensors(source, tmp_path / "out", "w4a8g64")
    with pytest.raises(CheckpointError, match=EXPORT):
        write_compressed_tensors(source, source, "w4a8g64", force=True)
    write_compressed_tensors(source, tmp_path / "out", "w4a8g64", force=True)
    assert open_weights(tmp_path / "out")[Q].own_format == "w4a8g64"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize("format", ["w4a8g32", "w1.6a8"])
def test_the_file_is_plain_safetensors(tmp_path: Path, format: str) -> None:
    """No tensor that a reader would not know, and every one aligned to its type: 102 scales of
    float16 would leave the words that follow them unaligned."""
    safetensors = pytest.importorskip("safetensors.numpy")
    odd = {"intermediate_size": 102} if format == "w1.6a8" else {}
    write_compressed_tensors(made(tmp_path, "F16", **odd), tmp_path / "out", format)
    path = tmp_path / "out" / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    sizes = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4, "I64": 8, "I8": 1}
    for name, entry in header.items():
        assert "padding" not in name
        assert (8 + length + entry["data_offsets"][0]) % sizes[entry["dtype"]] == 0
    assert safetensors.load_file(path).keys() == header.keys()

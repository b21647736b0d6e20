"""GGUF metadata in the words of a config.json, and tensors in the order of Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacewing.checkpoint import ggml, load_model, open_source
from lacewing.checkpoint.ggufmodel import hf_name
from lacewing.errors import CheckpointError, UnsupportedModelError
from lacewing.models import get_spec
from tests.checkpoint.build import (
    ARRAY,
    BOOL,
    F32,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    I32,
    KV_HEADS,
    QUANTS,
    STRING,
    TOKENS,
    U32,
    VOCAB,
    Gguf,
    config,
    gguf_name,
    tiny_gguf,
)

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3_text",
}


def source_of(file: Gguf, path: Path) -> Any:
    return open_source(file.write(path / "model.gguf"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_config_tells_the_same_decoder(tmp_path: Path, architecture: str) -> None:
    model_type = ARCHITECTURES[architecture]
    expected = config(model_type, num_hidden_layers=7)
    if architecture == "gemma3":
        expected |= {"sliding_window": 4096, "query_pre_attn_scalar": HEAD_DIM}
    source = source_of(tiny_gguf("Q8_0", architecture, num_hidden_layers=7), tmp_path)
    assert source.kind == "gguf"
    assert source.config["model_type"] == model_type
    found, wanted = source.spec, get_spec(expected)
    for field in wanted.__dataclass_fields__:
        if field != "ropes":
            assert getattr(found, field) == getattr(wanted, field), field
    for one, other in zip(found.ropes, wanted.ropes, strict=True):
        assert np.array_equal(one.inv_freq, other.inv_freq)
        assert one.attention_factor == other.attention_factor


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_name_is_mapped(architecture: str) -> None:
    shapes = get_spec(config(ARCHITECTURES[architecture])).tensor_shapes()
    for name in shapes:
        assert hf_name(gguf_name(name, architecture), architecture) == name


@pytest.mark.parametrize(
    "name", ["blk.attn_q.weight", "blk.1.attn_q", "blk.-1.attn_q.weight", "x", "", "blk.1.odd.bias"]
)
def test_unknown_names_stay(name: str) -> None:
    assert hf_name(name, "llama") == name


@pytest.mark.parametrize("type", ["Q4_1", "Q8_0", "F32", "Q6_K"])
def test_llama_heads_are_put_back_into_halves(tmp_path: Path, type: str) -> None:
    """The converter turns a head's halves (a0 a1 .. b0 b1 ..) into pairs (a0 b0 a1 b1 ..)."""
    source = source_of(tiny_gguf(type), tmp_path)
    for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", None)):
        name = f"model.layers.1.self_attn.{part}_proj.weight"
        tensor = source.tensors[name]
        stored = source.file.tensors[gguf_name(name)]
        rows = ggml.dequantize(stored.type, source.file.rows(stored))
        expected = rows.copy()
        if heads is not None:
            half = HEAD_DIM // 2
            for head in range(heads):
                for i in range(HEAD_DIM):
                    where = head * HEAD_DIM + i // 2 + half * (i % 2)
                    expected[where] = rows[head * HEAD_DIM + i]
        assert np.array_equal(tensor.dequantize(), expected)
        assert np.array_equal(tensor.dequantize(16, 48), expected[16:48])


def test_a_bias_is_put_back_too(tmp_path: Path) -> None:
    file = tiny_gguf()
    for layer in range(2):
        for part, n in (("q", HEADS * HEAD_DIM), ("k", KV_HEADS * HEAD_DIM)):
            values = np.arange(n, dtype="<f4")
            file.tensor(f"blk.{layer}.attn_{part}.bias", (n,), "F32", values.tobytes())
    source = source_of(file, tmp_path)
    assert source.config["attention_bias"] is True
    found = source.tensors["model.layers.0.self_attn.k_proj.bias"].dequantize()
    assert found[:4].tolist() == [0, 2, 4, 6]
    assert found[HEAD_DIM // 2 : HEAD_DIM // 2 + 3].tolist() == [1, 3, 5]


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma3"])
def test_other_heads_are_as_they_are(tmp_path: Path, architecture: str) -> None:
    source = source_of(tiny_gguf("F32", architecture), tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    stored = source.file.tensors[gguf_name(name, architecture)]
    expected = source.file.rows(stored).view("<f4")
    assert np.array_equal(source.tensors[name].dequantize(), expected)


def test_an_untied_head(tmp_path: Path) -> None:
    source = source_of(tiny_gguf(tie_word_embeddings=False), tmp_path)
    assert source.config["tie_word_embeddings"] is False
    assert source.tensors["lm_head.weight"].shape == (VOCAB, HIDDEN)


def test_rope_factors(tmp_path: Path) -> None:
    file = tiny_gguf()
    factors = np.linspace(1, 32, HEAD_DIM // 2).astype("<f4")
    file.tensor("rope_freqs.weight", (HEAD_DIM // 2,), "F32", factors.tobytes())
    source = source_of(file, tmp_path)
    scaling = source.config["rope_scaling"]
    assert scaling["rope_type"] == "factors"
    assert scaling["factors"] == factors.tolist()
    assert "rope_freqs.weight" not in source.tensors
    plain = 10000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    assert np.allclose(source.spec.ropes[0].inv_freq, plain / factors)


def test_rope_factors_beside_scaling_are_refused(tmp_path: Path) -> None:
    file = tiny_gguf()
    file.tensor("rope_freqs.weight", (HEAD_DIM // 2,), "F32", bytes(2 * HEAD_DIM))
    file.put("llama.rope.scaling.type", STRING, "linear")
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        source_of(file, tmp_path).config  # noqa: B018


@pytest.mark.parametrize("factors", [[0.0] * 32, [float("nan")] * 32, [1.0] * 31])
def test_bad_rope_factors_are_refused(tmp_path: Path, factors: list[float]) -> None:
    file = tiny_gguf()
    data = np.array(factors, "<f4").tobytes()
    file.tensor("rope_freqs.weight", (len(factors),), "F32", data)
    with pytest.raises(CheckpointError, match="rope_freqs"):
        load_model(file.write(tmp_path / "a.gguf"))


def test_linear_and_yarn_scaling(tmp_path: Path) -> None:
    file = tiny_gguf("Q8_0", "qwen2")
    file.put("qwen2.rope.scaling.type", STRING, "yarn")
    file.put("qwen2.rope.scaling.factor", F32, 4.0)
    file.put("qwen2.rope.scaling.original_context_length", U32, 32768)
    source = source_of(file, tmp_path)
    assert source.config["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    }
    file.put("qwen2.rope.scaling.type", STRING, "none")
    assert "rope_scaling" not in source_of(file, tmp_path).config


def test_gemma3_windows_and_scaling(tmp_path: Path) -> None:
    """The 4B and larger models squeeze the rope of the layers that see everything by 8."""
    file = tiny_gguf("Q8_0", "gemma3", num_hidden_layers=7)
    file.put("gemma3.attention.sliding_window", U32, 512)
    file.put("gemma3.rope.freq_base", F32, 1e6)
    file.put("gemma3.rope.scaling.type", STRING, "linear")
    file.put("gemma3.rope.scaling.factor", F32, 8.0)
    spec = source_of(file, tmp_path).spec
    assert [layer.window for layer in spec.layers] == [512] * 5 + [0, 512]
    pairs = np.arange(0, HEAD_DIM, 2) / HEAD_DIM
    local, everything = (spec.ropes[spec.layers[i].rope] for i in (0, 5))
    assert np.allclose(local.inv_freq, 10000.0**-pairs)
    assert np.allclose(everything.inv_freq, 1e6**-pairs / 8)
    assert spec.attention_scale == HEAD_DIM**-0.5
    assert spec.embedding_scale == HIDDEN**0.5


def test_gemma3_pattern_from_the_file(tmp_path: Path) -> None:
    file = tiny_gguf("Q8_0", "gemma3", num_hidden_layers=4)
    file.put("gemma3.attention.sliding_window", U32, 16)
    file.put("gemma3.attention.sliding_window_pattern", ARRAY, (BOOL, [1, 0, 1, 0]))
    assert [layer.window for layer in source_of(file, tmp_path).spec.layers] == [16, 0, 16, 0]
    file.put("gemma3.attention.sliding_window_pattern", U32, 2)
    assert [layer.window for layer in source_of(file, tmp_path).spec.layers] == [16, 0, 16, 0]


def test_gemma3_27b_scales_attention_by_its_own_number(tmp_path: Path) -> None:
    """62 layers: hidden / heads, where the head is wider."""
    file = tiny_gguf("F32", "gemma3")
    file.put("gemma3.block_count", U32, 62)
    file.put("gemma3.attention.head_count", U32, 2)
    assert source_of(file, tmp_path).config["query_pre_attn_scalar"] == HIDDEN // 2


def test_soft_caps_are_refused(tmp_path: Path) -> None:
    file = tiny_gguf("Q8_0", "gemma3")
    file.put("gemma3.final_logit_softcapping", F32, 30.0)
    with pytest.raises(UnsupportedModelError, match="final_logit_softcapping"):
        source_of(file, tmp_path).spec  # noqa: B018


def test_one_head_count_per_layer_where_they_agree(tmp_path: Path) -> None:
    file = tiny_gguf()
    file.put("llama.attention.head_count_kv", ARRAY, (I32, [KV_HEADS] * 2))
    assert source_of(file, tmp_path).config["num_key_value_heads"] == KV_HEADS


@pytest.mark.parametrize("type", QUANTS)
def test_own_formats(tmp_path: Path, type: str) -> None:
    exact = {"Q4_0": "w4a8g32", "Q4_1": "w4a8g32z", "Q5_0": "w5a8g32z", "Q5_1": "w5a8g32z"}
    exact["Q8_0"] = "w8a8g32"
    near = {"Q4_K": "w4a8g32z", "Q5_K": "w5a8g32z", "Q6_K": "w8a8g32"}
    tensor = source_of(tiny_gguf(type), tmp_path).tensors["model.layers.0.mlp.up_proj.weight"]
    assert tensor.dtype == type
    assert tensor.own_format == (exact | near)[type]
    codes = tensor.codes()
    assert (codes is None) == (type in near)
    assert codes is None or codes[0] == exact[type]


def test_tokenizer(tmp_path: Path) -> None:
    files = source_of(tiny_gguf(), tmp_path).tokenizer
    assert (files.bos_token, files.bos_token_id) == ("<s>", 1)
    assert (files.eos_token, files.eos_token_ids) == ("<|endoftext|>", [0])
    assert files.add_bos
    assert files.chat_template == "{{ messages[0]['content'] }}"


def test_ends_of_turns(tmp_path: Path) -> None:
    """The stated ends come first; control tokens that end a turn end it though nobody says so."""
    file = tiny_gguf()
    tokens = [*TOKENS[:-3], "<end_of_turn>", "<|im_end|>", "</s>"]
    types = [3, 3] + [1] * (VOCAB - 5) + [3, 1, 3]
    file.put("tokenizer.ggml.tokens", ARRAY, (STRING, tokens))
    file.put("tokenizer.ggml.token_type", ARRAY, (I32, types))
    file.put("tokenizer.ggml.eos_token_id", U32, VOCAB - 1)
    files = source_of(file, tmp_path).tokenizer
    assert files.eos_token == "</s>"
    # `<|im_end|>` is an ordinary token here: a user may have written it.
    assert files.eos_token_ids == [VOCAB - 1, 0, VOCAB - 3]

"""Configs to specs: what is read, what is refused."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lacewing.errors import CheckpointError, UnsupportedModelError
from lacewing.models import MODELS, LayerSpec, get_spec
from tests.tiny import CONFIGS, tiny_spec

SMOLLM2: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != key}


def test_smollm2() -> None:
    spec = get_spec(SMOLLM2)
    assert (spec.head_dim, spec.n_kv_heads, spec.n_layers) == (64, 3, 30)
    assert spec.layers == (LayerSpec(rope=0, window=0),) * 30
    assert spec.attention_scale == 1 / 8
    assert spec.embedding_scale == 1.0
    assert spec.ropes[0].inv_freq.dtype == np.float64
    assert spec.ropes[0].inv_freq[1] == pytest.approx(100000 ** (-1 / 32))
    shapes = spec.tensor_shapes()
    assert len(shapes) == 272
    assert sum(math.prod(shape) for shape in shapes.values()) == 134_515_008
    assert "lm_head.weight" not in shapes


def test_gemma3_alternates_windows_and_ropes() -> None:
    spec = tiny_spec("gemma3")
    assert [layer.window for layer in spec.layers] == [7, 7, 7, 7, 7, 0, 7]
    assert [layer.rope for layer in spec.layers] == [0, 0, 0, 0, 0, 1, 0]
    local, full = spec.ropes
    assert local.inv_freq[1] == pytest.approx(1e4 ** (-1 / 16))
    assert full.inv_freq[1] == pytest.approx(1e6 ** (-1 / 16) / 2)  # only it is scaled
    assert spec.embedding_scale == pytest.approx(96**0.5)
    assert spec.attention_scale == pytest.approx(24**-0.5)
    assert (spec.qk_norm, spec.sandwich_norm, spec.activation) == (True, True, "gelu_tanh")


def test_layer_types_of_the_config_come_before_the_pattern() -> None:
    types = ["full_attention", *["sliding_attention"] * 6]
    spec = get_spec(CONFIGS["gemma3"] | {"layer_types": types})
    assert [layer.window for layer in spec.layers] == [0, 7, 7, 7, 7, 7, 7]


def test_the_newer_spelling_of_gemma3_ropes() -> None:
    config = without(without(CONFIGS["gemma3"], "rope_scaling"), "rope_theta")
    parameters = {
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    spec = get_spec(config | {"rope_parameters": parameters})
    for rope, other in zip(spec.ropes, tiny_spec("gemma3").ropes, strict=True):
        np.testing.assert_array_equal(rope.inv_freq, other.inv_freq)


def test_qwen2_windows_begin_at_max_window_layers() -> None:
    assert [layer.window for layer in tiny_spec("qwen2").layers] == [0, 0, 0]
    assert [layer.window for layer in tiny_spec("qwen2-window").layers] == [0, 7, 7]


def test_biases_by_architecture() -> None:
    block = "model.layers.0.self_attn"
    for name, parts in {"llama": "", "llama-bias": "qkvo", "qwen2": "qkv", "qwen3": ""}.items():
        shapes = tiny_spec(name).tensor_shapes()
        for part in "qkvo":
            assert (f"{block}.{part}_proj.bias" in shapes) is (part in parts), (name, part)
    assert tiny_spec("qwen2").tensor_shapes()[f"{block}.k_proj.bias"] == (32,)
    assert tiny_spec("qwen3").tensor_shapes()[f"{block}.q_norm.weight"] == (32,)


# Rotary embeddings ----------------------------------------------------------------------------


def test_llama3_rope_keeps_fast_pairs_and_slows_slow_ones() -> None:
    config = SMOLLM2 | {"head_dim": 64, "rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}
    scaled = get_spec(config).ropes[0].inv_freq
    plain = get_spec(config | {"rope_scaling": None}).ropes[0].inv_freq
    wavelength = 2 * math.pi / plain
    ratio = plain / scaled
    np.testing.assert_allclose(ratio[wavelength < 8192 / 4], 1)
    np.testing.assert_allclose(ratio[wavelength > 8192], 32)
    assert np.all(np.diff(ratio) >= -1e-12)
    assert ((ratio > 1.01) & (ratio < 31.9)).sum() >= 3


def test_factors_divide() -> None:
    factors = np.linspace(1, 8, 32)
    config = SMOLLM2 | {"rope_scaling": {"rope_type": "factors", "factors": factors.tolist()}}
    plain = get_spec(SMOLLM2).ropes[0].inv_freq
    np.testing.assert_allclose(get_spec(config).ropes[0].inv_freq * factors, plain)


def test_the_older_word_for_the_rope_type() -> None:
    config = SMOLLM2 | {"rope_scaling": {"type": "linear", "factor": 4.0}}
    assert get_spec(config).ropes[0].inv_freq[0] == 0.25


def test_tables_are_rounded_once() -> None:
    rope = tiny_spec("llama-yarn").ropes[0]
    assert rope.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    cos, sin = rope.tables(300)
    assert cos.shape == sin.shape == (300, 8)
    assert cos.dtype == np.float32
    assert cos[299, 3] == np.float32(math.cos(299 * rope.inv_freq[3]) * rope.attention_factor)
    assert sin[299, 0] == np.float32(math.sin(299 * rope.inv_freq[0]) * rope.attention_factor)


# What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "model_type"),
        (SMOLLM2 | {"model_type": "mamba"}, "'mamba'"),
        (SMOLLM2 | {"model_type": ["llama"]}, "model_type"),
        (SMOLLM2 | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        (SMOLLM2 | {"rope_scaling": {"type": "longrope"}}, "'longrope'"),
        (SMOLLM2 | {"rope_parameters": {"rope_type": "proportional"}}, "'proportional'"),
        (SMOLLM2 | {"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type"),
        (SMOLLM2 | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (SMOLLM2 | {"hidden_act": "relu"}, "'relu'"),
        (SMOLLM2 | {"mlp_bias": True}, "mlp_bias"),
        (CONFIGS["gemma3"] | {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (CONFIGS["gemma3"] | {"text_config": {}}, "vision"),
        (CONFIGS["gemma3"] | {"layer_types": ["chunked_attention"] * 7}, "chunked"),
    ],
)
def test_what_is_not_implemented(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        get_spec(config)


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_hidden_layers",
    ],
)
@pytest.mark.parametrize("value", [None, 0, -1, 2.5, "9", True, 1 << 40])
def test_a_count_out_of_range(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=key):
        get_spec(SMOLLM2 | {key: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": 2}, "divisor of num_attention_heads 9, got 2"),
        ({"hidden_size": 577}, "multiple of num_attention_heads"),
        ({"head_dim": 63}, "even"),
        ({"num_hidden_layers": 5000}, "4096"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"rope_theta": 1}, "rope_theta"),
        ({"rope_scaling": "linear"}, "mapping"),
        ({"rope_scaling": {"rope_type": "linear"}}, "`factor`"),
        ({"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 4.0}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "factors", "factors": [1.0]}}, "rope_freqs"),
        ({"rope_scaling": {"rope_type": "factors", "factors": [0.0] * 32}}, "rope_freqs"),
        ({"rope_scaling": {"rope_type": "factors", "factors": "x"}}, "rope_freqs"),
        ({"tie_word_embeddings": "yes"}, "true or false"),
        ({"model_type": "gemma3", "layer_types": ["full_attention"]}, "layer_types"),
    ],
)
def test_a_config_that_contradicts_itself(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        get_spec(SMOLLM2 | changes)


KEYS = sorted(
    {key for config in CONFIGS.values() for key in config}
    | {
        "rope_parameters",
        "layer_types",
        "sliding_window_pattern",
        "attention_bias",
        "mlp_bias",
        "partial_rotary_factor",
        "hidden_act",
        "final_logit_softcapping",
    }
)
PLAIN = st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=3)
VALUES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["rope_type", "type", "factor", "factors", "full_attention", "rope_theta"]
            ),
            inner | st.sampled_from(["linear", "yarn", "llama3", "factors"]),
        )
    ),
    max_leaves=6,
)


@settings(max_examples=200)
@given(st.sampled_from(sorted(CONFIGS)), st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3))
def test_any_config_gives_a_spec_or_a_typed_error(name: str, changes: dict[str, Any]) -> None:
    with suppress(CheckpointError, UnsupportedModelError):
        spec = get_spec(CONFIGS[name] | changes)
        assert all(np.isfinite(rope.inv_freq).all() for rope in spec.ropes)


def test_shapes_are_checked_against_the_config() -> None:
    spec = tiny_spec("llama")
    shapes = spec.tensor_shapes()
    spec.check_shapes(shapes | {"model.layers.0.self_attn.rotary_emb.inv_freq": (8,)})
    tiny_spec("qwen3").check_shapes(tiny_spec("qwen3").tensor_shapes() | {"lm_head.weight": (1,)})
    with pytest.raises(CheckpointError, match=r"embed_tokens.*\[131, 96\], got \[128, 96\]"):
        spec.check_shapes(shapes | {"model.embed_tokens.weight": (128, 96)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*none"):
        spec.check_shapes(without(shapes, "model.norm.weight"))
    with pytest.raises(CheckpointError, match="no such tensor"):
        spec.check_shapes(shapes | {"model.layers.0.self_attn.q_proj.bias": (96,)})


@pytest.mark.parametrize("model_type", MODELS)
def test_every_model_is_registered_under_its_model_type(model_type: str) -> None:
    assert get_spec(SMOLLM2 | {"model_type": model_type}).model_type == model_type

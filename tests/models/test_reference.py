"""The reference decoder: its own paths agree, and real models speak through it."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from lacewing.checkpoint import load_model
from lacewing.engine.text import Text
from lacewing.models import DecoderSpec, get_spec
from tests.reference import Reference, dequantized
from tests.tiny import CONFIGS, tiny_spec, tiny_tokens, tiny_weights

BEGINNING = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball."
)


@pytest.mark.parametrize("name", CONFIGS)
def test_token_by_token_equals_all_at_once(name: str) -> None:
    reference = Reference(tiny_spec(name), tiny_weights(name), dtype=np.float64)
    prompts = [tiny_tokens(5), tiny_tokens(11, seed=3)]
    outputs = reference.greedy(prompts, 8)
    for shortfall in reference.shortfalls(prompts, outputs):
        np.testing.assert_allclose(shortfall, 0, atol=1e-12)
    for prompt, output in zip(prompts, outputs, strict=True):
        logits = reference.logits([*prompt, *output])
        assert logits[len(prompt) - 1 : -1].argmax(axis=-1).tolist() == output


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_is_close_to_float64(name: str) -> None:
    tokens, weights = tiny_tokens(24), tiny_weights(name)
    wide = Reference(tiny_spec(name), weights, dtype=np.float64).logits(tokens)
    narrow = Reference(tiny_spec(name), weights).logits(tokens)
    assert wide.dtype == np.float64
    np.testing.assert_allclose(narrow, wide, atol=2e-5)


def test_a_window_forgets_what_lies_before_it() -> None:
    """One layer with a window of 7: token 0 reaches tokens 0 to 6 and no further."""
    config = CONFIGS["qwen2-window"] | {
        "num_hidden_layers": 1,
        "layer_types": ["sliding_attention"],
    }
    spec = get_spec(config)
    weights = {name: w for name, w in tiny_weights("qwen2").items() if name in spec.tensor_shapes()}
    tokens = tiny_tokens(10)
    before = Reference(spec, weights).logits(tokens)
    after = Reference(spec, weights).logits([(tokens[0] + 1) % 131, *tokens[1:]])
    changed = np.abs(before - after).max(axis=-1) > 1e-6
    assert changed.tolist() == [True] * 7 + [False] * 3


# stories260K: a real model of 260,000 weights, in llama2.c's own file format --------------------


def read_stories(path: Path) -> tuple[DecoderSpec, dict[str, np.ndarray]]:
    data = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("<7i", data[:28])
    spec = get_spec(
        {
            "model_type": "llama",
            "vocab_size": vocab,
            "hidden_size": dim,
            "intermediate_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": context,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        }
    )
    values, at = np.frombuffer(data, np.float32, offset=28), 0

    def take(*shape: int) -> np.ndarray:
        nonlocal at
        at += int(np.prod(shape))
        return values[at - int(np.prod(shape)) : at].reshape(shape)

    kv_dim = kv_heads * spec.head_dim
    weights = {"model.embed_tokens.weight": take(vocab, dim)}
    for part, shape in (
        ("input_layernorm", (dim,)),
        ("self_attn.q_proj", (dim, dim)),
        ("self_attn.k_proj", (kv_dim, dim)),
        ("self_attn.v_proj", (kv_dim, dim)),
        ("self_attn.o_proj", (dim, dim)),
        ("post_attention_layernorm", (dim,)),
        ("mlp.gate_proj", (hidden, dim)),
        ("mlp.down_proj", (dim, hidden)),
        ("mlp.up_proj", (hidden, dim)),
    ):
        for i, weight in enumerate(take(layers, *shape)):
            turned = part in ("self_attn.q_proj", "self_attn.k_proj")
            name = f"model.layers.{i}.{part}.weight"
            weights[name] = halves(weight, spec.head_dim) if turned else weight
    weights["model.norm.weight"] = take(dim)
    return spec, weights


def halves(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of adjacent pairs, as llama2.c turns them, to the order of halves."""
    heads = weight.reshape(-1, head_dim // 2, 2, weight.shape[1])
    return heads.swapaxes(1, 2).reshape(weight.shape)


def read_pieces(path: Path, count: int) -> list[bytes]:
    data, at, pieces = path.read_bytes(), 4, []
    for _ in range(count):
        _, length = struct.unpack_from("<fi", data, at)
        pieces.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    return pieces


def test_stories260k_tells_its_story(data_dir: Path) -> None:
    folder = data_dir / "models" / "stories260K"
    spec, weights = read_stories(folder / "stories260K.bin")
    spec.check_shapes({name: weight.shape for name, weight in weights.items()})
    output = Reference(spec, weights).greedy([[1]], 80)[0]
    pieces = read_pieces(folder / "tok512.bin", spec.vocab_size)
    text = b"".join(pieces[token] for token in output).decode()
    assert text.lstrip().startswith(BEGINNING)


# SmolLM2 ----------------------------------------------------------------------------------------


def test_smollm2_predicts_real_text(smollm2_gguf: Path, data_dir: Path) -> None:
    """The first 256 tokens of WikiText-2 test. Over the whole file, in windows of 2048, the
    perplexity is 22.04; a wrong permutation, norm or rope lands above 100."""
    model = load_model(smollm2_gguf)
    wiki = (data_dir / "text" / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")
    tokens = Text(model.tokenizer).encode(wiki[:2000])[:257]
    reference = Reference(get_spec(model.config), dequantized(model.tensors))
    perplexity = float(np.exp(-reference.log_probabilities(tokens).mean()))
    assert 15 < perplexity < 45, perplexity

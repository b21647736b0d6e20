"""Tiny random models in real formats, for tests that need the native model but not its words."""

from __future__ import annotations

from typing import Any

import numpy as np

from lacewing import formats
from lacewing.engine.engine import Engine
from lacewing.engine.runner import Runner, build_model
from lacewing.kv.blocks import Store
from lacewing.kv.choice import parse_kv
from lacewing.kv.layout import lay_out
from lacewing.models import DecoderSpec, get_spec
from tests.engine.fakes import EOS, VOCAB, ByteDecoder

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def tiny_spec() -> DecoderSpec:
    return get_spec(CONFIG)


def tiny_tensors(format: str, seed: int = 0) -> dict[str, Any]:
    """Packed weights and f32 vectors of `tiny_spec`, from a seeded generator."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    for name, shape in tiny_spec().tensor_shapes().items():
        if len(shape) == 1:
            tensors[name] = 1 + 0.1 * rng.standard_normal(shape).astype(np.float32)
            continue
        weight = rng.standard_normal(shape).astype(np.float32) * 3 / np.sqrt(shape[1])
        head = "embed_tokens" in name and format != "bf16"
        sparsity = 0.5 if formats.FORMATS[format].sparse and not head else None
        tensors[name] = formats.pack(weight, "w8a8g32" if head else format, sparsity=sparsity)
    return tensors


def tiny_engine(
    format: str = "w8a8g32",
    *,
    isa: str | None = None,
    threads: int | None = None,
    kv_blocks: int = 128,
    kv: str = "f16",
    **options: int,
) -> Engine:
    layout, stores = lay_out(tiny_spec(), parse_kv(kv), None, 512), [Store(kv_blocks)]
    model = build_model(tiny_spec(), tiny_tensors(format), 512, layout, stores, isa, threads)
    runner = Runner(model, VOCAB, 512, stores, merge=layout.merge)
    return Engine(runner, ByteDecoder, (EOS,), **options)

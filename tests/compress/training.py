"""Tiny decoders, dense and compressed, as what is trained and what it is trained towards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lacewing.checkpoint.manifest import MANIFEST, TOKENIZER, VECTOR, WEIGHTS, manifest_json
from lacewing.checkpoint.safetensors import SafetensorsWriter
from lacewing.checkpoint.tensors import TABLES, TokenizerFiles
from lacewing.compress.columns import Solution
from lacewing.compress.decoder import STAGES, Block
from lacewing.compress.master import solution_of
from lacewing.formats import FORMATS, PackedTensor, pack
from lacewing.models import get_spec

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 67,
    "hidden_size": 48,  # a short last group in every format with groups
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 80,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
FAMILIES = (
    "bf16_sp",
    "w8a8g64_sp",
    "w4a8g32",
    "w4a8g32z",
    "w3a8g64",
    "w2a8g64",
    "w1.6a8",
    "w4a8g64_24",
    "w8a8_b16x1",
)
LAYERS = tuple(name for stage in STAGES for name in stage)


def weights(config: dict[str, Any] = CONFIG, seed: int = 3) -> dict[str, np.ndarray]:
    """f32 weights that keep activations near 1."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in get_spec(config).tensor_shapes().items():
        values = rng.standard_normal(shape)
        if name.endswith("norm.weight"):
            values = 1 + 0.1 * values
        elif name.endswith("bias"):
            values = 0.3 * values
        elif name not in TABLES:
            values = 1.5 * values / np.sqrt(shape[1])
        found[name] = values.astype(np.float32)
    return found


def compressed(weight: np.ndarray, format: str) -> PackedTensor:
    """Rounded to nearest; half of it pruned where the format is sparse."""
    kind = FORMATS[format]
    return pack(weight, format, 0.5 if kind.sparse else None)


def block_of(found: dict[str, np.ndarray], index: int = 0) -> Block:
    prefix = f"model.layers.{index}."
    parts = {
        name.removeprefix(prefix): torch.from_numpy(value).clone()
        for name, value in found.items()
        if name.startswith(prefix)
    }
    return Block(get_spec(CONFIG), index, parts)


def solutions_of(found: dict[str, np.ndarray], format: str, index: int = 0) -> dict[str, Solution]:
    return {
        name: solution_of(compressed(found[f"model.layers.{index}.{name}.weight"], format))
        for name in LAYERS
    }


def tokens(count: int = 24, length: int = 16, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(CONFIG["vocab_size"], (count, length), generator=generator)


def write_model(
    path: Path, found: dict[str, np.ndarray], format: str, record: dict[str, Any] | None = None
) -> Path:
    """A packed directory of `weights`, its layers in `format`, whose tokens are t0, t1, .., and
    which keeps `record` of how it was made."""
    config = CONFIG
    packed: dict[str, Any] = {
        name: value if value.ndim == 1 else compressed(value, _format_of(name, format))
        for name, value in found.items()
    }
    path.mkdir()
    parts = [f"{name}.{part}" for name in packed for part in ("stream", "offsets")]
    with SafetensorsWriter(path / WEIGHTS, parts, {"format": "lacewing"}) as out:
        for name, value in packed.items():
            arrays = value.parts if isinstance(value, PackedTensor) else {"": value}
            for part, array in arrays.items():
                out.add(f"{name}.{part}".rstrip("."), array)
    kinds = {
        name: (value.format if isinstance(value, PackedTensor) else VECTOR, value.shape)
        for name, value in packed.items()
    }
    document = json.loads(manifest_json(config, TOKENS, kinds)) | {
        "recipe": record or {"name": "kept"}
    }
    (path / MANIFEST).write_text(json.dumps(document))
    (path / TOKENIZER).write_text(TOKENS.tokenizer_json)
    return path


def _format_of(name: str, format: str) -> str:
    return "bf16" if name in TABLES else format


TOKENS = TokenizerFiles(
    tokenizer_json=json.dumps(
        {"model": {"type": "WordLevel", "vocab": {f"t{i}": i for i in range(67)}}}
    ),
    chat_template=None,
    bos_token=None,
    eos_token=None,
    bos_token_id=None,
    eos_token_ids=[0],
    add_bos=False,
)

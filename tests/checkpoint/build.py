"""Tiny models in every file format, written here byte by byte, so that tests can also write them
wrongly."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lacewing.checkpoint.ggml import GGML_TYPES, GgmlType
from lacewing.models import get_spec

TYPES: dict[str, GgmlType] = {kind.name: kind for kind in GGML_TYPES.values()}
NUMBERS = {kind.name: number for number, kind in GGML_TYPES.items()}
READABLE = [kind.name for kind in GGML_TYPES.values() if kind.readable]
QUANTS = [name for name in READABLE if name not in ("F32", "F16", "BF16")]

# -- GGUF -----------------------------------------------------------------------------------------

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B"}
_CODES |= {U64: "Q", I64: "q", F64: "d"}


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw)) + raw


def value(kind: int, item: Any) -> bytes:
    """A value of metadata; an array is (element kind, items)."""
    if kind == STRING:
        return string(item)
    if kind == ARRAY:
        element, items = item
        return u32(element) + u64(len(items)) + b"".join(value(element, i) for i in items)
    return struct.pack("<" + _CODES[kind], item)


def entry(key: str | bytes, kind: int, item: Any) -> bytes:
    return string(key) + u32(kind) + value(kind, item)


@dataclass
class Info:
    """One line of the tensor table; `dims` innermost first."""

    name: str | bytes
    dims: Sequence[int]
    type: int
    offset: int
    n_dims: int | None = None

    def bytes(self) -> bytes:
        n = len(self.dims) if self.n_dims is None else self.n_dims
        dims = b"".join(u64(d) for d in self.dims)
        return string(self.name) + u32(n) + dims + u32(self.type) + u64(self.offset)


@dataclass
class Gguf:
    """A GGUF file in pieces; every count can be made to lie."""

    entries: dict[str, bytes] = field(default_factory=dict)
    infos: dict[str, Info] = field(default_factory=dict)
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: int = 3
    n_tensors: int | None = None
    n_entries: int | None = None
    alignment: int = 32
    more: bytes = b""
    """Entries that a dict could not hold; count them in `n_entries`."""
    more_infos: bytes = b""

    def put(self, key: str, kind: int, item: Any) -> None:
        self.entries[key] = entry(key, kind, item)

    def tensor(self, name: str, shape: Sequence[int], type: str, data: bytes) -> None:
        self.data += bytes(-len(self.data) % self.alignment)
        self.infos[name] = Info(name, shape[::-1], NUMBERS[type], len(self.data))
        self.data += data

    def bytes(self) -> bytes:
        n_tensors = len(self.infos) if self.n_tensors is None else self.n_tensors
        n_entries = len(self.entries) if self.n_entries is None else self.n_entries
        head = self.magic + u32(self.version) + u64(n_tensors) + u64(n_entries)
        head += b"".join(self.entries.values()) + self.more
        head += b"".join(info.bytes() for info in self.infos.values()) + self.more_infos
        return head + bytes(-len(head) % self.alignment) + self.data

    def write(self, path: Path) -> Path:
        path.write_bytes(self.bytes())
        return path


def random_rows(name: str, n: int, k: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Bytes `[n, row bytes]` of a random tensor with ordinary scales."""
    kind = TYPES[name]
    assert kind.layout is not None
    rng = np.random.default_rng(seed)
    count = n * (k // kind.block)
    blocks = np.frombuffer(rng.bytes(count * kind.nbytes), kind.layout).copy()
    scale = {"Q4_K": 1e-3, "Q5_K": 1e-3, "Q6_K": 1e-4}.get(name, 1e-2)
    for part in ("d", "m", "x"):
        if part not in (kind.layout.names or ()):
            continue
        numbers = rng.standard_normal(count).astype(np.float32)
        if name == "BF16":
            blocks[part] = (numbers.view(np.uint32) >> 16).astype(np.uint16)
        else:
            blocks[part] = numbers * (1 if part == "x" else scale)
    return blocks.view(np.uint8).reshape(n, -1)


BYTES = [chr(c) for c in range(33, 127)]
TOKENS = ["<|endoftext|>", "<s>", *BYTES]
VOCAB = len(TOKENS)
HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 256, 256, 4, 2, 64

_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA_NAMES = _GGUF_NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, architecture: str = "llama") -> str:
    """Hugging Face name -> GGUF name, written apart from the reader's own table."""
    names = _GEMMA_NAMES if architecture == "gemma3" else _GGUF_NAMES
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{names[rest]}.{kind}"
    return f"{names[stem]}.{kind}"


def config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": INNER,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    return found | changes


_MODEL_TYPES = {"gemma3": "gemma3_text"}


def tiny_gguf(type: str = "Q4_1", architecture: str = "llama", **changes: Any) -> Gguf:
    """A whole model: metadata, tokenizer, and random tensors of one type (vectors are F32)."""
    expected = config(_MODEL_TYPES.get(architecture, architecture), **changes)
    file = Gguf()
    put_metadata(file, architecture, expected)
    shapes = get_spec(expected).tensor_shapes()
    for seed, (name, shape) in enumerate(shapes.items()):
        kind = "F32" if len(shape) == 1 else type
        n, k = (1, shape[0]) if len(shape) == 1 else shape
        file.tensor(
            gguf_name(name, architecture), shape, kind, random_rows(kind, n, k, seed).tobytes()
        )
    return file


def put_metadata(file: Gguf, architecture: str, config: Mapping[str, Any]) -> None:
    file.put("general.architecture", STRING, architecture)
    for key, kind, name in (
        ("block_count", U32, "num_hidden_layers"),
        ("context_length", U32, "max_position_embeddings"),
        ("embedding_length", U32, "hidden_size"),
        ("feed_forward_length", U32, "intermediate_size"),
        ("attention.head_count", U32, "num_attention_heads"),
        ("attention.head_count_kv", U32, "num_key_value_heads"),
        ("attention.key_length", U32, "head_dim"),
        ("attention.value_length", U32, "head_dim"),
        ("attention.layer_norm_rms_epsilon", F32, "rms_norm_eps"),
        ("rope.freq_base", F32, "rope_theta"),
    ):
        file.put(f"{architecture}.{key}", kind, config[name])
    put_tokenizer(file)


def put_tokenizer(file: Gguf) -> None:
    file.put("tokenizer.ggml.model", STRING, "gpt2")
    file.put("tokenizer.ggml.pre", STRING, "gpt-2")
    file.put("tokenizer.ggml.tokens", ARRAY, (STRING, TOKENS))
    file.put("tokenizer.ggml.token_type", ARRAY, (I32, [3, 3] + [1] * len(BYTES)))
    file.put("tokenizer.ggml.merges", ARRAY, (STRING, []))
    file.put("tokenizer.ggml.bos_token_id", U32, 1)
    file.put("tokenizer.ggml.eos_token_id", U32, 0)
    file.put("tokenizer.ggml.add_bos_token", BOOL, True)
    file.put("tokenizer.chat_template", STRING, "{{ messages[0]['content'] }}")


# -- safetensors ----------------------------------------------------------------------------------


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """`header`: a document, or the bytes that take its place."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return u64(len(raw) if length is None else length) + raw + data


def floats(array: np.ndarray[Any, Any], dtype: str) -> bytes:
    """f32 values in `dtype`, to be given to `header_of`."""
    if dtype == "BF16":
        return (array.astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    return array.astype({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[dtype]).tobytes()


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray[Any, Any]], dtype: str = "F32"
) -> None:
    """A plain writer, apart from the one under test."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        raw = floats(array, dtype)
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    path.write_bytes(safetensors_bytes(header, data))


# -- Hugging Face directories ---------------------------------------------------------------------


def tokenizer_document() -> dict[str, Any]:
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": TOKENS[i], "special": True, "single_word": False}
            | {"lstrip": False, "rstrip": False, "normalized": False}
            for i in (0, 1)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(TOKENS)},
            "merges": [],
        },
    }


def random_weights(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) / 16).astype(np.float32)
        for name, shape in get_spec(config).tensor_shapes().items()
    }


def write_hub(
    path: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, np.ndarray[Any, Any]],
    dtype: str = "F32",
    shards: int = 1,
) -> Path:
    """A Hugging Face directory with everything the reader wants."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text(json.dumps(tokenizer_document()))
    options = {"bos_token": "<s>", "eos_token": {"content": "<|endoftext|>"}, "chat_template": "x"}
    (path / "tokenizer_config.json").write_text(json.dumps(options))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5]}))
    if shards == 1:
        write_safetensors(path / "model.safetensors", weights, dtype)
        return path
    placed = {name: f"model-{i % shards + 1:05}.safetensors" for i, name in enumerate(weights)}
    for file in set(placed.values()):
        own = {name: weights[name] for name in weights if placed[name] == file}
        write_safetensors(path / file, own, dtype)
    index = {"metadata": {"total_size": 1}, "weight_map": placed}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path

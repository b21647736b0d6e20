"""Makes a model of Llama-3.2-1B's shape with random weights, for speed measurements only.

    python benchmarks/make_llama_1b.py OUT            OUT/config.json, model.safetensors, tokenizer
    python benchmarks/make_llama_1b.py OUT --gguf     the same weights also as OUT/model-BF16.gguf
    python benchmarks/make_llama_1b.py OUT --gguf --llama-python VENV/bin/python
                                                      ... and as Q4_0 and Q8_0, by llama.cpp

`--gguf` needs the package `gguf`; the quantized files are written by llama.cpp itself, so their
mix of types (Q6_K for the head of a Q4_0 file) is the rival's own choice. `--layers 1` makes a
small one for a trial.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

FIRST_SPECIAL = 128_000
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hugging Face names and shapes in the order of the file."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        out.update({f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()})
    out["model.norm.weight"] = (hidden,)
    return out


def tensor(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Bits of bf16: ones for a norm, else a normal distribution with standard deviation 0.02."""
    if len(shape) == 1:
        return np.full(shape, 0x3F80, np.uint16)
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    values *= 0.02
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    for seed, (name, shape) in enumerate(shapes(config).items()):
        yield name, tensor(shape, seed)


def write_safetensors(path: Path, config: dict[str, Any]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes(config).items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, values in tensors(config):
            values.tofile(file)


def vocabulary(size: int) -> list[str]:
    """GPT-2's byte alphabet, one merge, fillers that no text contains, then special tokens."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    alphabet = {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    words = [alphabet[b] for b in range(256)]
    words.append(words[0] + words[1])
    words += [f"filler{i}" for i in range(len(words), FIRST_SPECIAL)]
    named = {0: "<|begin_of_text|>", 1: "<|end_of_text|>"}
    return words + [named.get(i, f"<|reserved_{i}|>") for i in range(size - FIRST_SPECIAL)]


def write_tokenizer(folder: Path, config: dict[str, Any]) -> None:
    words = vocabulary(config["vocab_size"])
    special = [
        {"id": i, "content": word, "special": True, "normalized": False, "single_word": False,
         "lstrip": False, "rstrip": False}
        for i, word in enumerate(words)
        if i >= FIRST_SPECIAL
    ]  # fmt: skip
    split = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    tokenizer = {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": split,
        "decoder": split,
        "model": {
            "type": "BPE",
            "vocab": {word: i for i, word in enumerate(words[:FIRST_SPECIAL])},
            "merges": [words[:2]],
        },
    }
    names = {"bos_token": words[FIRST_SPECIAL], "eos_token": words[FIRST_SPECIAL + 1]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    if parts[1] == "layers":
        return f"blk.{parts[2]}.{GGUF_NAMES['.'.join(parts[3:])]}.weight"
    return {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[parts[1]]


def rope_factors(config: dict[str, Any]) -> np.ndarray:
    """What each rotation's frequency is divided by (Llama 3's rope scaling)."""
    scaling, dim = config["rope_scaling"], config["head_dim"]
    freqs = config["rope_theta"] ** (-np.arange(0, dim, 2) / dim)
    waves = 2 * math.pi / freqs
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (scaling["original_max_position_embeddings"] / waves - low) / (high - low)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)).astype(np.float32)


def pair_order(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head from rotate-half order to GGUF's adjacent pairs."""
    n, k = values.shape
    halves = values.reshape(heads, 2, n // heads // 2, k)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(n, k))


def add_metadata(writer: Any, config: dict[str, Any]) -> None:
    import gguf

    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    words = vocabulary(config["vocab_size"])
    kinds = [gguf.TokenType.NORMAL] * FIRST_SPECIAL
    kinds += [gguf.TokenType.CONTROL] * (len(words) - FIRST_SPECIAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{words[0]} {words[1]}"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def write_gguf(path: Path, config: dict[str, Any]) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "llama", use_temp_file=False)
    add_metadata(writer, config)
    kinds = gguf.GGMLQuantizationType
    order = shapes(config)
    for name, shape in order.items():
        flat = len(shape) == 1
        kind, width = (kinds.F32, 4) if flat else (kinds.BF16, 2)
        dtype = np.dtype(np.float32 if flat else np.uint16)
        size = width * math.prod(shape)
        writer.add_tensor_info(gguf_name(name), shape, dtype, size, raw_dtype=kind)
    factors = rope_factors(config)
    writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, values in tensors(config):
        if values.ndim == 1:
            values = np.ones(values.shape, np.float32)
        elif name.endswith("q_proj.weight"):
            values = pair_order(values, config["num_attention_heads"])
        elif name.endswith("k_proj.weight"):
            values = pair_order(values, config["num_key_value_heads"])
        writer.write_tensor_data(values)
    writer.write_tensor_data(factors)
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--gguf", action="store_true")
    parser.add_argument("--llama-python", type=Path)
    args = parser.parse_args()
    config = {**CONFIG, "num_hidden_layers": args.layers}
    args.out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(args.out, config)
    write_safetensors(args.out / "model.safetensors", config)
    if not (args.gguf or args.llama_python):
        return
    source = args.out / "model-BF16.gguf"
    write_gguf(source, config)
    if args.llama_python:
        from harness import Worker

        with Worker.llama(args.llama_python) as llama:
            for kind in ("Q4_0", "Q8_0"):
                target = args.out / f"model-{kind}.gguf"
                llama.ask("quantize", source=str(source), target=str(target), kind=kind, threads=2)
                print(target, file=sys.stderr)


if __name__ == "__main__":
    main()

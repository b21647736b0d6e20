"""A GGUF file as a model: llama.cpp's tensors and tokenizer in the words of Hugging Face."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lacewing.checkpoint import ggml
from lacewing.checkpoint.files import fail, shown
from lacewing.checkpoint.gguf import GgufFile, GgufTensor, read_gguf
from lacewing.checkpoint.ggufconfig import ARCHITECTURES, gguf_config
from lacewing.checkpoint.tensors import F32, Source, SourceTensor, TokenizerFiles, check_ids
from lacewing.checkpoint.vocab import adds_bos, build_tokenizer_json
from lacewing.errors import UnsupportedModelError
from lacewing.formats import Codes

__all__ = ["GgufSource", "hf_name"]

Metadata = Mapping[str, Any]
Order = npt.NDArray[np.int64]

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_BLOCK = _BLOCK | {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_FACTORS = "rope_freqs.weight"
_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>")
"""Control tokens that end a turn or a document even where the metadata names another one."""
_STARTS = ("bos_token_id", "unknown_token_id")
_CONTROL = 3


def hf_name(name: str, architecture: str) -> str:
    """The Hugging Face name of a GGUF tensor; a name that is not known stays as it is."""
    parts = re.fullmatch(r"(?:blk\.(\d{1,6})\.)?(\w+)\.(weight|bias)", name, re.ASCII)
    if parts is None:
        return name
    block, stem, kind = parts.groups()
    if block is None:
        return f"{_TOP[stem]}.{kind}" if stem in _TOP else name
    names = _GEMMA_BLOCK if architecture == "gemma3" else _BLOCK
    return f"model.layers.{int(block)}.{names[stem]}.{kind}" if stem in names else name


class GgufSource(Source):
    """A GGUF file. Opening checks the container; what it holds is checked on first use."""

    kind = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = read_gguf(path)

    @cached_property
    def architecture(self) -> str:
        name = self.file.metadata.get("general.architecture")
        if not isinstance(name, str):
            fail(f"{self.path}: metadata `general.architecture`", "a name", shown(name))
        if name not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"{self.path}: metadata `general.architecture`: needs one of"
                f" {', '.join(ARCHITECTURES)}, got {shown(name)!r}"
            )
        return name

    @cached_property
    def config(self) -> dict[str, Any]:  # type: ignore[override]
        _refuse_split(self.path, self.file.metadata)
        factors = self.file.tensors.get(_FACTORS)
        values = None if factors is None else _dequantize(self.file, factors).reshape(-1)
        return gguf_config(self.architecture, self.file, values)

    @cached_property
    def tensors(self) -> dict[str, SourceTensor]:  # type: ignore[override]
        found: dict[str, SourceTensor] = {}
        for tensor in self.file.tensors.values():
            if tensor.name == _FACTORS:
                continue
            name = hf_name(tensor.name, self.architecture)
            if name in found:
                fail(f"{self.path}: tensor `{tensor.name}`", f"to be the only `{name}`", "two")
            found[name] = _Tensor(self.file, tensor, name, self._heads(name))
        return found

    def _heads(self, name: str) -> int | None:
        """Heads whose rows llama.cpp's converter has interleaved, or None."""
        if self.architecture != "llama":
            return None
        parts = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        key = parts.get(name.split(".")[-2]) if "." in name else None
        return None if key is None else int(self.config[key])

    def _read_tokenizer(self) -> TokenizerFiles:
        metadata = self.file.metadata
        tokens = self._tokens()
        bos, _ = (_token_id(self.path, metadata, k, len(tokens)) for k in _STARTS)
        ends = _end_ids(self.path, metadata, tokens)
        document = build_tokenizer_json(metadata)
        template = metadata.get("tokenizer.chat_template")
        return TokenizerFiles(
            tokenizer_json=document,
            chat_template=template if isinstance(template, str) else None,
            bos_token=None if bos is None else tokens[bos],
            eos_token=tokens[ends[0]] if ends else None,
            bos_token_id=bos,
            eos_token_ids=ends,
            add_bos=bos is not None and adds_bos(metadata),
        )

    def _tokens(self) -> list[str]:
        """The vocabulary, one token for every row of the embedding."""
        tokens = self.file.metadata.get("tokenizer.ggml.tokens")
        where = f"{self.path}: metadata `tokenizer.ggml.tokens`"
        if not isinstance(tokens, list) or not all(isinstance(text, str) for text in tokens):
            fail(where, "strings", type(tokens).__name__)
        size = self.config["vocab_size"]
        if len(tokens) != size:
            hint = "the vocabulary and the weights are of different models"
            fail(where, f"{size} tokens, the rows of the embedding", len(tokens), hint)
        return tokens


class _Tensor(SourceTensor):
    """A tensor of a GGUF file, its rows in Hugging Face order."""

    def __init__(self, file: GgufFile, tensor: GgufTensor, name: str, heads: int | None) -> None:
        self._file = file
        self._tensor = tensor
        self._heads = heads
        self.name = name
        self.shape = tensor.shape
        self.dtype = tensor.type.name
        self.nbytes = tensor.nbytes
        floats = self.dtype in ("F32", "F16", "BF16")
        self.own_format = None if floats else tensor.type.grid or tensor.type.near

    @cached_property
    def _order(self) -> Order | None:
        if self._heads is None:
            return None
        n = self.shape[0] if len(self.shape) > 1 else self.shape[-1]
        if n % (2 * self._heads):
            fail(f"`{self.name}`", f"{self._heads} heads of an even width", f"{n} rows")
        # The converter turned the halves of a head, [2, half], into pairs, [half, 2].
        return np.arange(n).reshape(self._heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def check_type(self) -> None:
        _check_type(self._tensor, self.name)

    def _rows(self, begin: int, end: int | None) -> ggml.U8:
        rows = self._file.rows(self._tensor)
        return rows[begin:end] if self._order is None else rows[self._order[begin:end]]

    def dequantize(self, begin: int = 0, end: int | None = None) -> F32:
        if len(self.shape) != 1:
            weights = ggml.dequantize(self._tensor.type, self._rows(begin, end))
            return weights if len(self.shape) == 2 else weights.reshape(-1, *self.shape[1:])
        vector = _dequantize(self._file, self._tensor).reshape(-1)
        return vector if self._order is None else vector[self._order]

    def release(self) -> None:
        self._file.release(self._tensor)

    def codes(self, begin: int = 0, end: int | None = None) -> tuple[str, Codes] | None:
        kind = self._tensor.type
        if kind.grid is None or len(self.shape) != 2:
            return None
        found = ggml.codes(kind, self._rows(begin, end))
        return None if found is None else (kind.grid, found)

    def near_codes(self, begin: int = 0, end: int | None = None) -> tuple[str, Codes] | None:
        kind = self._tensor.type
        if kind.near is None or len(self.shape) != 2:
            return None
        found = ggml.near_codes(kind, self._rows(begin, end))
        return None if found is None else (kind.near, found)


def _check_type(tensor: GgufTensor, name: str) -> None:
    if tensor.type.readable:
        return
    known = ", ".join(kind.name for kind in ggml.GGML_TYPES.values() if kind.readable)
    raise UnsupportedModelError(
        f"`{name}`: needs a type of {known}, got {tensor.type.name}",
        hint="use a file of this model in one of these types",
    )


def _dequantize(file: GgufFile, tensor: GgufTensor) -> F32:
    _check_type(tensor, tensor.name)
    return ggml.dequantize(tensor.type, file.rows(tensor))


def _refuse_split(path: Path, metadata: Metadata) -> None:
    count = metadata.get("split.count", 0)
    if isinstance(count, int) and count > 1:
        raise UnsupportedModelError(
            f"{path}: needs a model in one file, got one part of {count}",
            hint="join the parts first (`llama-gguf-split --merge`)",
        )


# -- tokenizer ------------------------------------------------------------------------------------


def _token_id(path: Path, metadata: Metadata, key: str, count: int) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is None:
        return None
    where = f"{path}: metadata `tokenizer.ggml.{key}`"
    if isinstance(value, bool) or not isinstance(value, int):
        fail(where, "a token id", shown(value))
    check_ids(where, [value], count)
    return value


def _end_ids(path: Path, metadata: Metadata, tokens: list[str]) -> list[int]:
    """Ids that end an answer, the stated one first."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    stated = [_token_id(path, metadata, key, len(tokens)) for key in keys]
    types = metadata.get("tokenizer.ggml.token_type")
    known = []
    if isinstance(types, np.ndarray) and len(types) == len(tokens):
        control = np.flatnonzero(types == _CONTROL).tolist()
        known = [i for i in control if tokens[i] in _ENDS]
    return list(dict.fromkeys([i for i in stated if i is not None] + known))

"""A Hugging Face directory: config.json, weights (`weights.py`), and the tokenizer's files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lacewing.checkpoint.files import fail, parse_json, read_json, read_text, shown
from lacewing.checkpoint.shards import FloatTensor
from lacewing.checkpoint.tensors import F32, Source, SourceTensor, TokenizerFiles, check_ids
from lacewing.checkpoint.weights import CONFIG, QUANTIZATION_KEYS, read_weights
from lacewing.errors import CheckpointError
from lacewing.models import DecoderSpec, get_spec

__all__ = ["CONFIG", "HubSource", "norms_are_offsets", "read_tokenizer"]


class HubSource(Source):
    """A Hugging Face directory. Raises CheckpointError and UnsupportedModelError when opened."""

    kind = "huggingface"

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / CONFIG).exists():
            hint = "name a packed directory, a Hugging Face directory or a GGUF file"
            fail(str(path), f"a {CONFIG} (or lacewing.json)", "none", hint)
        stated = read_json(path / CONFIG)
        self.weights = read_weights(path, stated)
        self.notes = self.weights.notes
        self.config = {key: stated[key] for key in stated if key not in QUANTIZATION_KEYS}

    @cached_property
    def tensors(self) -> dict[str, SourceTensor]:  # type: ignore[override]
        found = self.weights.tensors
        if not norms_are_offsets(self.config):
            return found
        return {name: _with_offset(tensor) for name, tensor in found.items()}

    @cached_property
    def spec(self) -> DecoderSpec:
        """As in `Source`. Biases of zeros that the decoder does not have are left out: AutoGPTQ
        has saved one for every weight, whether or not the model has any."""
        expected = get_spec(self.config).tensor_shapes()
        for name in [name for name in self.tensors if name not in expected]:
            if name.endswith(".bias") and not self.tensors[name].dequantize().any():
                del self.tensors[name]
        return self.check_spec()

    def _read_tokenizer(self) -> TokenizerFiles:
        return read_tokenizer(self.path, self.config)


def read_tokenizer(place: Path, config: Mapping[str, Any]) -> TokenizerFiles:
    """The tokenizer in a directory, for the model of `config`. Raises CheckpointError."""
    path = place / "tokenizer.json"
    if not path.exists():
        raise CheckpointError(
            f"{place}: needs a tokenizer.json, got none",
            hint="`AutoTokenizer.from_pretrained(..).save_pretrained(..)` of transformers"
            " writes it",
        )
    return _Tokenizer(place, read_text(path), config).files()


def norms_are_offsets(config: Mapping[str, Any]) -> bool:
    """Whether Hugging Face's files have norm weights less one: Gemma multiplies by 1 + w."""
    return str(config.get("model_type", "")).startswith("gemma")


def _with_offset(tensor: SourceTensor) -> SourceTensor:
    if isinstance(tensor, FloatTensor) and tensor.name.endswith("norm.weight"):
        return _NormOffset(tensor.file, tensor.name)
    return tensor


class _NormOffset(FloatTensor):
    """Gemma multiplies by 1 + w; the 1 is added here, once and for all."""

    def dequantize(self, begin: int = 0, end: int | None = None) -> F32:
        return super().dequantize(begin, end) + np.float32(1)


# -- tokenizer ------------------------------------------------------------------------------------


class _Tokenizer:
    """The tokenizer's files. What they do not say is looked up in the vocabulary."""

    def __init__(self, path: Path, document: str, config: Mapping[str, Any]) -> None:
        self.path = path
        self.document = document
        self.config = config
        self.json = parse_json(document, str(path / "tokenizer.json"))
        self.options = self._optional("tokenizer_config.json")
        self.generation = self._optional("generation_config.json")
        self.ids = self._ids()
        self._check_vocabulary()

    def files(self) -> TokenizerFiles:
        bos, eos = self._token("bos_token"), self._token("eos_token")
        found = self._named(bos) or self._stated_ids(self.config, "bos_token_id")
        ends = [
            *self._stated_ids(self.generation, "eos_token_id"),
            *self._stated_ids(self.config, "eos_token_id"),
            *self._named(eos),
        ]
        return TokenizerFiles(
            tokenizer_json=self.document,
            chat_template=self._chat_template(),
            bos_token=bos,
            eos_token=eos,
            bos_token_id=found[0] if found else None,
            eos_token_ids=list(dict.fromkeys(ends)),
            add_bos=bool(found) and self._adds_bos(found[0]),
        )

    def _optional(self, name: str) -> dict[str, Any]:
        path = self.path / name
        return read_json(path) if path.exists() else {}

    def _named(self, token: str | None) -> list[int]:
        return [self.ids[token]] if token is not None and token in self.ids else []

    def _ids(self) -> dict[str, int]:
        ids = dict(self._vocabulary())
        added = self.json.get("added_tokens", [])
        for token in added if isinstance(added, list) else []:
            if isinstance(token, dict) and isinstance(token.get("content"), str):
                index = token.get("id")
                if isinstance(index, int):
                    ids[token["content"]] = index
        return ids

    def _vocabulary(self) -> dict[str, int]:
        """The model's own tokens: a mapping (BPE, WordPiece) or a list of pairs (Unigram)."""
        model = self.json.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, list):
            pairs = [item for item in vocabulary if isinstance(item, list) and item]
            return {str(item[0]): i for i, item in enumerate(pairs)}
        if not isinstance(vocabulary, dict) or not all(type(i) is int for i in vocabulary.values()):
            where = f"{self.path / 'tokenizer.json'}: `model.vocab`"
            fail(where, "a mapping of tokens to ids", shown(vocabulary))
        return vocabulary

    def _check_vocabulary(self) -> None:
        """Added tokens may go beyond the embedding (Gemma's image token does), others not."""
        size = self.config.get("vocab_size")
        largest = max(self._vocabulary().values(), default=0)
        if isinstance(size, int) and largest >= size:
            fail(
                f"{self.path / 'tokenizer.json'}: `model.vocab`",
                f"ids below the {size} rows of the embedding",
                largest,
                "the tokenizer and the weights are of different models",
            )

    def _token(self, key: str) -> str | None:
        value = self.options.get(key)
        if isinstance(value, dict):
            value = value.get("content")
        return value if isinstance(value, str) else None

    def _stated_ids(self, options: Mapping[str, Any], key: str) -> list[int]:
        value = options.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int for i in ids):
            fail(f"{self.path}: `{key}`", "token ids", shown(value))
        size = self.config.get("vocab_size")
        check_ids(f"{self.path}: `{key}`", ids, size if isinstance(size, int) else None)
        return ids

    def _adds_bos(self, bos: int) -> bool:
        """As the configuration says, or else as the tokenizer's own post-processor does."""
        stated = self.options.get("add_bos_token")
        if isinstance(stated, bool):
            return stated
        return self._starts_with(self.json.get("post_processor"), bos)

    def _starts_with(self, processor: Any, bos: int) -> bool:
        if not isinstance(processor, dict):
            return False
        inner = processor.get("processors")
        if isinstance(inner, list):
            return any(self._starts_with(step, bos) for step in inner[:16])
        single = processor.get("single")
        first = single[0] if isinstance(single, list) and single else None
        token = first.get("SpecialToken") if isinstance(first, dict) else None
        name = token.get("id") if isinstance(token, dict) else None
        return isinstance(name, str) and self.ids.get(name) == bos

    def _chat_template(self) -> str | None:
        """The newer file of its own, or the older key: one template, or several with names."""
        path = self.path / "chat_template.jinja"
        if path.exists():
            return read_text(path)
        value = self.options.get("chat_template")
        if isinstance(value, list):
            named = [item for item in value if isinstance(item, dict)]
            chosen = [item for item in named if item.get("name") == "default"] or named[:1]
            value = chosen[0].get("template") if chosen else None
        return value if isinstance(value, str) else None

"""GGUF tokenizer metadata -> the JSON of the `tokenizers` library.

A GGUF file carries its vocabulary in `tokenizer.ggml.*`; two models of it are understood:

    gpt2   byte-level BPE: tokens in GPT-2's byte alphabet, merges in order of rank, and
           `tokenizer.ggml.pre`, the name of the rule that cuts text into words before merging
    llama  SentencePiece BPE: pieces with scores, `▁` for a space, `<0xNN>` pieces for other bytes

The word rules live in `_WORD_RULES`; a new one is one entry there. Sources: the `tokenizer.json` of
the models themselves, and llama.cpp's `llama-vocab.cpp` for the names of the rules.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lacewing.errors import CheckpointError, UnsupportedModelError

__all__ = ["adds_bos", "build_tokenizer_json"]

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_MAX_TOKENS = 1 << 21

_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")

Json = dict[str, Any]


def build_tokenizer_json(metadata: Mapping[str, Any]) -> str:
    """The `tokenizer.json` text that encodes exactly as the vocabulary in GGUF `metadata` does.

    Raises `UnsupportedModelError` for a tokenizer model or word rule that is not known (a guess
    would give wrong tokens in silence), `CheckpointError` for metadata that contradicts itself.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model is None:
        raise CheckpointError(
            "GGUF metadata: needs `tokenizer.ggml.model`, the file has no tokenizer",
            hint="use a file that was converted together with its tokenizer",
        )
    build = _MODELS.get(str(model))
    if build is None:
        raise UnsupportedModelError(
            f"`tokenizer.ggml.model`: needs one of {', '.join(_MODELS)}, got `{model}`",
            hint="use the model's Hugging Face directory, which has a tokenizer.json",
        )
    vocabulary = _Vocabulary(metadata)
    document: Json = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added_tokens(),
        "post_processor": _post_processor(metadata, vocabulary),
        **build(metadata, vocabulary),
    }
    return json.dumps(document, ensure_ascii=False)


def adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether a prompt starts with the beginning-of-sequence token. A file that does not say
    follows its kind: SentencePiece and Llama 3 vocabularies do, other byte-level ones do not."""
    stated = metadata.get("tokenizer.ggml.add_bos_token")
    if stated is not None:
        return bool(stated)
    if metadata.get("tokenizer.ggml.model") == "llama":
        return True
    return _word_rule_name(metadata) == "llama-bpe"


class _Vocabulary:
    """The token list of the metadata, checked."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.tokens = [str(token) for token in _array(metadata, "tokens")]
        if not 0 < len(self.tokens) <= _MAX_TOKENS:
            raise CheckpointError(
                f"`tokenizer.ggml.tokens`: needs 1 to {_MAX_TOKENS} tokens, got {len(self.tokens)}"
            )
        self.types = self._types(metadata)
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            self._raise_duplicate()

    def _types(self, metadata: Mapping[str, Any]) -> list[int]:
        if "tokenizer.ggml.token_type" not in metadata:
            return [_NORMAL] * len(self.tokens)
        types = [int(kind) for kind in _array(metadata, "token_type")]
        if len(types) != len(self.tokens):
            raise CheckpointError(
                f"`tokenizer.ggml.token_type`: needs one type per token "
                f"({len(self.tokens)}), got {len(types)}"
            )
        return types

    def _raise_duplicate(self) -> None:
        for i, token in enumerate(self.tokens):
            if self.ids[token] != i:
                raise CheckpointError(
                    f"`tokenizer.ggml.tokens`: needs distinct tokens, got {token!r} "
                    f"as {i} and as {self.ids[token]}"
                )

    def added_tokens(self) -> list[Json]:
        """Tokens matched in the text before any word rule: the special ones, and user's own."""
        return [
            {
                "id": i,
                "content": self.tokens[i],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != _USER,
            }
            for i, kind in enumerate(self.types)
            if kind in (_UNKNOWN, _CONTROL, _USER) and self.tokens[i]
        ]

    def token_at(self, metadata: Mapping[str, Any], key: str) -> str | None:
        """The token that `tokenizer.ggml.<key>` names by id, or None where the key is absent."""
        index = metadata.get(f"tokenizer.ggml.{key}")
        if index is None:
            return None
        if not 0 <= int(index) < len(self.tokens):
            raise CheckpointError(
                f"`tokenizer.ggml.{key}`: needs an id below the vocabulary size "
                f"{len(self.tokens)}, got {int(index)}"
            )
        return self.tokens[int(index)]


def _array(metadata: Mapping[str, Any], key: str) -> Sequence[Any]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if values is None or isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
        found = "nothing" if values is None else type(values).__name__
        raise CheckpointError(f"GGUF metadata: needs an array `tokenizer.ggml.{key}`, got {found}")
    # An array of numpy holds numpy scalars; `tolist` is also much faster to walk.
    return values.tolist() if hasattr(values, "tolist") else values  # type: ignore[no-any-return]


def _post_processor(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> Json | None:
    bos = vocabulary.token_at(metadata, "bos_token_id")
    if bos is None or not adds_bos(metadata):
        return None
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    first: Json = {"Sequence": {"id": "A", "type_id": 0}}
    second: Json = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [start, first],
        "pair": [start, first, second],
        "special_tokens": {bos: {"id": bos, "ids": [vocabulary.ids[bos]], "tokens": [bos]}},
    }


# Byte-level BPE ------------------------------------------------------------------------------


def _byte_level(regex: bool) -> Json:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": regex,
    }


def _split(pattern: str) -> Json:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def _sequence(*steps: Json) -> Json:
    return {"type": "Sequence", "pretokenizers": list(steps)}


# name -> (pre_tokenizer, normalizer, a whole word that is a token needs no merges)
_WORD_RULES: dict[str, tuple[Json, Json | None, bool]] = {
    "gpt-2": (_byte_level(regex=True), None, False),
    # Digits one by one, which most converters lose: SmolLM2 was trained on "2", "0", "2", "4".
    "smollm": (
        _sequence({"type": "Digits", "individual_digits": True}, _byte_level(regex=True)),
        None,
        False,
    ),
    "llama-bpe": (_sequence(_split(_LLAMA3_WORDS), _byte_level(regex=False)), None, True),
    "qwen2": (
        _sequence(_split(_QWEN2_WORDS), _byte_level(regex=False)),
        {"type": "NFC"},
        False,
    ),
    # What llama.cpp does where a file names no rule, or names this one.
    "default": (
        _sequence(
            _split(r"[\p{P}\$\+<=>\^~\|]+"),
            _split(_GPT2_WORDS),
            _split(r"\p{N}+"),
            _split(r"[0-9][0-9][0-9]"),
            _byte_level(regex=False),
        ),
        None,
        False,
    ),
}
_ALIASES = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "gpt2": "gpt-2",
    "deepseek-r1-qwen": "qwen2",
}


def _word_rule_name(metadata: Mapping[str, Any]) -> str:
    name = str(metadata.get("tokenizer.ggml.pre", "default"))
    return _ALIASES.get(name, name)


def _build_byte_level(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> Json:
    name = _word_rule_name(metadata)
    if name not in _WORD_RULES:
        raise UnsupportedModelError(
            f"`tokenizer.ggml.pre`: needs one of {', '.join(_WORD_RULES)}, got `{name}`",
            hint="use the model's Hugging Face directory, which has a tokenizer.json",
        )
    words, normalizer, ignore_merges = _WORD_RULES[name]
    return {
        "normalizer": normalizer,
        "pre_tokenizer": words,
        "decoder": _byte_level(regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": vocabulary.ids,
            "merges": _checked_merges(metadata, vocabulary.ids),
        },
    }


def _checked_merges(metadata: Mapping[str, Any], ids: Mapping[str, int]) -> list[list[str]]:
    merges = []
    for rank, merge in enumerate(_array(metadata, "merges")):
        text = str(merge)
        # A piece may begin with the separator, so look for it from the second character on.
        cut = text.find(" ", 1)
        left, right = text[:cut], text[cut + 1 :]
        if cut < 0 or left not in ids or right not in ids or left + right not in ids:
            raise CheckpointError(
                f"`tokenizer.ggml.merges[{rank}]`: needs two tokens of the vocabulary "
                f"whose join is one too, got {text[:80]!r}"
            )
        merges.append([left, right])
    return merges


# SentencePiece BPE ---------------------------------------------------------------------------


def _build_sentencepiece(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> Json:
    scores = [float(score) for score in _array(metadata, "scores")]
    if len(scores) != len(vocabulary.tokens):
        raise CheckpointError(
            f"`tokenizer.ggml.scores`: needs one score per token ({len(vocabulary.tokens)}), "
            f"got {len(scores)}"
        )
    if not all(map(math.isfinite, scores)):
        raise CheckpointError("`tokenizer.ggml.scores`: needs finite scores, got NaN or infinity")
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    normalizers: list[Json] = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    decoders: list[Json] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": _unknown_token(metadata, vocabulary),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": _BYTE in vocabulary.types,
            "ignore_merges": False,
            "vocab": vocabulary.ids,
            "merges": _merges_from_scores(vocabulary, scores),
        },
    }


def _unknown_token(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> str | None:
    stated = vocabulary.token_at(metadata, "unknown_token_id")
    if stated is None and _UNKNOWN in vocabulary.types:
        return vocabulary.tokens[vocabulary.types.index(_UNKNOWN)]
    return stated


def _merges_from_scores(vocabulary: _Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score first: SentencePiece's own order.

    Where scores are equal the longer left part comes first, as in the Hugging Face conversion.
    """
    whole = (_NORMAL, _USER)
    tokens, types = vocabulary.tokens, vocabulary.types
    pieces = {token for token, kind in zip(tokens, types, strict=True) if kind in whole}
    ranked: list[tuple[float, int, int, str]] = []
    for token, kind, score in zip(tokens, types, scores, strict=True):
        if kind != _NORMAL or len(token) < 2:
            continue
        for cut in range(1, len(token)):
            if token[:cut] in pieces and token[cut:] in pieces:
                ranked.append((-score, -cut, len(ranked), token))
    ranked.sort()
    return [(token[:-cut], token[-cut:]) for _, cut, _, token in ranked]


_MODELS = {"gpt2": _build_byte_level, "llama": _build_sentencepiece}

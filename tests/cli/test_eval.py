"""`lacewing eval`: how a text is cut into windows, and the perplexity of one that is known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lacewing import LLM, RequestError
from lacewing.cli.evaluate import windows
from tests.cli.conftest import Call


def model(bos: list[int]) -> Any:
    def encode(text: str, add_special: bool = True) -> list[int]:
        return [*(bos if add_special else []), *(ord(letter) for letter in text)]

    return SimpleNamespace(text=SimpleNamespace(encode=encode))


def test_windows_do_not_overlap() -> None:
    found = windows(model([]), "abcdefgh", 3, None)
    assert found == [[97, 98, 99], [100, 101, 102]]


def test_every_window_begins_with_the_models_first_token() -> None:
    found = windows(model([1]), "abcde", 3, None)
    assert found == [[1, 97, 98], [1, 99, 100]]


def test_a_short_text_is_one_window() -> None:
    assert windows(model([]), "ab", 2048, None) == [[97, 98]]
    assert windows(model([1]), "ab", 2048, None) == [[1, 97, 98]]


@pytest.mark.parametrize(("max_tokens", "count"), [(1, 1), (2, 1), (3, 2), (4, 2), (99, 3)])
def test_max_tokens_bounds_the_windows(max_tokens: int, count: int) -> None:
    assert len(windows(model([]), "abcdefghi", 3, max_tokens)) == count


def test_no_text() -> None:
    with pytest.raises(RequestError, match="at least 2 tokens"):
        windows(model([1]), "a", 8, None)


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
        scores = [llm.score(piece) for piece in windows(llm, text.read_text(), 32, None)]
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


def test_smollm2_predicts_english(call: Call, smollm2_gguf: Path, data_dir: Path) -> None:
    text = data_dir / "text" / "wikitext2" / "wiki.test.raw"
    options = ("--perplexity", text, "--window", "256", "--max-tokens", "510", "--json")
    status, out, err = call("eval", smollm2_gguf, *options)
    assert status == 0, err
    found = json.loads(out)
    assert found["scored_tokens"] == 510
    assert 10 < found["perplexity"] < 60

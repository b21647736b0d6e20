"""Calibration text: files to windows of tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacewing.checkpoint import TokenizerFiles
from lacewing.compress import data
from lacewing.compress.data import read_windows
from lacewing.compress.recipe import Calibration
from lacewing.errors import CheckpointError, RecipeError
from tests.checkpoint import build

LETTERS = "".join(build.BYTES)
BOS = 1


def tokenizer(add_bos: bool = False) -> TokenizerFiles:
    """A word is a printable character."""
    document = json.dumps(build.tokenizer_document())
    return TokenizerFiles(document, None, "<s>", "<|endoftext|>", BOS, [0], add_bos)


def text_of(count: int, seed: int = 0) -> str:
    return "".join(np.random.default_rng(seed).choice(list(LETTERS), count))


def ids_of(text: str) -> list[int]:
    return [build.TOKENS.index(letter) for letter in text]


def read(*files: Path, tokens: int = 64, window: int = 16, seed: int = 0, bos: bool = False) -> Any:
    return read_windows(files, tokenizer(bos), build.VOCAB, Calibration(tokens, window, seed))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def lines(path: Path, *documents: Any) -> Path:
    return write(path, "".join(json.dumps(document) + "\n" for document in documents))


def rows_of(stream: list[int], size: int) -> list[list[int]]:
    return [stream[i : i + size] for i in range(0, len(stream) - size + 1, size)]


@pytest.mark.parametrize("bos", [False, True])
def test_windows_are_pieces_of_the_text(tmp_path: Path, bos: bool) -> None:
    text = text_of(200)
    windows = read(write(tmp_path / "a.txt", text), bos=bos)
    assert windows.ids.shape == (4, 16)
    assert windows.ids.dtype == np.int64
    rows = windows.ids.tolist()
    if bos:
        assert all(row[0] == BOS for row in rows)
        rows = [row[1:] for row in rows]
    stream = [BOS, *ids_of(text)] if bos else ids_of(text)
    places = [rows_of(stream, 15 if bos else 16).index(row) for row in rows]
    assert places == sorted(set(places))  # each once, in the order of the text
    assert windows.files == (data.Passages("a.txt", len(stream), 4),)


def test_the_seed_decides(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", text_of(2000))
    first, again, other = read(file), read(file), read(file, seed=1)
    assert (first.ids == again.ids).all()
    assert first.digest() == again.digest()
    assert first.digest() != other.digest()


def test_the_windows_of_a_seed_never_change(tmp_path: Path) -> None:
    text = "".join(LETTERS[i % 90] for i in range(400))
    windows = read(write(tmp_path / "a.txt", text), seed=5)
    assert windows.ids[:, 0].tolist() == [66, 24, 40, 36]


def test_files_have_equal_shares(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{i}.txt", LETTERS[i] * 500) for i in range(3)]
    windows = read(*files, tokens=7 * 16)
    assert [file.windows for file in windows.files] == [3, 2, 2]
    firsts = [build.TOKENS[i] for i in windows.ids[:, 0]]
    assert firsts == [LETTERS[0]] * 3 + [LETTERS[1]] * 2 + [LETTERS[2]] * 2


@pytest.mark.parametrize(
    ("document", "means"),
    [
        ({"text": "abc", "prompt": "x", "response": "y"}, "abc"),
        ({"prompt": "ab", "response": "c"}, "abc"),
        ({"ids": ids_of("abc")}, "abc"),
    ],
)
def test_json_lines(tmp_path: Path, document: Any, means: str) -> None:
    file = lines(tmp_path / "a.jsonl", *[document] * 100)
    for row in read(file, bos="ids" not in document).ids:
        found = "".join(build.TOKENS[i] for i in row if i != BOS)
        assert len(found) > 8
        assert found in means * 10


def test_a_question_and_its_answer_are_two_lines(tmp_path: Path) -> None:
    assert data._text_of({"question": "a?", "answer": "b"}, "x:1") == "a?\nb"


def test_documents_are_parted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the first token where the model wants one, else by an empty line."""
    file = lines(tmp_path / "a.jsonl", *[{"text": "abcdefg"}] * 20)
    assert (read(file, bos=True).ids == BOS).sum() > 4
    seen: list[str] = []
    monkeypatch.setattr(data, "_pieces", lambda text: seen.append(text) or [text])
    read(file)
    assert seen == ["abcdefg\n\n"] * 20


def test_long_text_is_cut_at_line_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_PIECE", 8)
    text = "abc\ndef\n" + "g" * 20 + "\nh"
    pieces = list(data._pieces(text))
    assert "".join(pieces) == text
    assert pieces == ["abc\ndef\n", "g" * 8, "g" * 8, "gggg\nh"]


@pytest.mark.parametrize("content", ["", "  \n \n"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_empty_files(tmp_path: Path, content: str, name: str) -> None:
    with pytest.raises(RecipeError, match=rf"{name}: needs text to calibrate on, got none"):
        read(write(tmp_path / name, content))


def test_too_little_text(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", text_of(50))
    with pytest.raises(RecipeError, match=r"needs 64 tokens for 4 windows of 16, got 50") as caught:
        read(file)
    assert "48 tokens" in (caught.value.hint or "")
    assert read(file, tokens=48).ids.shape == (3, 16)
    with pytest.raises(RecipeError, match=r"got 50") as caught:
        read(file, window=64)
    assert "shorter windows: 25" in (caught.value.hint or "")


def test_more_files_than_windows(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{i}.txt", text_of(50)) for i in range(5)]
    with pytest.raises(RecipeError, match="a window for each of 5 files, got 4"):
        read(*files)
    with pytest.raises(RecipeError, match="got no file"):
        read()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", r"a\.jsonl:2: needs a JSON document"),
        ("[1]", r"a\.jsonl:2: needs a JSON object, got list"),
        ('{"text": 1}', r"a\.jsonl:2: `text`: needs text, got 1"),
        ('{"prompt": "a"}', r"a\.jsonl:2: needs `text`.*got prompt"),
        ("{}", r"got nothing"),
        ('{"ids": "abc"}', r"`ids`: needs a list of token ids"),
        ('{"ids": [1.0]}', r"`ids`: needs a list of token ids"),
        ('{"ids": [3, 96]}', r"a\.jsonl:2: needs token ids below 96.*got 96"),
        ('{"ids": [-1]}', r"token ids below 96.*got -1"),
        ('{"text": "\\ud800"}', r"a\.jsonl:2: needs valid Unicode"),
        ("[" * 100000, r"a\.jsonl:2: needs JSON nested"),
    ],
)
def test_lines_that_are_no_documents(tmp_path: Path, line: str, says: str) -> None:
    file = write(tmp_path / "a.jsonl", '{"text": "abc"}\n' + line + "\n")
    with pytest.raises(RecipeError, match=says):
        read(file)


def test_the_tokenizer_of_another_model(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", text_of(500))
    with pytest.raises(RecipeError, match="token ids below 20"):
        read_windows([file], tokenizer(), 20, Calibration(64, 16))
    broken = TokenizerFiles("{}", None, None, None, None, [], False)
    with pytest.raises(CheckpointError, match="tokenizer"):
        read_windows([file], broken, 20, Calibration(64, 16))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(RecipeError, match=r"a\.txt: needs UTF-8 text, got byte 0xff at 3"):
        read(tmp_path / "a.txt")
    with pytest.raises(RecipeError, match="no such file"):
        read(tmp_path / "b.txt")
    with pytest.raises(RecipeError, match="cannot be read"):
        read(tmp_path)

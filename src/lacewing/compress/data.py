"""Calibration text: files in, windows of tokens out, the same for the same seed.

    *.jsonl, *.json   a document per line: `text`, or `prompt` and `response`, or `question` and
                      `answer`, or `ids`: tokens of the model's own tokenizer
    anything else     UTF-8 text, one document

The documents of a file are laid end to end, each begun by the token that the model wants at the
beginning, or parted by an empty line where it wants none. The stream is cut into windows, and a
seed says which of them are read: each at most once, equally many of every file. With the token at
the beginning, every window has it in front.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from lacewing.checkpoint import TokenizerFiles
from lacewing.checkpoint.files import MAX_JSON, parse_json, read_text, shown
from lacewing.compress.checks import fail
from lacewing.compress.recipe import Calibration
from lacewing.errors import CheckpointError, RecipeError

__all__ = ["Passages", "Windows", "read_windows"]

Ids = npt.NDArray[np.int64]

_PAIRS = (("prompt", "response"), ("question", "answer"))
_PIECE = 1 << 18
"""Characters that are tokenized at once, cut at the end of a line: bounds the memory."""


@dataclass(frozen=True)
class Passages:
    """What one file gave. tokens: in the whole file. windows: those that are read."""

    name: str
    tokens: int
    windows: int


@dataclass(frozen=True, eq=False)
class Windows:
    """ids: int64 `[windows, window]`. files: one for each given."""

    ids: Ids
    files: tuple[Passages, ...]

    def digest(self) -> str:
        """sha256 of the ids, as hexadecimal."""
        shape = repr(self.ids.shape).encode()
        return hashlib.sha256(shape + self.ids.astype("<i8").tobytes()).hexdigest()


def read_windows(
    files: Sequence[str | os.PathLike[str]],
    tokenizer: TokenizerFiles,
    vocab_size: int,
    calibration: Calibration,
) -> Windows:
    """The windows that `calibration` asks for, of equal shares of all files.

    Raises RecipeError, naming the file, for one that is empty, too short, no UTF-8, no JSON, or of
    another tokenizer.
    """
    count = calibration.windows
    if not files:
        raise RecipeError("calibration: needs data, got no file", hint="name a text file: --data")
    if count < len(files):
        raise RecipeError(
            f"calibration: needs a window for each of {len(files)} files, got {count} windows of"
            f" {calibration.window} tokens",
            hint="ask for more tokens, or for shorter windows",
        )
    reader = _Reader(tokenizer, vocab_size)
    shares = [count // len(files) + (i < count % len(files)) for i in range(len(files))]
    drawn, told = [], []
    for index, (file, share) in enumerate(zip(files, shares, strict=True)):
        stream = reader.stream(Path(file))
        drawn.append(_draw(Path(file), stream, share, calibration, index, reader.first))
        told.append(Passages(Path(file).name, len(stream), share))
    return Windows(np.concatenate(drawn), tuple(told))


def _draw(
    file: Path, stream: Ids, count: int, calibration: Calibration, index: int, first: int | None
) -> Ids:
    """`[count, window]`: windows side by side in the stream, of which the seed chooses."""
    body = calibration.window - (first is not None)
    there = len(stream) // body
    if there < count:
        wanted = f"{count * body} tokens for {count} windows of {calibration.window}"
        least = len(stream) // calibration.window * calibration.window
        hint = "give more text"
        if least:
            hint += f", or ask for less: {least} tokens"
        elif len(stream) >= 16:
            hint += f", or ask for shorter windows: {len(stream) // 2} tokens"
        raise RecipeError(f"{file}: needs {wanted}, got {len(stream)}", hint=hint)
    # Raw output of PCG64, which numpy promises to keep; what its generators make of it may change.
    keys = np.random.PCG64([calibration.seed, index]).random_raw(there)
    chosen = np.sort(np.argsort(keys, kind="stable")[:count])
    windows = stream[: there * body].reshape(there, body)[chosen]
    if first is None:
        return windows
    return np.concatenate([np.full((count, 1), first, np.int64), windows], axis=1)


class _Reader:
    """Files to streams of tokens of one model."""

    def __init__(self, files: TokenizerFiles, vocab_size: int) -> None:
        self.first = files.bos_token_id if files.add_bos else None
        self._vocab_size = vocab_size
        try:
            self._tokenizer = Tokenizer.from_str(files.tokenizer_json)
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"tokenizer.json: cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def stream(self, file: Path) -> Ids:
        """int64 `[tokens]` of the whole file."""
        pieces = [np.asarray(ids, np.int64) for ids in self._documents(file)]
        stream = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
        if not len(stream):
            fail(str(file), "text to calibrate on", "none")
        return stream

    def _documents(self, file: Path) -> Iterator[list[int]]:
        text = _read(file)
        if file.suffix not in (".jsonl", ".json"):
            yield from self._tokens(text, str(file))
            return
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield from self._line(line, f"{file}:{number}")

    def _line(self, line: str, where: str) -> Iterator[list[int]]:
        try:
            document = parse_json(line, where)
        except CheckpointError as error:
            raise RecipeError(str(error), hint="every line is one JSON object") from None
        if "ids" in document:
            ids = document["ids"]
            if not isinstance(ids, list) or not all(type(i) is int for i in ids):
                fail(f"{where}: `ids`", "a list of token ids", shown(ids))
            yield self._checked(ids, where)
        else:
            yield from self._tokens(_text_of(document, where), where)

    def _tokens(self, text: str, where: str) -> Iterator[list[int]]:
        """A document, with what begins or ends it."""
        if not text.strip():
            return
        if self.first is not None:
            yield [self.first]
        elif not text.endswith("\n\n"):
            text = text.rstrip("\n") + "\n\n"
        for piece in _pieces(text):
            try:
                found = self._tokenizer.encode(piece, add_special_tokens=False).ids
            except (UnicodeEncodeError, TypeError) as error:  # half a surrogate pair
                fail(where, "valid Unicode", str(error))
            yield self._checked(found, where)

    def _checked(self, ids: list[int], where: str) -> list[int]:
        bad = [i for i in ids if not 0 <= i < self._vocab_size]
        if bad:
            fail(
                where,
                f"token ids below {self._vocab_size}, as the model has them",
                shown(bad[0]),
                "the tokens are of another model's tokenizer: give the text itself",
            )
        return ids


def _read(file: Path) -> str:
    try:
        return read_text(file)
    except CheckpointError as error:
        hint = error.hint
        if file.is_file() and file.stat().st_size > MAX_JSON:
            hint = "split it: `--data` takes any number of files, each of an equal share"
        raise RecipeError(str(error), hint=hint) from None


def _text_of(document: dict[str, Any], where: str) -> str:
    keys: Sequence[str] = ("text",) if "text" in document else ()
    for pair in _PAIRS:
        if not keys and all(key in document for key in pair):
            keys = pair
    if not keys:
        has = ", ".join(shown(key, 20) for key in list(document)[:8]) or "nothing"
        fail(where, "`text`, `prompt` and `response`, `question` and `answer`, or `ids`", has)
    for key in keys:
        if not isinstance(document[key], str):
            fail(f"{where}: `{key}`", "text", shown(document[key]))
    between = "\n" if keys == ("question", "answer") else ""
    return between.join(document[key] for key in keys)


def _pieces(text: str) -> Iterator[str]:
    begin = 0
    while begin < len(text):
        end = begin + _PIECE
        if end < len(text):
            end = text.rfind("\n", begin, end) + 1 or end
        yield text[begin:end]
        begin = end

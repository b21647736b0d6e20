"""From output tokens to text that is safe to show: stop strings over a stream of pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["Decoder", "StopStrings", "Writer"]


class Decoder(Protocol):
    """Tokens to text, piece by piece (`engine.text.StreamDecoder`)."""

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class StopStrings:
    """Cuts a text at the first stop string, wherever the borders of its pieces lie.

    The stop string that is complete first wins, as if the text came character by character; among
    those complete at the same character, the longest. Text that may still be the beginning of a
    stop string is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Takes the next piece: (text that is safe to show, whether a stop string was met)."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = [(at + len(s), at) for s in self._stops if (at := text.find(s)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """The end of the text: what was held back after all."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(max(map(len, self._stops)) - 1, len(text))
        for length in range(longest, 0, -1):
            tail = text[len(text) - length :]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


class Writer:
    """The text of one sequence: tokens through the decoder, then through the stop strings."""

    def __init__(self, decoder: Decoder, stops: Sequence[str]) -> None:
        self._decoder = decoder
        self._stops = StopStrings(stops)

    def push(self, token: int) -> tuple[str, bool]:
        """Takes the next token: (text that is safe to show, whether a stop string was met)."""
        return self._stops.push(self._decoder.push(token))

    def flush(self) -> tuple[str, bool]:
        """The end of the output: what was held back, cut at a stop string if it has one."""
        text, met = self._stops.push(self._decoder.flush())
        return (text, True) if met else (text + self._stops.flush(), False)

"""A program in a process of its own that answers one JSON command a line: how rivals are asked.

Each side sleeps on a pipe while the other works, so that two thread pools never spin at the same
time.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from lacewing.errors import LacewingError


class Worker:
    """The process.

    A command is an object with a `verb` and its arguments; so is the answer, or `{"error": text}`.
    Raises LacewingError when the process ends (with `hint`) or answers with an error.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        hint: str | None = None,
        environment: Mapping[str, str] | None = None,
        quiet: bool = False,
    ) -> None:
        self._hint = hint
        self._command = " ".join(command)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            env=environment,
            text=True,
        )

    def ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"verb": verb, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise LacewingError(
                f"`{self._command}` ended with code {self._process.wait()}", self._hint
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise LacewingError(answer["error"])
        return answer

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):  # a command that it did not live to read
                    pipe.close()
        self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

"""What the command line's tests share: tiny models in files, and two ways to run a verb."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from lacewing.cli.__main__ import main
from tests.checkpoint import build

COMMAND = [sys.executable, "-m", "lacewing.cli"]


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


Call = Callable[..., Outcome]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command line in this process: `call("info", path) -> (status, out, err)`."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Outcome(int(exit.value.code or 0), out, err)

    return run


def spawn(*arguments: object, **options: object) -> subprocess.Popen[str]:
    """Starts a command line as a process of its own."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    environment |= options.pop("env", {})  # type: ignore[arg-type]
    return subprocess.Popen([*COMMAND, *map(str, arguments)], text=True, env=environment, **options)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama in Q4_1 whose words are single printable characters."""
    path = tmp_path_factory.mktemp("cli") / "tiny.gguf"
    return build.tiny_gguf("Q4_1", max_position_embeddings=4096).write(path)


@pytest.fixture(scope="session")
def tiny_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in a Hugging Face directory of float32 weights."""
    tiny = build.config("llama")
    weights = build.random_weights(tiny)
    return build.write_hub(tmp_path_factory.mktemp("cli") / "tiny", tiny, weights)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Nothing to read: letters, the same every time."""
    letters = np.random.default_rng(0).choice(list("abcdefgh "), 1500)
    path = tmp_path / "text.txt"
    path.write_text("".join(letters))
    return path

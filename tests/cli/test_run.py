"""`lacewing run`: an answer, a conversation, and what Ctrl-C leaves of it."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lacewing import Piece, RequestError, SamplingParams
from lacewing.cli import run as verb
from lacewing.cli.run import Talk
from lacewing.engine import Timings
from tests.cli.conftest import COMMAND, Call, spawn

TIMINGS = Timings(prompt_tokens=3, output_tokens=2, ttft=0.1, total=0.2)


class ScriptedLLM:
    """Answers with its script; an exception in the script is raised there."""

    def __init__(self, *script: object) -> None:
        self.script = list(script)
        self.asked: list[Any] = []
        self.text = SimpleNamespace(encode_chat=lambda messages: [1])

    def stream_chat(self, messages: list[dict[str, str]], params: object) -> Iterator[Piece]:
        self.asked.append([dict(message) for message in messages])
        return self._pieces()

    def stream(self, text: str, params: object) -> Iterator[Piece]:
        self.asked.append(text)
        return self._pieces()

    def _pieces(self) -> Iterator[Piece]:
        while self.script:
            part = self.script.pop(0)
            if isinstance(part, BaseException):
                raise part
            if part is None:
                break
            yield Piece(str(part), [1])
        yield Piece("", [], "stop", TIMINGS)


def talk(*script: object, raw: bool = False, system: str | None = None) -> tuple[Talk, ScriptedLLM]:
    llm = ScriptedLLM(*script)
    opened: Any = SimpleNamespace(llm=llm, path=Path("model.gguf"))
    return Talk(opened, SamplingParams(), system, raw, False), llm


def type_lines(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def test_a_conversation_remembers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_lines(monkeypatch, "one", "", "two")
    conversation, llm = talk("A", "B\n", None, "C", None, system="S")
    conversation.converse()
    assert llm.asked[0] == [said("system", "S"), said("user", "one")]
    assert llm.asked[1] == [*llm.asked[0], said("assistant", "AB\n"), said("user", "two")]
    assert capsys.readouterr().out == "AB\nC\n"


def test_clear_and_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    type_lines(monkeypatch, "one", "/clear", "two", "/exit", "three")
    conversation, llm = talk("A", None, "B", None, system="S")
    conversation.converse()
    assert llm.asked == [[said("system", "S"), said("user", text)] for text in ("one", "two")]


def test_an_interrupted_answer_stays_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_lines(monkeypatch, "one", "two")
    conversation, llm = talk("half", KeyboardInterrupt(), "whole", None)
    conversation.converse()
    assert llm.asked[1] == [said("user", "one"), said("assistant", "half"), said("user", "two")]
    out, err = capsys.readouterr()
    assert out == "half\nwhole\n"
    assert "stopped" in err


def test_a_refused_turn_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_lines(monkeypatch, "too long", "short")
    conversation, llm = talk(RequestError("the prompt must be shorter"), "fine", None)
    conversation.converse()
    assert llm.asked[1] == [said("user", "short")]
    out, err = capsys.readouterr()
    assert out == "\nfine\n" or out == "fine\n"
    assert "error: the prompt must be shorter" in err
    assert "/clear" in err


def test_raw_turns_stand_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    type_lines(monkeypatch, "one", "two")
    conversation, llm = talk("A", None, "B", None, raw=True)
    conversation.converse()
    assert llm.asked == ["one", "two"]


def test_one_prompt_interrupted_is_status_130(
    call: Call, monkeypatch: pytest.MonkeyPatch, tiny_gguf: Path
) -> None:
    conversation, _ = talk("half", KeyboardInterrupt())
    monkeypatch.setattr("lacewing.cli.opening.open_llm", lambda *_: conversation.opened)
    status, out, err = call("run", tiny_gguf, "-p", "one")
    assert (status, out, err) == (130, "half\n", "")


# -- a real, if tiny, model -------------------------------------------------------------------


def test_the_answer_alone_goes_to_stdout(call: Call, tiny_gguf: Path) -> None:
    options = ("-p", "abc", "--max-tokens", "8", "--stats")
    status, out, err = call("run", tiny_gguf, *options)
    assert status == 0
    assert len(out) <= 9
    assert out.endswith("\n")
    for word in ("format", "w4a8g32z", "bits/weight", "tokens/s", "of memory", "GB/s"):
        assert word in err
    assert call("run", tiny_gguf, *options[:-1]).out == out


def test_a_seed_repeats_an_answer(call: Call, tiny_gguf: Path) -> None:
    options = ("-p", "abc", "--max-tokens", "12", "--temperature", "1.5", "--seed")
    first, again, other = (call("run", tiny_gguf, *options, seed).out for seed in (1, 1, 2))
    assert first == again != other


def test_rounding_is_said(call: Call, tiny_gguf: Path) -> None:
    status, _, err = call("run", tiny_gguf, "-p", "a", "--max-tokens", "1", "--format", "w4a8g32")
    assert status == 0
    assert "Q4_1 -> w4a8g32" in err
    assert "added error" in err


def test_a_packed_directory_answers_as_its_source(
    call: Call, tiny_gguf: Path, tmp_path: Path
) -> None:
    assert call("compress", tiny_gguf, tmp_path / "packed").status == 0
    options = ("-p", "abc", "--max-tokens", "20", "--threads", "1")
    packed = call("run", tmp_path / "packed", *options)
    assert packed.status == 0
    assert packed.out == call("run", tiny_gguf, *options).out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("-p", "x", "--threads", "0"), "threads"),
        (("-p", "x", "--max-tokens", "0"), "max_tokens"),
        (("-p", "x", "--temperature", "-1"), "temperature"),
        (("-p", "x", "--seed", "-1"), "seed"),
        (("-p", "x" * 5000), "context"),
        (("-p", "\udcff"), "Unicode"),
    ],
)
def test_bad_options(call: Call, tiny_gguf: Path, options: tuple[str, ...], says: str) -> None:
    status, out, err = call("run", tiny_gguf, *options)
    assert (status, out.strip()) == (1, "")
    assert err.startswith("error: ")
    assert says in err


def test_a_conversation_through_a_pipe(tiny_gguf: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = spawn("run", tiny_gguf, "--max-tokens", "4", **pipes)
    out, err = process.communicate("ab\ncd\n", timeout=60)
    assert process.returncode == 0, err
    assert "> " not in out
    assert len(out.splitlines()) >= 2


def test_a_reader_that_leaves_ends_the_answer(tiny_gguf: Path) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = spawn("run", tiny_gguf, "-p", "ab", "--max-tokens", "4000", **pipes)
    assert process.stdout
    assert process.stderr
    process.stdout.read(1)
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) in (0, 1)
    assert "Traceback" not in error
    assert "BrokenPipe" not in error


class Screen:
    """A pseudo-terminal with a command in it."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        pid, self.fd = pty.fork()
        if pid == 0:
            os.environ.pop("NO_COLOR", None)
            os.environ.update({"TERM": "xterm-256color", "COLUMNS": "80", **environment})
            os.execv(COMMAND[0], [*COMMAND, *map(str, arguments)])
        self.pid = pid
        self.seen = ""

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """What was shown up to and including `text`; takes it off `seen`."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.fd], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {text!r} in {self.seen!r}"
            self.seen += os.read(self.fd, 4096).decode(errors="replace")
        head, self.seen = self.seen.split(text, 1)
        return head + text

    def wait_for_prompt(self) -> None:
        """Until the command waits for keys. CPython's readline shows the prompt a moment before it
        waits, and notices a signal that comes in between only with the next key."""
        self.wait_for("> ")
        status = Path(f"/proc/{self.pid}/task/{self.pid}/stat")
        end = time.monotonic() + 60
        asleep = 0
        while asleep < 5:
            assert time.monotonic() < end, "the command does not come to rest at its prompt"
            asleep = asleep + 1 if status.read_text().rpartition(")")[2].split()[0] == "S" else 0
            time.sleep(0.01)

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def end(self) -> int:
        """Exit status."""
        try:
            while os.read(self.fd, 4096):
                pass
        except OSError:  # how a pseudo-terminal says that nobody is there
            pass
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_ctrl_c_stops_the_answer_and_keeps_the_session(smollm2_gguf: Path) -> None:
    screen = Screen("run", smollm2_gguf, "--max-tokens", "3000")
    screen.wait_for_prompt()
    for story in ("moon", "sea"):
        screen.type(f"Write a very long story of the {story}.\r")
        screen.wait_for(f"{story}.\r\n")
        screen.wait_for(" ")  # the first words are there, thousands are to come
        screen.type("\x03")
        screen.wait_for("(stopped)")
        screen.wait_for_prompt()
    screen.type("\x03")
    screen.wait_for("/exit")
    screen.wait_for_prompt()
    screen.type("/exit\r")
    assert screen.end() == 0


def test_ctrl_d_ends(tiny_gguf: Path) -> None:
    screen = Screen("run", tiny_gguf)
    screen.wait_for_prompt()
    screen.type("\x04")
    assert screen.end() == 0


@pytest.mark.parametrize(("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_can_be_had_without(environment: dict[str, str], coloured: bool) -> None:
    screen = Screen("info", "/nowhere", **environment)
    shown = screen.wait_for("GGUF file")
    assert ("\x1b[1;31m" in shown) == coloured
    assert "error: " in shown
    assert screen.end() == 1


def test_stats_need_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(verb.screen, "print_table", lambda columns, rows, **_: shown.extend(rows))
    monkeypatch.setattr(verb.screen, "note", lambda text: None)
    size = {"format": "bf16", "bits_per_weight": 16.0, "bytes": 10}
    opened: Any = SimpleNamespace(
        size=lambda: size, seconds=1.0, isa="scalar", threads=1, read_bandwidth=1.0
    )
    verb.show_stats(opened, Timings(prompt_tokens=1, output_tokens=1, ttft=0.1, total=0.1))
    assert shown[0][-2:] == ("-", "-")

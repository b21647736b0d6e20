"""`lacewing run`: ask a model, once or in a conversation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from lacewing.cli import screen
from lacewing.cli.screen import KV_HELP
from lacewing.errors import RequestError

if TYPE_CHECKING:
    from lacewing.cli.opening import Opened
    from lacewing.engine import Piece, SamplingParams, Timings

_GREETING = "/exit or Ctrl-D ends, /clear forgets, Ctrl-C stops an answer"


def run(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Packed directory, Hugging Face directory or GGUF file. Default: the demo model, "
            "where installed.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Answer this and end.")
    ] = None,
    format: Annotated[
        str, typer.Option(help="Weight format; auto: the file's own grid, where it has one.")
    ] = "auto",
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 512,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answer.")] = None,
    threads: Annotated[int | None, typer.Option(help="Default: all usable cores.")] = None,
    kv: Annotated[str, typer.Option(help=KV_HELP)] = "f16",
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    raw: Annotated[bool, typer.Option(help="Continue the text, without chat template.")] = False,
    stats: Annotated[bool, typer.Option(help="Print a table of size and speed.")] = False,
) -> None:
    """Ask a model, or chat with it (without --prompt)."""
    if raw and system is not None:
        raise typer.BadParameter("--system needs the chat template, which --raw leaves out")
    from lacewing.engine import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    from lacewing.cli.opening import open_llm

    opened = open_llm(model, format, threads, kv)
    talk = Talk(opened, params, system, raw, stats)
    if prompt is not None:
        talk.answer(prompt)
    else:
        talk.converse()


@dataclass
class Talk:
    """A conversation: what has been said, and how to go on."""

    opened: Opened
    params: SamplingParams
    system: str | None
    raw: bool
    stats: bool

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def converse(self) -> None:
        """Reads lines until the end of input; Ctrl-C stops an answer, not the conversation."""
        if not self.raw:
            self.opened.llm.text.encode_chat([{"role": "user", "content": "?"}])  # has a template
        if sys.stdin.isatty():
            screen.note(f"{self.opened.path.name}: {_GREETING}")
        for line in _lines():
            if line.strip() in ("/exit", "/quit"):
                return
            if line.strip() == "/clear":
                self.clear()
                continue
            try:
                self.answer(line)
            except KeyboardInterrupt:
                screen.note(" (stopped)")
            except RequestError as error:
                screen.fail(str(error), error.hint or "/clear begins a new conversation")

    def answer(self, text: str) -> None:
        """Streams the answer to stdout. What was said stays said when it is interrupted."""
        said: list[str] = []
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            timings = self._stream(self._pieces(text), said)
        except RequestError:
            self.messages = before
            raise
        finally:
            if len(self.messages) > len(before):
                self.messages.append({"role": "assistant", "content": "".join(said)})
        if self.stats:
            show_stats(self.opened, timings)

    def _pieces(self, text: str) -> Iterator[Piece]:
        llm = self.opened.llm
        if self.raw:
            return llm.stream(text, self.params)
        return llm.stream_chat(self.messages, self.params)

    def _stream(self, pieces: Iterator[Piece], said: list[str]) -> Timings:
        reason, timings = None, None
        try:
            for piece in pieces:
                said.append(piece.text)
                screen.write(piece.text)
                reason, timings = piece.finish_reason, piece.timings
        finally:
            if not "".join(said).endswith("\n"):
                screen.write("\n")
        assert timings is not None, "the last piece has the timings"
        if reason == "length":
            screen.note(
                f"(ended after {timings.output_tokens} tokens: --max-tokens or the context)"
            )
        return timings


def _lines() -> Iterator[str]:
    """Lines of input that are not blank. Ctrl-C at the prompt drops the line."""
    while True:
        try:
            line = _ask()
        except KeyboardInterrupt:
            screen.note("\n(/exit or Ctrl-D ends)")
            continue
        except EOFError:
            if sys.stdin.isatty():
                screen.note("")
            return
        if line.strip():
            yield line


def _ask() -> str:
    """One line. The prompt is shown to a person only, and never on stdout when that is a file."""
    if not sys.stdin.isatty():
        return input()
    if sys.stdout.isatty():
        import readline  # noqa: F401  gives `input` its line editing and history

        return input(screen.prompt_text("> "))
    sys.stderr.write("> ")
    sys.stderr.flush()
    return input()


def show_stats(opened: Opened, timings: Timings) -> None:
    """The table under an answer, on stderr."""
    size = opened.size()
    rate = timings.tokens_per_second
    columns = (
        "format",
        "bits/weight",
        "bytes",
        "load s",
        "first token s",
        "tokens/s",
        "of memory",
    )
    row = (
        size["format"],
        f"{size['bits_per_weight']:.2f}",
        screen.bytes_text(size["bytes"]),
        f"{opened.seconds:.2f}",
        f"{timings.ttft:.3f}",
        f"{rate:.1f}" if rate else "-",
        f"{opened.share(rate):.0%}" if rate else "-",
    )
    screen.print_table(columns, [row], gap=True, stderr=True)
    screen.note(
        f"{opened.isa}, {opened.threads} threads, {timings.prompt_tokens} prompt tokens, "
        f"{timings.output_tokens} tokens out; of memory: bytes read per second against the "
        f"{opened.read_bandwidth:.1f} GB/s that this machine reads"
    )

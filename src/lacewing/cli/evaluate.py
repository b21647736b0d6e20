"""`lacewing eval`: how well a model predicts a text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lacewing.cli import screen
from lacewing.cli.screen import KV_HELP
from lacewing.errors import RequestError

if TYPE_CHECKING:
    from lacewing.engine import LLM


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(help="Default: the demo model, where installed.", show_default=False),
    ] = None,
    perplexity: Annotated[
        Path, typer.Option(help="Text file (UTF-8) to predict.", show_default=False)
    ] = ...,  # type: ignore[assignment]  # typer's mark of an option that must be given
    window: Annotated[int, typer.Option(min=2, help="Tokens predicted from nothing.")] = 2048,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many scored tokens.")
    ] = None,
    format: Annotated[
        str, typer.Option(help="Weight format; auto: the file's own grid, where it has one.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(help="Default: all usable cores.")] = None,
    kv: Annotated[str, typer.Option(help=KV_HELP)] = "f16",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Perplexity of a text.

    The text is cut into windows that do not overlap, each read from an empty context: a window of
    2048 tokens scores its last 2047. Where the model wants a beginning-of-sequence token, every
    window begins with it (2047 tokens of text, all of them scored). A last window that is not full
    is left out, unless it is the only one.
    """
    text = _read(perplexity)
    from lacewing.cli.opening import open_llm

    opened = open_llm(model, format, threads, kv, max_context=window)
    pieces = windows(opened.llm, text, window, max_tokens)
    losses: list[float] = []
    count = 0
    with screen.progress("scoring") as advance:
        for index, piece in enumerate(pieces):
            scores = opened.llm.score(piece)[: None if max_tokens is None else max_tokens - count]
            losses.append(-float(scores.sum(dtype="float64")))
            count += len(scores)
            advance(index + 1, len(pieces), f"perplexity {math.exp(sum(losses) / count):.3f}")
    value = math.exp(sum(losses) / count)
    found = {
        "model": str(opened.path),
        **opened.size(),
        "perplexity": value,
        "scored_tokens": count,
        "windows": len(pieces),
        "window": window,
    }
    if as_json:
        screen.print_json(screen.to_plain(found))
        return
    screen.print_pairs(
        [
            ("model", opened.path.name),
            ("format", f"{found['format']}, {found['bits_per_weight']:.2f} bits per weight"),
            ("perplexity", f"{value:.4f}"),
            ("scored tokens", f"{count:,} in {len(pieces)} windows of {window}"),
        ]
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path}: needs UTF-8 text, got byte 0x{error.object[error.start]:02x} at {error.start}"
        ) from None


def windows(llm: LLM, text: str, window: int, max_tokens: int | None) -> list[list[int]]:
    """The token windows that score `text`, as `evaluate` says. Raises RequestError."""
    first = llm.text.encode("")  # the beginning-of-sequence token, where the model wants one
    ids = llm.text.encode(text, add_special=False)
    if len(ids) < 2:
        raise RequestError(f"the text must have at least 2 tokens, got {len(ids)}")
    step = window - len(first)
    found = list(_cut(ids, step)) or [ids]
    if max_tokens is not None:
        found = found[: -(-max_tokens // (window - 1))]
    return [first + piece for piece in found]


def _cut(ids: list[int], step: int) -> Iterator[list[int]]:
    for start in range(0, len(ids) - step + 1, step):
        yield ids[start : start + step]

"""What the verbs share on the terminal: consoles, tables, units, the progress bar, errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# Tables that are piped into a file are not cut to the width of a terminal that is not there.
_PIPED_WIDTH = 240


def console(*, stderr: bool = False) -> Console:
    """A console on stdout (data) or stderr (the rest); colours only on a terminal."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(
        file=stream, highlight=False, width=None if stream.isatty() else _PIPED_WIDTH, markup=False
    )


def fail(message: str, hint: str | None = None) -> int:
    """Prints `error:` and `hint:` on stderr; returns the exit status 1."""
    err = console(stderr=True)
    err.print("error: ", style="bold red", end="", soft_wrap=True)
    err.print(safe(message), soft_wrap=True)
    if hint:
        err.print("hint: ", style="bold cyan", end="", soft_wrap=True)
        err.print(safe(hint), soft_wrap=True)
    return 1


def write(text: str) -> None:
    """A piece of an answer to stdout, at once."""
    sys.stdout.write(safe(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


# A model, or a file that names its tensors, must not steer the reader's terminal.
_CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if code not in (9, 10)}


def safe(text: str) -> str:
    """`text` without control characters (escape sequences among them) but tab and newline."""
    return text.translate(_CONTROLS)


def prompt_text(text: str) -> str:
    """The prompt of `input`, bold where the terminal has colours (the marks are for readline)."""
    if console().color_system is None:
        return text
    return f"\x01\x1b[1m\x02{text}\x01\x1b[0m\x02"


def note(message: str) -> None:
    """One line on stderr that is no error."""
    console(stderr=True).print(safe(message), style="dim", soft_wrap=True)


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    gap: bool = False,
    stderr: bool = False,
) -> None:
    """A table, below an empty line if `gap`; columns of numbers are aligned to the right."""
    from rich import box
    from rich.table import Table

    out = console(stderr=stderr)
    lines = [[safe(str(cell)) for cell in row] for row in rows]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, width in enumerate(_least_widths(columns, lines, out.width)):
        numbers = index > 0 and all(line[index][:1] in "0123456789-+<" for line in lines)
        table.add_column(
            columns[index],
            justify="right" if numbers else "left",
            overflow="fold",
            min_width=width,
            header_style="bold",
        )
    for line in lines:
        table.add_row(*line)
    if gap:
        print(file=out.file)
    _show(table, out)


def _least_widths(
    columns: Sequence[str], lines: Sequence[Sequence[str]], room: int
) -> list[int | None]:
    """How far each column may shrink: to its longest word of the header, or where that is too
    much, to its cells, so that figures are never broken. None: as far as it has to."""
    cells = [max((len(line[i]) for line in lines), default=0) for i in range(len(columns))]
    words = [max(len(word) for word in (column or " ").split(" ")) for column in columns]
    whole = [max(pair) for pair in zip(cells, words, strict=True)]
    for widths in (whole, cells):
        if sum(widths) + 3 * (len(widths) - 1) <= room:
            return list(widths)
    return [None] * len(columns)


def print_pairs(pairs: Iterable[tuple[str, object]], *, stderr: bool = False) -> None:
    """Name and value, a line each."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        grid.add_row(name, safe(str(value)))
    _show(grid, console(stderr=stderr))


def _show(table: RenderableType, out: Console) -> None:
    if out.is_terminal:
        out.print(table)
        return
    with out.capture() as text:
        out.print(table)
    lines = [line.rstrip() for line in text.get().splitlines()]
    out.file.write("\n".join([*lines, ""]))


class Advance(Protocol):
    def __call__(self, done: float, total: float, text: str = "") -> None: ...


@contextmanager
def progress(title: str, period: float = 30.0) -> Iterator[Advance]:
    """A bar on stderr that goes away when done; silent where stderr is no terminal.

    Yields `advance(done, total, text)`; `done` and `total` are in any one unit. period: seconds
    over which the speed is averaged, to say what time is left.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn(title),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[text]}", style="dim"),
        console=console(stderr=True),
        transient=True,
        speed_estimate_period=period,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task("", total=None, text="")

        def advance(done: float, total: float, text: str = "") -> None:
            bar.update(task, completed=done, total=total, text=text)

        yield advance


def bytes_text(count: float) -> str:
    """`98.4 MB`: decimal units, three digits."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 1000 else f"{count:.0f} GB"


_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_bytes(text: str) -> int:
    """`1.2G`, `98M`, `4096`, `1.5 GB` in bytes. Raises ValueError."""
    body = text.strip().upper().removesuffix("B").strip()
    suffix = body[-1:] if body[-1:] in "KMGT" else ""
    count = float(body.removesuffix(suffix)) * _SUFFIXES[suffix]
    if not 0 < count < 1e18:
        raise ValueError(text)
    return int(count)


def to_plain(value: Any) -> Any:
    """Makes numpy numbers and tuples printable as JSON."""
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value


KV_HELP = "KV cache: f16, bf16, f32, int8, int4; to read less: topk:1/16, plan:FILE, merge:0.2."

"""`lacewing`: the verbs, and how an error leaves the program.

Data goes to stdout, everything else to stderr. Exit status: 0 done, 1 an error (`error:` and
`hint:` lines), 2 a wrong command line, 130 interrupted.
"""

from __future__ import annotations

import sys
from typing import Annotated, cast

import typer

from lacewing.cli import (
    bench,
    calibratekv,
    compress,
    diff,
    doctor,
    evaluate,
    heal,
    info,
    run,
    screen,
)
from lacewing.errors import LacewingError

app = typer.Typer(
    name="lacewing",
    help="Small, fast language models on ordinary CPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(short_help="Ask a model, or chat with it.")(run.run)
app.command(short_help="Round and pack a model.")(compress.compress)
app.command(short_help="Let a compressed model learn from the dense one.")(heal.heal)
app.command(name="calibrate-kv", short_help="Find what of the KV cache is read.")(
    calibratekv.calibrate_kv
)
app.command(short_help="What is inside a model.")(info.info)
app.command(name="eval", short_help="Judge a model: text, items, reference.")(evaluate.evaluate)
app.command(short_help="Two models side by side.")(diff.diff)
app.add_typer(bench.app, name="bench", short_help="Measure speed.")
app.command(short_help="What this machine offers.")(doctor.doctor)

# typer carries its own copy of click from some version on; this is that copy's usage error.
_UsageError = cast("type[Exception]", typer.BadParameter.__base__)


def _version(value: bool) -> None:
    if value:
        from lacewing import __version__

        print(f"lacewing {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Small, fast language models on ordinary CPUs."""


def _attempt(arguments: list[str] | None) -> int:
    try:
        status = app(arguments, prog_name="lacewing", standalone_mode=False)
    except LacewingError as error:
        return screen.fail(str(error), error.hint)
    except _UsageError as error:
        return _misuse(error)
    except MemoryError:
        return screen.fail(
            "not enough memory", "use a format of fewer bits, e.g. --format w4a8g32z"
        )
    except OSError as error:
        return screen.fail(f"{error.strerror or error}: {error.filename or 'input or output'}")
    except (KeyboardInterrupt, typer.Abort):
        return 130
    return status if isinstance(status, int) else 0


def _misuse(error: Exception) -> int:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "lacewing"
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    if not message:  # no verb was given: the help has been printed
        return 2
    screen.fail(message[0].lower() + message[1:].rstrip("."), f"{command} --help")
    return 2


def main(arguments: list[str] | None = None) -> None:
    """Runs one command line (default: the process's own) and exits."""
    sys.exit(_attempt(arguments))


if __name__ == "__main__":
    main()

"""`lacewing compress`: any model file into a packed directory, or one that others open, without
calibration data or, with a recipe (`calibrated.py`), with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lacewing.cli import calibrated, screen

if TYPE_CHECKING:
    from lacewing.checkpoint import Report

_KINDS = ("lacewing", "compressed-tensors")


def compress(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Hugging Face directory, GGUF file or packed.")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Directory to make.")],
    format: Annotated[
        str, typer.Option(help="Weight format; auto: the file's own grid, where it has one.")
    ] = "auto",
    sparsity: Annotated[
        float | None, typer.Option(help="Share of the weights to prune by magnitude, in [0, 1).")
    ] = None,
    head_format: Annotated[
        str | None,
        typer.Option(help="Format of embedding and head.", show_default="8 bits, or as --format"),
    ] = None,
    machine: Annotated[
        str | None,
        typer.Option(
            help="avx512, avx2 or scalar: where a sparse format must be faster than a dense one.",
            show_default="this one",
        ),
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            "--as", help="What OUT is: lacewing, or compressed-tensors for others to open."
        ),
    ] = _KINDS[0],
    recipe: Annotated[
        str | None,
        typer.Option(help="Calibrate: safe, balanced, small, sparse50, or a YAML file."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Text to calibrate on, .txt or .jsonl; any number."),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="Tokens of it.", show_default="the recipe's")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Which of them.", show_default="the recipe's")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate bytes, memory and time; write nothing.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget the finished blocks of an earlier run.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prune and round a model, and pack it into a directory that is mapped and run as it is.

    OUT appears complete or not at all.
    """
    if recipe is not None:
        _check_recipe_alone(format, sparsity, head_format, kind)
        calibrated.compress(
            source,
            out,
            recipe,
            data or [],
            as_json,
            seed=seed,
            tokens=calibration_tokens,
            force=force,
            restart=restart,
            dry_run=dry_run,
            machine=machine,
        )
        return
    _check_no_calibration(data, calibration_tokens, seed, dry_run, restart)
    _round(source, out, format, sparsity, head_format, machine, kind, force, as_json)


def _check_recipe_alone(
    format: str,
    sparsity: float | None,
    head_format: str | None,
    kind: str,
) -> None:
    for option, given in (
        ("--format", format != "auto"),
        ("--sparsity", sparsity is not None),
        ("--head-format", head_format is not None),
    ):
        if given:
            raise typer.BadParameter("the recipe says it: give it a rule", param_hint=option)
    if kind != _KINDS[0]:
        raise typer.BadParameter(
            f"a recipe makes a directory of {_KINDS[0]}; compress that one once more",
            param_hint="--as",
        )


def _check_no_calibration(
    data: list[str] | None,
    calibration_tokens: int | None,
    seed: int | None,
    dry_run: bool,
    restart: bool,
) -> None:
    for option, given in (
        ("--data", bool(data)),
        ("--calibration-tokens", calibration_tokens is not None),
        ("--seed", seed is not None),
        ("--dry-run", dry_run),
        ("--restart", restart),
    ):
        if given:
            raise typer.BadParameter("needs a --recipe", param_hint=option)


def _round(
    source: str,
    out: str,
    format: str,
    sparsity: float | None,
    head_format: str | None,
    machine: str | None,
    kind: str,
    force: bool,
    as_json: bool,
) -> None:
    """To the nearest codes, without data."""
    import time

    from lacewing.cli.opening import dense_instead, found_zeros, roundings
    from lacewing.native import check_isa, compiled

    _check_kind(kind, head_format)
    check_isa()
    target = machine or compiled().default_isa()
    start = time.perf_counter()
    with screen.progress(f"packing {Path(source).name}") as advance:
        write = _writer(kind, head_format)
        reports = write(
            source,
            out,
            format,
            sparsity=sparsity,
            force=force,
            machine=target,
            progress=lambda name, done, total: advance(done, total, name),
        )
    seconds = time.perf_counter() - start
    rows = roundings(reports)
    if as_json:
        found = {
            "out": out,
            "seconds": seconds,
            "machine": target,
            "formats": [row.as_dict() for row in rows],
            "dense_instead": dense_instead(reports),
            "found_zeros": found_zeros(reports),
        }
        screen.print_json(found)
        return
    screen.print_table(
        ("from", "to", "tensors", "bits/weight", "bytes", "added error", "at most"),
        [
            (
                row.source,
                row.format,
                row.tensors,
                f"{row.bits_per_weight:.2f}",
                screen.bytes_text(row.bytes),
                "exact" if row.exact else f"{row.error:.2%}",
                "exact" if row.exact else f"{row.worst:.2%}",
            )
            for row in rows
        ],
    )
    _note_zeros(reports, target)
    total = screen.bytes_text(sum(row.bytes for row in rows))
    opens = f"Run it: lacewing run {out}"
    if kind != _KINDS[0]:
        opens += ". Others open it with compressed-tensors"
    screen.note(f"{out}: {total} in {seconds:.1f} s. {opens}")


def _check_kind(kind: str, head_format: str | None) -> None:
    if kind not in _KINDS:
        raise typer.BadParameter(f"'{kind}' is not one of {', '.join(_KINDS)}", param_hint="--as")
    if kind != _KINDS[0] and head_format is not None:
        raise typer.BadParameter(
            "embedding and head stay floats in compressed-tensors", param_hint="--head-format"
        )


def _writer(kind: str, head_format: str | None) -> Callable[..., list[Report]]:
    from lacewing.checkpoint import write_compressed_tensors, write_packed

    if kind != _KINDS[0]:
        return write_compressed_tensors
    return partial(write_packed, head_format=head_format)


def _note_zeros(reports: list[Report], machine: str) -> None:
    """What became of weights because so many of them are zero, or too few."""
    from lacewing.cli.opening import found_zeros, note_dense

    note_dense(reports, machine)
    for row in found_zeros(reports):
        screen.note(
            f"{row['tensors']} tensors have zeros in them and are {row['format']}: {row['zeros']}"
        )

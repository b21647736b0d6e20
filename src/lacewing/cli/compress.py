"""`lacewing compress`: any model file into a packed directory, or one that others open, without
calibration data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lacewing.cli import screen

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
    force: Annotated[bool, typer.Option("--force", help="Replace an existing OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prune and round a model, and pack it into a directory that is mapped and run as it is.

    OUT appears complete or not at all.
    """
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
    from lacewing.cli.opening import dense_instead, found_zeros

    for row in dense_instead(reports):
        screen.note(
            f"{row['tensors']} tensors are {row['format']} instead of {row['instead_of']}: up to"
            f" {row['density']:.0%} of their weights are not zero, too many to pay on {machine}"
        )
    for row in found_zeros(reports):
        screen.note(
            f"{row['tensors']} tensors have zeros in them and are {row['format']}: {row['zeros']}"
        )

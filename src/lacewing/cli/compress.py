"""`lacewing compress`: any model file into a packed directory, without calibration data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lacewing.cli import screen


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
    force: Annotated[bool, typer.Option("--force", help="Replace an existing OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prune and round a model, and pack it into a directory that is mapped and run as it is.

    OUT appears complete or not at all.
    """
    import time

    from lacewing.checkpoint import write_packed
    from lacewing.cli.opening import dense_instead, roundings
    from lacewing.native import check_isa, compiled

    check_isa()
    target = machine or compiled().default_isa()
    start = time.perf_counter()
    with screen.progress(f"packing {Path(source).name}") as advance:
        reports = write_packed(
            source,
            out,
            format,
            sparsity=sparsity,
            head_format=head_format,
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
    for row in dense_instead(reports):
        screen.note(
            f"{row['tensors']} tensors are {row['format']} instead of {row['instead_of']}: up to"
            f" {row['density']:.0%} of their weights are not zero, too many to pay on {target}"
        )
    total = screen.bytes_text(sum(row.bytes for row in rows))
    screen.note(f"{out}: {total} in {seconds:.1f} s. Run it: lacewing run {out}")

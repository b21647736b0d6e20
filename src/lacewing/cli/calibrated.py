"""`lacewing compress --recipe`: with calibration, block by block."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lacewing.cli import screen

if TYPE_CHECKING:
    from lacewing.compress.estimate import Estimate
    from lacewing.compress.run import Compression
    from lacewing.compress.session import LayerReport

__all__ = ["compress"]

_PERIOD = 3600.0
"""Seconds over which the speed is estimated: a layer alone may take a minute."""


def compress(
    source: str,
    out: str,
    recipe: str,
    data: Sequence[str],
    as_json: bool,
    machine: str | None,
    **options: Any,
) -> None:
    """machine: None is this one. options: as `lacewing.compress` has them."""
    from lacewing import compress as run
    from lacewing.native import check_isa, compiled

    check_isa()
    target = machine or compiled().default_isa()
    with screen.progress("compressing", period=_PERIOD) as advance:
        try:
            found: Any = run(
                source,
                out,
                recipe,
                data,
                progress=lambda name, done, total: advance(done, total, name),
                machine=target,
                **options,
            )
        except KeyboardInterrupt:
            if Path(f"{os.path.realpath(out)}.work").is_dir():
                screen.note("finished blocks are kept: the same command goes on from there")
            raise
    if options.get("dry_run"):
        _print_estimate(found, as_json)
    else:
        _print_result(found, out, as_json)


def _print_estimate(found: Estimate, as_json: bool) -> None:
    if as_json:
        screen.print_json(asdict(found))
        return
    screen.print_pairs(
        [
            ("output", screen.bytes_text(found.nbytes)),
            ("bits per weight", f"{found.bits_per_weight:.2f}"),
            ("memory", f"about {screen.bytes_text(found.memory)}"),
            ("work directory", screen.bytes_text(found.disk)),
            ("calibration", f"{found.windows} windows of {found.window} tokens"),
            ("time", f"about {_time_text(found.seconds)}"),
        ]
    )


def _print_result(found: Compression, out: str, as_json: bool) -> None:
    from lacewing.cli.opening import note_dense

    if as_json:
        screen.print_json(_as_dict(found, out))
        return
    screen.print_table(
        ("layers", "format", "solver", "count", "zeros", "bits/weight", "error", "at most"),
        [_row(*group) for group in _groups(found.layers)],
    )
    for layer in found.layers:
        if layer.damping:
            screen.note(f"{layer.name}: {layer.damping}")
    note_dense((*found.layers, *found.others), found.record["machine"])
    data = found.record["data"]
    if data["tokens"]:
        screen.note(f"calibrated on {data['tokens']:,} tokens, seed {data['seed']}")
    for said in found.record["notes"]:
        screen.note(said)
    size = f"{screen.bytes_text(found.nbytes)}, {found.bits_per_weight:.2f} bits per weight"
    took = _time_text(found.seconds)
    screen.note(f"{out}: {size} in {took}. Run it: lacewing run {out}")


def _as_dict(found: Compression, out: str) -> dict[str, Any]:
    return {
        "out": out,
        "seconds": found.seconds,
        "bytes": found.nbytes,
        "bits_per_weight": found.bits_per_weight,
        **found.record,
        "others": [
            {"name": other.name, "format": other.format, "error": other.error}
            for other in found.others
        ],
    }


_Group = tuple[tuple[str, str, str], list["LayerReport"]]


def _groups(layers: Sequence[LayerReport]) -> list[_Group]:
    """Layers of the same kind in all blocks, such as `mlp.down_proj`, in the order of a block."""

    def kind(layer: LayerReport) -> tuple[str, str, str]:
        return layer.name.split(".", 3)[-1], layer.format, layer.solver

    order = {key: i for i, key in reversed(list(enumerate(map(kind, layers))))}
    ordered = sorted(layers, key=lambda layer: order[kind(layer)])
    return [(key, list(group)) for key, group in groupby(ordered, kind)]


def _row(kind: tuple[str, str, str], group: Sequence[LayerReport]) -> tuple[object, ...]:
    def mean(key: str) -> float:
        return float(sum(getattr(layer, key) for layer in group) / len(group))

    worst = max(layer.error for layer in group)
    bits = f"{mean('bits_per_weight'):.2f}"
    return (
        *kind,
        len(group),
        f"{mean('sparsity'):.0%}",
        bits,
        f"{mean('error'):.2%}",
        f"{worst:.2%}",
    )


def _time_text(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""`lacewing calibrate-kv`: what of the KV cache a model's heads read, found on text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lacewing.cli import screen
from lacewing.errors import LacewingError

if TYPE_CHECKING:
    from lacewing.checkpoint.kvplan import Span
    from lacewing.compress.calibrate_kv import Found

_PERIOD = 3600.0
"""Seconds over which the speed is estimated: a layer alone may take a minute."""


def calibrate_kv(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hugging Face directory, GGUF file or packed.")
    ],
    data: Annotated[
        list[Path], typer.Option(metavar="FILE", help="Text, or JSONL; may be repeated.")
    ] = ...,  # type: ignore[assignment]  # typer's mark of an option that must be given
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The plan to write.",
            show_default="kvplan.json in a packed directory",
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Find spans that keep this share of the dense cache.", show_default="labels only"
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Of the text, in all.")] = 8192,
    window: Annotated[
        int, typer.Option(help="Tokens read in one piece, at most the model's context.")
    ] = 4096,
    seed: Annotated[int, typer.Option(min=0, help="Which of the text.")] = 0,
    labels: Annotated[
        int | None,
        typer.Option(
            metavar="R", help="Label channels per head, a multiple of 4.", show_default="a quarter"
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of PyTorch.", show_default="all usable cores")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing plan.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find out what of the KV cache each head needs: label channels for `kv="topk:1/16"` and, with
    a budget, spans for `kv="plan:FILE"`.

    The plan appears whole or not at all. The model is not changed.
    """
    try:
        from lacewing.compress.calibrate_kv import calibrate_kv as run
    except ImportError as error:
        raise LacewingError(
            f"`lacewing calibrate-kv` needs PyTorch: {error}", hint="pip install 'lacewing[torch]'"
        ) from error

    with screen.progress(f"calibrating {Path(model).name}", period=_PERIOD) as advance:
        found = run(
            model,
            data,
            out,
            budget=budget,
            tokens=tokens,
            window=window,
            seed=seed,
            labels=labels,
            threads=threads,
            force=force,
            progress=lambda text, done, total: advance(done, total, text),
        )
    if as_json:
        screen.print_json(_as_dict(found))
    else:
        _show(found)


def _as_dict(found: Found) -> dict[str, object]:
    plan = found.plan
    return {
        "out": str(found.path),
        "seconds": found.seconds,
        "model": plan.model,
        "labels": 0 if plan.labels is None else plan.labels.channels.shape[2],
        "share": found.share,
        "loss": found.loss,
        "spans": plan.to_dict().get("spans"),
        "notes": plan.notes,
    }


def _show(found: Found) -> None:
    plan = found.plan
    if plan.spans is not None:
        heads = range(len(plan.spans[0]))
        windows = found.windows
        screen.print_table(
            ("layer", *(f"head {head}" for head in heads)),
            [
                (index, *((f"own {window}",) * len(heads) if window else map(str, spans)))
                for index, (spans, window) in enumerate(zip(plan.spans, windows, strict=True))
            ],
        )
        screen.note(_counted([s for layer in plan.spans for s in layer]))
        kept = f"{found.share:.1%} of the dense cache at {found.window:,} tokens"
        screen.note(f"spans keep {kept}, at a loss of about {found.loss:.4f} nats per token")
    if plan.labels is not None:
        screen.note(f"labels: {plan.labels.channels.shape[2]} channels of each head's keys")
    tokens = f"{plan.notes['tokens']:,} tokens, seed {plan.notes['seed']}"
    screen.note(f"{found.path}: calibrated on {tokens}, in {found.seconds:.0f} s")


def _counted(spans: list[Span]) -> str:
    """`12 heads read all, 40 read 16+64, ..`"""
    counts = Counter(spans).items()
    ordered = sorted(counts, key=lambda item: item[0].window or 1 << 40)
    return "heads: " + ", ".join(f"{count} of {span}" for span, count in ordered)

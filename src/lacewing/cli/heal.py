"""`lacewing heal`: a compressed model learns from the dense one it was made of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lacewing.cli import screen
from lacewing.errors import LacewingError

if TYPE_CHECKING:
    from lacewing.compress.heal import Healed

_MINUTES = 20.0


def heal(
    compressed: Annotated[str, typer.Argument(metavar="COMPRESSED", help="Packed directory.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Directory to make.")],
    dense: Annotated[
        str, typer.Option(metavar="SRC", help="The model that was compressed.", show_default=False)
    ] = ...,  # type: ignore[assignment]  # typer's mark of an option that must be given
    data: Annotated[
        list[Path], typer.Option(metavar="FILE", help="Text, or JSONL; may be repeated.")
    ] = ...,  # type: ignore[assignment]
    minutes: Annotated[
        float | None,
        typer.Option(help="How long.", show_default=f"{_MINUTES:.0f}, without --steps"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="How many steps instead; reproducible.", show_default=False)
    ] = None,
    lora: Annotated[
        int | None,
        typer.Option(
            metavar="RANK",
            help="Train low-rank changes: less memory.",
            show_default="every weight",
        ),
    ] = None,
    rate: Annotated[
        float,
        typer.Option(help="Largest change of a weight per step, as a share of a typical weight."),
    ] = 5e-4,
    tokens: Annotated[int, typer.Option(help="Tokens of one step.")] = 1024,
    window: Annotated[int, typer.Option(help="Tokens read in one piece.")] = 512,
    scales: Annotated[bool, typer.Option(help="Train the scales of groups too.")] = True,
    mix: Annotated[
        float, typer.Option(help="Share of the text's own next tokens in what is learned.")
    ] = 0.0,
    bf16: Annotated[
        bool, typer.Option(help="Multiply in bf16: faster where the CPU has it.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Order of the text.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of PyTorch.", show_default="all usable cores")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train a compressed model on the dense one's predictions. Pruned weights stay pruned, formats
    stay what they are, bytes stay what they were (sparse formats may lose some).

    OUT appears complete or not at all. An interrupted run goes on when it is started again.
    """
    from dataclasses import asdict

    if minutes is not None and steps is not None:
        raise typer.BadParameter("give --minutes or --steps, not both")
    try:
        from lacewing.compress.heal import Healing
        from lacewing.compress.heal import heal as run
    except ImportError as error:
        raise LacewingError(
            f"`lacewing heal` needs PyTorch: {error}", hint="pip install 'lacewing[torch]'"
        ) from error

    healing = Healing(
        steps=steps,
        minutes=_MINUTES if steps is None and minutes is None else minutes,
        rate=rate,
        tokens=tokens,
        lora_rank=lora,
        learn_scales=scales,
        mix=mix,
        seed=seed,
        bf16=bf16,
    )
    with screen.progress(f"healing {Path(compressed).name}") as advance:
        found = run(
            compressed,
            dense,
            out,
            data,
            healing,
            window=window,
            threads=threads,
            force=force,
            progress=lambda share, text: advance(share, 1.0, text),
        )
    if as_json:
        screen.print_json({"out": out, **asdict(found), "helped": found.helped})
        return
    _show(out, found)


def _show(out: str, found: Healed) -> None:
    screen.print_pairs(
        [
            ("KL before", f"{found.before:.4f} nats per token, held-out text"),
            ("KL after", f"{found.after:.4f}"),
            ("steps", f"{found.steps_done:,}"),
            ("tokens", f"{found.tokens_seen:,} in {found.seconds:.0f} s"),
        ]
    )
    if not found.steps_done:
        screen.note(f"{out}: no step fitted: it is the model as it was. Give more --minutes")
    elif found.helped:
        screen.note(f"{out}: run it with `lacewing run {out}`")
    else:
        screen.note(f"{out}: healing did not help: it is the model as it was. Try another --rate")

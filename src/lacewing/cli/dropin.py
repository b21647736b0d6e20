"""What `lacewing bench torch` prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lacewing.cli import screen
from lacewing.errors import LacewingError

if TYPE_CHECKING:
    from lacewing.nn.compare import Comparison


def measure(
    name: str,
    format: str,
    sparsity: float | None,
    options: Mapping[str, Any],
    dtype: str,
    work: Mapping[str, int],
    rounds: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Opens the model, compares, and prints tables, or JSON."""
    try:
        from lacewing.nn import compare, opening
    except ImportError as error:
        raise LacewingError(
            f"`lacewing bench torch` needs PyTorch: {error}", hint="pip install 'lacewing[torch]'"
        ) from error
    opening.set_threads(threads)
    with screen.progress("comparing") as advance:
        model, runs = opening.open_model(name, dtype, opening.Work(**work))
        found = compare.compare(
            model,
            runs,
            format,
            rounds=rounds,
            progress=lambda what, done, total: advance(done, total, what),
            sparsity=sparsity,
            **options,
        )
    if as_json:
        screen.print_json({"model": name, "dtype": dtype, "format": format, **found.to_dict()})
        return
    _show(found, dtype)


def _show(found: Comparison, dtype: str) -> None:
    times = (f"{dtype} ms", "packed ms", "gain")
    screen.print_table(("run", *times, "spread", "in layers ms"), list(_runs(found)))
    screen.print_table(
        ("outputs of", "error", "cosine", "same choice"), list(_outputs(found)), gap=True
    )
    for each in found.timings:
        rows = list(_layers(found, each.run))
        screen.print_table((f"layers in {each.run}", "weight", "format", *times), rows, gap=True)
    before, after = found.dense_bytes, found.replaced_bytes
    layers, left = len(found.report.replaced), len(found.report.left_alone)
    screen.note(
        f"{layers} layers replaced in {found.replacing_seconds:.1f} s, {left} left alone;"
        f" the whole model {before / 1e6:.0f} -> {after / 1e6:.0f} MB;"
        f" {found.threads} threads; times of layers are of one run and include its hooks"
    )


def _runs(found: Comparison) -> Iterator[tuple[str, ...]]:
    for each in found.timings:
        spread = max(each.dense_spread, each.replaced_spread)
        yield (
            each.run,
            f"{each.dense * 1e3:.1f}",
            f"{each.replaced * 1e3:.1f}",
            f"{each.speedup:.2f}x",
            f"{spread:.0%}",
            f"{each.dense_layers * 1e3:.1f} / {each.replaced_layers * 1e3:.1f}",
        )


def _outputs(found: Comparison) -> Iterator[tuple[str, ...]]:
    for each in found.timings:
        yield (
            each.run,
            "-" if each.error is None else f"{each.error:.2%}",
            "-" if each.cosine is None else f"{each.cosine:.4f}",
            f"{each.agreement:.1%}",
        )


def _layers(found: Comparison, run: str) -> Iterator[tuple[str, ...]]:
    for layer in found.by_place():
        if layer.run != run:
            continue
        shape = "x".join(str(length) for length in layer.shape)
        yield (
            layer.name,
            f"{layer.count} x {shape}",
            layer.format,
            f"{layer.dense * 1e3:.2f}",
            f"{layer.replaced * 1e3:.2f}",
            f"{layer.dense / layer.replaced:.2f}x" if layer.replaced else "-",
        )

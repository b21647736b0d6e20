"""`lacewing info`: what is inside a model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lacewing.cli import screen

# What a reader wants of a config first; `--json` has all of it.
_CONFIG_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "sliding_window",
    "tie_word_embeddings",
)


def info(
    model: Annotated[
        str | None,
        typer.Argument(metavar="DIR|FILE", help="Default: the demo model.", show_default=False),
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what is inside a model: architecture, tensors, formats, sizes. Reads no weights."""
    from lacewing.checkpoint import describe

    if model is None:
        from lacewing.engine import default_model

        model = str(default_model())
    found = describe(model)
    if as_json:
        screen.print_json(found)
        return
    screen.print_pairs(_head(found))
    for note in found["notes"]:
        screen.note(note)
    rows = [(row["format"], row["tensors"], *_size(row)) for row in found["formats"]]
    screen.print_table(("format", "tensors", "weights", "bits/weight", "bytes"), rows, gap=True)
    if tensors:
        screen.print_table(
            ("tensor", "format", "shape", "weights", "bits/weight", "bytes"),
            [
                (row["name"], row["format"], "x".join(map(str, row["shape"])), *_size(row))
                for row in found["tensors"]
            ],
            gap=True,
        )


def _head(found: dict[str, Any]) -> list[tuple[str, object]]:
    config = found["config"] or {}
    pairs: list[tuple[str, object]] = [
        ("path", found["path"]),
        ("kind", found["kind"]),
        ("architecture", found["architecture"] or "not named"),
        ("runs here", "yes" if found["runnable"] else f"no: {found['problem']}"),
        *((key, config[key]) for key in _CONFIG_KEYS if config.get(key) is not None),
    ]
    if found["weights"]:
        pairs.append(("weights", f"{found['weights']:,}"))
        size = (
            f"{screen.bytes_text(found['bytes'])}, {found['bits_per_weight']:.2f} bits per weight"
        )
        pairs.append(("size", size))
    return pairs + _recipe(found.get("recipe"))


def _recipe(record: Any) -> list[tuple[str, object]]:
    """How the model was compressed, as far as the file says it in the expected words."""
    from lacewing.checkpoint.files import shown

    record = record if isinstance(record, dict) else {}
    recipe, data = record.get("recipe"), record.get("data")
    pairs: list[tuple[str, object]] = []
    if isinstance(recipe, dict) and isinstance(recipe.get("rules"), list):
        name = recipe.get("name")
        pairs.append(("recipe", shown(name) if name else f"{len(recipe['rules'])} rules"))
    if isinstance(data, dict) and isinstance(data.get("files"), list) and data["files"]:
        names = [file.get("name") for file in data["files"] if isinstance(file, dict)]
        said = f"{data.get('tokens')} tokens of {', '.join(map(shown, names))}"
        pairs.append(("calibrated on", f"{said}, seed {data.get('seed')}"))
    return pairs


def _size(row: dict[str, Any]) -> tuple[str, str, str]:
    bits = row["bits_per_weight"]
    return (
        f"{row['weights']:,}",
        "-" if bits is None else f"{bits:.2f}",
        screen.bytes_text(row["bytes"]),
    )

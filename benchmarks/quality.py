"""Perplexity of a model in every format: `python benchmarks/quality.py TEXT [MODEL]`.

`lacewing eval` on the first 61,410 scored tokens of TEXT in windows of 2048, as the figures of the
documentation are made (TEXT: WikiText-2's wiki.test.raw). `auto` is the file's own grid.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import harness
import models

FORMATS = ["bf16", "w8a8g32", "w8a8g64", "w5a8g32z", "w4a8g32z", "w4a8g32", "w4a8g64"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity per format.")
    parser.add_argument("text", type=Path)
    parser.add_argument("model", nargs="?", help="default: SmolLM2-135M")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--max-tokens", type=int, default=61_410)
    parser.add_argument("--window", type=int, default=2048)
    harness.add_common_arguments(parser)
    args = parser.parse_args()
    source = Path(args.model) if args.model else models.demo_model()
    found = []
    for format in args.formats:
        found.append(evaluate(source, format, args))
        harness.progress(f"{format}: {found[-1]['perplexity']:.4f}")
    show(found)
    if not args.no_save:
        record = {"label": args.label or source.stem, "text": args.text.name, "formats": found}
        print("saved", harness.save("quality", record, args.threads))


def evaluate(source: Path, format: str, args: argparse.Namespace) -> dict[str, Any]:
    found = harness.lacewing(
        "eval", str(models.packed(source, format)), "--perplexity", str(args.text),
        "--max-tokens", str(args.max_tokens), "--window", str(args.window),
        "--threads", str(args.threads), "--json",
    )  # fmt: skip
    return {**found, "model": source.name, "format": format}


def show(found: list[dict[str, Any]]) -> None:
    base = next((row["perplexity"] for row in found if row["format"] == "bf16"), None)
    rows = [
        [row["format"], f"{row['bits_per_weight']:.2f}", f"{row['perplexity']:.3f}",
         f"{row['perplexity'] / base - 1:+.2%}" if base else "-"]
        for row in found
    ]  # fmt: skip
    harness.table("perplexity", ["", "bits/weight", "perplexity", "over bf16"], rows)


if __name__ == "__main__":
    main()

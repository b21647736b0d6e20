"""`lacewing bench kernels` at the shapes of real models, kept in the results file.

python benchmarks/kernels.py [--shape 4096x4096 ...] [--rows 1 ...] [--threads 2]
"""

from __future__ import annotations

import argparse
from typing import Any

import harness

SHAPES = ["4096x4096", "8192x2048", "2048x8192"]  # square; Llama-3.2-1B's up and down


def main() -> None:
    parser = argparse.ArgumentParser(description="Every format's linear layer, from memory.")
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="NxK")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--seconds", type=float, default=0.5, help="per row of the table")
    harness.add_common_arguments(parser)
    args = parser.parse_args()
    found = [measure(rows, args) for rows in args.rows]
    if not args.no_save:
        record: dict[str, Any] = {"runs": found}
        if args.label:
            record["label"] = args.label
        print("saved", harness.save("kernels", record, args.threads))


def measure(rows: int, args: argparse.Namespace) -> dict[str, Any]:
    shapes = [option for shape in args.shape for option in ("--shape", shape)]
    found = harness.lacewing(
        "bench", "kernels", *shapes, "--rows", str(rows), "--threads", str(args.threads),
        "--seconds", str(args.seconds), "--json",
    )  # fmt: skip
    show(rows, found)
    return found


def show(rows: int, found: dict[str, Any]) -> None:
    cells = [
        [row["format"], f"{row['n']}x{row['k']}", f"{row['bits_per_weight']:.2f}",
         f"{row['seconds'] * 1e6:.0f}", f"{row['gb_s']:.1f}"]
        for row in found["kernels"]
    ]  # fmt: skip
    harness.table(f"kernels, {rows} rows", ["", "shape", "bits/weight", "us", "GB/s"], cells)


if __name__ == "__main__":
    main()

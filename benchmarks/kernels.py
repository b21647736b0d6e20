"""`lacewing bench kernels` at the shapes of real models, kept in the results file.

python benchmarks/kernels.py [--shape 4096x4096 ...] [--rows 1 ...] [--threads 2]
python benchmarks/kernels.py --goals     the shapes and rows that the kernels' goals speak of

Install torch in the same environment to have PyTorch's bf16 and dynamic int8 beside ours.
"""

from __future__ import annotations

import argparse
from typing import Any

import harness

SHAPES = ["4096x4096", "8192x2048", "2048x8192"]  # square; Llama-3.2-1B's up and down

# Square, up and down of an 8B model; every matrix of Llama-3.2-1B, the head among them.
GOAL_SHAPES = [
    "4096x4096", "14336x4096", "4096x14336",
    "2048x2048", "512x2048", "8192x2048", "2048x8192", "128256x2048",
]  # fmt: skip
GOAL_ROWS = [1, 4, 512]
LARGE = 128256  # outputs: of it, only decode is measured


def main() -> None:
    parser = argparse.ArgumentParser(description="Every format's linear layer, from memory.")
    parser.add_argument("--shape", nargs="+", help="NxK")
    parser.add_argument("--rows", nargs="+", type=int)
    parser.add_argument("--goals", action="store_true", help="the shapes and rows of the goals")
    parser.add_argument("--format", nargs="+", default=[], help="default: all")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5])
    parser.add_argument("--seconds", type=float, default=0.5, help="per row of the table")
    parser.add_argument("--svg", help="roofline plots: SVG_<shape>.svg")
    harness.add_common_arguments(parser)
    args = parser.parse_args()
    shapes = args.shape or (GOAL_SHAPES if args.goals else SHAPES)
    rows = args.rows or (GOAL_ROWS if args.goals else [1, 8])
    found = [measure(shape, rows, args) for shape in shapes]
    if args.goals:
        show_goals([row for run in found for row in run["kernels"]])
    if not args.no_save:
        record: dict[str, Any] = {"runs": found}
        if args.label:
            record["label"] = args.label
        print("saved", harness.save("kernels", record, args.threads))


def measure(shape: str, rows: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """One shape a process: its weights are gone before the next one's are packed."""
    if int(shape.split("x")[0]) >= LARGE:
        rows = [m for m in rows if m <= 8] or rows
    several = {"--format": args.format, "--rows": rows, "--sparsity": args.sparsity}
    options = [
        str(part) for name, all_ in several.items() for each in all_ for part in (name, each)
    ]
    if args.svg:
        options += ["--svg", f"{args.svg}_{shape}.svg"]
    found = harness.lacewing(
        "bench", "kernels", "--shape", shape, *options, "--threads", str(args.threads),
        "--seconds", str(args.seconds), "--json",
    )  # fmt: skip
    show(shape, found)
    return found


def name_of(row: dict[str, Any]) -> str:
    return row["format"] + ("" if row["sparsity"] is None else f" {row['sparsity']:.0%}")


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def show(shape: str, found: dict[str, Any]) -> None:
    at = found["conditions"]
    cells = [
        [
            name_of(row),
            str(row["m"]),
            f"{row['bits_per_weight']:.2f}",
            f"{row['seconds'] * 1e6:.0f}",
            share(row["spread"]),
            f"{row['gb_s']:.1f}",
            share(row["bandwidth_share"]),
            f"{row['gop_s']:.0f}",
            share(row["peak_share"]),
        ]
        for row in found["kernels"]
    ]
    head = ["", "m", "bits", "us", "spread", "GB/s", "of memory", "GOP/s", "of peak"]
    harness.table(f"{shape}, memory reads {at['read_bandwidth_gb_s']:.1f} GB/s", head, cells)


def show_goals(rows: list[dict[str, Any]]) -> None:
    """Decode as a share of the bandwidth and beside PyTorch; what 4 rows cost; prefill."""
    times = {(name_of(r), r["n"], r["k"], r["m"]): r["seconds"] for r in rows}
    cells = []
    for row in rows:
        if row["engine"] != "lacewing" or row["m"] != 1:
            continue
        at = (name_of(row), row["n"], row["k"])
        cells.append(
            [at[0], f"{row['n']}x{row['k']}", share(row["bandwidth_share"])]
            + [
                ratio(times.get(over), times.get(under))
                for over, under in (
                    (("torch bf16", *at[1:], 1), (*at, 1)),
                    (("bf16", *at[1:], 1), (*at, 1)),
                    ((*at, 4), (*at, 1)),
                    (("torch bf16", *at[1:], 512), (*at, 512)),
                    (("bf16", *at[1:], 512), (*at, 512)),
                )
            ]
        )
    head = [
        "", "shape", "m=1 of memory", "x torch bf16", "x our bf16", "m=4 / m=1",
        "m=512 x torch bf16", "x our bf16",
    ]  # fmt: skip
    harness.table("goals", head, cells)


def ratio(over: float | None, under: float | None) -> str:
    return f"{over / under:.2f}" if over and under else "-"


if __name__ == "__main__":
    main()

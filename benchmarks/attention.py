"""Attention by itself: decode from memory and causal prefill, per KV cache format.

python benchmarks/attention.py [--torch-python VENV/python] [--head-dim 64 128]

Decode rotates through layers of a cache of at least `--megabytes`; prefill is one layer. The heads
are those of Llama 3.2 1B (head_dim 64) and 3.1 8B (128) unless told otherwise. Every round asks
all formats and PyTorch once, in turn.
"""

from __future__ import annotations

import argparse
import math
import statistics
from fractions import Fraction
from typing import Any

import harness

TORCH = {"torch bf16": "bfloat16", "torch f32": "float32"}
TORCH_BYTES = {"torch bf16": 2, "torch f32": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description="Attention per KV cache format, and PyTorch's.")
    parser.add_argument("--torch-python", help="an interpreter with PyTorch")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--group", type=int, default=4, help="query heads of a KV head")
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--decode", nargs="*", type=int, default=[4096, 16384, 65536])
    parser.add_argument("--prefill", nargs="*", type=int, default=[2048, 8192])
    parser.add_argument("--kv", nargs="+", default=["f16", "bf16", "int8", "int4", "int8_sp70"])
    parser.add_argument("--topk", nargs="*", default=[], metavar="1/16", help="of the blocks read")
    parser.add_argument("--megabytes", type=int, default=1024)
    harness.add_common_arguments(parser)
    args = parser.parse_args()
    from lacewing import _C

    torch = None
    if args.torch_python:
        torch = harness.Worker(args.torch_python, "worker_torch.py")
        torch.ask("open", threads=args.threads)
    cases = [(d, tokens, 1) for d in args.head_dim for tokens in args.decode]
    cases += [(d, tokens, tokens) for d in args.head_dim for tokens in args.prefill]
    found = [row for case in cases for row in measure(*case, torch, args)]
    chosen = [
        topk_row(kv, d, tokens, share, args)
        for d in args.head_dim
        for tokens in args.decode
        for kv in args.kv
        if kv not in _C.KV_SEALED_FROM
        for share in args.topk
    ]
    if torch:
        torch.close()
    show(found)
    if chosen:
        show_topk(chosen)
    if not args.no_save:
        record: dict[str, Any] = {"kv_heads": args.kv_heads, "group": args.group, "rows": found}
        if chosen:
            record["topk"] = chosen
        if args.label:
            record["label"] = args.label
        print("saved", harness.save("attention", record, args.threads))


def measure(
    d: int, tokens: int, rows: int, torch: harness.Worker | None, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row per format: medians over the rounds."""
    from lacewing import _C

    names = [*args.kv, *(TORCH if torch else ())]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    sizes: dict[str, int] = {}
    roofs = []
    for turn in range(args.rounds):
        roofs.append(_C.read_bandwidth(args.megabytes << 20, args.threads, None, 0.1))
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if name in TORCH:
                one = 2 * args.kv_heads * tokens * d * TORCH_BYTES[name]
            else:
                one = args.kv_heads * -(-tokens // 16) * _C.kv_block_bytes(name, d)
            layers = 1 if rows > 1 else max(1, (args.megabytes << 20) // one)
            if name in TORCH:
                assert torch
                answer = torch.ask(
                    "attention", dtype=TORCH[name], layers=layers, kv_heads=args.kv_heads,
                    group=args.group, head_dim=d, tokens=tokens, rows=rows,
                )  # fmt: skip
                seconds[name].append(answer["seconds"])
                sizes[name] = layers * one
            else:
                times, sizes[name] = _C.time_attention(
                    name, layers, args.kv_heads, args.group, d, tokens, rows, 1, args.threads
                )
                seconds[name] += times
        harness.progress(f"{'decode' if rows == 1 else 'prefill'} {tokens} d={d}: round {turn + 1}")
    roof = max(roofs)
    heads = args.kv_heads * args.group
    return [result(n, heads, d, tokens, rows, seconds[n], sizes[n], roof) for n in names]


def result(
    name: str,
    heads: int,
    d: int,
    tokens: int,
    rows: int,
    times: list[float],
    size: int,
    roof: float,
) -> dict[str, Any]:
    seconds = statistics.median(times)
    row = {
        "what": "decode" if rows == 1 else "prefill",
        "kv": name,
        "head_dim": d,
        "tokens": tokens,
        "milliseconds": round(seconds * 1e3, 3),
        "rounds": [round(each * 1e3, 3) for each in times],
    }
    if rows == 1:
        rate = size / seconds * 1e-9
        row |= {"cache_mb": size >> 20, "gb_s": round(rate, 2), "share": round(rate / roof, 3)}
        return row | {"read_bandwidth_gb_s": round(roof, 2)}
    operations = 4 * d * heads * rows * (rows + 1) / 2
    return {**row, "gflop_s": round(operations / seconds * 1e-9, 1)}


def topk_row(kv: str, d: int, tokens: int, share: str, args: argparse.Namespace) -> dict[str, Any]:
    """Choosing blocks by labels and attending them, beside all of the cache, and beside a cache
    that is as long as what they read: in turn, a pass of each a round."""
    from lacewing import _C

    fraction = float(Fraction(share))
    budget = max(32, math.ceil(fraction * (tokens // 16)))
    head = args.kv_heads * _C.kv_block_bytes(kv, d)
    layers = max(1, (args.megabytes << 20) // (head * (tokens // 16)))
    short = max(1, (args.megabytes << 20) // 8 // (head * budget))
    sizes = (args.kv_heads, args.group, d)
    seconds: dict[str, list[float]] = {}
    for turn in range(args.rounds):
        both, choose, attend, label_bytes, read = _C.time_topk(
            kv, layers, *sizes, tokens, d // 4, fraction, 1, args.threads
        )
        whole, whole_bytes = _C.time_attention(kv, layers, *sizes, tokens, 1, 1, args.threads)
        close, close_bytes = _C.time_attention(kv, short, *sizes, 16 * budget, 1, 3, args.threads)
        times = {"topk": both, "choose": choose, "attend": attend, "dense": whole, "short": close}
        for name, found in times.items():
            seconds.setdefault(name, []).append(statistics.median(found))
        harness.progress(f"{kv}+topk:{share} {tokens} d={d}: round {turn + 1}")
    median = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "kv": f"{kv}+topk:{share}",
        "head_dim": d,
        "tokens": tokens,
        "milliseconds": {name: round(each * 1e3, 3) for name, each in median.items()},
        "rounds": {n: [round(each * 1e3, 3) for each in s] for n, s in seconds.items()},
        "times_dense": round(median["dense"] / median["topk"], 2),
        "gb_s": {
            "choose": round(label_bytes / median["choose"] * 1e-9, 2),
            "attend": round(read / median["attend"] * 1e-9, 2),
            "short": round(close_bytes / median["short"] * 1e-9, 2),
            "dense": round(whole_bytes / median["dense"] * 1e-9, 2),
        },
    }


def show_topk(found: list[dict[str, Any]]) -> None:
    cells = []
    for row in found:
        ms, rate = row["milliseconds"], row["gb_s"]
        cells.append(
            [row["kv"], str(row["tokens"]), str(row["head_dim"]), f"{ms['topk']:.2f}",
             f"{ms['choose']:.2f}", f"{ms['attend']:.2f}", f"{ms['dense']:.2f}",
             f"{row['times_dense']:.2f}x", str(rate["attend"]), str(rate["short"])]
        )  # fmt: skip
    head = ["", "tokens", "head_dim", "ms", "choosing", "attending", "all of it", "faster",
            "GB/s", "in one piece"]  # fmt: skip
    harness.table("attention over chosen blocks", head, cells)


def show(found: list[dict[str, Any]]) -> None:
    cells = [
        [row["kv"], row["what"], str(row["tokens"]), str(row["head_dim"]),
         f"{row['milliseconds']:.1f}", str(row.get("gb_s", "-")),
         f"{row['share']:.0%}" if "share" in row else "-", str(row.get("gflop_s", "-"))]
        for row in found
    ]  # fmt: skip
    head = ["", "", "tokens", "head_dim", "ms", "GB/s", "of memory", "GFLOP/s"]
    harness.table("attention", head, cells)


if __name__ == "__main__":
    main()

"""What storing a token costs, of the attention step behind a long text.

python benchmarks/append.py [--tokens 16384] [--kv bf16 int8 int4 int8+topk:1/16]

A layer's step with new keys and values is timed beside one without, in turn, behind 64 tokens:
there the difference shows, which is lost in the noise of a long text. Layers take turns, so that
blocks are not in cache. 16 tokens are a turn: blocks are sealed every 16. The text is zeros.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import harness
import numpy as np

from lacewing import _C
from lacewing.checkpoint.kvplan import KvPlan, Labels
from lacewing.kv.blocks import BLOCK_SIZE
from lacewing.kv.choice import parse_kv
from lacewing.kv.layout import LayerShape, lay_out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--group", type=int, default=4, help="query heads of a KV head")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--kv", nargs="+", default=["bf16", "int8", "int4", "int8_sp70"])
    parser.add_argument("--megabytes", type=int, default=256, help="of layers that take turns")
    harness.add_common_arguments(parser)
    args = parser.parse_args()
    rows = [measure(kv, args) for kv in args.kv]
    cells = [[r["kv"], f"{r['milliseconds']:.3f}", f"{r['microseconds']:.2f}", f"{r['cost']:.2%}",
              " .. ".join(f"{each:.2%}" for each in r["quartiles"])] for r in rows]  # fmt: skip
    harness.table(
        f"a step behind {args.tokens} tokens, one layer",
        ["", "ms", "storing, us", "of it", "quartiles"],
        cells,
    )
    if not args.no_save:
        sizes = {n: getattr(args, n) for n in ("kv_heads", "group", "head_dim", "tokens")}
        label = {"label": args.label} if args.label else {}
        print("saved", harness.save("append", {**sizes, "rows": rows, **label}, args.threads))


SHORT = 64


class Layer:
    def __init__(self, kv: str, tokens: int, args: argparse.Namespace) -> None:
        shape = LayerShape("llama", args.kv_heads, args.head_dim, 0)
        channels = np.tile(np.arange(args.head_dim // 4, dtype=np.int32), (1, args.kv_heads, 1))
        plan = KvPlan(labels=Labels(channels, np.ones(channels.shape, np.float32)))
        layout = lay_out(shape, parse_kv(kv), plan, 1 << 30)
        last = tokens + BLOCK_SIZE
        stores = [p.store(-(-last // p.block_tokens)) for p in layout.stores]
        self.cache: Any = _C.KvCache(layout.native(stores), args.kv_heads, args.head_dim)
        self.bytes = self.cache.bytes
        table = np.arange(last // BLOCK_SIZE + 1, dtype=np.int32)
        self.tables = np.tile(table, (len(stores), 1, 1))
        for store, row in zip(stores, self.tables, strict=True):
            row[0, store.total :] = 0
        self.threads, self.scale = args.threads, args.head_dim**-0.5

    def step(self, position: int, q: Any, k: Any, v: Any) -> None:
        cached, rows = np.array([position], np.int32), np.array([0, 1], np.int32)
        self.cache.step(q, k, v, self.scale, 0, cached, self.tables, rows, None, None, self.threads)


def measure(kv: str, args: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    heads = (args.kv_heads * args.group, args.kv_heads, args.kv_heads)
    q, k, v = (rng.standard_normal((1, n, args.head_dim), dtype=np.float32) for n in heads)
    short, long = (layers_of(kv, tokens, args) for tokens in (SHORT, args.tokens))
    costs, steps = [], []
    for turn in range(-1, 4 * args.rounds):
        runs = [(k, v), (None, None)]
        found = [seconds(short, SHORT, q, *new) for new in runs[:: 1 if turn % 2 else -1]]
        stored, read = found[:: 1 if turn % 2 else -1]
        whole = seconds(long, args.tokens, q, k, v)
        if turn >= 0:  # the first warms up
            costs.append(stored - read)
            steps.append(whole)
    step = statistics.median(steps)
    low, middle, high = (each / step for each in statistics.quantiles(costs, n=4))
    return {
        "kv": harness.without_folders(kv),
        "milliseconds": round(step * 1e3, 4),
        "microseconds": round(middle * step * 1e6, 3),
        "cost": round(middle, 5),
        "quartiles": [round(low, 5), round(high, 5)],
    }


def layers_of(kv: str, tokens: int, args: argparse.Namespace) -> list[Layer]:
    first = Layer(kv, tokens, args)
    count = min(1000, (args.megabytes << 20) // first.bytes)
    return [first, *(Layer(kv, tokens, args) for _ in range(count))]


def seconds(layers: list[Layer], tokens: int, *rows: Any) -> float:
    """Of one step of one layer."""
    start = time.perf_counter()
    for position in range(tokens, tokens + BLOCK_SIZE):
        for layer in layers:
            layer.step(position, *rows)
    return (time.perf_counter() - start) / BLOCK_SIZE / len(layers)


if __name__ == "__main__":
    main()

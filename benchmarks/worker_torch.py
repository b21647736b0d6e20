"""PyTorch's scaled_dot_product_attention in a process of its own: one JSON command a line."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention


def attention(
    dtype: str, layers: int, kv_heads: int, group: int, head_dim: int, tokens: int, rows: int
) -> dict[str, Any]:
    """Seconds of one pass over all layers, after one that warms up.

    Decoding, the query heads of a KV head are given as its rows: the same product, and up to eight
    times as fast as `enable_gqa`, which copies keys and values.
    """
    kind = getattr(torch, dtype)
    shape = (1, kv_heads, tokens, head_dim)
    caches = [(torch.rand(shape, dtype=kind), torch.rand(shape, dtype=kind)) for _ in range(layers)]
    decode = rows == 1
    q_shape = (1, kv_heads, group, head_dim) if decode else (1, kv_heads * group, rows, head_dim)
    q = torch.rand(q_shape, dtype=kind)
    gqa = group > 1 and not decode
    for _ in range(2):
        start = time.perf_counter()
        for k, v in caches:
            scaled_dot_product_attention(q, k, v, is_causal=not decode, enable_gqa=gqa)
        seconds = time.perf_counter() - start
    return {"seconds": seconds}


def main() -> None:
    for line in sys.stdin:
        command = json.loads(line)
        verb = command.pop("verb")
        if verb == "open":
            torch.set_num_threads(command["threads"])
            answer = {"version": torch.__version__}
        else:
            with torch.inference_mode():
                answer = attention(**command)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

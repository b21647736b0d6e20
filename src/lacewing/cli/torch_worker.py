"""PyTorch's linear layers for `lacewing bench kernels`, in a process of their own.

Reads one JSON command a line, answers with one line. The only module of the command line that
imports torch, and only ever run as `python -m lacewing.cli.torch_worker`: two thread pools in one
process would spin against each other.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

KINDS = ("bf16", "int8")


def main() -> None:
    import torch

    warnings.simplefilter("ignore")  # quantize_dynamic announces its successor
    layers: dict[str, list[Any]] = {}
    inputs: dict[tuple[str, int, int], Any] = {}
    wake = torch.ones(1 << 20)

    def start(threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        engines = torch.backends.quantized.supported_engines
        if "onednn" in engines:
            torch.backends.quantized.engine = "onednn"
        return {"version": torch.__version__, "engine": torch.backends.quantized.engine}

    def load(kind: str, n: int, k: int, copies: int) -> dict[str, Any]:
        layers[kind] = [_layer(torch, kind, n, k) for _ in range(copies)]
        return {}

    def drop() -> dict[str, Any]:
        layers.clear()
        inputs.clear()
        return {}

    def measure(kind: str, m: int, k: int, calls: int) -> dict[str, Any]:
        at = (kind, m, k)
        if at not in inputs:
            x = torch.randn(m, k)
            inputs[at] = x.bfloat16() if kind == "bf16" else x
        x, rotation = inputs[at], layers[kind]
        wake.add_(1)  # the threads of the pool are asleep after the others' turns
        times = []
        for turn in range(max(calls, len(rotation))):
            layer = rotation[turn % len(rotation)]
            begin = time.perf_counter()
            layer(x)
            times.append(time.perf_counter() - begin)
        return {"times": times}

    verbs: dict[str, Callable[..., dict[str, Any]]] = {
        "start": start,
        "load": load,
        "drop": drop,
        "measure": measure,
    }
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = verbs[command.pop("verb")](**command)
        except (RuntimeError, MemoryError, NotImplementedError) as error:
            answer = {"error": str(error).strip().split("\n")[0]}
        print(json.dumps(answer), flush=True)


def _layer(torch: Any, kind: str, n: int, k: int) -> Any:
    linear = torch.nn.Linear(k, n, bias=False)
    if kind == "bf16":
        weight = linear.weight.detach().bfloat16()
        return lambda x: torch.nn.functional.linear(x, weight)
    both = torch.nn.Sequential(linear)
    return torch.ao.quantization.quantize_dynamic(both, {torch.nn.Linear}, dtype=torch.qint8)


if __name__ == "__main__":
    main()

"""Decoding behind a long text, per KV cache; llama.cpp beside it with its own.

python benchmarks/longcontext.py MODEL [--format w4a8g32] [--context 16384]
    [--kv bf16 int8 int4 int8+topk:1/16@FILE]
    [--llama-python VENV/python --llama-kv f16 q8_0 q4_0]

All caches of ours are open at once and decode in turn, on one copy of the weights. Their text is
not computed: the cache is filled with numbers without meaning, whose reading takes as long.
llama.cpp computes a prompt of that length first, which takes minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import harness
import models
from kvquality import bytes_per_token

from lacewing.engine import LLM, SamplingParams
from lacewing.engine.sampling import Sampler
from lacewing.engine.scheduler import Chunk
from lacewing.engine.sequence import Sequence


def main() -> None:
    parser = argparse.ArgumentParser(description="Decoding behind a long text, per KV cache.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--format", default="w4a8g32")
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=8, help="tokens of a round")
    parser.add_argument("--kv", nargs="+", default=["bf16", "int8", "int4", "int8_sp70"])
    parser.add_argument("--llama-python", help="an interpreter with llama-cpp-python")
    parser.add_argument("--llama-kind", default="Q4_0")
    parser.add_argument("--llama-kv", nargs="+", default=["f16", "q8_0", "q4_0"])
    harness.add_common_arguments(parser)
    args = parser.parse_args()
    path = models.packed(args.model, args.format)
    ours = [Ours(path, kv, args) for kv in args.kv]
    theirs = [Theirs(kv, args) for kv in args.llama_kv] if args.llama_python else []
    every = [*ours, *theirs]
    for turn in range(args.rounds):
        for one in every[turn % len(every) :] + every[: turn % len(every)]:
            one.seconds += one.decode(args.steps)
        harness.progress(f"round {turn + 1}")
    rows = [one.row(every[0]) for one in every]
    cells = [[r["name"], f"{r['milliseconds']:.1f}", f"{r['spread']:.0%}", f"{r['times']:.2f}",
              f"{r['cache_mib']:.0f}"] for r in rows]  # fmt: skip
    harness.table(
        f"a token behind {args.context}",
        ["", "ms", "spread", f"x {args.kv[0]}", "cache MiB"],
        cells,
    )
    if not args.no_save:
        record: dict[str, Any] = {"model": args.model.name, "format": args.format, "rows": rows}
        record |= {"context": args.context} | ({"label": args.label} if args.label else {})
        print("saved", harness.save("longcontext", record, args.threads))


class Candidate:
    name: str
    bytes: int
    seconds: list[float]

    def row(self, first: Candidate) -> dict[str, Any]:
        median = statistics.median(self.seconds)
        return {
            "name": self.name,
            "milliseconds": round(median * 1e3, 2),
            "spread": round((max(self.seconds) - min(self.seconds)) / median, 3),
            "times": round(statistics.median(first.seconds) / median, 3),
            "cache_mib": round(self.bytes / 2**20, 1),
            "rounds": [round(each * 1e3, 2) for each in self.seconds],
        }


class Ours(Candidate):
    """An engine whose only sequence has `context` tokens in the cache."""

    def __init__(self, path: Path, kv: str, args: argparse.Namespace) -> None:
        room = args.context + (args.rounds + 1) * args.steps + 1
        self.name, self.seconds = f"lacewing {harness.without_folders(kv)}", []
        self.llm = LLM(path, threads=args.threads, max_context=room, kv=kv)
        self.runner, self.blocks = self.llm.engine.runner, self.llm.engine.scheduler.blocks
        self.runner._model.fill_cache()
        tokens = harness.token_ids(room, 0)
        params = SamplingParams()
        self.sequence = Sequence(tokens, params, Sampler(params, tokens), None, room)
        tables = self.sequence.tables
        for at in range(0, args.context, 512):  # as a prompt would be placed
            assert self.blocks.reserve(tables, at + 512, 512)
            self.blocks.place(tables, at, min(at + 512, args.context))
        self.sequence.computed = args.context
        self.decode(args.steps)
        self.bytes = int(bytes_per_token(self.llm.spec, kv, path, args.context) * args.context)

    def decode(self, steps: int) -> list[float]:
        """Seconds of each of the next tokens."""
        seconds = []
        for _ in range(steps):
            at = self.sequence.computed
            begin = time.perf_counter()
            assert self.blocks.reserve(self.sequence.tables, at + 1, 1)
            self.blocks.place(self.sequence.tables, at, at + 1)
            self.runner.step([Chunk(self.sequence, at, 1, True)])
            seconds.append(time.perf_counter() - begin)
            self.sequence.computed += 1
        return seconds


class Theirs(Candidate):
    """llama.cpp behind a prompt of `context` tokens."""

    def __init__(self, kv: str, args: argparse.Namespace) -> None:
        room = args.context + (args.rounds + 1) * args.steps + 1
        self.name, self.seconds = f"llama.cpp {args.llama_kind} {kv}", []
        self.worker = harness.Worker.llama(args.llama_python)
        path = models.gguf(args.model, args.llama_kind, args)
        self.worker.ask("load", path=str(path), threads=args.threads, n_ctx=room, kv=kv)
        harness.progress(f"{self.name}: computing a prompt of {args.context} tokens")
        self.bytes = self.worker.ask("fill", tokens=harness.token_ids(args.context, 0))["bytes"]
        self.decode(args.steps)

    def decode(self, steps: int) -> list[float]:
        return list(self.worker.ask("go_on", count=steps)["seconds"])


if __name__ == "__main__":
    main()

"""Worker: Lacewing through its public Python API, one JSON command a line (see worker_llama.py)."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import lacewing
from lacewing import LLM, SamplingParams
from lacewing.cli.memory import cold_bytes
from lacewing.native import compiled

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Model:
    """`path` is a packed directory, so that a load maps the file and packs nothing."""

    def __init__(self, path: str, threads: int, n_ctx: int) -> None:
        self.llm = LLM(path, threads=threads, max_context=n_ctx)

    def close(self) -> None:
        self.llm.close()

    def weight_bytes(self) -> int:
        """Bytes read for one token: all weights; of an embedding that is not the head, a row."""
        tensors = self.llm.model.tensors
        untied = _HEAD in tensors
        return sum(t.nbytes for name, t in tensors.items() if not (untied and name == _EMBEDDING))

    def _generate(self, prompts: list[list[int]], count: int) -> list[Any]:
        params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
        return self.llm.generate(prompts, params)

    def prefill(self, tokens: list[int]) -> dict[str, Any]:
        start = time.perf_counter()
        result = self._generate([tokens], 1)[0]
        return {"seconds": time.perf_counter() - start, "tokens": result.token_ids}

    def decode(self, prompt: list[int], count: int) -> dict[str, Any]:
        """Seconds of `count` steps after the first token; sampling and text included."""
        result = self._generate([prompt], count + 1)[0]
        seconds = result.timings.total - result.timings.ttft
        return {"seconds": seconds, "tokens": result.token_ids}


def bandwidth(threads: int, seconds: float) -> dict[str, Any]:
    """GB/s of reading a buffer larger than any cache."""
    isa = compiled().default_isa()
    return {"gb_s": float(compiled().read_bandwidth(cold_bytes(), threads, isa, seconds))}


def version() -> dict[str, Any]:
    return {"engine": f"lacewing {lacewing.__version__}", "build": compiled().default_isa()}


def load(options: dict[str, Any]) -> tuple[Model, dict[str, Any]]:
    start = time.perf_counter()
    model = Model(**options)
    seconds = time.perf_counter() - start
    return model, {"seconds": seconds, "weight_bytes": model.weight_bytes()}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    model: Model | None = None
    for line in sys.stdin:
        command = json.loads(line)
        verb = command.pop("verb")
        try:
            if verb == "load":
                if model:
                    model.close()
                model, answer = load(command)
            elif verb == "version":
                answer = version()
            elif verb == "bandwidth":
                answer = bandwidth(**command)
            elif model is None:
                raise RuntimeError("no model is loaded")
            else:
                answer = getattr(model, verb)(**command)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

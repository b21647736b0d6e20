"""Worker: Lacewing through its public Python API (see worker.py)."""

from __future__ import annotations

import time
from typing import Any

from worker import serve

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

    def weight_bytes(self) -> dict[str, Any]:
        """Bytes read for one token: all weights; of an embedding that is not the head, a row."""
        tensors = self.llm.model.tensors
        untied = _HEAD in tensors
        read = [t.nbytes for name, t in tensors.items() if not (untied and name == _EMBEDDING)]
        return {"bytes": sum(read)}

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


if __name__ == "__main__":
    serve(Model, version=version, bandwidth=bandwidth)

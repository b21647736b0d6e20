"""Worker: CTranslate2 through its Python API (see worker.py). `convert` needs torch and
transformers beside ctranslate2.

Tokens go in as the strings of its vocabulary and come out as numbers; the loop over tokens is
CTranslate2's own, and its callback tells when each of them is there.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import ctranslate2
from worker import Generator, serve


class Model(Generator):
    """`path` is a converted directory; its weights stay as they are stored (compute type
    "default")."""

    def __init__(self, path: str, threads: int, n_ctx: int) -> None:
        self.generator = ctranslate2.Generator(
            path, device="cpu", compute_type="default", inter_threads=1, intra_threads=threads
        )
        self.words = json.loads((Path(path) / "vocabulary.json").read_text(encoding="utf-8"))

    def close(self) -> None:
        self.generator.unload_model()

    def generate(self, prompt: list[int], count: int) -> tuple[list[float], list[int]]:
        """When each of `count` greedy tokens was there, and the tokens; the end token is never
        chosen."""
        times: list[float] = []
        found = self.generator.generate_batch(
            [[self.words[token] for token in prompt]],
            max_length=count,
            min_length=count,
            include_prompt_in_result=False,
            callback=lambda step: times.append(time.perf_counter()),
        )
        return times, found[0].sequences_ids[0]


def convert(source: str, target: str, kind: str) -> dict[str, Any]:
    """Writes `target`, the Hugging Face directory `source` in weights of `kind`."""
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(source, low_cpu_mem_usage=True).convert(target, quantization=kind)
    return {}


def version() -> dict[str, Any]:
    types = ", ".join(sorted(ctranslate2.get_supported_compute_types("cpu")))
    return {"engine": f"CTranslate2 {ctranslate2.__version__}", "build": types}


if __name__ == "__main__":
    serve(Model, version=version, convert=convert)

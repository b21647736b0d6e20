"""Worker: OpenVINO GenAI through its Python API (see worker.py), from a GGUF file.

Its reader takes the codes and scales of the file over into OpenVINO's own layout. Tokens go in and
come out as numbers; the loop over tokens is OpenVINO's own, and its streamer tells when each of
them is there.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import openvino
import openvino_genai
from worker import Generator, serve


class Clock(openvino_genai.StreamerBase):
    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def write(self, tokens: Any) -> openvino_genai.StreamingStatus:
        self.times.append(time.perf_counter())
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


class Model(Generator):
    """Everything not named here is OpenVINO's default: precision, groups of quantized activations,
    KV cache."""

    def __init__(self, path: str, threads: int, n_ctx: int) -> None:
        self.pipeline = openvino_genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads)

    def close(self) -> None:
        del self.pipeline

    def generate(self, prompt: list[int], count: int) -> tuple[list[float], list[int]]:
        """When each of `count` greedy tokens was there, and the tokens; the end token is as good
        as any."""
        clock = Clock()
        found = self.pipeline.generate(
            openvino.Tensor(np.array([prompt], np.int64)),
            streamer=clock,
            max_new_tokens=count,
            ignore_eos=True,
            do_sample=False,
        )
        return clock.times, found.tokens[0]


def version() -> dict[str, Any]:
    return {
        "engine": f"OpenVINO GenAI {openvino_genai.__version__}",
        "build": openvino.get_version(),
    }


if __name__ == "__main__":
    serve(Model, version=version)

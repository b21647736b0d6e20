"""Worker: llama.cpp through llama-cpp-python's low-level API (see worker.py).

The C API is called directly: no Python sampler, no copy of the logits, greedy sampling in C.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from typing import Any

import llama_cpp as lc
import numpy as np
from worker import serve

N_BATCH = 512
ROWS = 64  # of logits that become float64 at a time


class Model:
    """A loaded model with one context; everything not named here is llama.cpp's default."""

    def __init__(self, path: str, threads: int, n_ctx: int, kv: str = "f16") -> None:
        params = lc.llama_model_default_params()  # mmap on, repacking on
        params.n_gpu_layers = 0
        self.model = lc.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        cparams = lc.llama_context_default_params()  # flash attention "auto"
        cparams.n_ctx = n_ctx
        cparams.n_batch = cparams.n_ubatch = N_BATCH
        cparams.n_threads = cparams.n_threads_batch = threads
        cparams.no_perf = True
        cparams.type_k = cparams.type_v = getattr(lc, f"GGML_TYPE_{kv.upper()}")
        self.context = lc.llama_init_from_model(self.model, cparams)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context")
        self.n_tokens = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(self.model))
        self.sampler = lc.llama_sampler_init_greedy()

    def close(self) -> None:
        lc.llama_free(self.context)
        lc.llama_model_free(self.model)

    def clear(self) -> None:
        lc.llama_memory_clear(lc.llama_get_memory(self.context), True)

    def feed(self, tokens: list[int]) -> None:
        """Runs the tokens; only the last one's logits are computed."""
        for start in range(0, len(tokens), N_BATCH):
            part = tokens[start : start + N_BATCH]
            array = (lc.llama_token * len(part))(*part)
            if lc.llama_decode(self.context, lc.llama_batch_get_one(array, len(part))):
                raise RuntimeError("llama_decode failed")
        lc.llama_synchronize(self.context)

    def sample(self) -> int:
        return int(lc.llama_sampler_sample(self.sampler, self.context, -1))

    def prefill(self, tokens: list[int]) -> dict[str, Any]:
        self.clear()
        start = time.perf_counter()
        self.feed(tokens)
        first = self.sample()
        return {"seconds": time.perf_counter() - start, "tokens": [first]}

    def decode(self, prompt: list[int], count: int) -> dict[str, Any]:
        """Seconds of `count` steps after the first token; the end-of-text token is ignored."""
        self.clear()
        self.feed(prompt)
        out = [self.sample()]
        start = time.perf_counter()
        for _ in range(count):
            self.feed(out[-1:])
            out.append(self.sample())
        return {"seconds": time.perf_counter() - start, "tokens": out}

    def fill(self, tokens: list[int]) -> dict[str, Any]:
        """Computes a prompt and keeps its cache; the bytes of its state."""
        self.clear()
        self.feed(tokens)
        self.last = self.sample()
        return {"bytes": lc.llama_state_seq_get_size(self.context, 0)}

    def go_on(self, count: int) -> dict[str, Any]:
        """Seconds of each of the next tokens."""
        seconds = []
        for _ in range(count):
            begin = time.perf_counter()
            self.feed([self.last])
            self.last = self.sample()
            seconds.append(time.perf_counter() - begin)
        return {"seconds": seconds}

    def score(self, tokens: list[int]) -> dict[str, Any]:
        """The log-probability of every token but the first."""
        found = []
        for start, rows in self.rows(tokens[:-1]):
            wanted = np.array(tokens[start + 1 : start + 1 + len(rows)])
            for at in range(0, len(rows), ROWS):
                some = rows[at : at + ROWS].astype(np.float64)
                found += log_probabilities(some, wanted[at : at + ROWS]).tolist()
        return {"values": found}

    def logits(self, tokens: list[int], start: int, file: str) -> dict[str, Any]:
        """Writes those of what follows the tokens from `start` on: f32 [tokens, vocabulary]."""
        with open(file, "wb") as out:
            for first, rows in self.rows(tokens):
                rows[max(start - first, 0) :].tofile(out)
        return {}

    def rows(self, tokens: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Where a batch begins, and the logits of its tokens, which the next one overwrites."""
        self.clear()
        for start in range(0, len(tokens), N_BATCH):
            part = tokens[start : start + N_BATCH]
            batch = lc.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            failed = lc.llama_decode(self.context, batch)
            lc.llama_batch_free(batch)
            if failed:
                raise RuntimeError(f"llama_decode returned {failed}")
            shape = (len(part), self.n_tokens)
            yield start, np.ctypeslib.as_array(lc.llama_get_logits(self.context), shape)

    def vocabulary(self) -> dict[str, Any]:
        return {"size": self.n_tokens}


def log_probabilities(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Of one token a row."""
    most = logits.max(1)
    sums = np.log(np.exp(logits - most[:, None]).sum(1))
    return logits[np.arange(len(logits)), tokens] - most - sums


def quantize(source: str, target: str, kind: str, threads: int) -> dict[str, Any]:
    """Writes `target` with llama.cpp's own quantizer and its own choice of mixed types."""
    params = lc.llama_model_quantize_default_params()
    whole = "ALL" if kind == "F32" else "MOSTLY"
    params.ftype = getattr(lc, f"LLAMA_FTYPE_{whole}_{kind}")
    params.allow_requantize = True
    params.nthread = threads
    failed = lc.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    if failed:
        raise RuntimeError(f"llama_model_quantize returned {failed}")
    return {"bytes": os.path.getsize(target)}


def version() -> dict[str, Any]:
    return {
        "engine": f"llama.cpp (llama-cpp-python {lc.__version__})",
        "build": lc.llama_print_system_info().decode().strip(" |"),
    }


if __name__ == "__main__":
    lc.llama_backend_init()
    serve(Model, version=version, quantize=quantize)

"""llama.cpp as a `lacewing.quality` Scorer: its own logits of our tokens.

The tokenizer is ours, so that both engines read the same tokens of the same file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from harness import Worker
from numpy.typing import NDArray

from lacewing.checkpoint import open_source
from lacewing.engine.text import Text

Floats = NDArray[np.float32]
ROWS = 256  # of logits in memory at a time


class LlamaScorer:
    """A GGUF file in a worker of llama.cpp. `source`: the model whose tokenizer reads."""

    def __init__(
        self, worker: Worker, path: Path, source: Path, context: int, threads: int
    ) -> None:
        self.worker = worker
        self.name = path.name
        self.max_context = context
        self.text = Text(open_source(source).tokenizer)
        self.bos: list[int] = self.text.encode("")
        worker.ask("load", path=str(path), threads=threads, n_ctx=context)
        self.vocab_size = int(worker.ask("vocabulary")["size"])

    @property
    def prefix_token(self) -> int | None:
        bos = self.text.bos_token_id
        return min(self.text.eos_token_ids, default=None) if bos is None else bos

    def encode(self, text: str, add_special: bool) -> list[int]:
        return self.text.encode(text, add_special=add_special)

    def decode(self, ids: Sequence[int]) -> str:
        return self.text.decode(ids, skip_special=False, continues=True)

    def score(self, ids: Sequence[int]) -> Floats:
        return np.array(self.worker.ask("score", tokens=list(ids))["values"], np.float32)

    def logits(self, ids: Sequence[int], start: int = 0) -> Iterator[Floats]:
        with tempfile.NamedTemporaryFile() as file:
            self.worker.ask("logits", tokens=list(ids), start=start, file=file.name)
            rows = np.fromfile(file.name, np.float32).reshape(-1, self.vocab_size)
        for at in range(0, len(rows), ROWS):
            yield rows[at : at + ROWS]

    def generate(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """To its end: llama.cpp is asked to go on behind an end token, which ends the answer."""
        return [self.answer(list(prompt), count) for prompt in prompts]

    def answer(self, prompt: list[int], count: int) -> list[int]:
        found = self.worker.ask("decode", prompt=prompt, count=count - 1)["tokens"]
        ends = [i for i, token in enumerate(found) if token in self.text.eos_token_ids]
        return found[: ends[0] + 1] if ends else found

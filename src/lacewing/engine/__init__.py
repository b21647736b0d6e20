"""The engine: a native decoder behind `LLM`. Needs no PyTorch.

Five nouns: a `Sequence` is one request, the `BlockManager` owns its KV cache, the `Scheduler`
decides what the next step computes, the `Runner` computes it, the `Engine` turns steps into text.
"""

from lacewing.engine.llm import LLM, Piece, Result, default_model
from lacewing.engine.sampling import SamplingParams, TokenLogprobs
from lacewing.engine.sequence import Timings

__all__ = [
    "LLM",
    "Piece",
    "Result",
    "SamplingParams",
    "Timings",
    "TokenLogprobs",
    "default_model",
]

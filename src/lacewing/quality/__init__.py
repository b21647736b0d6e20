"""How good a model is: perplexity, items with an answer, needles in a haystack, divergence from a
reference.

    from lacewing.engine.scorer import LLMScorer
    from lacewing.quality import Text, evaluate, read_items

    with LLM("packed") as llm:
        tasks = [Text.read(Path("text.txt")), read_items(Path("piqa.jsonl"))]
        perplexity, accuracy = evaluate(LLMScorer(llm), tasks)

A model is anything that is a `Scorer`: the engine's, one of PyTorch, your own. Every result says
how many tokens or items it is of, and the seed of its intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lacewing.quality.bootstrap import Interval
from lacewing.quality.diff import (
    Answers,
    Flips,
    Parting,
    compare_answers,
    compare_items,
    cut_prompts,
    read_prompts,
)
from lacewing.quality.divergence import Against, Divergence, Place, Range, check_same_tokens
from lacewing.quality.items import Accuracy, Choice, Items, LastWord, read_items
from lacewing.quality.needles import Depth, Needle, Needles, Retrieval
from lacewing.quality.scorer import Scorer
from lacewing.quality.text import Advance, Perplexity, Text, windows

__all__ = [
    "Accuracy",
    "Against",
    "Answers",
    "Choice",
    "Depth",
    "Divergence",
    "Flips",
    "Interval",
    "Items",
    "LastWord",
    "Needle",
    "Needles",
    "Parting",
    "Perplexity",
    "Place",
    "Range",
    "Retrieval",
    "Scorer",
    "Text",
    "check_same_tokens",
    "compare_answers",
    "compare_items",
    "cut_prompts",
    "evaluate",
    "read_items",
    "read_prompts",
    "windows",
]

Task = Text | Items | Needles | Against


def evaluate(
    scorer: Scorer,
    tasks: Sequence[Task],
    seed: int = 0,
    progress: Advance | None = None,
) -> list[Any]:
    """The result of each task: `Perplexity`, `Accuracy`, `Retrieval` or `Divergence`.

    seed: of the intervals. progress: called with (work done of a task, its work in all, a word).
    Raises RequestError.
    """
    return [task.run(scorer, seed, progress or _silent) for task in tasks]


def _silent(done: float, total: float, text: str) -> None:
    """Nobody watches."""

"""What a model is worth: `lacewing eval` of ours, the same figures of llama.cpp's own logits."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import harness
from harness import Worker
from scorer_llama import LlamaScorer

from lacewing import quality

ITEMS = ("eval/lambada_1000.jsonl", "eval/arc_easy_500.jsonl")
LONGEST = 2048  # tokens of an item
# What an evaluation says that the record keeps.
PERPLEXITY = ("perplexity", "interval", "scored_tokens", "windows", "resampled")
ACCURACY = ("items", "acc", "acc_interval", "acc_norm", "acc_norm_interval", "perplexity")


def ours(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A packed directory, by `lacewing eval`."""
    items = [option for task in ITEMS for option in ("--items", str(harness.data(task)))]
    found = harness.lacewing(
        "eval", str(path), "--perplexity", str(args.text), "--max-tokens", str(args.max_tokens),
        "--window", str(args.window), *items, "--limit", str(args.items),
        "--seed", str(args.seed), "--threads", str(args.threads), "--json",
    )  # fmt: skip
    return figures(found, found["items"])


def llama(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A GGUF file, by llama.cpp's own logits of the same tokens."""
    text = quality.Text.read(args.text, args.window, args.max_tokens)
    items = [quality.read_items(harness.data(task), args.items) for task in ITEMS]
    with Worker.llama(args.llama_python) as worker:
        scorer = LlamaScorer(worker, path, args.model, max(args.window, LONGEST), args.threads)
        found = [each.to_dict() for each in quality.evaluate(scorer, [text, *items], args.seed)]
    return figures(found[0], found[1:])


def figures(text: dict[str, Any], items: list[dict[str, Any]]) -> dict[str, Any]:
    tasks = {task_name(each["file"]): {name: each[name] for name in ACCURACY} for each in items}
    return {**{name: text[name] for name in PERPLEXITY}, "tasks": tasks}


def task_name(stem: str) -> str:
    """`arc_easy` of `arc_easy_500`."""
    return re.sub(r"_\d+$", "", stem)

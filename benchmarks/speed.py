"""The run that decode.py and prefill.py share: warm up, interleaved rounds, table, results file."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import harness
import models
from harness import Candidate

FORMATS = ["bf16", "w8a8g32", "w4a8g32", "w4a8g32z"]


def parser(description: str) -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=description)
    out.add_argument("model", nargs="?", help="GGUF file or directory; default: SmolLM2-135M")
    out.add_argument("--formats", nargs="+", default=FORMATS, choices=list(models.GGUF_KINDS))
    out.add_argument("--llama-python", type=Path, help="interpreter that has llama-cpp-python")
    out.add_argument("--ct2-python", type=Path, help="interpreter that has ctranslate2")
    out.add_argument("--openvino-python", type=Path, help="interpreter that has openvino-genai")
    out.add_argument("--context", type=int, default=1024)
    harness.add_common_arguments(out)
    return out


def run(kind: str, args: argparse.Namespace, measure: Callable[[Candidate, int], float]) -> None:
    """`measure(candidate, turn)` gives tokens per second; turn -1 warms up."""
    with ExitStack() as stack:
        found = models.candidates(args, stack)
        bandwidth = interleave(found, args, measure)
        engines = {c.engine: c.worker.ask("version") for c in found}
    roof = median(bandwidth)
    show(kind, found, roof)
    if not args.no_save:
        kept = record(kind, args, found, bandwidth, engines)
        print("saved", harness.save(kind, kept, args.threads))


def interleave(
    found: list[Candidate], args: argparse.Namespace, measure: Callable[[Candidate, int], float]
) -> list[float]:
    """Rounds through all candidates; returns the GB/s that memory gave in each round."""
    bandwidth: list[float] = []
    with harness.Worker.lacewing() as meter:
        for candidate in found:
            measure(candidate, -1)
            harness.progress(f"ready: {candidate.name}")
        for turn in range(args.rounds):
            answer = meter.ask("bandwidth", threads=args.threads, seconds=0.5)
            bandwidth.append(answer["gb_s"])
            at = turn % len(found)  # nobody is always first
            for candidate in found[at:] + found[:at]:
                candidate.values.append(measure(candidate, turn))
            harness.progress(f"round {turn + 1} of {args.rounds}")
    return bandwidth


def decode(candidate: Candidate, turn: int, prompt_tokens: int, tokens: int) -> float:
    """Greedy tokens per second after a prompt."""
    count = tokens if turn >= 0 else 8
    prompt = harness.token_ids(prompt_tokens, seed=turn)
    answer = candidate.worker.ask("decode", prompt=prompt, count=count)
    return float(count / answer["seconds"])


def ratios(candidate: Candidate, found: list[Candidate]) -> dict[str, tuple[str, float]]:
    """By rival, its type with the same bits and the median over the rounds of ours / theirs: what
    disturbs a whole round cancels."""
    if candidate.engine != "lacewing":
        return {}
    return {
        other.engine: (
            other.format,
            median(a / b for a, b in zip(candidate.values, other.values, strict=True)),
        )
        for other in found
        if other.engine != "lacewing"
        and models.RIVALS[other.engine].kinds.get(candidate.format) == other.format
    }


def show(kind: str, found: list[Candidate], roof: float) -> None:
    decode = kind.startswith("decode")
    rivals = [engine for engine in models.RIVALS if any(c.engine == engine for c in found)]
    head = ["", "MB", "tokens/s", "min", "max", "of memory", *(f"x {engine}" for engine in rivals)]
    rows = []
    for c in found:
        times = ratios(c, found)
        share = f"{c.median * c.weight_bytes / 1e9 / roof:.0%}" if decode else "-"
        beside = [f"{times[r][1]:.2f} {times[r][0]}" if r in times else "-" for r in rivals]
        rows.append(
            [c.name, f"{c.weight_bytes / 1e6:.0f}", f"{c.median:.1f}", f"{min(c.values):.1f}",
             f"{max(c.values):.1f}", share, *beside]
        )  # fmt: skip
    harness.table(f"{kind}: memory reads {roof:.1f} GB/s", head, rows)


def record(
    kind: str,
    args: argparse.Namespace,
    found: list[Candidate],
    bandwidth: list[float],
    engines: dict[str, Any],
) -> dict[str, Any]:
    """What the results file keeps."""
    roof = median(bandwidth)
    rows = []
    for candidate in found:
        row = candidate.row()
        if kind == "decode":  # a prompt reads the weights once for many tokens
            share = candidate.median * candidate.weight_bytes / 1e9 / roof
            row["bandwidth_share"] = round(share, 3)
        times = ratios(candidate, found)
        if times:
            row["times"] = {f"{r} {theirs}": round(x, 3) for r, (theirs, x) in times.items()}
        rows.append(row)
    model = Path(args.model).name if args.model else models.demo_model().name
    label = args.label or Path(model).stem
    options = {"tokens": args.tokens, "prompt_tokens": args.prompt_tokens, "rounds": args.rounds}
    return {
        "label": label,
        "options": options,
        "engines": engines,
        "read_bandwidth_gb_s": [round(value, 2) for value in bandwidth],
        "candidates": rows,
    }

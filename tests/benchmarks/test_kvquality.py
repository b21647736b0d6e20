"""The benchmark of KV caches on a tiny model: rows, what is kept, and what is compared."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import harness
import kvquality
import models
import numpy as np
import pytest
from kvquality import Job

from lacewing import LLM
from lacewing.engine.scorer import LLMScorer
from lacewing.quality import Text, evaluate
from tests.checkpoint import build


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    monkeypatch.setattr(models, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(harness, "HERE", tmp_path)
    model = build.tiny_gguf("Q4_1", max_position_embeddings=4096).write(tmp_path / "tiny.gguf")
    (tmp_path / "text").write_text("abcdefghij klm. " * 40)
    words = [{"id": str(i), "context": "ab" * i + "c", "target": "de"} for i in range(1, 5)]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(word) + "\n" for word in words))
    return kvquality.arguments(
        [str(model), "--kv", "f16", "int8", "--windows", "64", "96", "--max-tokens", "300",
         "--text", str(tmp_path / "text"), "--lambada", str(tmp_path / "words.jsonl"),
         "--items", "4", "--book", str(tmp_path / "text"), "--haystacks", "300",
         "--needles", "3", "--threads", "1"]
    )  # fmt: skip


def measured(args: argparse.Namespace) -> tuple[dict[str, Any], Job]:
    job = Job(args)
    for kv in args.kv:
        job.measure(kv)
    return job.record(), job


def test_figures_are_those_of_eval(args: argparse.Namespace) -> None:
    record, _ = measured(args)
    dense, narrow = record["rows"]
    assert (record["compared_with"], dense["kv"], narrow["kv"]) == ("f16", "f16", "int8")
    for size in (64, 96):
        for row in (dense, narrow):
            with LLM(args.model, threads=1, max_context=record["context"], kv=row["kv"]) as llm:
                (expected,) = evaluate(LLMScorer(llm), [Text.read(args.text, size, 300)])
            found = row[f"text {size} 300"]
            assert found["scored_tokens"] == expected.scored_tokens == 300
            assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
        ratio = narrow[f"text {size} 300"]["perplexity"] / dense[f"text {size} 300"]["perplexity"]
        assert narrow[f"text {size} 300"]["perplexity_ratio"] == pytest.approx(ratio, rel=1e-5)
        low, high = narrow[f"text {size} 300"]["perplexity_ratio_interval"]
        assert low <= ratio <= high
    assert "perplexity_ratio" not in dense["text 64 300"]
    assert narrow["needles 300 3"]["needles"] == 3
    assert {"difference", "log_prob_difference_interval"} <= narrow["lambada 4"].keys()
    assert narrow["bytes_per_token"] < dense["bytes_per_token"]
    assert "losses" not in json.dumps(record)
    kvquality.show(record)


def test_what_is_measured_is_kept(
    args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Any] = []
    run = Job.run
    monkeypatch.setattr(Job, "run", lambda *given: runs.append(given[2]) or run(*given))
    first, _ = measured(args)
    assert len(runs) == 2 * 4
    again, _ = measured(args)
    assert again == first
    assert len(runs) == 8, "nothing is measured twice"
    args.kv = ["f16", "int8", "f32"]
    args.windows = [64, 96, 128]
    measured(args)
    assert len(runs) == 8 + 2 + 5, "what is new, and nothing else"
    args.again = True
    args.kv = ["f32"]
    measured(args)
    assert len(runs) == 15 + 5


def test_bytes_are_those_of_the_context_that_is_asked_for(args: argparse.Namespace) -> None:
    """Of `int4` the last blocks are int8, and the fewer the tokens the more these weigh."""
    args.kv, args.items = ["int4"], 0
    long, _ = measured(args)
    args.haystacks = []
    short, _ = measured(args)
    assert (long["context"], short["context"]) == (300, 96)
    assert short["rows"][0]["bytes_per_token"] > long["rows"][0]["bytes_per_token"]


def test_a_run_that_was_stopped_goes_on(
    args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, runs = Job.run, []

    def stop(*given: Any) -> Any:
        runs.append(given)
        if len(runs) == 3:
            raise KeyboardInterrupt
        return run(*given)

    monkeypatch.setattr(Job, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        measured(args)
    record, _ = measured(args)
    assert len(runs) == 3 + 6
    assert all(len(row) == 2 + 4 for row in record["rows"])


def test_a_cache_that_the_engine_does_not_know(args: argparse.Namespace) -> None:
    args.kv = ["nonsense:1/16", "f32", "int8"]
    record, job = measured(args)
    unknown, _, narrow = record["rows"]
    assert unknown["error"].startswith("RequestError: ")
    assert unknown.keys() == {"kv", "error"}
    assert record["compared_with"] == "f32"
    assert "perplexity_ratio" in narrow["text 64 300"]
    assert not job.path("nonsense:1/16").exists(), "it is tried again next time"
    kvquality.show(record)
    args.kv = ["nonsense:1/16"]
    kvquality.show(measured(args)[0])


def test_the_difference_is_paired(args: argparse.Namespace) -> None:
    """Twice as hard everywhere: no doubt about it, though the text itself varies much."""
    job, rng = Job(args), np.random.default_rng(0)
    losses = rng.exponential(3, 640)
    lengths = [64] * 10
    told = job.compared(
        {"perplexity": 1.0, "losses": list(losses + np.log(2)), "lengths": lengths},
        {"perplexity": 1.0, "losses": list(losses), "lengths": lengths},
    )
    assert told["perplexity_ratio"] == pytest.approx(2)
    assert told["perplexity_ratio_interval"] == pytest.approx([2, 2])

"""The sentences of the quality benchmark's page."""

from __future__ import annotations

from typing import Any

import verdict


def row(name: str, family: str, bytes: int, perplexity: float, **more: Any) -> dict[str, Any]:
    figures = {"bytes": bytes, "perplexity": perplexity, "loss": perplexity / 20 - 1}
    return {"name": name, "family": family, "own_grid": False, **figures, **more}


DENSE = row("F32", "llama.cpp", 500_000_000, 20.0, dense=True)
OWN = row("Q4_1", "llama.cpp", 10_000_000, 20.0, own_grid=True)
THREE = row("w3a8g64 calibrated", "calibrated", 80_500_000, 24.0, speed={"median": 90.0})
FOUR = row("w4a8g64 calibrated", "calibrated", 90_000_000, 22.0, speed={"median": 95.0})
SPARSE = row("w4a8g64_sp 50% joint", "sparse", 80_000_000, 28.0, speed={"median": 99.0})
THEIRS = row("Q4_0", "llama.cpp", 91_000_000, 25.0, speed={"median": 60.0})


def said(*rows: dict[str, Any]) -> list[str]:
    return verdict.sentences({"rows": list(rows)})


def test_the_frontier_is_of_those_that_nobody_beats() -> None:
    found = said(DENSE, OWN, THREE, FOUR, SPARSE, THEIRS)
    assert found[:4] == [
        "On the frontier of perplexity and bytes: "
        "w4a8g64_sp 50% joint, w3a8g64 calibrated, w4a8g64 calibrated.",
        "Beaten in perplexity and bytes: llama.cpp Q4_0 (by w4a8g64 calibrated).",
        "On the frontier of perplexity and speed: w4a8g64_sp 50% joint, w4a8g64 calibrated.",
        "Beaten in perplexity and speed: "
        "w3a8g64 calibrated (by w4a8g64 calibrated), llama.cpp Q4_0 (by w4a8g64 calibrated).",
    ]


def test_equal_ones_do_not_beat_each_other() -> None:
    assert said(THREE, {**THREE, "name": "twin"})[0].endswith(": w3a8g64 calibrated, twin.")


def test_a_sparse_model_is_held_against_a_dense_one_of_as_many_bytes() -> None:
    (sentence,) = [each for each in said(THREE, FOUR, SPARSE) if each.startswith("Sparse")]
    assert sentence == (
        "Sparse w4a8g64_sp 50% joint (80.0 MB, +40.0%) loses to the best dense one in as many "
        "bytes, w3a8g64 calibrated (80.5 MB, +20.0%)."
    )
    healed = {**SPARSE, "name": "mended", "family": "healed"}
    assert any(
        each.startswith("Healed mended (80.0 MB, +40.0%) loses to the best dense one that was not")
        for each in said(THREE, healed)
    )
    better = {**SPARSE, "perplexity": 23.0, "loss": 0.15}
    assert any("+15.0%) beats the best dense one" in each for each in said(THREE, FOUR, better))
    assert said(FOUR, SPARSE)[-1] == (
        "No dense model of ours is as small as w4a8g64_sp 50% joint (80.0 MB, +40.0%)."
    )


def test_ours_are_held_against_llama_cpp_in_no_more_bytes() -> None:
    assert said(FOUR, THREE, SPARSE, THEIRS)[-1] == (
        "Better than llama.cpp Q4_0 (91.0 MB, +25.0%) in no more bytes: "
        "w4a8g64 calibrated (90.0 MB, +10.0%), w3a8g64 calibrated (80.5 MB, +20.0%)."
    )
    assert said(SPARSE, THEIRS)[-1] == (
        "Nothing of ours is better than llama.cpp Q4_0 (91.0 MB, +25.0%) in no more bytes."
    )


def test_without_others_nothing_is_said() -> None:
    assert said(DENSE, OWN) == []

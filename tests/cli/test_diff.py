"""`lacewing diff`: two models side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.checkpoint import build
from tests.cli.conftest import Call

ITEMS = (
    '{"id": "1", "query": "abc", "choices": ["def", "gh"], "gold": 0}\n'
    '{"id": "2", "query": "xyz", "choices": ["x", "yz"], "gold": 1}\n'
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text("abcdefghijklmnopqrstuvwxyz" * 12)
    return path


def test_everything_side_by_side(call: Call, tiny_hub: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text(ITEMS)
    options = ["--text", text, "--window", "32", "--items", tmp_path / "items.jsonl"]
    options += ["--prompts", "3", "--tokens", "5", "--format-b", "w4a8g32", "--speed"]
    status, out, err = call("diff", tiny_hub, tiny_hub, *options, "--seed", "2", "--json")
    assert status == 0, err
    found = json.loads(out)
    a, b = found["models"]
    assert b["format"] == "w4a8g32"
    assert b["bytes"] < a["bytes"] and b["bits_per_weight"] < a["bits_per_weight"]
    kl = found["divergence"]
    assert kl["kl"] > 0
    assert sum(each["scored_tokens"] for each in kl["ranges"]) == kl["scored_tokens"]
    assert len(kl["places"]) == 10
    assert (found["answers"]["prompts"], found["answers"]["asked_tokens"]) == (3, 5)
    assert (found["items"][0]["items"], found["items"][0]["a"]["seed"]) == (2, 2)
    assert all(rate > 0 for rate in found["speed"]["tokens_per_s"])
    assert [len(runs) for runs in found["speed"]["tokens_per_s_runs"]] == [5, 5]
    status, out, err = call("diff", tiny_hub, tiny_hub, *options)
    assert status == 0, err
    for word in ("bits per weight", "KL(A || B)", "A expects", "A says", "lost / gained"):
        assert word in out
    assert "tokens/s decoding 64 tokens" in out
    assert "greedy answers, of at most 5 tokens" in err
    assert "seed 0" in out


def test_a_model_is_like_itself(call: Call, tiny_gguf: Path, text: Path) -> None:
    status, out, err = call(
        "diff", tiny_gguf, tiny_gguf, "--text", text, "--window", "32", "--tokens", "4", "--json"
    )
    assert status == 0, err
    found = json.loads(out)
    assert found["divergence"]["kl_max"] == 0
    assert found["divergence"]["perplexity_ratio_interval"] == [1, 1]
    assert found["answers"]["same"] == found["answers"]["prompts"] == 8
    assert "items" not in found and "speed" not in found


def test_only_the_bytes(call: Call, tiny_gguf: Path) -> None:
    status, out, err = call("diff", tiny_gguf, tiny_gguf)
    assert status == 0, err
    assert "bytes" in out and "KL" not in out


def test_prompts_of_a_file(call: Call, tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("abc\ndef\n")
    options = ("--prompts", tmp_path / "prompts.txt", "--tokens", "3", "--json")
    status, out, err = call("diff", tiny_gguf, tiny_gguf, *options)
    assert status == 0, err
    answers = json.loads(out)["answers"]
    assert [each["prompt"] for each in answers["partings"]] == ["<s>abc", "<s>def"]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [("3", "--prompts 3 are cut from a text"), ("nowhere.txt", "nowhere.txt")],
)
def test_prompts_that_are_none(call: Call, tiny_gguf: Path, prompts: str, message: str) -> None:
    status, out, err = call("diff", tiny_gguf, tiny_gguf, "--prompts", prompts)
    assert (status, out) == (1, "")
    assert message in err


def test_no_prompts(call: Call, tiny_gguf: Path, text: Path) -> None:
    status, _, err = call("diff", tiny_gguf, tiny_gguf, "--text", text, "--prompts", "0")
    assert status == 1
    assert "--prompts must be at least 1 or a file, got 0" in err


def test_models_of_other_vocabularies(
    call: Call, tiny_gguf: Path, tmp_path: Path, text: Path
) -> None:
    config = build.config("llama", vocab_size=build.VOCAB + 8)
    other = build.write_hub(tmp_path / "other", config, build.random_weights(config))
    status, out, err = call("diff", tiny_gguf, other, "--text", text, "--window", "32")
    assert (status, out) == (1, "")
    wanted = f"got {build.VOCAB} and {build.VOCAB + 8} tokens"
    assert "need the same vocabulary" in err and wanted in err
    assert "A (tiny.gguf) and B (other)" in err

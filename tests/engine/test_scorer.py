"""The engine behind `lacewing.quality`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lacewing import LLM, SamplingParams
from lacewing.engine.scorer import LLMScorer
from lacewing.errors import RequestError
from lacewing.quality import Choice, Items, Text, evaluate
from tests.checkpoint import build


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> LLMScorer:
    path = build.tiny_gguf("Q4_1").write(tmp_path_factory.mktemp("scorer") / "tiny.gguf")
    return LLMScorer(LLM(path), "tiny")


def test_what_it_says_of_the_model(scorer: LLMScorer) -> None:
    assert (scorer.name, scorer.max_context, scorer.vocab_size) == ("tiny", 128, build.VOCAB)
    assert scorer.bos == [1]
    assert scorer.prefix_token == 1
    assert scorer.encode("ab", True) == [1, *scorer.encode("ab", False)]
    assert scorer.decode(scorer.encode("some-text", False)) == "some-text"
    assert scorer.decode([1]) == "<s>"


def test_logits_give_the_scores(scorer: LLMScorer) -> None:
    ids = scorer.encode("some-text", True)
    rows = np.concatenate(list(scorer.logits(ids[:-1]))).astype(np.float64)
    logs = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    found = logs[range(len(rows)), ids[1:]]
    assert scorer.score(ids) == pytest.approx(found, abs=1e-5)


def test_logits_of_a_branch_are_those_of_the_whole(scorer: LLMScorer) -> None:
    """To the bit, whatever the cache holds from the call before."""
    ids = scorer.encode("some-longer-text-that-branches", True)
    whole = np.concatenate(list(scorer.logits(ids)))
    list(scorer.logits([*ids[:20], 7, 8, 9], 18))
    assert (np.concatenate(list(scorer.logits(ids, 18))) == whole[18:]).all()


def test_it_generates_what_the_engine_does(scorer: LLMScorer) -> None:
    prompts = [scorer.encode("abc", True), scorer.encode("de", True)]
    params = SamplingParams(max_tokens=5)
    expected = [scorer.llm.generate(prompt, params)[0].token_ids for prompt in prompts]
    assert scorer.generate(prompts, 5) == expected


def test_it_can_be_evaluated(scorer: LLMScorer) -> None:
    text = Text("text", "abcdefghij" * 10, window=32)
    items = Items("items", (Choice("1", "abc", ("d", "-ef"), 0),))
    perplexity, accuracy = evaluate(scorer, [text, items])
    ids = scorer.encode("abc-ef", True)
    assert accuracy.log_probs[0][1] == pytest.approx(scorer.score(ids)[-3:].sum(), abs=1e-4)
    assert perplexity.scored_tokens == 93


def test_a_closed_model_gives_no_logits(tmp_path: Path) -> None:
    llm = LLM(build.tiny_gguf("Q4_1").write(tmp_path / "tiny.gguf"))
    chunks = llm.logits([1, 2, 3])
    llm.close()
    with pytest.raises(RequestError, match="closed"):
        next(chunks)

"""SmolLM2 from its file to words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacewing import LLM, RequestError, SamplingParams, UnsupportedCpuError

QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three colours.",
]


@pytest.fixture(scope="module")
def llm(smollm2_gguf: Path) -> Iterator[LLM]:
    with LLM(smollm2_gguf, max_context=512) as opened:
        yield opened


def chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def test_it_answers(llm: LLM) -> None:
    result = llm.chat(chat("What is 2+2?"), SamplingParams(max_tokens=40))
    assert "4" in result.text
    assert result.finish_reason == "stop"
    assert "<|im_end|>" not in result.text


def test_it_continues_a_text(llm: LLM) -> None:
    result = llm.generate("The capital of France is", SamplingParams(max_tokens=2))[0]
    assert result.text.startswith(" Paris")  # the space is the model's
    assert len(result.token_ids) == 2
    assert result.finish_reason == "length"


def test_streams_say_the_same(llm: LLM) -> None:
    params = SamplingParams(max_tokens=48, temperature=0.8, top_p=0.95, seed=7)
    for question in QUESTIONS:
        whole = llm.chat(chat(question), params)
        pieces = list(llm.stream_chat(chat(question), params))
        assert "".join(piece.text for piece in pieces) == whole.text
        assert pieces[-1].finish_reason == whole.finish_reason


def test_a_batch_says_what_each_prompt_says_alone(llm: LLM) -> None:
    params = [
        SamplingParams(max_tokens=12, logprobs=2, temperature=t, seed=5) for t in (0.0, 0.7, 1.0)
    ]
    together: list[Any] = llm.generate(list(QUESTIONS), params)
    for question, each, found in zip(QUESTIONS, params, together, strict=True):
        alone = llm.generate(question, each)[0]
        assert alone.token_ids == found.token_ids
        assert alone.logprobs == found.logprobs  # to the last bit
        assert alone.text == found.text


def test_one_thread_and_two_say_the_same(smollm2_gguf: Path, llm: LLM) -> None:
    params = SamplingParams(max_tokens=8, logprobs=1)
    with LLM(smollm2_gguf, max_context=512, threads=1) as single:
        one = single.generate(QUESTIONS[1], params)[0]
    two = llm.generate(QUESTIONS[1], params)[0]
    assert (one.token_ids, one.logprobs) == (two.token_ids, two.logprobs)


def test_emoji_and_scripts_stream_whole(llm: LLM) -> None:
    text = "Grüße 😀 日本語 नमस्ते"
    prompt = f"Repeat: {text}\nRepeat: {text}\nRepeat: {text}\nRepeat:"
    pieces = list(llm.stream(prompt, SamplingParams(max_tokens=30, stop="\n")))
    assert "".join(piece.text for piece in pieces) == f" {text}"
    assert all(len(piece.text) > 0 for piece in pieces[:-1])


def test_score_of_english_is_better_than_of_noise(llm: LLM) -> None:
    english = llm.text.encode("The sun rises in the east and sets in the west. " * 3)
    noise = np.random.default_rng(0).permutation(english).tolist()
    assert llm.score(english).mean() > -2
    assert llm.score(noise).mean() < -4


def test_too_long_a_prompt(llm: LLM) -> None:
    with pytest.raises(RequestError, match="context of 512 tokens"):
        llm.generate("word " * 600)


def test_out_of_context_ends_with_length(llm: LLM) -> None:
    prompt = [1000 + i % 50 for i in range(500)]
    result = llm.generate([prompt], SamplingParams(max_tokens=100, ignore_eos=True))[0]
    assert result.finish_reason == "length"
    assert len(result.token_ids) == 12


@pytest.mark.parametrize(
    "options", [{"max_context": 10**6}, {"threads": 0}, {"max_context": 1}], ids=str
)
def test_options_out_of_range(smollm2_gguf: Path, options: Any) -> None:
    with pytest.raises(RequestError):
        LLM(smollm2_gguf, **options)


def test_an_isa_that_is_none(smollm2_gguf: Path) -> None:
    with pytest.raises(UnsupportedCpuError, match="got 'mmx'"):
        LLM(smollm2_gguf, isa="mmx")

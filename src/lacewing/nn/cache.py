"""The engine's KV cache and attention inside models of transformers:

    from lacewing.nn.cache import LacewingCache

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="lacewing")
    model.generate(**inputs, past_key_values=LacewingCache(model.config, kv="int8"))

Importing this module makes the attention known to transformers. It reads keys and values in the
cache's codec where they lie (docs/concepts/kv-cache.md), a prompt's too, so that what a token
attends does not depend on how the tokens were cut into steps. No mask of the context's size is
made. Raises LacewingError where transformers is missing or too old.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lacewing.errors import LacewingError, RequestError
from lacewing.native import check_isa, compiled

_NEEDED = "the KV cache in PyTorch needs transformers 5.4 or newer"
try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.cache_utils import Cache, CacheLayerMixin
    from transformers.masking_utils import causal_mask_function, sdpa_mask
except ImportError as error:
    raise LacewingError(f"{_NEEDED}: {error}", hint="pip install -U transformers") from error
if "q_offset" not in inspect.signature(sdpa_mask).parameters:
    raise LacewingError(f"{_NEEDED}: its masks are made otherwise", "pip install -U transformers")

__all__ = ["LacewingCache", "attend", "describe_mask"]

NAME = "lacewing"
_Mixin: Any = CacheLayerMixin  # its own methods are not typed
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LAYERS = ("full_attention", "sliding_attention")
_UNKNOWN = ("softcap", "s_aux", "position_bias", "head_mask", "output_attentions", "cache")
"""Arguments of attention that change its result and that the kernels do not have."""


class LacewingCache(Cache):
    """Keys and values of every layer, as `kv` stores them; for `attn_implementation="lacewing"`.

    config: the model's. kv: "f16" (default), "bf16", "f32" or "int8". isa: force an
    instruction set (see `lacewing doctor`). Raises RequestError for another `kv`, and for layers
    that are neither full nor sliding-window attention; UnsupportedCpuError.

    Memory grows with the sequences, by doubling. Beam search, cropping (assisted decoding) and
    left padding are fine; every other mask than causal with left padding, gradients, and attention
    with soft caps, sinks or biases raise RequestError. `bytes` is what the blocks take.
    """

    def __init__(self, config: Any, kv: str = "f16", isa: str | None = None) -> None:
        check_isa(isa)
        _checked(compiled().KvCache, kv, 1, 1, 16, isa)
        kinds = _layer_kinds(config.get_text_config(decoder=True))
        if others := set(kinds) - set(_LAYERS):
            raise RequestError(
                f"LacewingCache: layers must be {' or '.join(_LAYERS)}, got {sorted(others)}"
            )
        self.kv = kv
        self._layers = [_Layer(kv, isa) for _ in kinds]
        super().__init__(layers=list(self._layers))

    @property
    def bytes(self) -> int:
        """Of the blocks of all layers; some of them are still free."""
        return sum(layer.native.bytes for layer in self._layers if layer.native is not None)


def _layer_kinds(config: Any) -> list[str]:
    """Of every layer. A window without `layer_types` is in the masks, as chunks are."""
    return list(
        getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    )


class _Layer(_Mixin):
    """One layer's `_C.KvCache`, made when the first keys tell its sizes.

    It keeps all tokens of a sliding window's layer too: cropping gets them back.
    """

    is_croppable = True
    is_sliding = False  # one length for all layers: masks are described, not made

    def __init__(self, kv: str, isa: str | None) -> None:
        super().__init__()
        self.kv, self.isa = kv, isa
        self.native: Any = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch, heads, _, head_dim = key_states.shape
        self.native = _checked(compiled().KvCache, self.kv, batch, heads, head_dim, self.isa)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens come into the cache with the attention that follows: it knows the padding."""
        _check_states(key_states, "keys")
        _check_states(value_states, "values")
        if key_states.shape != value_states.shape:
            raise RequestError(
                "LacewingCache: keys and values must have the same shape, got "
                f"{list(key_states.shape)} and {list(value_states.shape)}"
            )
        if self.native is None:
            self.lazy_initialization(key_states, value_states)
        keys = key_states.as_subclass(_Keys)
        keys.step = _Step(self, key_states, value_states)
        return keys, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return 0 if self.native is None else self.native.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in older versions of transformers

    def reset(self) -> None:
        self.native = None
        self.is_initialized = False

    def crop(self, tokens: int) -> None:
        """To its first `tokens`, or without its last `-tokens`; 0 does nothing. transformers has
        asked both ways."""
        if self.native is not None and tokens:
            length = self.native.length
            self.native.crop(min(length, tokens) if tokens > 0 else max(0, length + tokens))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.native is not None:
            rows = beam_idx.reshape(-1).to(device="cpu", dtype=torch.int64)
            _checked(self.native.select, rows.numpy())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.native is not None:
            self.reorder_cache(torch.arange(self.native.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.native is not None:
            self.reorder_cache(torch.arange(self.native.batch)[indices.cpu()])

    def offload(self) -> None:
        """There is only the CPU."""

    def prefetch(self) -> None:
        """There is only the CPU."""


@dataclass
class _Step:
    """New tokens of a layer: keys and values `[batch, n_kv_heads, tokens, head_dim]`."""

    layer: _Layer
    keys: torch.Tensor
    values: torch.Tensor
    stored: bool = field(default=False)

    def store(self, starts: list[int]) -> None:
        """Once, though layers may share the keys of another. starts: of each sequence, the column
        of its first token."""
        if not self.stored:
            new = [_rows(each) for each in (self.keys, self.values)]
            where = np.array(starts, np.int32)
            _checked(self.layer.native.append, *new, where, torch.get_num_threads())
            self.stored = True


class _Keys(torch.Tensor):
    """The new keys of a step, and where the others are. Whoever takes them for all keys, as every
    other attention does, gets a RequestError instead of a wrong result."""

    step: _Step

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in ("__get__", "__set__", "size", "dim"):
            return super().__torch_function__(func, types, args, kwargs or {})
        raise RequestError(
            f"keys in a LacewingCache are read by its own attention, not by `{func.__name__}`",
            hint='model.set_attn_implementation("lacewing")',
        )


# -- Attention ------------------------------------------------------------------------------------


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of `query` `[batch, n_heads, tokens, head_dim]` over the LacewingCache that `key`
    comes from: `[batch, tokens, n_heads, head_dim]` in the type of `query`; rows of padding are 0.

    attention_mask: of `describe_mask`. Raises RequestError for whatever it cannot do.
    """
    if not isinstance(key, _Keys):
        raise RequestError(
            'attn_implementation="lacewing" attends in a LacewingCache alone, got keys without one',
            hint="pass past_key_values=LacewingCache(model.config), and use_cache=True",
        )
    _check_states(query, "queries")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal or dropout:
        raise RequestError(
            f"attention in a LacewingCache is causal and without dropout, got {causal=}, {dropout=}"
        )
    if asked := [name for name in _UNKNOWN if options.get(name) not in (None, False)]:
        raise RequestError(f"attention in a LacewingCache has no {', '.join(asked)}")
    starts, window = _read_mask(attention_mask, key.step, query.shape[2])
    key.step.store(starts)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    native, threads = key.step.layer.native, torch.get_num_threads()
    found = _checked(native.attend, _rows(query), float(scale), window, threads)
    return torch.from_numpy(found).to(query.dtype), None


def _read_mask(mask: Any, step: _Step, rows: int) -> tuple[list[int], int]:
    """(the column where each sequence begins, the window or 0) of what `describe_mask` made."""
    native = step.layer.native
    if not isinstance(mask, torch.Tensor) or mask.shape != (native.batch, 3):
        shape = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise RequestError(
            "attention in a LacewingCache is causal, behind left padding: it takes no mask of "
            f"other kinds, got {shape}",
            hint="pass attention_mask as [batch, tokens], or none",
        )
    starts, (window, *_), (length, *_) = mask.T.tolist()
    known = native.length + (0 if step.stored else step.keys.shape[2])
    if known != length or step.keys.shape[2] != rows:
        raise RequestError(
            f"a LacewingCache's layers must have the same length, got {known} and {length} tokens",
            hint="a call that failed may have left them so: begin again with cache.reset()",
        )
    return starts, window


def describe_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., torch.Tensor] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> torch.Tensor:
    """What `attend` has to know instead of a mask, int64 `[batch, 3]`: the column of a sequence's
    first token, the sliding window (0: none), the tokens in all.

    The arguments are those of transformers' `sdpa_mask`. Raises RequestError for anything but
    causal attention, with or without a window, behind left padding.
    """
    window = local_size or 0
    if (
        not allow_is_causal_skip
        or kv_offset
        or q_offset + q_length != kv_length
        or not _is_causal(mask_function, q_offset, kv_length, window)
    ):
        raise RequestError(
            "attention in a LacewingCache is causal, with or without a sliding window: packed "
            "sequences, image tokens and other masks are not there"
        )
    starts = _starts(attention_mask, batch_size, kv_length)
    return torch.tensor([[start, window, kv_length] for start in starts])


def _is_causal(function: Callable[..., Any], first: int, length: int, window: int) -> bool:
    """Of rows `first`..`length - 1`, told by the first and the last two: these differ from those of
    attention in both directions and in chunks."""
    rows = torch.tensor(sorted({first, max(first, length - 2), length - 1}))[:, None]
    columns, zero = torch.arange(length)[None], torch.zeros(1, 1, dtype=torch.int64)
    expected = columns <= rows
    if window:
        expected &= columns > rows - window
    return torch.equal(function(zero, zero, rows, columns).expand_as(expected), expected)


def _starts(mask: torch.Tensor | None, batch: int, length: int) -> list[int]:
    if mask is None:
        return [0] * batch
    kept = mask[:, :length].bool()
    starts = (~kept).sum(1)
    if kept.shape != (batch, length) or not torch.equal(
        kept, torch.arange(length)[None] >= starts[:, None]
    ):
        raise RequestError(
            "attention in a LacewingCache needs an attention_mask of zeros, then ones, "
            f"[{batch}, {length}], got another of {list(mask.shape)}",
            hint='pad on the left: tokenizer(..., padding_side="left")',
        )
    return starts.tolist()


# -- Arguments ------------------------------------------------------------------------------------


def _check_states(states: torch.Tensor, what: str) -> None:
    if states.device.type != "cpu" or states.dtype not in _FLOATS or states.dim() != 4:
        raise RequestError(
            f"LacewingCache: {what} must be [batch, heads, tokens, head_dim] of float32, bfloat16 "
            f"or float16 on the CPU, got {list(states.shape)} of {states.dtype} on {states.device}"
        )
    if states.requires_grad and torch.is_grad_enabled():
        raise RequestError(
            "attention in a LacewingCache has no gradient",
            hint="call the model in torch.inference_mode() or torch.no_grad()",
        )


def _rows(states: torch.Tensor) -> Any:
    """`[batch, heads, tokens, head_dim]` as f32 `[batch, tokens, heads, head_dim]`: a view, where
    float32 heads came out of one projection."""
    return states.detach().transpose(1, 2).float().contiguous().numpy()


def _checked(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except ValueError as error:
        raise RequestError(str(error)) from error
    except MemoryError as error:
        raise RequestError("no memory for the KV cache", 'try kv="int8"') from error


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, describe_mask)

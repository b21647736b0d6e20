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

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lacewing.checkpoint import open_source
from lacewing.checkpoint.kvplan import KvPlan, fingerprint
from lacewing.errors import CheckpointError, RequestError, UnsupportedModelError
from lacewing.kv.choice import KvChoice, parse_kv
from lacewing.kv.layout import LayerShape, check_choice, check_mergeable, find_plan
from lacewing.native import check_isa
from lacewing.nn.masks import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    CacheLayerMixin,
    describe_mask,
)
from lacewing.nn.paged import PagedLayer

__all__ = ["LacewingCache", "attend", "describe_mask"]

NAME = "lacewing"
# Their methods are not typed.
_Cache: Any = Cache
_Mixin: Any = CacheLayerMixin
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LAYERS = ("full_attention", "sliding_attention")
_UNKNOWN = ("softcap", "s_aux", "position_bias", "head_mask", "output_attentions", "cache")
"""Arguments of attention that change its result and that the kernels do not have."""


class LacewingCache(_Cache):
    """Keys and values of every layer, as `kv` stores and reads them; for
    `attn_implementation="lacewing"`.

    config: the model's. kv: as in `lacewing.LLM` (docs/concepts/kv-cache.md): "f16" (default),
    "int8", "int4", "int8+topk:1/16", "plan:FILE", "merge:0.2", ..; labels of `topk` are those of
    `kvplan.json` in the directory that the model was read from, or of `topk:1/16@FILE`. `merge`
    takes the first call's tokens for the prompt. isa: force an instruction set (see
    `lacewing doctor`).

    Raises RequestError for another `kv` or one that the model cannot have, and for layers that are
    neither full nor sliding-window attention; CheckpointError for a plan of another model;
    UnsupportedCpuError.

    Memory grows with the sequences, by a 16th. Beam search, assisted decoding, left padding and
    `copy.deepcopy` are fine; `crop` goes back to any length with a codec that grows and no windows,
    else into the last call, or the last of its pieces of 512 tokens, and never into a prompt that
    was merged. Every other mask than causal with left padding, gradients, and attention with soft
    caps, sinks or biases raise RequestError. `bytes` is what the blocks take.
    """

    def __init__(self, config: Any, kv: str = "f16", isa: str | None = None) -> None:
        check_isa(isa)
        text = config.get_text_config(decoder=True)
        kinds = _layer_kinds(text)
        if others := set(kinds) - set(_LAYERS):
            raise RequestError(
                f"LacewingCache: layers must be {' or '.join(_LAYERS)}, got {sorted(others)}"
            )
        choice = parse_kv(kv)
        plan, model_type = _find_plan(config, text.model_type, kv)
        check_choice(choice, plan)
        if choice.merge is not None:
            check_mergeable([kind == "sliding_attention" for kind in kinds])
        shared = bool(getattr(text, "num_kv_shared_layers", 0))
        if shared and choice.merge:
            raise RequestError("`merge` needs layers that have keys of their own")
        made = _Made(choice, model_type, shared, isa)
        plans = [plan and plan.layer(i, len(kinds)) for i in range(len(kinds))]
        self.kv = kv
        self._layers = [_Layer(made, each) for each in plans]
        super().__init__(layers=list(self._layers))

    def crop(self, tokens: int) -> None:
        """All layers, or none: see `_Layer.crop`."""
        for layer in self._layers:
            if layer.paged is not None and tokens:
                layer.paged.check_crop(_cropped(layer.paged, tokens))
        super().crop(tokens)

    @property
    def bytes(self) -> int:
        """Of the blocks of all layers; some of them are still free."""
        return sum(layer.paged.bytes for layer in self._layers if layer.paged is not None)


def _layer_kinds(config: Any) -> list[str]:
    """Of every layer. A window without `layer_types` is in the masks, as chunks are."""
    return list(
        getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    )


def _find_plan(config: Any, model_type: str, kv: str) -> tuple[KvPlan | None, str]:
    """The plan that `kv` asks for, checked against the model's files where they are here, and what
    the model calls itself in a plan. Raises RequestError, CheckpointError."""
    name = getattr(config, "_name_or_path", "")
    home = Path(name) if name else None
    plan = find_plan(kv, home)
    if plan is None or home is None or not (home / "config.json").is_file():
        return plan, model_type
    try:
        source = open_source(home)
        spec = source.spec
    except (CheckpointError, UnsupportedModelError):  # what transformers reads, and we do not
        return plan, model_type
    plan.check(spec, fingerprint(source.tensors))
    return plan, spec.model_type


@dataclass(frozen=True)
class _Made:
    """How layers are made. shared: some attend the keys of others."""

    choice: KvChoice
    model_type: str
    shared: bool
    isa: str | None


class _Layer(_Mixin):
    """One layer's cache, made with the first attention, which tells its sizes and its window."""

    is_sliding = False  # one length for all layers: masks are described, not made

    def __init__(self, made: _Made, plan: KvPlan | None) -> None:
        super().__init__()
        self._made, self._plan = made, plan
        # batch, n_kv_heads, head_dim, until the first attention tells the window
        self._shape: tuple[int, int, int] | None = None
        self.paged: PagedLayer | None = None

    @property
    def is_croppable(self) -> bool:
        return True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch, heads, _, head_dim = key_states.shape
        self._shape = batch, heads, head_dim
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
        if self.paged is None:
            self.lazy_initialization(key_states, value_states)
        else:
            self._check_sizes(self.paged, key_states)
        keys = key_states.as_subclass(_Keys)
        keys.step = _Step(self, key_states, value_states)
        return keys, value_states

    @staticmethod
    def _check_sizes(paged: PagedLayer, keys: torch.Tensor) -> None:
        batch, heads, head_dim = paged.batch, paged.shape.n_kv_heads, paged.shape.head_dim
        if (keys.shape[0], keys.shape[1], keys.shape[3]) != (batch, heads, head_dim):
            raise RequestError(
                f"LacewingCache: keys must be [{batch}, {heads}, tokens, {head_dim}] as before, "
                f"got {list(keys.shape)}",
                hint="a new batch begins with cache.reset()",
            )

    def for_window(self, window: int) -> PagedLayer:
        """The cache. Raises RequestError if it was made for another sliding window."""
        if self.paged is None:
            assert self._shape is not None
            made, (batch, heads, head_dim) = self._made, self._shape
            shape = LayerShape(made.model_type, heads, head_dim, window)
            self.paged = PagedLayer(shape, made.choice, self._plan, batch, made.shared, made.isa)
        if self.paged.shape.window != window:
            raise RequestError(
                "a LacewingCache's layer keeps its sliding window of "
                f"{self.paged.shape.window} tokens, got one of {window}"
            )
        return self.paged

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return 0 if self.paged is None else self.paged.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in older versions of transformers

    def reset(self) -> None:
        self.paged = self._shape = None
        self.is_initialized = False

    def crop(self, tokens: int) -> None:
        """To its first `tokens`, or without its last `-tokens`; 0 does nothing. transformers has
        asked both ways."""
        if self.paged is not None and tokens:
            self.paged.crop(_cropped(self.paged, tokens))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.paged is not None:
            self.paged.select(beam_idx.reshape(-1).tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.paged is not None:
            self.reorder_cache(torch.arange(self.paged.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.paged is not None:
            self.reorder_cache(torch.arange(self.paged.batch)[indices.cpu()])

    def offload(self) -> None:
        """There is only the CPU."""

    def prefetch(self) -> None:
        """There is only the CPU."""


def _cropped(paged: PagedLayer, tokens: int) -> int:
    return min(paged.length, tokens) if tokens > 0 else max(0, paged.length + tokens)


@dataclass
class _Step:
    """New tokens of a layer: keys and values `[batch, n_kv_heads, tokens, head_dim]`."""

    layer: _Layer
    keys: torch.Tensor
    values: torch.Tensor
    stored: bool = False

    @property
    def length(self) -> int:
        """Columns with the new ones."""
        return self.layer.get_seq_length() + (0 if self.stored else self.keys.shape[2])

    def attend(
        self, query: torch.Tensor, starts: list[int], window: int, scale: float
    ) -> torch.Tensor:
        """Stores them, once, though layers may share the keys of another, and attends. starts: of
        each sequence, the column of its first token."""
        paged, threads = self.layer.for_window(window), torch.get_num_threads()
        if self.stored:
            return torch.from_numpy(paged.attend(_rows(query), scale, threads))
        new = _rows(self.keys), _rows(self.values)
        found = paged.step(_rows(query), *new, starts, scale, threads)
        self.stored = True
        return torch.from_numpy(found)


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
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return key.step.attend(query, starts, window, float(scale)).to(query.dtype), None


def _read_mask(mask: Any, step: _Step, rows: int) -> tuple[list[int], int]:
    """(the column where each sequence begins, the window or 0) of what `describe_mask` made."""
    if not isinstance(mask, torch.Tensor) or mask.shape != (len(step.keys), 3):
        shape = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise RequestError(
            "attention in a LacewingCache is causal, behind left padding: it takes no mask of "
            f"other kinds, got {shape}",
            hint="pass attention_mask as [batch, tokens], or none",
        )
    starts, (window, *_), (length, *_) = mask.T.tolist()
    if step.length != length or step.keys.shape[2] != rows:
        raise RequestError(
            "a LacewingCache's layers must have the same length, got "
            f"{step.length} and {length} tokens",
            hint="a call that failed may have left them so: begin again with cache.reset()",
        )
    return starts, window


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


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, describe_mask)

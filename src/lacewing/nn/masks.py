"""What attention in a LacewingCache is told instead of a mask, as transformers makes masks.

Raises LacewingError where transformers is missing or too old.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from lacewing.errors import LacewingError, RequestError

_NEEDED = "the KV cache in PyTorch needs transformers 5.4 or newer"
try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.cache_utils import Cache, CacheLayerMixin
    from transformers.masking_utils import causal_mask_function, sdpa_mask
except ImportError as error:
    raise LacewingError(f"{_NEEDED}: {error}", hint="pip install -U transformers") from error
if "q_offset" not in inspect.signature(sdpa_mask).parameters:
    raise LacewingError(f"{_NEEDED}: its masks are made otherwise", "pip install -U transformers")

__all__ = [
    "AttentionInterface",
    "AttentionMaskInterface",
    "Cache",
    "CacheLayerMixin",
    "describe_mask",
]


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

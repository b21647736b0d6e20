"""What `kv=` says: how keys and values are stored between steps, and which of them are read.

    kv = CODEC [+POLICY]      "int8", "int4", "int8_sp70", "int8+topk:1/16", "topk:1/16",
                              "int8+plan:heads.json"

A block holds 16 tokens of one KV head; codecs and their layouts are listed in `csrc/formats/kv*.h`.

- Growing codecs (`f16`, `bf16`, `f32`, `int8`) store a token as it comes.
- Sealed ones are made of full blocks of `int8` once they are `RECENT` blocks old; newer ones stay
  as they grew: `int4` (KIVI, arXiv 2402.02750), `int8_sp70` (70 % of the numbers of every token
  pruned by magnitude; MUSTAFAR, arXiv 2505.22913), `int8_sp50`.
- `topk:1/n`: every token reads one block of n, chosen by labels (Double Sparsity, arXiv
  2408.07092): some channels of every key in 8 bits. The first block and the last four are always
  read, and never fewer than 32. The labels' channels are calibrated: `kvplan.json` in the model's
  directory, or `topk:1/n@FILE`.
- `plan:FILE`: every head reads, and keeps, the span that the file gives it (MoA, arXiv 2406.14909).
- `merge:r`: when a prompt is complete, its cache shrinks to the share r (Elastic Cache, arXiv
  2407.17678): every KV head keeps its first 4 tokens, its last 32 and the most important between,
  and the others become part of one that stays. Growing codecs, and models whose layers all read
  everything.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lacewing.errors import RequestError
from lacewing.native import compiled

__all__ = [
    "DEFAULT_KV",
    "FLOATS",
    "LABEL_TOKENS",
    "MERGE_KEPT",
    "MERGE_ROWS",
    "RECENT",
    "KvChoice",
    "block_bytes",
    "kept_tokens",
    "kv_formats",
    "parse_kv",
]

DEFAULT_KV = "f16"
FLOATS = ("f16", "bf16", "f32")
"""Codecs that store floats; the others are integers."""
RECENT = 2
"""Query block i reads block j as it grew if i - j < RECENT."""
LABEL_TOKENS = 256
"""Tokens of one block of labels."""
MERGE_ROWS = 32
"""Tokens at a prompt's end that one step computes together, if the prompt is to be merged: their
queries say which of its tokens are important."""
MERGE_KEPT = 37
"""Tokens that stay at least: the first 4, the last 32 and one between."""
_MERGE_PROMPT = 64  # tokens of the shortest prompt that is merged


@dataclass(frozen=True)
class KvChoice:
    """`kv=`, read."""

    codec: str
    topk: int = 0
    """Reads one block of so many; 0: all."""
    spans: bool = False
    """Heads read their spans only."""
    file: Path | None = None
    """The plan that holds spans or labels; None: the one beside the model."""
    merge: float | None = None
    """The share of a prompt that stays; None: all of it."""

    @property
    def growing(self) -> str:
        """The codec in which tokens are stored as they come."""
        return sealed_from(self.codec) or self.codec


def parse_kv(text: Any) -> KvChoice:
    """Raises `RequestError` for anything but the grammar above."""
    if not isinstance(text, str):
        raise RequestError(f"`kv` must be a string, got {text!r}", hint=_hint())
    head, plus, rest = text.partition("+")
    if not plus and ":" in head:
        head, rest = DEFAULT_KV, text
    elif plus and not rest:
        raise RequestError(f"`kv` needs a policy after `+`, got {text!r}", hint=_hint())
    known = kv_formats()
    if head not in known:
        choices = ", ".join(f"`{each}`" for each in known)
        raise RequestError(f"`kv` must be one of {choices}, got {head!r}", hint=_hint())
    return KvChoice(head, **_policy(rest)) if rest else KvChoice(head)


def _policy(text: str) -> dict[str, Any]:
    kind, _, value = text.partition(":")
    if kind == "topk":
        share = re.fullmatch(r"1/([0-9]{1,6})(?:@(.+))?", value)
        if not share or int(share[1]) < 2:
            raise RequestError(f"`topk` takes a share like `topk:1/16`, got {text!r}")
        return {"topk": int(share[1]), "file": Path(share[2]) if share[2] else None}
    if kind == "plan" and value:
        return {"spans": True, "file": Path(value)}
    if kind == "merge":
        if not re.fullmatch(r"0?\.[0-9]{1,9}", value) or not 0 < float(value) < 1:
            raise RequestError(f"`merge` takes a share between 0 and 1, got {text!r}")
        return {"merge": float(value)}
    raise RequestError(f"`kv` has no policy {text!r}", hint=_hint())


def _hint() -> str:
    examples = "for instance `int8`, `int8+topk:1/16`, `plan:FILE`, `merge:0.2`"
    return f"{examples}; see docs/concepts/kv-cache.md"


def kv_formats() -> tuple[str, ...]:
    """Names of the codecs."""
    return tuple(compiled().KV_FORMATS)


def sealed_from(name: str) -> str | None:
    """The growing codec whose full blocks this one is made of; None if it grows itself."""
    found = compiled().KV_SEALED_FROM.get(name)
    return None if found is None else str(found)


def kept_tokens(prompt: int, share: float | None) -> int:
    """Tokens to which the cache of so many prompt tokens shrinks; 0: nothing is merged."""
    if share is None or prompt < _MERGE_PROMPT:
        return 0
    keep = max(MERGE_KEPT, math.ceil(share * prompt))
    return keep if keep < prompt else 0


def block_bytes(name: str, head_dim: int) -> int:
    """Bytes of the keys and values of 16 tokens and one head."""
    return int(compiled().kv_block_bytes(name, head_dim))

"""KvLayout: which stores a model's KV cache consists of, and where every head's blocks are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lacewing.checkpoint.kvplan import KVPLAN, KvPlan, Span
from lacewing.errors import RequestError
from lacewing.kv.blocks import BLOCK_SIZE, Keep, Store, blocks_for
from lacewing.kv.choice import (
    FLOATS,
    LABEL_TOKENS,
    RECENT,
    KvChoice,
    block_bytes,
    kept_tokens,
    parse_kv,
    sealed_from,
)

if TYPE_CHECKING:
    from lacewing.models import AttentionShape

__all__ = [
    "LABELS",
    "KvLayout",
    "LayerShape",
    "check_choice",
    "check_mergeable",
    "find_plan",
    "lay_out",
]

LABELS = "labels"
_NONE = (-1, 0)


@dataclass(frozen=True)
class LayerShape:
    """An `AttentionShape` of one layer."""

    model_type: str
    n_kv_heads: int
    head_dim: int
    window: int

    n_layers = 1

    @property
    def windows(self) -> tuple[int, ...]:
        return (self.window,)


@dataclass(frozen=True)
class StorePlan:
    """A store before its number of blocks is known."""

    format: str
    keep: Keep | None = None

    @property
    def block_tokens(self) -> int:
        return LABEL_TOKENS if self.format == LABELS else BLOCK_SIZE

    def store(self, blocks: int) -> Store:
        """The store, of so many blocks."""
        return Store(blocks, self.block_tokens, self.keep)


@dataclass
class KvLayout:
    """stores: and how many heads each holds. rows: for each layer and KV head the store and the
    number in it of growing, sealed and label blocks (store -1: none), then sinks, window, stride
    and phase of what is read, in blocks (window 0: everything)."""

    topk: int
    stores: dict[StorePlan, int] = field(default_factory=dict)
    rows: list[tuple[int, ...]] = field(default_factory=list)
    channels: NDArray[np.int32] | None = None
    scales: NDArray[np.float32] | None = None
    head_dim: int = 0
    merge: float | None = None
    """The share of a prompt that stays once it is complete; None: all of it. With one store."""

    @property
    def rounds_keys(self) -> bool:
        """Whether keys are stored as integers."""
        return any(plan.format not in (*FLOATS, LABELS) for plan in self.stores)

    def place(self, plan: StorePlan) -> tuple[int, int]:
        """The store of `plan` and the number in it of one head more."""
        number = self.stores.get(plan, 0)
        self.stores[plan] = number + 1
        return list(self.stores).index(plan), number

    def sizes(self, sequences: float, context: int, rows: int) -> list[Store]:
        """Stores for so many sequences of `context` tokens, `rows` of them computed at once."""
        found = []
        for plan in self.stores:
            one = plan.store(0).peak(context, rows)
            # While a prompt is merged, both are there.
            one += blocks_for(kept_tokens(context, self.merge))
            total = max(one, int(one * sequences))
            found.append(plan.store(total))
        return found

    def bytes(self, stores: Sequence[Store]) -> int:
        """Bytes of the whole cache."""
        pairs = zip(self.stores.items(), stores, strict=True)
        return sum(self._block_bytes(p) * heads * store.total for (p, heads), store in pairs)

    def native(self, stores: Sequence[Store]) -> dict[str, Any]:
        """What `_C.Model` and `_C.KvCache` have to know."""
        pairs = zip(self.stores.items(), stores, strict=True)
        labels = {} if self.channels is None else {"channels": self.channels, "scales": self.scales}
        return {
            "stores": [(p.format, store.total, heads) for (p, heads), store in pairs],
            "heads": np.array(self.rows, np.int32),
            "topk": self.topk,
            **labels,
        }

    def _block_bytes(self, plan: StorePlan) -> int:
        if plan.format == LABELS:
            assert self.channels is not None
            return LABEL_TOKENS * int(self.channels.shape[1])
        return block_bytes(plan.format, self.head_dim)


def lay_out(spec: AttentionShape, choice: KvChoice, plan: KvPlan | None, context: int) -> KvLayout:
    """The stores of `choice`. plan: spans of the heads, or labels.

    Raises `RequestError` as `check_choice`, and if what is to be merged is not all read.
    """
    check_choice(choice, plan)
    if choice.merge is not None:
        check_mergeable([0 < window < context for window in spec.windows])
    layout = KvLayout(0, head_dim=spec.head_dim, merge=choice.merge)
    for i, own in enumerate(spec.windows):
        window = own if own < context else 0
        for head in range(spec.n_kv_heads):
            span = plan.spans[i][head] if choice.spans and plan and plan.spans else None
            layout.rows.append(_head(layout, choice, window, None if window else span))
    if StorePlan(LABELS) in layout.stores:
        assert plan is not None
        assert plan.labels is not None
        layout.topk, rows = choice.topk, len(layout.rows)
        layout.channels = np.ascontiguousarray(plan.labels.channels.reshape(rows, -1), np.int32)
        layout.scales = np.ascontiguousarray(plan.labels.scales.reshape(rows, -1), np.float32)
    return layout


def find_plan(kv: str, model: Path | None = None) -> KvPlan | None:
    """The plan that `kv` names, or wants from the directory `model`; None if it needs none.

    Raises `CheckpointError` for a file that cannot be read, `RequestError` for what is no `kv`.
    """
    choice = parse_kv(kv)
    path = choice.file
    if path is None and choice.topk and model is not None and (model / KVPLAN).is_file():
        path = model / KVPLAN
    return None if path is None else KvPlan.load(path)


def check_choice(choice: KvChoice, plan: KvPlan | None) -> None:
    """Raises `RequestError` if labels or spans are asked for and `plan` has none, or for what does
    not go together with merging."""
    if choice.topk and (plan is None or plan.labels is None):
        raise RequestError(
            "`topk` needs the labels of this model, and there are none",
            hint="lacewing calibrate-kv MODEL --data TEXT --out FILE, and `topk:1/16@FILE`",
        )
    if choice.spans and (plan is None or plan.spans is None):
        raise RequestError(
            f"`{choice.file}` has no spans",
            hint="lacewing calibrate-kv MODEL --data TEXT --budget 0.4",
        )
    if choice.merge is None:
        return
    if choice.growing != choice.codec:
        raise RequestError(
            f"`merge` needs a codec that stores tokens as they come, got `{choice.codec}`",
            hint=f"`{choice.growing}+merge:{choice.merge}`",
        )
    if choice.topk or choice.spans:
        raise RequestError("`merge` goes together with neither `topk` nor `plan`")


def check_mergeable(windows: Sequence[bool]) -> None:
    """windows: of every layer, whether it has one. Raises `RequestError`."""
    if any(windows):
        raise RequestError(
            f"`merge` needs layers that read everything, {sum(windows)} of {len(windows)} have a "
            "sliding window",
            hint="another policy, such as `topk`",
        )


def _head(layout: KvLayout, choice: KvChoice, window: int, span: Span | None) -> tuple[int, ...]:
    """The row of one head. window: of its layer, in tokens; 0: none."""
    if window:  # reads the last `window` tokens, wherever blocks begin
        last = Keep(0, (window + BLOCK_SIZE - 2) // BLOCK_SIZE + 1)
        return (*layout.place(StorePlan(choice.growing, last)), *_NONE, *_NONE, 0, 0, 0, 0)
    read, keep = (0, 0, 0, 0), None
    if span is not None and span.window:
        read = (span.sinks // BLOCK_SIZE, span.window // BLOCK_SIZE, span.stride, span.phase)
        keep = Keep(*read)
    labels = layout.place(StorePlan(LABELS)) if choice.topk else _NONE
    if sealed_from(choice.codec) is None:
        return (*layout.place(StorePlan(choice.growing, keep)), *_NONE, *labels, *read)
    growing = layout.place(StorePlan(choice.growing, Keep(0, RECENT)))
    return (*growing, *layout.place(StorePlan(choice.codec, keep)), *labels, *read)

"""What `kv=` says. Where each way is used: tests/native/test_layouts.py."""

from __future__ import annotations

from lacewing import _C
from lacewing.checkpoint.kvplan_values import MOST_CHANNELS
from lacewing.kv import choice
from lacewing.kv.blocks import BLOCK_SIZE


def test_both_sides_count_with_the_same_sizes() -> None:
    assert _C.KV_SIZES == {
        "block": BLOCK_SIZE,
        "label_block": choice.LABEL_TOKENS,
        "recent": choice.RECENT,
        "merge_rows": choice.MERGE_ROWS,
        "merge_least": choice.MERGE_KEPT,
        "label_channels": MOST_CHANNELS,
    }

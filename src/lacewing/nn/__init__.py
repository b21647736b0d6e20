"""PyTorch models with packed layers."""

from __future__ import annotations

from lacewing.nn.attention import MultiheadAttention
from lacewing.nn.conv import Conv1d, Conv2d
from lacewing.nn.experts import PackedExperts
from lacewing.nn.linear import Linear
from lacewing.nn.registration import register_with_transformers
from lacewing.nn.replace import replace_linear
from lacewing.nn.report import LayerReport, Report
from lacewing.nn.weight import PackedWeight

__all__ = [
    "Conv1d",
    "Conv2d",
    "LayerReport",
    "Linear",
    "MultiheadAttention",
    "PackedExperts",
    "PackedWeight",
    "Report",
    "replace_linear",
]

register_with_transformers()

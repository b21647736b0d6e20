"""PyTorch models with packed layers."""

from __future__ import annotations

from lacewing.nn.linear import Linear
from lacewing.nn.registration import register_with_transformers
from lacewing.nn.weight import PackedWeight

__all__ = ["Linear", "PackedWeight"]

register_with_transformers()

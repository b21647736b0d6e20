"""Channel order: inputs of like size side by side, so that a group's one scale fits them all.

A format has one scale per group of consecutive inputs, for the weights and again for the
activations of every token. One large channel among small ones spoils its group; sorted by size it
spoils only the groups of its kind (RPTQ, arXiv:2304.01089; Atom, arXiv:2310.19102). The order is
folded into the layers around (`folds.py`), so that nothing is rearranged at run time. Channels go
from large to small, which is also the order in which the column solver does best.

Where the order may change: the inner channels of the MLP, and the value channels within a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lacewing.compress.decoder import STAGES, Block
from lacewing.compress.folds import channels, input_order, merge, permute_inputs
from lacewing.compress.rounding import Inputs, energies, error, sample
from lacewing.formats import Format
from lacewing.models import DecoderSpec

__all__ = ["KEYS", "Reader", "Reordering", "reorder_stage"]

KEYS = ("rms", "absmax", "weight", "joint")
"""What channels are sorted by: root mean square of the inputs, their largest magnitude, root mean
square of the weights, and the product of the first and the third."""
_GAIN = 0.999
"""An order that changes sums only in their last digits is no gain."""
_OUTPUTS = 256
"""Outputs of a layer that the search looks at; what it finds is confirmed on all of them."""


@dataclass(frozen=True, eq=False)
class Reader:
    """Layers that read the same input: weights `[n, k]` and their formats."""

    weights: Sequence[Tensor]
    formats: Sequence[Format]
    inputs: Inputs

    def error(self, order: Tensor) -> float:
        """`rounding.error` with the inputs in `order`."""
        weights = [w[:, order] for w in self.weights]
        return error(weights, self.formats, self.inputs.ordered(order), self._energies)

    def magnitudes(self) -> dict[str, Tensor]:
        """By key, what the inputs are sorted by: `[k]` each."""
        rms = self.inputs.hessian.diagonal().sqrt()
        weight = torch.cat(list(self.weights)).square().mean(0).sqrt()
        return dict(zip(KEYS, (rms, self.inputs.absmax, weight, rms * weight), strict=True))

    @cached_property
    def _energies(self) -> list[float]:
        return energies(self.weights, self.inputs.hessian)

    def sampled(self) -> Reader:
        """With some of the outputs."""
        return Reader(sample(self.weights, _OUTPUTS), self.formats, self.inputs)

    @property
    def grouped(self) -> bool:
        """Whether the order matters to any of the formats."""
        k = self.weights[0].shape[1]
        return any(f.group_size and f.group(k) < k for f in self.formats)


@dataclass(frozen=True, eq=False)
class Reordering:
    """What was done. key: what the channels are sorted by, None where they were left as they are.
    before, after: `rounding.error`. order: int64 `[channels]`."""

    key: str | None
    before: float
    after: float
    order: Tensor


def reorder_stage(
    block: Block, stage: int, formats: Sequence[Format], inputs: Inputs
) -> Reordering:
    """Chooses an order for the input of `STAGES[stage]`, 1 or 3, and folds it into `block`, in
    place. The stage then reads `inputs.ordered(input_order(block.spec, stage, order))`. The best
    order on some of the outputs is taken if it also lowers the error on all of them."""
    spec = block.spec
    weights = [block.linear(name).weight.detach() for name in STAGES[stage]]
    reader = Reader(weights, formats, inputs)
    identity = torch.arange(channels(spec, stage))
    before = reader.error(input_order(spec, stage, identity))
    if not reader.grouped:
        return Reordering(None, before, before, identity)
    orders = {}
    for key, magnitudes in reader.magnitudes().items():
        of_channels = merge(spec, stage, magnitudes)
        orders[key] = _sort_heads(spec, of_channels) if stage == 1 else _sort(of_channels)
    some = reader.sampled()
    losses = {k: some.error(input_order(spec, stage, order)) for k, order in orders.items()}
    key = min(losses, key=lambda name: losses[name])
    after = reader.error(input_order(spec, stage, orders[key]))
    if after >= before * _GAIN:
        return Reordering(None, before, before, identity)
    permute_inputs(block, stage, orders[key])
    return Reordering(key, before, after, orders[key])


def _sort(magnitudes: Tensor) -> Tensor:
    return magnitudes.argsort(dim=-1, descending=True, stable=True)


def _sort_heads(spec: DecoderSpec, magnitudes: Tensor) -> Tensor:
    """Sorted within every head."""
    heads = _sort(magnitudes.view(spec.n_kv_heads, spec.head_dim))
    return (heads + spec.head_dim * torch.arange(spec.n_kv_heads)[:, None]).flatten()

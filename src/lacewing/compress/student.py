"""A compressed decoder in training: plain layers that hold what its masters stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lacewing.checkpoint.manifest import PackedSource
from lacewing.checkpoint.tensors import Source
from lacewing.compress.columns import Solution
from lacewing.compress.decoder import STAGES, Block, Decoder, rms_norm
from lacewing.compress.divergence import Head
from lacewing.compress.master import Master, solution_of
from lacewing.compress.teacher import hold
from lacewing.formats import PackedTensor

__all__ = ["Student"]

_MORE = 1.25, 0.02
"""Times, and beyond that a share of all weights: more zeros than rounding makes were pruned."""

Make = Callable[[Solution, "Tensor | None", "Tensor | None", int], Master]
"""From a solution, its mask where weights were pruned, the original weight where that is known,
and the number of the layer."""


class Student:
    """All blocks of a packed model at once, with a master for every layer that is packed.

    Weights of the layers are leaves in `dtype`; when `backward` is done with one, its gradient has
    gone to its master and is dropped. Embedding and head stay as they are; norms, f32, are trained.
    """

    def __init__(self, source: PackedSource, dense: Source, make: Make, dtype: torch.dtype) -> None:
        self.spec, self.dtype = source.spec, dtype
        decoder, original = Decoder(source), Decoder(dense)
        folded, targets = _folded(source), _targets(source)
        self._embedding = decoder.embedding()
        norm, head = decoder.head()
        self._norm = nn.Parameter(norm)
        self.head = Head(head.to(dtype), self.spec.logit_softcap)
        self.blocks: list[Block] = []
        self.masters: dict[str, Master] = {}
        for index in range(self.spec.n_layers):
            block = hold(decoder.block(index), dtype)
            for name in (layer for stage in STAGES for layer in stage):
                full = f"model.layers.{index}.{name}.weight"
                packed = source.values[full]
                assert isinstance(packed, PackedTensor)
                solution = solution_of(packed)
                near = None if folded else original.tensor(full)
                dense_format = not solution.grid.format.sparse  # else a master knows it
                pruned = dense_format and _pruned(solution, targets.get(full), near)
                mask = solution.values() != 0 if pruned else None
                master = self.masters[full] = make(solution, mask, near, len(self.masters))
                _connect(block.linear(name).weight, master)
            self.blocks.append(block)
        for parameter in self.norms().values():
            parameter.requires_grad_(True)

    def norms(self) -> dict[str, Tensor]:
        """Weights of all norms by their Hugging Face names."""
        found = {
            f"model.layers.{block.index}.{name.replace('/', '.')}.weight": norm
            for block in self.blocks
            for name, norm in block.norms.items()
        }
        return found | {"model.norm.weight": self._norm}

    def write(self) -> None:
        """Brings the layers up to date with their masters."""
        for name, weight in self._weights():
            self.masters[name].write(weight.data)

    def hidden(self, ids: Tensor) -> Tensor:
        """f32 `[windows, T, hidden_size]` after the last norm, of tokens `[windows, T]`."""
        x = nn.functional.embedding(ids, self._embedding) * self.spec.embedding_scale
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            for block in self.blocks:
                x = block(x)
        return rms_norm(x, self._norm, self.spec.norm_eps)

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for block in self.blocks:
            for name in (layer for stage in STAGES for layer in stage):
                yield f"model.layers.{block.index}.{name}.weight", block.linear(name).weight


def _connect(weight: Tensor, master: Master) -> None:
    """Sends the gradient of `weight` to its master as soon as it is whole."""

    def send(parameter: Tensor) -> None:
        assert parameter.grad is not None
        master.take(parameter.grad)
        parameter.grad = None

    weight.requires_grad_(True)
    weight.register_post_accumulate_grad_hook(send)


# -- what the manifest says of how the model was compressed ---------------------------------------


def _folded(source: PackedSource) -> bool:
    """Whether scales or an order of channels were folded into the weights: then those of the dense
    model are others."""
    recipe = (source.recipe or {}).get("recipe")
    if not isinstance(recipe, dict):
        return False
    return recipe.get("smooth", "none") != "none" or bool(recipe.get("reorder"))


def _targets(source: PackedSource) -> dict[str, float]:
    """The share of every weight that was to be pruned, where that is known."""
    layers = (source.recipe or {}).get("layers")
    listed = layers if isinstance(layers, list) else []
    return {
        f"{entry.get('name')}.weight": entry["target"]
        for entry in listed
        if isinstance(entry, dict) and isinstance(entry.get("target"), (int, float))
    }


def _pruned(solution: Solution, target: float | None, near: Tensor | None) -> bool:
    """Whether zeros of a dense format were pruned and have to stay; where nobody says, whether they
    are more than rounding the original makes."""
    if target is not None:
        return target > 0
    if near is None:
        return False
    size = solution.grid.group_size(near.shape[1])
    groups = zip(near.split(size, 1), solution.scales, strict=True)
    rounded = sum((solution.grid.nearest(w, s) == 0).sum().item() for w, s in groups)
    times, beyond = _MORE
    zeros = (solution.values() == 0).sum().item()
    return zeros > times * rounded + beyond * near.numel()

"""Which weights stay: what dropping one costs, and the pattern that a format can hold.

Scores are squared errors, so that they add up over the weights of a block; their order is that of
the papers' formulas, some of which are the roots of these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lacewing.errors import RecipeError
from lacewing.formats import Format
from lacewing.formats.nm import KEPT, OF
from lacewing.formats.prune import largest_of
from lacewing.formats.tiles import STRIP

__all__ = [
    "Choice",
    "check_sparsity",
    "choose_mask",
    "in_blocks",
    "magnitude",
    "obs",
    "of_four",
    "wanda",
]


def magnitude(weight: Tensor) -> Tensor:
    """w^2"""
    return weight.square()


def wanda(weight: Tensor, diagonal: Tensor) -> Tensor:
    """w_j^2 E[x_j^2]: what the output loses if nothing makes up for it (arXiv:2306.11695).
    diagonal: `[k]`, the mean square of every input."""
    return weight.square() * diagonal


def obs(weight: Tensor, inverse_factor: Tensor) -> Tensor:
    """w_j^2 / U_jj^2: what the output loses if the later inputs make up for it (SparseGPT,
    arXiv:2301.00774). inverse_factor: U, `[k, k]`; U_jj^2 is the diagonal of the inverse of the
    Hessian of inputs j and later."""
    return (weight / inverse_factor.diagonal()).square()


def choose_mask(
    score: Tensor,
    format: Format,
    sparsity: float,
    per: Literal["row", "layer"] = "row",
    before: int = 0,
) -> Tensor:
    """True for the weights that stay, bool `[n, k]`, given what dropping each costs.

    N:M formats keep the two highest scores of every four inputs. Block formats drop
    `floor(k * sparsity + 0.5)` inputs in every strip of 16 outputs, those with the least sum of
    scores. All others drop as many in every row, or, per layer, `floor(n * k * sparsity + 0.5)`
    in all. Of equal scores the earlier go. before: inputs that were chosen from earlier, of a
    layer that is masked in parts; the parts drop as many as the whole would.

    Raises RecipeError for a sparsity that the format cannot hold.
    """
    check_sparsity(format, sparsity)
    if of_four(format):
        return torch.from_numpy(largest_of(score.numpy(), KEPT, OF))
    n, k = score.shape
    rows = _strips(score) if in_blocks(format) else score.reshape(n if per == "row" else 1, -1)
    width = rows.shape[1] // k
    drop = _count(width * (before + k) * sparsity) - _count(width * before * sparsity)
    keep = _without_lowest(rows, drop)
    return keep.repeat_interleave(STRIP, dim=0)[:n] if in_blocks(format) else keep.view(n, k)


@dataclass(frozen=True)
class Choice:
    """A mask that the column solver chooses as it goes, by what `obs` says of the weights as they
    are by then (SparseGPT, arXiv:2301.00774): unstructured in each block of columns over all
    rows, block formats in each strip, N:M in every four columns."""

    format: Format
    sparsity: float

    def choose(self, weight: Tensor, inverse_factor: Tensor, before: int = 0) -> Tensor:
        """The mask of columns `[n, c]`, given U `[c, c]`; `before` columns are done."""
        score = obs(weight, inverse_factor)
        return choose_mask(score, self.format, self.sparsity, "layer", before)


def of_four(format: Format) -> bool:
    """Whether the format holds two of every four inputs."""
    return format.fixed_sparsity is not None


def in_blocks(format: Format) -> bool:
    """Whether the format holds blocks of 16 outputs x 1 input."""
    return format.name.endswith(f"_b{STRIP}x1")


def check_sparsity(format: Format, sparsity: float) -> None:
    """Raises RecipeError unless weights in `format` can have that share of zeros. Formats that
    prescribe a share also take 0, for: as prescribed."""
    if not 0 <= sparsity < 1:
        raise RecipeError(f"sparsity must be in [0, 1), got {sparsity:g}")
    if sparsity and not format.holds_zero:
        raise RecipeError(
            f"{format.name} cannot hold pruned weights: zero is not on its grid",
            hint="use a symmetric or a sparse format, such as `w4a8g64_sp`",
        )
    if sparsity not in (0, format.fixed_sparsity) and format.fixed_sparsity is not None:
        raise RecipeError(
            f"{format.name} drops a share of {format.fixed_sparsity:g}, got sparsity {sparsity:g}",
            hint="leave the sparsity out, or use an unstructured format, such as `w4a8g64_sp`",
        )


def _strips(score: Tensor) -> Tensor:
    """Sums over strips of outputs, f64 `[ceil(n / 16), k]`."""
    first = np.arange(0, len(score), STRIP)
    return torch.from_numpy(np.add.reduceat(score.numpy(), first, axis=0, dtype=np.float64))


def _count(share: float) -> int:
    return math.floor(share + 0.5)


def _without_lowest(rows: Tensor, drop: int) -> Tensor:
    """A selection instead of a sort: ADMM asks for some sixty masks of a layer."""
    if drop == 0:
        return torch.ones(rows.shape, dtype=torch.bool)
    last = rows.kthvalue(drop, dim=1, keepdim=True).values
    keep, equal = rows > last, rows == last
    spare = (drop - (rows < last).sum(1, keepdim=True)).to(torch.int32)
    return keep | (equal & (equal.cumsum(1, dtype=torch.int32) > spare))

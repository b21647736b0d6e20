"""Spans of all heads under one budget of bytes, so that the sum of their losses is least.

MoA (arXiv:2406.14909) chooses spans by an integer program. Costs are whole blocks here, and the
budget is a sum over heads: that is a knapsack with one choice per head, solved exactly block by
block of the budget.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lacewing.errors import RecipeError

__all__ = ["choose"]

F64 = npt.NDArray[np.float64]
Choices = npt.NDArray[np.uint8]


def choose(losses: F64, costs: Sequence[int], budget: int) -> Choices:
    """One of the candidates for each head, `[heads]`, with the least sum of losses among those
    whose costs are at most `budget` together; of equals the cheaper ones.

    losses: `[heads, candidates]`. costs: of the candidates, blocks, ascending. Raises RecipeError
    if the budget is not enough for the cheapest.
    """
    heads = len(losses)
    spare = budget - heads * costs[0]
    if spare < 0:
        least = f"{heads * costs[0]} blocks for {heads} heads"
        raise RecipeError(f"spans: need at least {least}, got a budget of {budget}")
    more = [cost - costs[0] for cost in costs]
    best = np.zeros(spare + 1)  # of the heads so far, with this many blocks spent or fewer
    taken = np.empty((heads, spare + 1), np.uint8)
    for head, row in enumerate(losses):
        sums = np.full((len(costs), spare + 1), np.inf)
        for number, (extra, loss) in enumerate(zip(more, row, strict=True)):
            sums[number, extra:] = best[: max(0, spare + 1 - extra)] + loss
        taken[head] = sums.argmin(0)
        best = sums.min(0)
    return _traced(taken, more, spare)


def _traced(taken: Choices, more: Sequence[int], spare: int) -> Choices:
    """The way back, from the last head with the whole budget."""
    found = np.empty(len(taken), np.uint8)
    for head in reversed(range(len(taken))):
        found[head] = taken[head, spare]
        spare -= more[found[head]]
    return found

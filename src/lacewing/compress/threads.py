"""How many threads PyTorch uses while something is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lacewing.errors import RecipeError

__all__ = ["torch_threads"]


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """As many, or as many as there are for None; as before when left.

    Raises RecipeError for a count that is none.
    """
    before = torch.get_num_threads()
    if count is not None:
        if type(count) is not int or count < 1:
            raise RecipeError(f"`threads` must be a whole number from 1 on, got {count!r}")
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

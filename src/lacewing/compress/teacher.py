"""What the dense model says of every window, kept on disk so that it is asked once."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lacewing.checkpoint import Source
from lacewing.checkpoint.files import fail
from lacewing.compress.decoder import STAGES, Block, Decoder, rms_norm
from lacewing.compress.divergence import Head
from lacewing.errors import RecipeError

__all__ = ["Teacher", "hold"]

F16 = npt.NDArray[np.float16]

_CHUNK = 1 << 11
"""Tokens read at once, and kept in one file."""


def hold(block: Block, dtype: torch.dtype) -> Block:
    """`block` with the weights of its layers in `dtype`, and nothing to train."""
    block.requires_grad_(False)
    for name in (layer for stage in STAGES for layer in stage):
        weight = block.linear(name).weight
        weight.data = weight.data.to(dtype)
    return block


class Teacher:
    """The dense model over fixed windows of tokens, int64 `[count, T]`.

    Windows are read in chunks of a few thousand tokens, when they are needed first. What the head
    of the dense model reads, f16, lies in one file per chunk in `place`; what is there already is
    not computed again. The model itself stays in memory once it has been asked.
    """

    def __init__(self, source: Source, windows: Tensor, place: Path, dtype: torch.dtype) -> None:
        self.windows, self.place, self.dtype = windows, place, dtype
        self._decoder = Decoder(source)
        self._embedding = self._decoder.embedding()
        self._norm, head = self._decoder.head()
        self.head = Head(head.to(dtype), source.spec.logit_softcap)
        self._per_chunk = max(1, _CHUNK // windows.shape[1])

    def unread(self, picked: Tensor) -> list[int]:
        """The chunks that windows `picked` are in and that were not read yet."""
        chunks = sorted({i // self._per_chunk for i in picked.tolist()})
        return [chunk for chunk in chunks if not self._path(chunk).exists()]

    def read(self, chunk: int) -> None:
        """Puts down what the dense model says of a chunk. Raises RecipeError if it overflows."""
        path = self._path(chunk)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, self._read(self._ids(chunk)).numpy(), allow_pickle=False)
        partial.replace(path)

    def hidden(self, picked: Tensor) -> Tensor:
        """f32 `[len(picked), T, hidden_size]`: after the last norm, of windows that were read."""
        rows = []
        for i in picked.tolist():
            chunk, row = divmod(i, self._per_chunk)
            shape = (*self._ids(chunk).shape, self._decoder.spec.hidden_size)
            rows.append(torch.from_numpy(_open(self._path(chunk), shape)[row].astype(np.float32)))
        return torch.stack(rows)

    def _path(self, chunk: int) -> Path:
        return self.place / f"teacher.{chunk}.npy"

    def _ids(self, chunk: int) -> Tensor:
        return self.windows[chunk * self._per_chunk :][: self._per_chunk]

    @cached_property
    def _blocks(self) -> list[Block]:
        layers = range(self._decoder.spec.n_layers)
        return [hold(self._decoder.block(index), self.dtype) for index in layers]

    def _read(self, ids: Tensor) -> Tensor:
        decoder, in_bf16 = self._decoder, self.dtype == torch.bfloat16
        x = decoder.embed(ids, self._embedding)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            for block in self._blocks:
                x = block(x)
        out = rms_norm(x, self._norm, decoder.spec.norm_eps).half()
        if not out.isfinite().all():
            raise RecipeError(
                f"{decoder.source.path}: needs finite activations that f16 holds, got others",
                hint="the dense model overflows on the text it is to be distilled on",
            )
        return out


def _open(path: Path, shape: tuple[int, ...]) -> F16:
    try:
        found: F16 = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        fail(str(path), "a file of numpy", str(error), "delete it: it is made anew")
    if found.shape != shape or found.dtype != np.float16:
        fail(str(path), f"float16 {list(shape)}", f"{found.dtype} {list(found.shape)}", "delete it")
    return found

"""What the dense model says of every window, kept on disk so that it is asked once."""

from __future__ import annotations

import os
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

_CHUNK = 1 << 15
"""Tokens read at once: reading every block of the file anew is then little of the work."""
_BATCH = 1 << 11
"""Tokens in one pass of a block."""


def hold(block: Block, dtype: torch.dtype) -> Block:
    """`block` with the weights of its layers in `dtype`, and nothing to train."""
    block.requires_grad_(False)
    for name in (layer for stage in STAGES for layer in stage):
        weight = block.linear(name).weight
        weight.data = weight.data.to(dtype)
    return block


class Teacher:
    """The dense model over fixed windows of tokens, int64 `[count, T]`.

    Windows are read in chunks, block by block: memory of one block and the activations of a chunk.
    What the head of the dense model reads, f16, lies in one file per chunk in `place`; what is
    there already is not computed again.
    """

    def __init__(self, source: Source, windows: Tensor, place: Path, dtype: torch.dtype) -> None:
        self.windows, self.place, self.dtype = windows, place, dtype
        self._decoder = Decoder(source)
        self._embedding = self._decoder.embedding()
        self._norm, head = self._decoder.head()
        self.head = Head(head.to(dtype), source.spec.logit_softcap)
        self._per_chunk = max(1, _CHUNK // windows.shape[1])

    def hidden(self, picked: Tensor) -> Tensor:
        """f32 `[len(picked), T, hidden_size]`: after the last norm, of the windows `picked`."""
        rows = []
        for i in picked.tolist():
            chunk, row = divmod(i, self._per_chunk)
            rows.append(torch.from_numpy(self._chunk(chunk)[row].astype(np.float32)))
        return torch.stack(rows)

    def _chunk(self, index: int) -> F16:
        path = self.place / f"teacher.{index}.npy"
        ids = self.windows[index * self._per_chunk :][: self._per_chunk]
        if not path.exists():
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                np.save(file, self._read(ids).numpy(), allow_pickle=False)
                os.fsync(file.fileno())
            partial.replace(path)
        shape = (*ids.shape, self._decoder.spec.hidden_size)
        return _open(path, shape)

    def _read(self, ids: Tensor) -> Tensor:
        decoder, spec = self._decoder, self._decoder.spec
        x = decoder.embed(ids, self._embedding)
        step = max(1, _BATCH // ids.shape[1])
        in_bf16 = self.dtype == torch.bfloat16
        for index in range(spec.n_layers):
            block = hold(decoder.block(index), self.dtype)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
                for part in x.split(step):
                    part.copy_(block(part))
        out = rms_norm(x, self._norm, spec.norm_eps).half()
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

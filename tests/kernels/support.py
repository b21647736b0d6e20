"""Weights and activations for kernel tests: random codes with every extreme in them."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from lacewing import _C
from lacewing.formats import Codes, PackedTensor, get_format

F32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

LIBC = ctypes.CDLL(None, use_errno=True)


def guarded(raw: Bytes) -> Bytes:
    """A copy that ends where memory ends: reading one byte further is a fault (SIGSEGV)."""
    room = -(-len(raw) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, room + mmap.PAGESIZE), np.uint8)
    guard = ctypes.c_void_p(memory.ctypes.data + room)
    if LIBC.mprotect(guard, mmap.PAGESIZE, 0):  # PROT_NONE
        raise OSError(ctypes.get_errno(), "mprotect")
    out = memory[room - len(raw) : room]
    out[:] = raw
    return out


def tensor_of(packed: PackedTensor) -> Any:
    """The compiled module's tensor; every part ends at a guard page."""
    parts = [packed.parts[name] for name in get_format(packed.format).part_names]
    views = [guarded(np.ascontiguousarray(p).reshape(-1).view(np.uint8)) for p in parts]
    return _C.Tensor(packed.format, *packed.shape, views)


def random_packed(name: str, n: int, k: int, seed: int = 0) -> PackedTensor:
    """Random codes with the extremes of the format: least and greatest code, zero and tiny scales,
    a group of nothing but zero weights, half of a sparse tensor's weights masked."""
    fmt = get_format(name)
    rng = np.random.default_rng([seed, n, k])
    kept = np.ones((n, k), np.bool_)
    if fmt.sparse:
        mask = fmt.mask(rng.random((n, k), np.float32), fmt.fixed_sparsity or 0.5)
        assert mask is not None
        kept = mask
    if fmt.group_size == 0:
        values = rng.standard_normal((n, k)).astype(np.float32).view(np.uint32) >> 16
        return fmt.pack(Codes(np.where(kept, values, 0).astype(np.uint16)))
    top = fmt.max_code
    q = rng.integers(0, top + 1, (n, k)).astype(np.uint8)
    q[0] = np.where(np.arange(k) % 2, top, 0)
    q[-1] = top
    q[n // 2] = 0
    if fmt.sparse:
        q[~kept] = fmt.zero_point
        q[:, :64] = fmt.zero_point  # a tile with nothing in it
        q[0, -4:-1] = fmt.zero_point
        q[0, -1] = top
    groups = -(-k // fmt.group_size)
    scales = rng.standard_normal((n, groups)).astype(np.float16)
    scales[0, 0], scales[-1, -1] = 0.0, 6e-8
    mins = rng.standard_normal((n, groups)).astype(np.float16) if fmt.asymmetric else None
    return fmt.pack(Codes(q, scales, mins))


def random_rows(m: int, k: int, seed: int = 0) -> F32:
    """Activations with a zero row, a zero group, and rows of the greatest quantized values."""
    rng = np.random.default_rng([seed, m, k])
    x = rng.standard_normal((m, k)).astype(np.float32)
    x[:, 32:64] *= np.float32(100.0)
    if m > 1:
        x[1] = 0.0
    if m > 2:
        x[2] = np.where(rng.random(k) < 0.5, -3.0, 3.0)
        x[2, :32] = 0.0
    if m > 3:
        x[3] = 1e-42  # too tiny to invert: becomes zero
    if m > 4:
        x[4] = 5.0
    return x

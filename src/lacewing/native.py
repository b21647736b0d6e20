"""The compiled module as the rest of the Python code sees it: `linear` and the weights it reads."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from lacewing import tuning
from lacewing.errors import FormatError, LacewingError, RequestError, UnsupportedCpuError
from lacewing.formats import PackedTensor, get_format

__all__ = ["check_isa", "check_threads", "compiled", "linear", "tensor"]

# Validating a sparse weight reads all of its records: once per weight, not once per call.
_tensors: WeakKeyDictionary[PackedTensor, Any] = WeakKeyDictionary()


@cache
def compiled() -> Any:
    """The module `lacewing._C`, tuned. Raises `LacewingError` if it is not there."""
    try:
        from lacewing import _C
    except ImportError as error:
        raise LacewingError(
            f"the compiled module `lacewing._C` cannot be loaded: {error}",
            hint="install Lacewing again: `pip install --force-reinstall .`",
        ) from error
    tuning.load(_C)
    return _C


@cache
def check_isa(isa: str | None = None) -> None:
    """Raises `UnsupportedCpuError` unless this CPU runs `isa` (None: what `LACEWING_ISA` names, or
    the best there is)."""
    hint = "leave it to Lacewing, or see `lacewing doctor`"
    if isa is None:
        try:
            compiled().default_isa()
        except RuntimeError as error:
            raise UnsupportedCpuError(str(error), hint=hint) from error
        return
    known = {each["name"]: each for each in compiled().isas()}
    if isa not in known:
        raise UnsupportedCpuError(f"`isa` must be one of {', '.join(known)}, got {isa!r}", hint)
    if not known[isa]["usable"]:
        raise UnsupportedCpuError(f"isa {isa} needs a CPU with {known[isa]['missing']}", hint)


def tensor(packed: PackedTensor) -> Any:
    """The `_C.Tensor` over the bytes of `packed`: no copy, checked once. Raises `FormatError`."""
    native = _tensors.get(packed)
    if native is None:
        names = get_format(packed.format).part_names
        missing = [name for name in names if name not in packed.parts]
        if missing:
            raise FormatError(f"a {packed.format} weight has the parts {names}, missing {missing}")
        views = [np.ascontiguousarray(packed.parts[n]).reshape(-1).view(np.uint8) for n in names]
        n, k = packed.shape
        try:
            native = compiled().Tensor(packed.format, n, k, views)
        except ValueError as error:
            raise FormatError(str(error)) from error
        _tensors[packed] = native
    return native


def check_threads(threads: Any) -> int:
    """`threads` as the compiled module wants it (0: the default). Raises `RequestError`."""
    if threads is None:
        return 0
    if not isinstance(threads, (int, np.integer)) or isinstance(threads, bool) or threads < 1:
        raise RequestError(f"`threads` must be an integer >= 1 or None, got {threads!r}")
    return int(threads)


def linear(x: Any, packed: PackedTensor, bias: Any = None, threads: int | None = None) -> Any:
    """`y = x W^T + bias` with a packed weight `[n, k]`.

    - `x`: `[..., k]`, any leading dimensions, any strides; numpy or torch.
    - `bias`: `[n]` or None.
    - `threads`: None takes the pool's default.

    Returns f32 `[..., n]`; for a torch tensor, a torch tensor of the type and on the device of `x`
    (no gradient). Raises `FormatError` (a `ValueError`) if shapes do not fit.
    What the result means is stated by `Format.reference_linear`, bit by bit.
    """
    n, k = packed.shape
    rows = _floats(x)
    if rows.ndim < 1 or rows.shape[-1] != k:
        raise FormatError(
            f"`linear`: x must be [..., {k}] for a weight [{n}, {k}], got {list(rows.shape)}"
        )
    addend = None if bias is None else _floats(bias)
    if addend is not None and addend.shape != (n,):
        raise FormatError(f"`linear`: bias must be [{n}], got {list(addend.shape)}")
    flat = np.ascontiguousarray(rows.reshape(-1, k))
    count = check_threads(threads)
    check_isa()
    if len(flat):
        addend = None if addend is None else np.ascontiguousarray(addend)
        y = compiled().linear(flat, tensor(packed), addend, threads=count)
    else:
        y = np.empty((0, n), np.float32)
    return _like(x, y.reshape(*rows.shape[:-1], n))


def _floats(x: Any) -> NDArray[np.float32]:
    if hasattr(x, "detach"):  # a torch tensor; torch itself is never imported here
        x = x.detach().float().cpu().numpy()
    floats: NDArray[np.float32] = np.asarray(x, dtype=np.float32)
    return floats


def _like(x: Any, y: NDArray[np.float32]) -> Any:
    if not hasattr(x, "detach"):
        return y
    return sys.modules["torch"].from_numpy(y).to(device=x.device, dtype=x.dtype)

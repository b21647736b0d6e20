"""`PackedExperts`: the weights of all experts of a layer, packed, in the place of a parameter of
three dimensions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import Module
from torch.utils._pytree import tree_map

from lacewing import native
from lacewing.checkpoint.breakeven import dense_twin
from lacewing.errors import FormatError, RequestError
from lacewing.formats import PackedTensor, get_format
from lacewing.formats.base import Array, aligned_empty
from lacewing.nn.linear import array_of, refuse_torch_save
from lacewing.nn.spill import in_memory
from lacewing.nn.weight import PackedWeight

__all__ = ["PackedExperts", "TransposedWeight", "join"]

_MATMULS: set[Any] = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm}


class PackedExperts(Module):
    """`[experts, n, k]`, or `[experts, k, n]` if `transposed`, as code that uses the parameter
    sees it.

    - `stack[i]` is the weight of an expert without a copy: `F.linear(x, stack[i])`, and
      `x @ stack[i]` of a transposed stack, multiply by the packed weight.
    - `torch.bmm(x, stack)` of a transposed stack multiplies expert by expert.
    - Whatever else reads it gets the dequantized weights, made anew each time.

    `state_dict` holds the parts of the format with a leading axis of experts; streams are laid end
    to end, and `offsets` `[experts, strips + 1]` count from the beginning of all.
    """

    def __init__(
        self,
        stack: PackedTensor,
        *,
        transposed: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """stack: from `join`. Not copied. Raises FormatError."""
        super().__init__()
        self.format, self.matrix_shape = stack.format, stack.shape
        self.transposed = transposed
        self.dtype = dtype
        self._set_packed(stack)

    # -- what code reads of a parameter -----------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        n, k = self.matrix_shape
        return torch.Size((len(self), k, n) if self.transposed else (len(self), n, k))

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def ndim(self) -> int:
        return 3

    @property
    def requires_grad(self) -> bool:
        return False

    def dim(self) -> int:
        return 3

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        return len(self._experts)

    def __getitem__(self, index: Any) -> Any:
        """One expert's weight for one number; else dequantized weights as a tensor has them."""
        if isinstance(index, (int, np.integer)) or (
            isinstance(index, torch.Tensor) and index.dim() == 0 and index.dtype != torch.bool
        ):
            weight = self._experts[int(index)]
            return TransposedWeight(weight) if self.transposed else weight
        if isinstance(index, torch.Tensor) and index.dim() == 1 and index.dtype == torch.int64:
            chosen, where = index.unique(return_inverse=True)
            return torch.stack([self._dense(int(i)) for i in chosen])[where]
        return self.dequantized()[index]

    def transpose(self, first: int, second: int) -> torch.Tensor:
        return self.dequantized().transpose(first, second)

    def dequantized(self) -> torch.Tensor:
        """All of it, dense, in `dtype`."""
        return torch.stack([self._dense(i) for i in range(len(self))])

    def _dense(self, index: int) -> torch.Tensor:
        weight = self._experts[index].dequantized()
        return weight.T if self.transposed else weight

    @property
    def packed(self) -> list[PackedTensor]:
        """The weight of every expert, without PyTorch."""
        return [weight.packed() for weight in self._experts]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.bmm and len(args) == 2 and isinstance(args[0], torch.Tensor):
            x, stack = args
            if stack.transposed and len(x) == len(stack):
                return torch.stack([w.linear(r) for w, r in zip(stack._experts, x, strict=True)])
        return func(*tree_map(_dense, args), **tree_map(_dense, dict(kwargs or {})))

    # -- a module of bytes ------------------------------------------------------------------------

    def _set_packed(self, stack: PackedTensor) -> None:
        """Checks every expert's weight. Raises FormatError."""
        names = get_format(self.format).part_names
        experts = []
        for each in _split(stack):
            native.tensor(each)
            first, second, *_ = (*(torch.from_numpy(each.parts[name]) for name in names), None)
            experts.append(PackedWeight(first, second, self.format, each.shape, self.dtype))
        before = self.__dict__.get("_experts", experts)
        if len(before) != len(experts):
            raise FormatError(f"there are {len(before)} experts, got {len(experts)}")
        for name in names:
            self.register_buffer(name, torch.from_numpy(stack.parts[name]))
        self.__dict__["_experts"] = experts

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> PackedExperts:
        probe = fn(torch.empty(0, dtype=self.dtype))
        if probe.device.type != "cpu" or probe.dtype != self.dtype:
            raise RequestError(
                f"lacewing.nn.PackedExperts ({self.format}) stays on the CPU and stands for weights"
                f" in {self.dtype}, asked for {probe.dtype} on {probe.device}",
                hint="convert or move the dense model before replace_linear",
            )
        return self

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        keys = {name: prefix + name for name in self._buffers}
        missing = [key for key in keys.values() if key not in state_dict]
        missing_keys += missing
        unexpected_keys += [
            key for key in state_dict if key.startswith(prefix) and key not in keys.values()
        ]
        if not missing:
            try:
                parts = {name: array_of(state_dict[key]) for name, key in keys.items()}
                stack = PackedTensor(self.format, self.matrix_shape, parts)
                self._set_packed(in_memory(stack))
            except (FormatError, TypeError, ValueError, IndexError) as error:
                error_msgs.append(f"`{prefix.rstrip('.')}`: not experts in {self.format}: {error}")

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedExperts:
        """The packed weights never change and are shared."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(self.__dict__)
        new.__dict__["_buffers"] = dict(self._buffers)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        refuse_torch_save()
        return super().__reduce_ex__(protocol)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_experts"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What a pickle calls. Raises FormatError for bytes that are no experts."""
        super().__setstate__(state)
        parts = {name: buffer.numpy() for name, buffer in state["_buffers"].items()}
        self._set_packed(PackedTensor(self.format, self.matrix_shape, parts))

    def extra_repr(self) -> str:
        order = ", transposed" if self.transposed else ""
        return f"{list(self.shape)}, format={self.format}{order}"


class TransposedWeight:
    """`[k, n]`: `x @ weight` multiplies by the packed weight of an expert `[n, k]`; whatever else
    reads it gets the dequantized matrix."""

    def __init__(self, weight: PackedWeight) -> None:
        self._weight = weight
        self.dtype = weight.dtype
        self.shape = weight.shape[::-1]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dequantized(), name)

    def dequantized(self) -> torch.Tensor:
        return self._weight.dequantized().T

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _MATMULS and isinstance(args[0], torch.Tensor) and isinstance(args[1], cls):
            return args[1]._weight.linear(args[0])
        return func(*tree_map(_dense, args), **tree_map(_dense, dict(kwargs or {})))


def _dense(value: Any) -> Any:
    return value.dequantized() if isinstance(value, (PackedExperts, TransposedWeight)) else value


# -- one array per part ---------------------------------------------------------------------------


def join(packed: Sequence[PackedTensor]) -> PackedTensor:
    """The weights of all experts as one: `shape` is that of each, parts have a leading axis of
    experts; streams differ in length and are laid end to end. Where some experts are dense because
    they have too few zeros, all are. Raises FormatError if they differ in format or shape
    otherwise."""
    packed = _alike(packed)
    kinds = {(each.format, each.shape) for each in packed}
    if len(kinds) != 1:
        raise FormatError(f"experts must have one format and one shape, got {sorted(kinds)}")
    format, shape = kinds.pop()
    streams = [each.parts["stream"] for each in packed if "stream" in each.parts]
    if not streams:
        parts = {name: _stacked([p.parts[name] for p in packed]) for name in packed[0].parts}
        return PackedTensor(format, shape, parts)
    sizes = [len(stream) for stream in streams]
    begins = np.cumsum([0, *sizes[:-1]])
    joined = aligned_empty((sum(sizes),), np.uint8)
    np.concatenate(streams, out=joined)
    offsets = np.stack([p.parts["offsets"] + at for p, at in zip(packed, begins, strict=True)])
    return PackedTensor(format, shape, {"stream": joined, "offsets": offsets})


def _alike(packed: Sequence[PackedTensor]) -> Sequence[PackedTensor]:
    dense = next((each.format for each in packed if not get_format(each.format).sparse), None)
    if dense is None:
        return packed
    return [_dense_twin_of(each) if each.format != dense else each for each in packed]


def _dense_twin_of(packed: PackedTensor) -> PackedTensor:
    """The same weights in the dense format of the same width, or as they are."""
    kind = get_format(packed.format)
    twin = dense_twin(kind)
    return packed if twin is None else twin.pack(kind.unpack(packed))


def _stacked(parts: Sequence[Array]) -> Array:
    out = aligned_empty((len(parts), *parts[0].shape), parts[0].dtype)
    for i, part in enumerate(parts):
        out[i] = part
    return out


def _split(stack: PackedTensor) -> list[PackedTensor]:
    """The weight of every expert, as views. Raises FormatError for parts that do not fit."""
    kind, parts = get_format(stack.format), stack.parts
    for name, part in parts.items():
        if part.dtype != kind.part_dtypes[name] or part.ndim == 0:
            raise FormatError(f"part `{name}` must be {kind.part_dtypes[name]}, got {part.dtype}")
    counts = {len(part) for name, part in parts.items() if name != "stream"}
    if len(counts) != 1:
        raise FormatError(f"parts of experts must have one length, got {sorted(counts)}")
    out = []
    for i in range(counts.pop()):
        if "stream" in parts:
            own = _cut_stream(parts["stream"], parts["offsets"], i)
        else:
            own = {name: part[i] for name, part in parts.items()}
        out.append(PackedTensor(stack.format, stack.shape, own))
        kind.validate(out[-1])
    return out


def _cut_stream(stream: Array, offsets: Array, i: int) -> dict[str, Array]:
    if offsets.ndim != 2 or stream.ndim != 1:
        raise FormatError(f"offsets of experts must have two axes, got {list(offsets.shape)}")
    begin = int(offsets[i, 0])
    end = int(offsets[i + 1, 0]) if i + 1 < len(offsets) else len(stream)
    return {"stream": stream[begin:end], "offsets": offsets[i] - begin}

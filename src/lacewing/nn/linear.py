"""`Linear`: a `torch.nn.Linear` whose weight is packed."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch.nn import Module, Parameter
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lacewing import native
from lacewing.errors import FormatError, RequestError
from lacewing.formats import PackedTensor, get_format, pack
from lacewing.nn import ops
from lacewing.nn.ops import FLOATS
from lacewing.nn.spill import in_memory
from lacewing.nn.weight import PackedWeight

__all__ = ["Linear", "array_of", "refuse_torch_save"]

_STAYS = "its kernels are for CPUs: move the dense model instead"


class Linear(NonDynamicallyQuantizableLinear):  # a nn.Linear that quantizers (torchao) leave alone
    """`y = x W^T + bias` with a packed weight `[out_features, in_features]`.

    x: `[..., in_features]` in float32, bfloat16 or float16, any strides; y has the type of x. The
    gradient goes through x and the bias; the weight is frozen. `state_dict` holds the parts as
    `weight.<part>`, the names of a packed file, and `bias`.

    - packed: checked here; FormatError if its bytes are not a weight in its format. Not copied.
    - bias: `[out_features]` or None.
    - dtype: of the dense weight that it stands for (`weight.dtype`).
    """

    format: str
    dtype: torch.dtype
    bias: Parameter | None

    def __init__(
        self,
        packed: PackedTensor,
        bias: torch.Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        Module.__init__(self)
        if dtype not in FLOATS:
            raise FormatError(f"`dtype` must be one of {FLOATS}, got {dtype}")
        self.out_features, self.in_features = packed.shape
        self.format = packed.format
        self.dtype = dtype
        self._set_packed(packed)
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise FormatError(f"bias must be [{self.out_features}], got {list(bias.shape)}")
        if bias is not None and bias.dtype not in FLOATS:
            raise FormatError(f"bias must be one of {FLOATS}, got {bias.dtype}")
        frozen = None if bias is None else Parameter(bias.detach().contiguous(), False)
        self.register_parameter("bias", frozen)

    @classmethod
    def from_dense(
        cls, linear: torch.nn.Linear, format: str = "w8a8g64", sparsity: float | None = None
    ) -> Linear:
        """`linear` rounded to nearest and packed (see `lacewing.pack`). Raises FormatError, and
        RequestError for a layer that has no dense weight in memory."""
        if isinstance(linear, Linear) or linear.weight.device.type != "cpu":
            what = "a packed" if isinstance(linear, Linear) else f"one on {linear.weight.device}"
            raise RequestError(f"Linear.from_dense: needs a dense layer on the CPU, got {what}")
        new = cls(pack(linear.weight, format, sparsity), linear.bias, dtype=linear.weight.dtype)
        return new.train(linear.training)

    @property
    def weight(self) -> PackedWeight:
        """The weight as a tensor, dequantized when it is read."""
        return self._weight

    @weight.setter
    def weight(self, value: Any) -> None:
        raise _packed_already()

    @property
    def packed(self) -> PackedTensor:
        """The packed weight, without PyTorch."""
        return self._weight.packed()

    def _set_packed(self, packed: PackedTensor) -> None:
        native.tensor(packed)
        for name, part in packed.parts.items():
            self.register_buffer(name, _from_numpy(part), persistent=False)
        first, second, *_ = (*get_format(packed.format).part_names, None)
        self._names = first, second
        parts = self.parts()
        self.__dict__["_weight"] = PackedWeight(*parts, self.format, packed.shape, self.dtype)

    def parts(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The packed bytes, as the operators take them."""
        first, second = self._names
        buffers: Any = self._buffers
        return buffers[first], buffers[second] if second else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            x = ops.autocast(x)
        first, second = self._names
        buffers, bias = self._buffers, self._parameters["bias"]
        needed = x.requires_grad or (bias is not None and bias.requires_grad)
        op = ops.linear if needed and torch.is_grad_enabled() else ops.linear_no_grad
        try:
            y: torch.Tensor = op(
                x,
                buffers[first],
                buffers[second] if second else None,
                bias,
                self.format,
                self.out_features,
                self.in_features,
            )
        except RuntimeError as error:
            self._explain(x, error)
        return y

    def _explain(self, x: torch.Tensor, error: RuntimeError) -> NoReturn:
        """Raises a typed error where x is to blame, else `error`."""
        where = f"lacewing.nn.Linear ({self.format})"
        if x.device.type != "cpu":
            raise RequestError(
                f"{where} computes on the CPU, got x on {x.device}", hint="move x: x.to('cpu')"
            ) from error
        if x.dtype not in FLOATS:
            raise FormatError(
                f"{where} needs x in float32, bfloat16 or float16, got {x.dtype}",
                hint="convert it: x.float()",
            ) from error
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise FormatError(
                f"{where} needs x [..., {self.in_features}], got {list(x.shape)}"
            ) from error
        if self.bias is not None and tuple(self.bias.shape) != (self.out_features,):
            raise FormatError(
                f"{where} needs a bias [{self.out_features}], got {list(self.bias.shape)}"
            ) from error
        raise error

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format}"

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        if name == "weight":
            raise _packed_already()
        super().register_parameter(name, param)

    # -- elsewhere and otherwise ------------------------------------------------------------------

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Linear:
        where = f"lacewing.nn.Linear ({self.format})"
        try:
            probe = fn(torch.empty(0, dtype=self.dtype))
        except (RuntimeError, AssertionError) as error:  # PyTorch's, for a device it is without
            raise RequestError(
                f"{where} lives on the CPU and cannot be moved: {error}", hint=_STAYS
            ) from error
        if probe.device.type != "cpu":
            raise RequestError(
                f"{where} lives on the CPU, asked to go to {probe.device}", hint=_STAYS
            )
        if probe.dtype != self.dtype:
            raise RequestError(
                f"{where} stands for a weight in {self.dtype}, asked for {probe.dtype}",
                hint="it takes x of any float type as it is; to convert the rest of the model, do"
                " it before replace_linear (what this call has converted already goes back with"
                f" model.to({self.dtype}))",
            )
        parts = {name: self._buffers.pop(name) for name in self._part_names()}
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(parts)
        return self

    def _part_names(self) -> tuple[str, ...]:
        return get_format(self.format).part_names

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._part_names():
            destination[f"{prefix}weight.{name}"] = self._buffers[name]

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
        keys = {name: f"{prefix}weight.{name}" for name in self._part_names()}
        missing_keys += [key for key in keys.values() if key not in state_dict]
        if f"{prefix}weight" in state_dict:
            error_msgs.append(
                f"`{prefix}weight` is dense and this layer is packed in {self.format}: load the"
                " state dict into the dense model, then replace its layers"
            )
        if all(key in state_dict for key in keys.values()):
            self._load_parts({name: state_dict[key] for name, key in keys.items()}, error_msgs)
        unknown: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unknown, error_msgs
        )
        ours = {f"{prefix}weight", *keys.values()}
        unexpected_keys += [key for key in unknown if key not in ours]

    def _load_parts(self, parts: dict[str, Any], errors: list[str]) -> None:
        """Copies them, as PyTorch does: what a caller then writes to his own is not read here, and
        parts from a file begin wherever they like."""
        shape = (self.out_features, self.in_features)
        try:
            arrays = {name: array_of(part) for name, part in parts.items()}
            packed = PackedTensor(self.format, shape, arrays)
            get_format(self.format).validate(packed)
            self._set_packed(in_memory(packed))
        except FormatError as error:
            errors.append(f"a {self.format} weight {list(shape)}: {error}")

    # -- copies -----------------------------------------------------------------------------------

    def __copy__(self) -> Linear:
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        for name in ("_buffers", "_parameters"):
            new.__dict__[name] = dict(self.__dict__[name])
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Linear:
        """The packed weight never changes and is shared."""
        memo.update({id(shared): shared for shared in (*self._buffers.values(), self._weight)})
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        refuse_torch_save()
        names = self._part_names()
        parts = save_safetensors({name: self._buffers[name].contiguous() for name in names})
        state = {key: value for key, value in self.__dict__.items() if key != "_weight"}
        state["_buffers"] = {key: b for key, b in self._buffers.items() if key not in names}
        shape = (self.out_features, self.in_features)
        return _restore, (parts, self.format, shape, self.dtype), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        parts = {name: self._buffers[name] for name in self._part_names()}
        super().__setstate__(state)
        self._buffers.update(parts)


def refuse_torch_save() -> None:
    """Raises RequestError if `torch.save` is what pickles."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == "torch.serialization":
            raise RequestError(
                "torch.save: a module with packed layers is not saved as a pickle",
                hint="save its state_dict(), with torch.save or safetensors",
            )


def _restore(data: bytes, format: str, shape: tuple[int, int], dtype: torch.dtype) -> Linear:
    """What a pickle calls. Raises FormatError for bytes that are not such a weight."""
    parts = {name: part.numpy() for name, part in load_safetensors(data).items()}
    packed = PackedTensor(format, shape, parts)
    get_format(format).validate(packed)
    return Linear(in_memory(packed), dtype=dtype)


def _packed_already() -> RequestError:
    return RequestError(
        "lacewing.nn.Linear: `weight` is packed and cannot be assigned",
        hint="put a new torch.nn.Linear in its place, or pack the new weight:"
        " lacewing.nn.Linear(lacewing.pack(weight, format), bias)",
    )


def array_of(part: Any) -> Any:
    """A part of a state dict, without PyTorch."""
    if not isinstance(part, torch.Tensor) or part.device.type != "cpu":
        what = f"one on {part.device}" if isinstance(part, torch.Tensor) else type(part).__name__
        raise FormatError(f"parts must be tensors on the CPU, got {what}")
    if part.dtype == torch.bfloat16:
        raise FormatError("parts must be bytes, integers or float16, got torch.bfloat16")
    return part.detach().contiguous().numpy()


def _from_numpy(part: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
        return torch.from_numpy(part)  # of a mapped file: read-only, and nobody writes to it

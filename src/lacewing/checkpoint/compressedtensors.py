"""Weights of compressed-tensors (llm-compressor): `pack-quantized`, `int-quantized`, and the legacy
`sparse-bitmask` and `sparse-24-bitmask`, alone or under `int-quantized`.

    pack-quantized  <module>.weight_packed      int32 [n, words]: codes + 2^(bits - 1), packed along
                                                the inputs; before 0.18 `padded`, then a `stream`
                                                (words.py): the number of words tells which
                    <module>.weight_shape       [2]: n, k
                    <module>.weight_zero_point  int32 [words, groups], packed along the outputs
                                                (asymmetric)
                    <module>.weight_g_idx       [k], group of every input; or all -1 (act order)
    int-quantized   <module>.weight             int8 [n, k]
                    <module>.weight_zero_point  int8, like the scales (asymmetric)
    both            <module>.weight_scale       [n, groups], [n, 1] (channel) or [1] (tensor)

    weight = scale * (code - zero_point), one multiplication in f32. The library multiplies in the
    type of the scale: what it gets is this rounded to that type.

Source: the library's compressors (versions 0.9 to 0.20).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lacewing.checkpoint.bitmask import BITMASK_PARTS, BitmaskRows, BitmaskTensor
from lacewing.checkpoint.files import shown
from lacewing.checkpoint.grid import I16, I32, U8, GridTensor, checked_g_idx
from lacewing.checkpoint.parts import Files, Parts, Reading, modules_with
from lacewing.checkpoint.schemes import ORIGINAL, Scheme, Schemes
from lacewing.checkpoint.settings import Config
from lacewing.checkpoint.tensors import F32, SourceTensor
from lacewing.checkpoint.words import Layout, unpack_range, unpack_words, word_count

__all__ = ["read_compressed_tensors"]

Array = npt.NDArray[Any]

_WEIGHT_PARTS = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_g_idx",
    "weight_shape",
    *BITMASK_PARTS,
)
_ACTIVATION_PARTS = (
    "input_scale",
    "input_zero_point",
    "output_scale",
    "output_zero_point",
    "k_scale",
    "k_zero_point",
    "v_scale",
    "v_zero_point",
)


def read_compressed_tensors(place: Path, config: Config, files: Files) -> Reading:
    """Raises UnsupportedModelError and CheckpointError."""
    schemes = Schemes(place, config, (name.rpartition(".")[0] for name in files))
    reading = Reading(notes=schemes.notes)
    modules = [*modules_with("weight_scale", files), *modules_with("compressed", files)]
    for module in dict.fromkeys([*modules_with("weight_packed", files), *modules]):
        parts = Parts(place, module, _WEIGHT_PARTS, files)
        reading.add(_tensor(parts, schemes), parts)
    ends = tuple(f".{part}" for part in _ACTIVATION_PARTS)
    reading.left_out = [name for name in files if name.endswith(ends)]
    return reading


def _tensor(parts: Parts, schemes: Schemes) -> SourceTensor:
    if "weight_scale" not in parts and "weight_packed" not in parts:
        return BitmaskTensor(parts)
    scheme = schemes.of(parts)
    return _Packed(parts, scheme) if "weight_packed" in parts else _Int8(parts, scheme)


# -- weights --------------------------------------------------------------------------------------


class _Quantized(GridTensor):
    """What both formats share: scales, and groups of inputs."""

    def __init__(self, parts: Parts, scheme: Scheme, shape: tuple[int, int], kind: str) -> None:
        grouped = f"g{scheme.group_size}" if scheme.group_size else scheme.strategy
        super().__init__(parts, shape, f"{kind} int{scheme.bits} {grouped}")
        self.bits = scheme.bits
        self.group_size = scheme.group_size
        self._scale = parts.scales("weight_scale", self._like_scales(scheme))
        if scheme.symmetric:
            _check_symmetric(parts)
        self.g_idx = _g_idx(parts, shape[1], self.group_size, self.groups, scheme.reordered)

    def _like_scales(self, scheme: Scheme) -> tuple[int, ...]:
        n = self.shape[0]
        stored = self._parts.entry("weight_scale").shape
        if scheme.strategy == "group":
            return (n, self.groups)
        choices = ((n, 1), (n,)) if scheme.strategy == "channel" else ((1,), (), (1, 1))
        return stored if stored in choices else choices[0]

    def _rows(self, values: Array, begin: int, end: int) -> Array:
        """Rows `[r, groups]` of what is stored like the scales."""
        if values.size == 1:
            return np.broadcast_to(values.reshape(1, 1), (end - begin, 1))
        return values[begin:end].reshape(end - begin, -1)

    def _scales(self, begin: int, end: int) -> F32:
        return self._parts.floats("weight_scale", self._rows(self._scale, begin, end))


class _Packed(_Quantized):
    """pack-quantized"""

    def __init__(self, parts: Parts, scheme: Scheme) -> None:
        shape = n, k = parts.size("weight_shape")
        super().__init__(parts, scheme, shape, "pack-quantized")
        self.code_range = (0, (1 << self.bits) - 1)
        words = parts.entry("weight_packed").shape
        self._layout = _layout(parts, words[-1] if words else 0, k, scheme)
        size = (n, word_count(k, self.bits, self._layout))
        self._words = parts.array("weight_packed", ("I32",), size)
        if scheme.symmetric:
            self.zero_point = 1 << (self.bits - 1)
        elif scheme.strategy == "tensor":
            self._stored_zeros = parts.array("weight_zero_point", ("I8",), self._scale.shape)
        else:
            size = (word_count(n, self.bits, self._layout), self.groups)
            self._stored_zeros = parts.array("weight_zero_point", ("I32",), size)

    def _codes(self, begin: int, end: int) -> U8:
        return unpack_words(self._words[begin:end], self.bits, self.shape[1], self._layout)

    def _zeros(self, begin: int, end: int) -> I16:
        if self._stored_zeros.dtype == np.int8:
            return _signed(self._rows(self._stored_zeros, begin, end), self.bits, self._parts)
        codes = unpack_range(self._stored_zeros.T, self.bits, begin, end, self._layout)
        return codes.T.astype(np.int16)


class _Int8(_Quantized):
    """int-quantized and naive-quantized: codes of up to 8 bits in a byte each."""

    def __init__(self, parts: Parts, scheme: Scheme) -> None:
        self._sparse = BitmaskRows(parts) if "compressed" in parts else None
        dtype, shape = _stored_as(parts, self._sparse)
        if dtype != "I8" or len(shape) != 2 or 0 in shape:
            hint = "save it compressed (`save_compressed=True`)" if dtype[:2] != "F8" else ORIGINAL
            parts.refuse("int8 codes [n, k]", f"{dtype} {shown(list(shape))}", hint)
        super().__init__(parts, scheme, (shape[0], shape[1]), "int-quantized")
        half = 1 << (self.bits - 1)
        self.code_range = (128 - half, 127 + half)
        if scheme.symmetric:
            self.zero_point = 128
        else:
            self._stored_zeros = parts.array("weight_zero_point", ("I8",), self._scale.shape)

    def _codes(self, begin: int, end: int) -> U8:
        if self._sparse is not None:
            stored = self._sparse.read(begin, end)
        else:
            stored = self._parts.array("weight", ("I8",))[begin:end]
        out: U8 = stored.view(np.uint8) ^ np.uint8(0x80)
        return out

    def _zeros(self, begin: int, end: int) -> I16:
        zeros = _signed(self._rows(self._stored_zeros, begin, end), self.bits, self._parts)
        return zeros + np.int16(128 - (1 << (self.bits - 1)))


def _stored_as(parts: Parts, sparse: BitmaskRows | None) -> tuple[str, tuple[int, ...]]:
    if sparse is not None:
        return sparse.dtype, sparse.shape
    entry = parts.entry("weight")
    return entry.dtype, entry.shape


def _check_symmetric(parts: Parts) -> None:
    """Some versions store the zero points of symmetric weights, too."""
    part = "weight_zero_point"
    if part in parts and parts.array(part, ("I8", "I32")).any():
        parts.fail(part, "zeros, as the config says `symmetric`", "others")


def _signed(zeros: Array, bits: int, parts: Parts) -> I16:
    """int8 zero points as unsigned codes of `bits`."""
    half = 1 << (bits - 1)
    wide = zeros.astype(np.int16) + np.int16(half)
    if wide.min() < 0 or wide.max() >= 2 * half:
        wrong = int(zeros[(wide < 0) | (wide >= 2 * half)][0])
        parts.fail("weight_zero_point", f"{-half} to {half - 1}", wrong)
    return wide


def _layout(parts: Parts, words: int, k: int, scheme: Scheme) -> Layout:
    """How `words` words per row hold k codes: as many as fit one way, or as the version says."""
    stream, padded = (word_count(k, scheme.bits, way) for way in ("stream", "padded"))
    if scheme.bits in (2, 4, 8) or stream == padded == 1:  # both ways are the same
        return "stream"
    if stream != padded:
        return "padded" if words == padded else "stream"
    if scheme.layout is None:
        hint = "say in `quantization_config.version` which version of compressed-tensors wrote it"
        parts.fail("weight_packed", "a width that tells how it is packed", f"{words} words", hint)
    return scheme.layout


def _g_idx(parts: Parts, k: int, group: int | None, groups: int, reordered: bool) -> I32 | None:
    """Group of every input, or None where groups are runs of inputs."""
    if "weight_g_idx" not in parts and not reordered:
        return None
    found = parts.array("weight_g_idx", ("I32", "I64"), (k,))
    if (found == -1).all():  # the library's mark of an order that was not kept
        return None
    return checked_g_idx(parts, "weight_g_idx", found, group or k, groups, reordered)

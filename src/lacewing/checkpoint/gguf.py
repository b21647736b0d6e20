"""The GGUF container, versions 2 and 3: metadata, tensor table, and the tensors' bytes.

    "GGUF"  version u32  tensors u64  entries u64
    entries x (key string, type u32, value)            string: length u64, UTF-8 bytes
    tensors x (name string, n_dims u32, dims u64[n_dims], type u32, offset u64)
    padding to `general.alignment` (32), then tensor data

All little-endian. Dimensions come innermost first: dims [k, n] is a weight [n, k]. Source:
`gguf.md` of ggml. Nothing is allocated before the file is known to hold as much as it says.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from lacewing.checkpoint.files import fail, map_file, release, shown
from lacewing.checkpoint.ggml import GGML_TYPES, GgmlType

__all__ = ["MAGIC", "GgufFile", "GgufTensor", "read_gguf"]

U8 = npt.NDArray[np.uint8]

MAGIC = b"GGUF"
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MAX_KEY = 65535
_MAX_NAME = 64
_MAX_DIMS = 4
_MAX_DEPTH = 4
_MAX_OBJECTS = 1 << 22
"""Strings and arrays in all metadata: each becomes a Python object."""
_MAX_TENSORS = 1 << 17
_DAMAGED = "the file is damaged or incomplete: fetch it again"


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the tensor table. `shape` is outermost first: `[n, k]`."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    offset: int
    """Of the first byte, from the beginning of the file."""

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.type.block * self.type.nbytes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


class GgufFile:
    """An open file; `metadata` values are Python scalars and strings, numpy arrays and lists."""

    def __init__(
        self,
        path: Path,
        version: int,
        metadata: dict[str, Any],
        tensors: dict[str, GgufTensor],
        data: mmap.mmap,
    ) -> None:
        self.path = path
        self.version = version
        self.metadata = metadata
        self.tensors = tensors
        self._data = data

    @property
    def nbytes(self) -> int:
        return len(self._data)

    def rows(self, tensor: GgufTensor) -> U8:
        """The bytes of a tensor, `[rows, row bytes]`, a view of the file."""
        flat = np.frombuffer(self._data, np.uint8, tensor.nbytes, tensor.offset)
        return flat.reshape(-1, tensor.row_bytes)

    def release(self, tensor: GgufTensor) -> None:
        """The tensor's pages are not needed for now; reading them again brings them back."""
        release(self._data, tensor.offset, tensor.nbytes)


def read_gguf(path: Path) -> GgufFile:
    """Opens a GGUF file; reads no tensor data. Raises CheckpointError for a file that is damaged,
    incomplete, contradicts itself, or is of another version."""
    return _Parser(path, map_file(path)).parse()


class _Parser:
    """A cursor over the mapped file. Every read is checked against what is left."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.at = 0
        self.objects = 0

    def parse(self) -> GgufFile:
        version, n_tensors, n_entries = self.header()
        metadata: dict[str, Any] = {}
        for i in range(n_entries):
            key, value = self.entry(i)
            if key in metadata:
                self.fail(f"metadata `{shown(key)}`", "distinct keys", "it twice")
            metadata[key] = value
        alignment = self.alignment(metadata)
        table: dict[str, tuple[GgmlType, tuple[int, ...], int]] = {}
        for i in range(n_tensors):
            name, info = self.tensor_info(i)
            if name in table:
                self.fail(f"tensor `{shown(name)}`", "distinct names", "it twice")
            table[name] = info
        start = -(-self.at // alignment) * alignment
        tensors = {
            name: GgufTensor(name, kind, shape, start + offset)
            for name, (kind, shape, offset) in table.items()
        }
        self.check_extents(tensors, start, alignment)
        return GgufFile(self.path, version, metadata, tensors, self.data)

    def fail(self, where: str, requirement: str, actual: object, hint: str = _DAMAGED) -> NoReturn:
        fail(f"{self.path}: {where}", requirement, actual, hint)

    # -- scalars ----------------------------------------------------------------------------------

    def take(self, count: int, what: str) -> int:
        """Moves over `count` bytes; returns where they begin."""
        if count > self.size - self.at:
            self.fail(
                what,
                f"{count} bytes at byte {self.at}",
                f"a file that ends after {self.size - self.at} more",
            )
        begin = self.at
        self.at += count
        return begin

    def u32(self, what: str) -> int:
        value: int = struct.unpack_from("<I", self.data, self.take(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = struct.unpack_from("<Q", self.data, self.take(8, what))[0]
        return value

    def string(self, what: str, longest: int | None = None) -> str:
        length = self.u64(what)
        if longest is not None and length > longest:
            self.fail(what, f"at most {longest} bytes", length)
        begin = self.take(length, what)
        return self.decode(self.data[begin : begin + length], what)

    def decode(self, raw: bytes, what: str) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(what, "UTF-8 text", f"byte {raw[error.start]:#04x} in {shown(repr(raw))}")

    # -- parts of the file ------------------------------------------------------------------------

    def header(self) -> tuple[int, int, int]:
        magic = self.data[:4]
        if magic != MAGIC:
            self.fail("the first four bytes", "GGUF", repr(magic), "this is no GGUF file")
        self.at = 4
        version = self.u32("version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            other = "a big-endian file" if swapped in (2, 3) else str(version)
            self.fail("version", "2 or 3", other, "convert the model with a current converter")
        n_tensors, n_entries = self.u64("tensor count"), self.u64("metadata count")
        left = self.size - self.at
        # The least an entry and a table row can take: 8 + 1 + 4 + 1 and 8 + 1 + 4 + 8 + 4 + 8.
        if n_entries > left // 14:
            self.fail("metadata count", f"at most {left // 14} in {left} bytes", n_entries)
        if n_tensors > min(left // 33, _MAX_TENSORS):
            most = min(left // 33, _MAX_TENSORS)
            self.fail("tensor count", f"at most {most} in {left} bytes", n_tensors)
        return version, n_tensors, n_entries

    def entry(self, index: int) -> tuple[str, Any]:
        key = self.string(f"metadata key {index}", _MAX_KEY)
        if not key:
            self.fail(f"metadata key {index}", "a name", "an empty one")
        where = f"metadata `{shown(key)}`"
        return key, self.value(self.u32(where), where, 0)

    def value(self, kind: int, where: str, depth: int) -> Any:
        if kind in _SCALARS:
            value = self.numbers(kind, 1, where)[0]
            return bool(value) if kind == _BOOL else value.item()
        if kind == _STRING:
            return self.string(where)
        if kind == _ARRAY:
            return self.array(where, depth + 1)
        self.fail(where, "a value type from 0 to 12", kind)

    def array(self, where: str, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            self.fail(where, f"arrays nested at most {_MAX_DEPTH} deep", "deeper ones")
        kind, count = self.u32(where), self.u64(where)
        if kind in _SCALARS:
            return self.numbers(kind, count, where)
        if kind not in (_STRING, _ARRAY):
            self.fail(where, "an element type from 0 to 12", kind)
        least = 8 if kind == _STRING else 12
        if count > (self.size - self.at) // least:
            self.fail(where, f"{count} elements", f"{self.size - self.at} bytes to the file's end")
        self.objects += count
        if self.objects > _MAX_OBJECTS:
            self.fail(where, f"at most {_MAX_OBJECTS} strings in all metadata", self.objects)
        if kind == _STRING:
            return self.strings(count, where)
        return [self.array(where, depth + 1) for _ in range(count)]

    def numbers(self, kind: int, count: int, where: str) -> npt.NDArray[Any]:
        """`count` numbers, a view of the file."""
        dtype = np.dtype(_SCALARS[kind])
        begin = self.take(count * dtype.itemsize, where)
        if kind != _BOOL:
            return np.frombuffer(self.data, dtype, count, begin)
        raw = np.frombuffer(self.data, np.uint8, count, begin)
        if count and raw.max() > 1:
            self.fail(where, "0 or 1 for false or true", int(raw.max()))
        return raw.view(np.bool_)

    def strings(self, count: int, where: str) -> list[str]:
        """A tight loop: vocabularies have hundreds of thousands."""
        data, at, size = self.data, self.at, self.size
        length_at = struct.Struct("<Q").unpack_from
        out: list[str] = []
        begin = at
        try:
            for _ in range(count):
                begin = at + 8
                at = begin + length_at(data, at)[0]
                if at > size:
                    raise struct.error
                out.append(data[begin:at].decode())
        except (struct.error, UnicodeDecodeError):
            self.at = begin - 8  # that one again, for its message
            self.string(f"{where}[{len(out)}]")
            raise
        self.at = at
        return out

    # -- tensors ----------------------------------------------------------------------------------

    def alignment(self, metadata: dict[str, Any]) -> int:
        value = metadata.get("general.alignment", 32)
        fits = isinstance(value, int) and not isinstance(value, bool) and 8 <= value <= 1 << 20
        if not fits or value & (value - 1):
            self.fail("metadata `general.alignment`", "a power of two from 8 to 2^20", shown(value))
        return int(value)

    def tensor_info(self, index: int) -> tuple[str, tuple[GgmlType, tuple[int, ...], int]]:
        name = self.string(f"name of tensor {index}", _MAX_NAME)
        if not name or not name.isprintable():
            self.fail(f"name of tensor {index}", "a printable name", shown(repr(name)))
        where = f"tensor `{shown(name)}`"
        n_dims = self.u32(where)
        if not 1 <= n_dims <= _MAX_DIMS:
            self.fail(where, f"1 to {_MAX_DIMS} dimensions", n_dims)
        dims = struct.unpack_from(f"<{n_dims}Q", self.data, self.take(8 * n_dims, where))
        number = self.u32(where)
        kind = GGML_TYPES.get(number)
        if kind is None:
            self.fail(where, "a known GGML type", number, "Lacewing does not know this type")
        if min(dims) < 1:
            self.fail(where, "dimensions of at least 1", list(dims))
        if dims[0] % kind.block:
            self.fail(where, f"rows of whole {kind.name} blocks of {kind.block}", dims[0])
        return name, (kind, dims[::-1], self.u64(where))

    def check_extents(self, tensors: dict[str, GgufTensor], start: int, alignment: int) -> None:
        """Data lies inside the file, aligned, tensor after tensor, without overlap or gap."""
        for tensor in tensors.values():
            where = f"tensor `{shown(tensor.name)}`"
            offset = tensor.offset - start
            if offset % alignment:
                self.fail(where, f"an offset that is a multiple of {alignment}", offset)
            if tensor.offset + tensor.nbytes > self.size:
                self.fail(
                    where,
                    f"{tensor.nbytes} bytes at byte {tensor.offset}",
                    f"a file of {self.size} bytes",
                )
        end = start
        for tensor in sorted(tensors.values(), key=lambda t: t.offset):
            where = f"tensor `{shown(tensor.name)}`"
            offset = tensor.offset - start
            if tensor.offset < end:
                self.fail(where, f"an offset of at least {end - start} (no overlap)", offset)
            if tensor.offset - end >= alignment:
                self.fail(where, f"no gap after the data that ends at {end - start}", offset)
            end = tensor.offset + tensor.nbytes

"""The safetensors container: a mapped reader that believes nothing, and an aligned writer.

    header length u64 (little-endian)   JSON {name: {dtype, shape, data_offsets}}   tensor data

Data covers the rest of the file without holes or overlap. The writer begins every tensor on a
64-byte boundary of the file; where that leaves room it puts a tensor of bytes named
`__padding__.<i>`, so that any reader of the format can read the file.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from lacewing.checkpoint.files import MAX_JSON, fail, map_file, parse_json, release, shown
from lacewing.errors import CheckpointError

__all__ = [
    "ALIGNMENT",
    "DTYPES",
    "NAMES",
    "SafetensorsFile",
    "SafetensorsWriter",
    "read_safetensors",
]

Array = npt.NDArray[Any]

ALIGNMENT = 64
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(np.uint8),
    "F8_E5M2": np.dtype(np.uint8),
    "F8_E8M0": np.dtype(np.uint8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}
"""Types of the format and how numpy holds them: bf16 and 8-bit floats as their bits."""
NAMES = {dtype: name for name, dtype in DTYPES.items() if name[:2] not in ("F8", "BF")}
"""The type that an array is written as, where nothing else is said."""
_PADDING = "__padding__."
_DAMAGED = "the file is damaged or incomplete: fetch or write it again"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the header; `begin` and `end` count from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class SafetensorsFile:
    """An open file. `tensors` leaves the writer's padding out."""

    def __init__(
        self,
        path: Path,
        metadata: dict[str, str],
        tensors: dict[str, TensorEntry],
        data: mmap.mmap,
    ) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors = tensors
        self._data = data

    @property
    def nbytes(self) -> int:
        return len(self._data)

    def array(self, name: str) -> Array:
        """The tensor as a read-only view of the file."""
        entry = self.tensors[name]
        dtype = DTYPES[entry.dtype]
        count = math.prod(entry.shape)
        if count == 0:
            return np.empty(entry.shape, dtype)
        return np.frombuffer(self._data, dtype, count, entry.begin).reshape(entry.shape)

    def release(self, name: str) -> None:
        """The tensor's pages are not needed for now; reading them again brings them back."""
        entry = self.tensors[name]
        release(self._data, entry.begin, entry.nbytes)


def read_safetensors(path: Path) -> SafetensorsFile:
    """Opens a file; reads its header alone. Raises CheckpointError for a file that is damaged,
    incomplete, or contradicts itself."""
    data = map_file(path)
    size = len(data)
    if size < 8:
        _fail(path, "header length", "8 bytes", size)
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(size - 8, MAX_JSON):
        _fail(path, "header length", f"2 to {min(size - 8, MAX_JSON)} in {size} bytes", length)
    header = _header(path, data[8 : 8 + length])
    metadata = _metadata(path, header.pop("__metadata__", {}))
    tensors = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    _check_extents(path, tensors, 8 + length, size)
    wanted = {name: entry for name, entry in tensors.items() if not name.startswith(_PADDING)}
    return SafetensorsFile(path, metadata, wanted, data)


def _fail(
    path: Path, where: str, requirement: str, actual: object, hint: str = _DAMAGED
) -> NoReturn:
    fail(f"{path}: {where}", requirement, actual, hint)


def _header(path: Path, raw: bytes) -> dict[str, Any]:
    if raw[:1] != b"{":
        _fail(path, "header", "JSON that begins with {", repr(raw[:8]), "this is no safetensors")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        _fail(path, "header", "UTF-8 text", f"byte {raw[error.start]:#04x} at {error.start}")
    return parse_json(text, f"{path}: header")


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        _fail(path, "`__metadata__`", "a mapping of strings to strings", shown(value))
    return value


def _entry(path: Path, name: str, value: Any, start: int) -> TensorEntry:
    where = f"tensor `{shown(name)}`"
    if not name or not name.isprintable():
        _fail(path, where, "a printable name", shown(repr(name)))
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        _fail(path, where, "dtype, shape and data_offsets", shown(value))
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        _fail(path, where, f"a dtype of {', '.join(DTYPES)}", shown(dtype), "not supported")
    if not _are_counts(shape) or len(shape) > 8:
        _fail(path, where, "a shape of at most 8 lengths", shown(shape))
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _fail(path, where, "data_offsets [begin, end] in order", shown(offsets))
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        _fail(
            path,
            where,
            f"{shown(nbytes)} bytes for {dtype} {shown(shape)}",
            shown(offsets[1] - offsets[0]),
        )
    return TensorEntry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 63
        for item in value
    )


def _check_extents(path: Path, tensors: Mapping[str, TensorEntry], start: int, size: int) -> None:
    """The tensors cover the data without overlap or hole."""
    for name, entry in tensors.items():
        if entry.end > size:
            where = f"tensor `{shown(name)}`"
            _fail(path, where, f"data to byte {entry.end}", f"a file of {size} bytes")
    end = start
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        where = f"tensor `{shown(name)}`"
        if entry.begin != end:
            kind = "no overlap" if entry.begin < end else "no hole"
            _fail(path, where, f"data from {end - start} ({kind})", entry.begin - start)
        end = entry.end
    if end != size:
        _fail(path, "end of the data", f"{end} bytes", f"{size}: bytes that no tensor owns")


class SafetensorsWriter:
    """Writes tensors one after the other; the header, whose length is fixed first, comes last.

        with SafetensorsWriter(path, {name: parts}) as out:
            out.add("a.codes", array)

    `names`: at least as many names as tensors will come, none shorter: they size the header.
    `padded` off: tensors follow each other without padding, for readers that would wonder about it;
    they stay aligned if those come first whose bytes are a multiple of 8.
    A file that is not closed well has an empty header, and no reader takes it.
    """

    def __init__(
        self, path: Path, names: list[str], metadata: Mapping[str, str], padded: bool = True
    ) -> None:
        self._padded = padded
        self._entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        # Per tensor: name, dtype, shape and two offsets; padding may come between any two.
        room = sum(len(json.dumps(name)) + 280 for name in names)
        room += len(json.dumps(self._entries)) + ALIGNMENT
        self._start = -(-(8 + room) // ALIGNMENT) * ALIGNMENT
        self._end = 0
        self._padding = 0
        self._file = path.open("xb")
        self._file.write(bytes(self._start))

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()

    def add(self, name: str, array: Array) -> None:
        """Appends a tensor; bf16 goes as the uint16 of its bits."""
        self.add_runs(name, NAMES[array.dtype], array.shape, [array])

    def add_runs(
        self, name: str, dtype: str, shape: tuple[int, ...], runs: Iterable[Array]
    ) -> None:
        """Appends a tensor of a type of DTYPES, made of runs of its rows."""
        assert name not in self._entries
        short = -self._end % ALIGNMENT if self._padded else 0
        if short:
            padding = np.zeros(short, np.uint8)
            self._append(f"{_PADDING}{self._padding}", "U8", padding.shape, [padding])
            self._padding += 1
        self._append(name, dtype, shape, runs)

    def _append(self, name: str, dtype: str, shape: tuple[int, ...], runs: Iterable[Array]) -> None:
        end = self._end + math.prod(shape) * DTYPES[dtype].itemsize
        offsets = [self._end, end]
        self._entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        for run in runs:
            if run.nbytes:
                self._file.write(np.ascontiguousarray(run).reshape(-1).view(np.uint8).data)
            self._end += run.nbytes
        assert self._end == end

    def _finish(self) -> None:
        header = json.dumps(self._entries, separators=(",", ":")).encode()
        length = self._start - 8
        if len(header) > length:
            raise CheckpointError(f"header of {len(header)} bytes in the {length} kept for it")
        self._file.seek(0)
        self._file.write(length.to_bytes(8, "little") + header.ljust(length, b" "))
        self._file.flush()
        os.fsync(self._file.fileno())

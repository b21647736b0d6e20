"""What a file stores of one weight: tensors `<module>.<part>` that make one `<module>.weight`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy.typing as npt

from lacewing.checkpoint.files import fail, shown
from lacewing.checkpoint.safetensors import SafetensorsFile, TensorEntry
from lacewing.checkpoint.shards import FLOATS, as_f32
from lacewing.checkpoint.tensors import F32, SourceTensor
from lacewing.errors import UnsupportedModelError

__all__ = ["Files", "Parts", "Reading", "modules_with"]

Array = npt.NDArray[Any]
Files = Mapping[str, SafetensorsFile]

_DAMAGED = "the checkpoint is damaged, or not what its config says: export it again"


def modules_with(part: str, files: Files) -> list[str]:
    """The modules that have a tensor `<module>.<part>`, in the order of the files."""
    ending = f".{part}"
    return [name.removesuffix(ending) for name in files if name.endswith(ending)]


class Parts:
    """The stored tensors of one module. Everything that is asked for is checked against the file's
    header before a byte of it is read."""

    def __init__(self, place: Path, module: str, known: Iterable[str], files: Files) -> None:
        self.place = place
        self.module = module
        self._files = {
            part: files[f"{module}.{part}"] for part in known if f"{module}.{part}" in files
        }

    @property
    def weight(self) -> str:
        """The Hugging Face name of the weight that the parts make."""
        return f"{self.module}.weight"

    @property
    def stored(self) -> list[str]:
        """Full names of the parts that are there."""
        return [f"{self.module}.{part}" for part in self._files]

    @property
    def nbytes(self) -> int:
        return sum(self.entry(part).nbytes for part in self._files)

    def __contains__(self, part: str) -> bool:
        return part in self._files

    def entry(self, part: str) -> TensorEntry:
        """Header of a part. Raises CheckpointError where there is none."""
        if part not in self._files:
            have = ", ".join(f"`{name}`" for name in self._files) or "none"
            fail(f"{self.place}: `{shown(self.weight)}`", f"the part `{part}`", have, _DAMAGED)
        return self._files[part].tensors[f"{self.module}.{part}"]

    def array(
        self, part: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...] | None = None
    ) -> Array:
        """A part as a view of the file, of one of `dtypes` and of `shape` (None: any length)."""
        entry = self.entry(part)
        if entry.dtype not in dtypes:
            self.fail(part, f"a type of {', '.join(dtypes)}", entry.dtype)
        if shape is not None and not _fits(entry.shape, shape):
            wanted = shown(["any" if length is None else length for length in shape])
            self.fail(part, f"shape {wanted}".replace("'", ""), shown(list(entry.shape)))
        return self._files[part].array(f"{self.module}.{part}")

    def floats(self, part: str, rows: Array) -> F32:
        """`rows`, taken from a float part, in f32."""
        return as_f32(rows, self.entry(part).dtype)

    def scales(self, part: str, shape: tuple[int | None, ...]) -> Array:
        """A part of floats, as it is stored."""
        return self.array(part, FLOATS, shape)

    def size(self, part: str) -> tuple[int, int]:
        """A part that says the shape [n, k] of the weight. What it says is still to be checked
        against the other parts."""
        entry = self.entry(part)
        if entry.shape not in ((2,), (2, 1)):
            self.fail(part, "two lengths", shown(list(entry.shape)))
        n, k = (int(length) for length in self.array(part, ("I64", "I32")).reshape(-1))
        if not (0 < n < 1 << 31 and 0 < k < 1 << 31):
            self.fail(part, "two positive lengths", shown([n, k]))
        return n, k

    def release(self) -> None:
        for part, file in self._files.items():
            file.release(f"{self.module}.{part}")

    def fail(self, part: str, requirement: str, actual: object, hint: str = _DAMAGED) -> NoReturn:
        """Raises CheckpointError about a part."""
        where = f"{self.place}: `{shown(f'{self.module}.{part}', 120)}`"
        fail(where, requirement, actual, hint)

    def refuse(self, requirement: str, actual: object, hint: str) -> NoReturn:
        """Raises UnsupportedModelError about the weight."""
        where = f"{self.place}: `{shown(self.weight, 120)}`"
        raise UnsupportedModelError(f"{where}: needs {requirement}, got {actual}", hint=hint)


@dataclass
class Reading:
    """What a reader makes of a directory's tensors."""

    made: dict[str, SourceTensor] = field(default_factory=dict)
    """Stored name -> the weight that it is a part of."""
    left_out: list[str] = field(default_factory=list)
    """Stored names that are no tensors of the model."""
    notes: list[str] = field(default_factory=list)
    """What the config says and Lacewing does otherwise."""

    def add(self, tensor: SourceTensor, parts: Parts) -> None:
        self.made.update(dict.fromkeys(parts.stored, tensor))


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        want in (None, have) for want, have in zip(wanted, shape, strict=True)
    )

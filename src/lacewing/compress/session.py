"""The work directory of one compression, from which a killed one goes on.

    state.json               {"session": 2, "digest": "..", "blocks": 30, "shape": [..],
                              "finished": 7}: replaced last, so that all it counts is on disk
    block-00006.safetensors  packed parts and vectors of a finished block
    block-00006.json         their formats and shapes, the reports of its layers, and changes
    dense.0.f32, dense.1.f32, compressed.0.f32, compressed.1.f32
                             activations `[windows, tokens, hidden_size]` of the two paths: what the
                             next block reads, and what it is writing

Of each path the file whose number is `finished % 2` is read and the other one written: a process
may die at any instant, and what the next one reads is whole. The directory is locked while it is
used.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lacewing.checkpoint.files import read_json, shown, write_file
from lacewing.checkpoint.safetensors import SafetensorsWriter, read_safetensors
from lacewing.errors import CheckpointError, RecipeError
from lacewing.formats import PackedTensor, get_format

__all__ = ["Change", "LayerReport", "Packed", "Session"]

Packed = PackedTensor | npt.NDArray[np.float32]

_VERSION = 2
_STATE = "state.json"
_OURS = re.compile(r"(state|note-\w+)\.json(\.new)?|block-\d+\.(safetensors|json)|\w+\.[01]\.f32")
_RESTART = "begin anew with --restart (`restart=True`)"


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    name: without `.weight`. target, sparsity: share of zeros that was asked for and that there is.
    error: tr((W' - W) H (W' - W)^T) / tr(W H W^T), the squared error of its outputs over their
    squares; W is the dense weight after folding, H of what the layer reads in the compressed model,
    W' as the layer was solved (a reconstruction of the block comes later, and judges itself:
    `Change`). In a recipe that needs no data H is I. damping: a note where the Hessian needed more
    than usual. instead_of, density: as `checkpoint.Report` has them.
    """

    name: str
    format: str
    solver: str
    target: float
    sparsity: float
    error: float
    bits_per_weight: float
    seconds: float = 0.0
    damping: str = ""
    instead_of: str | None = None
    density: float | None = None


@dataclass(frozen=True)
class Change:
    """What was done to a block, or to a stage of it, beside the rounding of its layers.

    name: of the block, or of the first layer of the stage. kind: `awq`, `smoothquant`, `reorder` or
    `reconstruct`. choice: the exponent, or what channels are sorted by; None where things were left
    as they were, or there is nothing to choose. before, after: the squared error over the square by
    which it was judged; None where it is not finite.
    """

    name: str
    kind: str
    choice: float | str | None
    before: float | None
    after: float | None


class Session:
    """A work directory that is open and locked. Closing it keeps it, `remove` does not.

    finished: blocks that are done; the next one to do has this number.
    """

    finished: int

    def __init__(self, place: Path, lock: int, state: dict[str, Any]) -> None:
        self.place = place
        self.shape = tuple(state["shape"])
        self.blocks: int = state["blocks"]
        self.finished = state["finished"]
        self._lock = lock
        self._state = state
        self._buffers: dict[str, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def open(
        place: Path,
        digest: str,
        blocks: int,
        shape: tuple[int, int, int],
        restart: bool = False,
    ) -> Session:
        """Makes the directory, or goes on with it where it is of the same compression.

        digest: of all that the result depends on. shape: of the activations. restart: forget what
        is there.

        Raises RecipeError where another compression lies there or another process is at work;
        CheckpointError where the directory is damaged, is not ours, or cannot be written.
        """
        with _writing(place):
            lock = _locked(place)
        try:
            _check_ours(place)
            if restart or not (place / _STATE).exists():
                _clear(place)  # without a state nobody knows what the rest is of
            wanted = {"session": _VERSION, "digest": digest, "blocks": blocks}
            wanted["shape"] = list(shape)
            if not (place / _STATE).exists():
                with _writing(place):
                    _replace_state(place, {**wanted, "finished": 0})
            return Session(place, lock, _read_state(place, wanted))
        except BaseException:
            os.close(lock)
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets another process go on from here."""
        self._buffers.clear()
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    def remove(self) -> None:
        """Deletes the directory; the session is over."""
        self._buffers.clear()
        shutil.rmtree(self.place, ignore_errors=True)
        self.close()

    # -- activations ------------------------------------------------------------------------------

    def activations(self, path: str) -> tuple[Tensor, Tensor]:
        """What the next block reads and what it writes, f32 `[windows, tokens, hidden_size]` each,
        mapped from files. path: `dense` or `compressed`.

        What the first block reads has to be written by whoever asks first; from then on a block's
        input is the output of the one before, and must not be written. After `finish_block` ask
        again: the two have changed places.

        Raises CheckpointError where the disk is full, or files of finished blocks are not there.
        """
        if path not in self._buffers:
            self._buffers[path] = (self._map(path, 0), self._map(path, 1))
        pair = self._buffers[path]
        return pair[self.finished % 2], pair[1 - self.finished % 2]

    def _file(self, path: str, number: int) -> Path:
        return self.place / f"{path}.{number}.f32"

    def _map(self, path: str, number: int) -> Tensor:
        """Space is taken before the file is mapped: writing to a map on a full disk kills."""
        file, count = self._file(path, number), math.prod(self.shape)
        with _writing(self.place):
            there = file.stat().st_size if file.exists() else 0
            if self.finished and number == self.finished % 2 and there != 4 * count:
                raise CheckpointError(
                    f"{file}: needs {4 * count} bytes of block {self.finished - 1}, got {there}",
                    hint=_RESTART,
                )
            with file.open("ab") as handle:
                os.posix_fallocate(handle.fileno(), 0, 4 * count)
        mapped = torch.from_file(str(file), shared=True, size=count, dtype=torch.float32)
        return mapped.view(self.shape)

    def remember(self, key: str, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What `make` returns, or returned before the process was killed."""
        file = self.place / f"note-{key}.json"
        if not file.exists():
            with _writing(self.place):
                new = file.with_suffix(".json.new")
                new.unlink(missing_ok=True)
                write_file(new, json.dumps(make()).encode())
                new.replace(file)
        found: dict[str, float] = read_json(file)
        return found

    # -- blocks -----------------------------------------------------------------------------------

    def finish_block(
        self,
        index: int,
        packed: Mapping[str, Packed],
        report: Sequence[LayerReport],
        changes: Sequence[Change] = (),
    ) -> None:
        """Puts block `index` on disk, with what it has written to the activations. From here on
        it is not done again.

        packed: tensors of the block by their whole names (`model.layers.0.mlp.up_proj.weight`);
        vectors as f32. What is left out stays as the model has it.

        Raises CheckpointError where the disk is full.
        """
        assert index == self.finished < self.blocks
        with _writing(self.place):
            self._write_block(index, packed, report, changes)
            for path in self._buffers:
                _sync(self._file(path, 1 - self.finished % 2))
            state = {**self._state, "finished": index + 1}
            _replace_state(self.place, state)
        self._state = state
        self.finished = index + 1

    def _write_block(
        self,
        index: int,
        packed: Mapping[str, Packed],
        report: Sequence[LayerReport],
        changes: Sequence[Change],
    ) -> None:
        weights, told = self._block_files(index)
        for file in (weights, told):
            file.unlink(missing_ok=True)
        arrays = dict(_arrays(packed))
        with SafetensorsWriter(weights, list(arrays), {"format": "lacewing"}) as out:
            for name, array in arrays.items():
                out.add(name, array)
        tensors = {
            name: [value.format, *value.shape]
            for name, value in packed.items()
            if isinstance(value, PackedTensor)
        }
        document = {
            "tensors": tensors,
            "layers": [asdict(layer) for layer in report],
            "changes": [asdict(change) for change in changes],
        }
        write_file(told, json.dumps(document).encode())

    def _block_files(self, index: int) -> tuple[Path, Path]:
        stem = f"block-{index:05}"
        return self.place / f"{stem}.safetensors", self.place / f"{stem}.json"

    def tensors(self, index: int) -> dict[str, Packed]:
        """What `finish_block` was given for a finished block; views of its file.

        Raises CheckpointError for files that are missing or damaged.
        """
        weights, told = self._block_files(index)
        file = read_safetensors(weights)
        arrays = {name: file.array(name) for name in file.tensors}
        found: dict[str, Packed] = {}
        for name, (format, n, k) in read_json(told)["tensors"].items():
            kind = get_format(format)
            parts = {part: arrays.pop(f"{name}.{part}") for part in kind.part_names}
            tensor = PackedTensor(format, (n, k), parts)
            kind.validate(tensor)
            found[name] = tensor
        return {**found, **arrays}

    def reports(self) -> list[LayerReport]:
        """Of all layers of the finished blocks, in order."""
        return [LayerReport(**layer) for found in self._documents() for layer in found["layers"]]

    def changes(self) -> list[Change]:
        """Of all finished blocks, in order."""
        return [Change(**change) for found in self._documents() for change in found["changes"]]

    def _documents(self) -> list[dict[str, Any]]:
        return [read_json(self._block_files(i)[1]) for i in range(self.finished)]


def _arrays(packed: Mapping[str, Packed]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    for name, value in packed.items():
        if isinstance(value, PackedTensor):
            for part, array in value.parts.items():
                yield f"{name}.{part}", array
        else:
            yield name, value


# -- the directory --------------------------------------------------------------------------------


def _locked(place: Path) -> int:
    """Makes the directory if there is none, and locks it."""
    if not place.parent.is_dir():
        raise CheckpointError(f"{place}: needs an existing parent directory, got none")
    while True:
        with suppress(FileExistsError):
            place.mkdir()
        lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if place.exists() and os.path.samestat(os.fstat(lock), place.stat()):
                return lock
        except BlockingIOError:
            os.close(lock)
            raise RecipeError(
                f"{place}: needs to be free, got one that another process works in",
                hint="wait for it, stop it, or name another output",
            ) from None
        os.close(lock)  # whoever had the lock has removed the directory: it was another one


def _check_ours(place: Path) -> None:
    strange = sorted(path.name for path in place.iterdir() if not _OURS.fullmatch(path.name))
    if strange:
        raise CheckpointError(
            f"{place}: needs the files of a compression alone, got `{shown(strange[0])}`",
            hint="move it away, or name another output",
        )


def _clear(place: Path) -> None:
    """The state goes first: without it nothing else counts."""
    with _writing(place):
        for file in sorted(place.iterdir(), key=lambda file: file.name != _STATE):
            file.unlink()


def _read_state(place: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    state = read_json(place / _STATE)
    if any(state.get(key) != value for key, value in wanted.items()):
        raise RecipeError(
            f"{place}: holds the work of another compression: the model, the recipe, the data, the"
            " seed, the threads or the version of Lacewing were others",
            hint=f"give what was given then to go on, or {_RESTART}",
        )
    if type(state.get("finished")) is not int or not 0 <= state["finished"] <= wanted["blocks"]:
        raise CheckpointError(f"{place / _STATE}: is damaged", hint=_RESTART)
    return state


def _replace_state(place: Path, state: Mapping[str, Any]) -> None:
    new = place / f"{_STATE}.new"
    new.unlink(missing_ok=True)
    write_file(new, json.dumps(state).encode())
    _sync(place)  # the names of the files that the state counts
    new.replace(place / _STATE)
    _sync(place)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """Turns what the system says into a CheckpointError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "free some space and run it again: it goes on from the last finished block"
        raise CheckpointError(
            f"{place}: cannot be written: {error.strerror or error}",
            hint=hint if full else "choose a place you may write to",
        ) from error

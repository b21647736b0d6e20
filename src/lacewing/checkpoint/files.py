"""What every file of a model goes through: mapping, JSON, and directories that appear whole or not
at all. Files are taken for hostile: nothing is sized by what they say before it is checked."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import shutil
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from lacewing.errors import CheckpointError

__all__ = [
    "MAX_JSON",
    "check_target",
    "fail",
    "map_file",
    "new_directory",
    "parse_json",
    "read_json",
    "read_text",
    "reading",
    "release",
    "replace_file",
    "shown",
    "write_file",
]

U8 = npt.NDArray[np.uint8]

MAX_JSON = 100_000_000
"""Bytes of a JSON document; the largest tokenizers need a third of it."""
MAX_DEPTH = 64
"""Nesting of a JSON document."""


def fail(where: str, requirement: str, actual: object, hint: str | None = None) -> NoReturn:
    """Raises the CheckpointError `where: needs requirement, got actual`."""
    raise CheckpointError(f"{where}: needs {requirement}, got {actual}", hint=hint)


def shown(value: object, length: int = 60) -> str:
    """`value` for a message: a hostile name must not fill the screen or move the cursor."""
    text = value if isinstance(value, str) else repr(value)
    clean = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[: length + 1])
    return clean if len(text) <= length else clean[:length] + "..."


# -- reading --------------------------------------------------------------------------------------


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what the system says about `path` into a CheckpointError."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"{path}: cannot be read: {reason}") from error


def map_file(path: Path) -> mmap.mmap:
    """The bytes of a regular file, mapped read-only. The map lives as long as views of it.

    Raises CheckpointError for a file that is absent, unreadable, empty or no file.
    """
    with reading(path), path.open("rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            fail(str(path), "a regular file", "something else")
        if status.st_size == 0:
            fail(str(path), "a model file", "an empty file", "download or convert it again")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def release(data: mmap.mmap, begin: int, count: int) -> None:
    """Takes whole pages of a map out of the process's memory; the system's cache keeps them."""
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    length = begin + count - first
    if length >= mmap.PAGESIZE:
        data.madvise(mmap.MADV_DONTNEED, first, length // mmap.PAGESIZE * mmap.PAGESIZE)


def read_text(path: Path) -> str:
    """A whole UTF-8 text file of at most MAX_JSON bytes. Raises CheckpointError."""
    with reading(path), path.open("rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            fail(str(path), "a regular file", "something else")
        if status.st_size > MAX_JSON:
            fail(str(path), f"at most {MAX_JSON} bytes", f"{status.st_size}")
        raw = file.read(MAX_JSON + 1)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        fail(str(path), "UTF-8 text", f"byte {raw[error.start]:#04x} at {error.start}")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """The JSON object `text`. Raises CheckpointError for anything else, duplicate keys, and
    nesting deeper than MAX_DEPTH."""
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError:
        fail(where, f"JSON nested at most {MAX_DEPTH} deep", "deeper nesting")
    except ValueError as error:
        fail(where, "a JSON document", str(error), "the file is damaged: fetch or write it again")
    if not isinstance(value, dict):
        fail(where, "a JSON object", type(value).__name__)
    if _depth(value) > MAX_DEPTH:
        fail(where, f"JSON nested at most {MAX_DEPTH} deep", "deeper nesting")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown(twice)!r} twice")
    return found


def _depth(value: Any) -> int:
    """Nesting of containers; breadth first, so that the document cannot exhaust the stack."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        containers = [item for item in level if isinstance(item, (dict, list)) and item]
        if not containers:
            break
        depth += 1
        level = [
            child
            for item in containers
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (dict, list))
        ]
    return depth


# -- writing --------------------------------------------------------------------------------------


@contextmanager
def new_directory(target: Path, marker: str, force: bool = False) -> Iterator[Path]:
    """A directory to fill, which becomes `target` when the block ends well, and is removed if not.

    It lies beside the target, so that the last step is one rename. With `force` an existing target
    is replaced, if it is empty or holds the file `marker`: it stays in place until the new one is
    complete and on disk. A killed process leaves a hidden `.<target>.<pid>.partial` behind, which
    the next call for the same target removes; the work starts again from zero.

    Raises CheckpointError where the target exists, is something else, or cannot be written.
    """
    target = Path(os.path.realpath(target))
    check_target(target, marker, force)
    _remove_stale(target)
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    with _writing(target):
        partial.mkdir()
        lock = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield partial
            os.fsync(lock)
            check_target(target, marker, force)
            _put_in_place(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            os.close(lock)


def write_file(path: Path, data: bytes) -> None:
    """Writes a new file and waits until it is on disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file, in the place of one that may be there: it is the old or the new one whole, at
    any instant. Raises CheckpointError where it cannot be written."""
    target = Path(os.path.realpath(path))
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    with _writing(target):
        try:
            write_file(partial, data)
            partial.replace(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _sync_directory(target.parent)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "free some space, or write elsewhere" if full else "choose a place you may write to"
        raise CheckpointError(
            f"{target}: cannot be written: {reason}; nothing was left behind", hint=hint
        ) from error


def check_target(target: Path, marker: str, force: bool) -> None:
    """Raises CheckpointError where `new_directory` could not put its result."""
    if not target.parent.is_dir():
        fail(str(target), "an existing parent directory", f"none at {target.parent}")
    if not os.path.lexists(target):
        return
    if not force:
        fail(str(target), "a path that is free", "an existing one", "replace it with --force")
    ours = target.is_dir() and ((target / marker).is_file() or not any(target.iterdir()))
    if not ours:
        fail(
            str(target),
            f"a directory that holds {marker}, or an empty one, to replace",
            "something else",
            "name another target: what Lacewing did not write it does not delete",
        )


def _remove_stale(target: Path) -> None:
    """Removes what killed processes left. A living one holds a lock on its directory."""
    for partial in target.parent.glob(f".{_escaped(target.name)}.*.partial"):
        with suppress(OSError):
            descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(partial, ignore_errors=True)
            finally:
                os.close(descriptor)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _put_in_place(partial: Path, target: Path) -> None:
    old = target.parent / f".{target.name}.{os.getpid()}.old"
    replaced = target.exists()
    if replaced:
        target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        if replaced:
            old.rename(target)
        raise
    _sync_directory(target.parent)
    if replaced:
        shutil.rmtree(old, ignore_errors=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""What the result of a compression depends on, as one digest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from lacewing.checkpoint import Source
from lacewing.checkpoint.files import read_json, reading
from lacewing.checkpoint.shards import INDEX, SINGLE
from lacewing.compress.data import Windows
from lacewing.compress.path import has_fast_products
from lacewing.compress.recipe import Recipe
from lacewing.formats.base import row_chunks
from lacewing.version import __version__

__all__ = ["digest_of", "fingerprint"]

_HEAD = 1 << 20
_PAGE = 1 << 12
_PAGES = 64


def digest_of(recipe: Recipe, source: Source, windows: Windows, machine: str | None = None) -> str:
    """sha256, as hexadecimal, of recipe, model, data, the machine it is for, versions, and of what
    decides in which order sums are made: kernels of the CPU and number of threads."""
    facts = [
        recipe.digest(),
        fingerprint(source),
        windows.digest(),
        machine,
        __version__,
        torch.__version__,
        torch.get_num_threads(),
        torch.backends.cpu.get_cpu_capability(),
        has_fast_products(),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def fingerprint(source: Source) -> str:
    """sha256 of configuration, tokenizer, names and shapes, and of weights: in memory all of them,
    of files as much as takes no time: size, date, beginning and some pages. Files that are not
    read do not count. Raises CheckpointError for one that cannot be read."""
    names = source.spec.tensor_shapes()
    tensors = {
        name: [source.tensors[name].dtype, list(source.tensors[name].shape)] for name in names
    }
    facts = [source.kind, source.config, asdict(source.tokenizer), tensors]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    if source.kind == "module":
        pieces = _of_memory(source, names)
    else:
        pieces = (piece for file in _files(source.path) for piece in _of_file(file))
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    """With weights; how they are found see `checkpoint/shards.py`."""
    if not path.is_dir():
        return [path]
    if (path / SINGLE).exists():
        return [path / SINGLE]
    if (path / INDEX).exists():
        placed = read_json(path / INDEX)["weight_map"]
        return [path / name for name in sorted(set(placed.values()))]
    return sorted(path.glob("*.safetensors"))


def _of_file(file: Path) -> Iterator[bytes]:
    with reading(file), file.open("rb") as handle:
        status = os.fstat(handle.fileno())
        yield json.dumps([file.name, status.st_size, status.st_mtime_ns]).encode()
        yield handle.read(_HEAD)
        for i in range(1, _PAGES + 1):
            handle.seek(max(0, status.st_size * i // _PAGES - _PAGE))
            yield handle.read(_PAGE)


def _of_memory(source: Source, names: Iterable[str]) -> Iterator[bytes]:
    for tensor in (source.tensors[name] for name in names):
        rows = row_chunks(*tensor.shape) if len(tensor.shape) == 2 else [(0, tensor.shape[0])]
        for begin, end in rows:
            yield tensor.dequantize(begin, end).tobytes()

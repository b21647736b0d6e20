"""What the result of a compression depends on, as one digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from lacewing.checkpoint import Source
from lacewing.compress.data import Windows
from lacewing.compress.path import has_fast_products
from lacewing.compress.recipe import Recipe
from lacewing.version import __version__

__all__ = ["digest_of", "fingerprint"]

_HEAD = 1 << 20
_PAGE = 1 << 12
_PAGES = 64
_ROWS = 4


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
    """sha256 of names, shapes and sizes, and of as much of the content as takes no time: of files
    their beginning, date and some pages, of weights in memory some rows."""
    tensors = {
        name: [tensor.dtype, list(tensor.shape), tensor.nbytes]
        for name, tensor in source.tensors.items()
    }
    facts = json.dumps([source.kind, source.config, tensors], sort_keys=True, default=str)
    digest = hashlib.sha256(facts.encode())
    for piece in _of_memory(source) if source.kind == "module" else _of_files(source.path):
        digest.update(piece)
    return digest.hexdigest()


def _of_files(path: Path) -> Iterator[bytes]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        if not file.is_file():
            continue
        status = file.stat()
        yield json.dumps([file.name, status.st_size, status.st_mtime_ns]).encode()
        with file.open("rb") as handle:
            yield handle.read(_HEAD)
            for i in range(1, _PAGES + 1):
                handle.seek(max(0, status.st_size * i // _PAGES - _PAGE))
                yield handle.read(_PAGE)


def _of_memory(source: Source) -> Iterator[bytes]:
    for tensor in source.tensors.values():
        for i in range(_ROWS):
            at = tensor.shape[0] * i // _ROWS
            yield tensor.dequantize(at, at + 1).tobytes()

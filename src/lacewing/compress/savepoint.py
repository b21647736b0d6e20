"""Tensors and a few facts in one file, replaced as a whole: what a killed run goes on from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lacewing.checkpoint.files import fail, parse_json
from lacewing.checkpoint.safetensors import SafetensorsWriter, read_safetensors

__all__ = ["load", "save"]


def save(path: Path, tensors: Iterable[Tensor], facts: Mapping[str, Any]) -> None:
    """Writes f32 `tensors` in their order, and `facts` as JSON. A kill at any time leaves the old
    file or the new one."""
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    listed = list(tensors)
    names = [str(i) for i in range(len(listed))]
    with SafetensorsWriter(partial, names, {"facts": json.dumps(facts)}) as out:
        for name, tensor in zip(names, listed, strict=True):
            out.add(name, tensor.detach().numpy())
    partial.replace(path)


def facts(path: Path) -> dict[str, Any]:
    """The facts of a file alone. Raises CheckpointError for a damaged one."""
    return parse_json(read_safetensors(path).metadata.get("facts", ""), str(path))


def load(path: Path, tensors: Iterable[Tensor]) -> dict[str, Any]:
    """Fills `tensors` from a file that holds as many, in the same order and of the same shapes;
    returns the facts. Raises CheckpointError for any other file, naming it."""
    file = read_safetensors(path)
    listed = list(tensors)
    found = [entry.shape for entry in file.tensors.values()]
    if [file.tensors[str(i)].shape for i in range(len(found))] != [tuple(t.shape) for t in listed]:
        fail(str(path), "the state of this very run", "tensors of other shapes", "delete it")
    for i, tensor in enumerate(listed):
        tensor.detach().copy_(torch.from_numpy(file.array(str(i)).copy()))
    return facts(path)

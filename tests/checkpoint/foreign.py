"""Directories as other libraries write them, byte by byte."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoint.build import safetensors_bytes

Array = np.ndarray[Any, Any]

_TYPES = {"i1": "I8", "u1": "U8", "i4": "I32", "i8": "I64", "f2": "F16", "f4": "F32", "u2": "BF16"}


def write_tensors(path: Path, tensors: Mapping[str, Array]) -> None:
    """model.safetensors of any numpy arrays; uint16 goes as bf16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": _TYPES[array.dtype.str[1:]],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    path.write_bytes(safetensors_bytes(header, data))


def write_quantized(
    path: Path, quantization: Any, tensors: Mapping[str, Array], **config: Any
) -> Path:
    """A directory with a config.json and one file of weights."""
    path.mkdir(exist_ok=True)
    document = {**config, "quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(document))
    write_tensors(path / "model.safetensors", tensors)
    return path


def numpy_of(tensor: Any) -> Array:
    """A torch tensor as numpy; bf16 as the uint16 of its bits."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)
    return tensor.detach().contiguous().numpy()


def group(targets: list[str] | None = None, **weights: Any) -> dict[str, Any]:
    """A compressed-tensors config with one group."""
    scheme = {"targets": targets or ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "version": "0.20.0",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": scheme},
    }

"""Every weight of a Hugging Face directory by its Hugging Face name, whoever has compressed it.

    quant_method         reader                  what it reads
    (none)                                       floats as they are
    compressed-tensors   compressedtensors.py    pack-quantized, int-quantized, sparse-bitmask,
                                                 sparse-24-bitmask
    gptq                 gptq.py                 gptq, gptq_v2, gptq_p; with activation order
    awq                  awq.py                  gemm, 4 bits
    auto-round           autoround.py            the layouts of gptq and awq
    lacewing             transformers.py         packed by lacewing.nn, saved by transformers

The tensors alone decide which weights are made of parts: `ignore`, `modules_to_not_convert` and the
like are not needed. `docs/concepts/checkpoints.md` says what becomes of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lacewing.checkpoint.autoround import read_auto_round
from lacewing.checkpoint.awq import read_awq
from lacewing.checkpoint.compressedtensors import read_compressed_tensors
from lacewing.checkpoint.files import fail, read_json, shown
from lacewing.checkpoint.gptq import read_gptq
from lacewing.checkpoint.parts import Files, Reading
from lacewing.checkpoint.settings import Config
from lacewing.checkpoint.shards import FloatTensor, open_shards
from lacewing.checkpoint.tensors import SourceTensor
from lacewing.checkpoint.transformers import read_transformers
from lacewing.errors import UnsupportedModelError

__all__ = ["CONFIG", "QUANTIZATION_KEYS", "Weights", "read_weights"]

CONFIG = "config.json"
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
"""Where a config.json says how weights are compressed; the second is that of old
compressed-tensors."""
_READERS: dict[str, Callable[[Path, Config, Files], Reading]] = {
    "compressed-tensors": read_compressed_tensors,
    "gptq": read_gptq,
    "awq": read_awq,
    "auto-round": read_auto_round,
    "intel/auto-round": read_auto_round,
    "lacewing": read_transformers,
}
_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files of their own that old exports have beside a config.json that says nothing."""


@dataclass(frozen=True, eq=False)
class Weights:
    """The weights of a directory, and what there is to say about reading them."""

    tensors: dict[str, SourceTensor]
    notes: tuple[str, ...] = ()
    """What the checkpoint's config says and Lacewing does otherwise."""


def read_weights(place: Path, config: Config) -> Weights:
    """Every tensor of a Hugging Face directory by its name. Reads headers and shapes, no weights.
    A directory whose config does not say that it is compressed is read as floats.

    Raises CheckpointError for a directory that is damaged or contradicts itself, and
    UnsupportedModelError for a compression that is not implemented.
    """
    files = open_shards(place)
    found = _quantization(place, config)
    reading = Reading() if found is None else _reader(place, found)(place, found, files)
    left_out = set(reading.left_out)
    tensors: dict[str, SourceTensor] = {}
    for name, file in files.items():
        if name in left_out:
            continue
        tensor = reading.made.get(name) or FloatTensor(file, name)
        if tensors.setdefault(tensor.name, tensor) is not tensor:
            fail(f"{place}: `{shown(tensor.name)}`", "one weight", "a dense one and its parts")
    return Weights(tensors, tuple(reading.notes))


def _quantization(place: Path, config: Config) -> dict[str, Any] | None:
    """What the directory says of how its weights are compressed, or None."""
    for key in QUANTIZATION_KEYS:
        found = config.get(key)
        if found:
            if not isinstance(found, dict):
                fail(f"{place / CONFIG}: `{key}`", "a mapping", shown(found))
            inner = found.get("quantization_config")
            return {**found, **(inner if isinstance(inner, dict) else {})}
    for name, method in _FILES.items():
        if (place / name).exists():
            return {"quant_method": method, **read_json(place / name)}
    return None


def _reader(place: Path, found: Config) -> Callable[[Path, Config, Files], Reading]:
    method = found.get("quant_method")
    if method is None and ("config_groups" in found or "sparsity_config" in found):
        method = "compressed-tensors"
    if not isinstance(method, str) or method not in _READERS:
        raise UnsupportedModelError(
            f"{place / CONFIG}: `quantization_config`: needs weights in bf16, f16 or f32, or"
            f" quant_method {', '.join(_READERS)}, got {shown(method)}",
            hint="use the original model, or a GGUF file of it",
        )
    return _READERS[method]

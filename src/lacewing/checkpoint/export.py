"""Writing what others read: a Hugging Face directory with the weights as compressed-tensors has
them. What becomes of a format:

    w8a8                          int-quantized: int8, one scale per row, activations rounded per
                                  token, as the format has it
    w8a8g* w4a8g* w3a8g64         pack-quantized, symmetric, of 8, 4 and 3 bits
    w2a8g64 w1.6a8                pack-quantized, symmetric, of 3 and 2 bits
    w4a8g32z w5a8g32z             pack-quantized, asymmetric, where every minimum is a whole number
                                  of steps below zero, rounded to float16 (AWQ and GPTQ have such);
                                  a FormatError where one is not
    _sp _24 _b16x1                as the dense format of the same width: zeros are written out
    bf16 bf16_sp, embedding,      as floats: of the source where it has them, bf16 of these formats,
    head, vectors                 or else f32

Codes and scales (float16) go over as they are. The config asks for f32: where a library loads
scales in bf16 it rounds them.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lacewing.checkpoint.convert import AUTO, Progress, make_plan, memory_of, pack_all
from lacewing.checkpoint.files import MAX_JSON, new_directory, write_file
from lacewing.checkpoint.hub import CONFIG, HubSource, norms_are_offsets
from lacewing.checkpoint.packing import Packed, Report
from lacewing.checkpoint.safetensors import DTYPES, NAMES, SafetensorsWriter
from lacewing.checkpoint.shards import FLOATS, FloatTensor
from lacewing.checkpoint.source import open_source
from lacewing.checkpoint.tensors import TABLES, Source, SourceTensor
from lacewing.checkpoint.words import pack_words
from lacewing.errors import FormatError
from lacewing.formats import Codes, Format, PackedTensor, get_format
from lacewing.formats.base import ROW, row_chunks

__all__ = ["EXPORT", "write_compressed_tensors"]

Array = npt.NDArray[Any]

EXPORT = "lacewing-export.json"
"""What Lacewing has written, and may replace: the formats and errors of the weights."""
VERSION = "0.20.0"
"""The version of compressed-tensors whose files these are."""
_WEIGHTS = "model.safetensors"
_BF16 = ("bf16", "bf16_sp")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def write_compressed_tensors(
    source: Source | str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    format: str = AUTO,
    sparsity: float | None = None,
    force: bool = False,
    progress: Progress | None = None,
    threads: int | None = None,
    machine: str | None = None,
) -> list[Report]:
    """Converts a model into a directory that transformers opens with compressed-tensors. It appears
    complete or not at all.

    format, sparsity and the rest: as in `write_packed`; with `auto` a packed directory keeps its
    codes, and zeros are not looked for, since they would be written out. force: replace what an
    earlier call has written.

    Raises CheckpointError and UnsupportedModelError as `write_packed`, and FormatError for weights
    that compressed-tensors cannot hold (see above).
    """
    opened = source if isinstance(source, Source) else open_source(source)
    plan = make_plan(opened, format, sparsity, None, machine)
    packed = {n: (t, k) for n, (t, k) in plan.items() if k is not None and n not in TABLES}
    for name, (tensor, kind) in packed.items():
        _check_groups(name, tensor.shape, kind)
    stream = pack_all(packed, sparsity, progress, threads, machine, search=False)
    groups = _ConfigGroups()
    with memory_of(opened), new_directory(Path(out_dir), EXPORT, force) as place:
        parts = [f"{name}_zero_point" for name in plan for _ in range(4)]
        with SafetensorsWriter(place / _WEIGHTS, parts, {"format": "pt"}, padded=False) as out:
            writer = _Deferring(out)
            reports = [
                _write_floats(writer, opened, tensor)
                for name, (tensor, _) in plan.items()
                if name not in packed
            ]
            for name, value, report in stream:
                begin = writer.nbytes
                _write_weight(writer, groups, name, value)
                reports.append(replace(report, nbytes=writer.nbytes - begin))
            writer.finish()
        _write_config(place, opened, groups)
        _write_tokenizer(place, opened)
        write_file(place / EXPORT, _report_json(reports).encode())
    return reports


def _check_groups(name: str, shape: tuple[int, ...], kind: Format) -> None:
    if kind.group_size not in (0, ROW) and shape[1] % kind.group_size:
        raise FormatError(
            f"`{name}`: compressed-tensors needs inputs divisible by the group size"
            f" {kind.group_size} of {kind.name}, got {shape[1]}",
            hint="use a format with smaller groups, or `w8a8`",
        )


# -- weights --------------------------------------------------------------------------------------


class _Deferring:
    """Writes tensors as they come; those that would leave the next one unaligned come last."""

    def __init__(self, out: SafetensorsWriter) -> None:
        self._out = out
        self.nbytes = 0
        self._last: dict[str, tuple[str, tuple[int, ...], list[Array]]] = {}

    def add(self, name: str, array: Array) -> None:
        self.add_runs(name, NAMES[array.dtype], array.shape, [array])

    def add_runs(
        self, name: str, dtype: str, shape: tuple[int, ...], runs: Iterable[Array]
    ) -> None:
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
        self.nbytes += nbytes
        if nbytes % 8:
            self._last[name] = (dtype, shape, list(runs))
        else:
            self._out.add_runs(name, dtype, shape, runs)

    def finish(self) -> None:
        for name, (dtype, shape, runs) in sorted(self._last.items(), key=_item_size):
            self._out.add_runs(name, dtype, shape, runs)


def _item_size(item: tuple[str, tuple[str, tuple[int, ...], list[Array]]]) -> int:
    return -DTYPES[item[1][0]].itemsize


def _write_floats(out: _Deferring, source: Source, tensor: SourceTensor) -> Report:
    """A tensor that is not rounded: in the type of the source where that is one of floats."""
    if isinstance(source, HubSource):
        tensor = source.weights.tensors[tensor.name]  # norms as they are stored
    stored = isinstance(tensor, FloatTensor) and tensor.dtype in FLOATS
    dtype = tensor.dtype if stored else "BF16" if tensor.own_format in _BF16 else "F32"
    less = np.float32(1 if _is_offset_norm(source, tensor) else 0)
    out.add_runs(tensor.name, dtype, tensor.shape, _float_runs(tensor, less))
    nbytes = DTYPES[dtype].itemsize * math.prod(tensor.shape)
    return Report(tensor.name, tensor.shape, tensor.dtype, dtype.lower(), nbytes, 0.0, True)


def _is_offset_norm(source: Source, tensor: SourceTensor) -> bool:
    """Whether a norm's weight has the 1 in it that Hugging Face's files leave out."""
    norm = tensor.name.endswith("norm.weight") and norms_are_offsets(source.config)
    return norm and not isinstance(source, HubSource)


def _float_runs(tensor: SourceTensor, less: np.float32) -> Iterator[Array]:
    if isinstance(tensor, FloatTensor) and tensor.dtype in FLOATS:
        yield tensor.array()
    elif len(tensor.shape) == 1:
        yield tensor.dequantize() - less
    elif tensor.own_format in _BF16:
        for run in row_chunks(*tensor.shape):
            found = tensor.codes(*run)
            assert found is not None
            yield found[1].q
    else:
        yield from (tensor.dequantize(*run) for run in row_chunks(*tensor.shape))


def _write_weight(out: _Deferring, groups: _ConfigGroups, name: str, value: Packed) -> None:
    assert isinstance(value, PackedTensor)
    module = name.removesuffix(".weight")
    kind = get_format(value.format)
    codes = kind.unpack(value)
    if codes.scales is None:
        out.add_runs(name, "BF16", value.shape, [codes.q])
        return
    scheme = _ConfigGroup.of(kind)
    groups.add(module, scheme)
    signed_zero = 1 << (scheme.bits - 1)
    if kind.asymmetric:
        unsigned = codes.q
        zeros = _zero_points(name, kind, codes)
        words = np.ascontiguousarray(pack_words(np.ascontiguousarray(zeros.T), scheme.bits).T)
        out.add(f"{module}.weight_zero_point", words)
    else:
        # uint8 arithmetic is modulo 256, and so is the way back from it
        shift = np.uint8((signed_zero - kind.zero_point) % 256)
        unsigned = codes.q * np.uint8(kind.code_step) + shift
    if scheme.format == "int-quantized":
        out.add(name, (unsigned ^ np.uint8(0x80)).view(np.int8))
    else:
        out.add(f"{module}.weight_packed", pack_words(unsigned, scheme.bits))
        out.add(f"{module}.weight_shape", np.array(value.shape, np.int64))
    out.add(f"{module}.weight_scale", codes.scales)


def _zero_points(name: str, kind: Format, codes: Codes) -> npt.NDArray[np.uint8]:
    """The codes `[n, groups]` of which -scale * code is the minimum, rounded to float16 as that is.
    Raises FormatError where there is none."""
    assert codes.scales is not None and codes.mins is not None
    scales, mins = codes.scales.astype(np.float32), codes.mins.astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        found = np.where(scales == 0, 0, np.round(-mins / scales))
        wrong = (found < 0) | (found > kind.max_code)
        wrong |= (found * -scales).astype(np.float16) != codes.mins
    if wrong.any():
        row, group = np.argwhere(wrong)[0]
        raise FormatError(
            f"`{name}`: compressed-tensors has zero points that are codes from 0 to"
            f" {kind.max_code}; {kind.name} has the minimum {mins[row, group]} beside the scale"
            f" {scales[row, group]} in row {row}, group {group}",
            hint="name a symmetric format, such as `w4a8g64` or `w8a8g64`",
        )
    zeros: npt.NDArray[np.uint8] = found.astype(np.uint8)
    return zeros


# -- the config -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ConfigGroup:
    """A group of the config."""

    bits: int
    group_size: int | None
    symmetric: bool
    format: str

    @classmethod
    def of(cls, kind: Format) -> _ConfigGroup:
        highest = kind.code_step * kind.max_code - kind.zero_point
        bits = kind.weight_bits
        while not kind.asymmetric and not -(1 << (bits - 1)) <= -kind.zero_point <= highest < (
            1 << (bits - 1)
        ):
            bits += 1
        group = None if kind.group_size == ROW else kind.group_size
        rows = group is None and bits == 8
        return cls(bits, group, not kind.asymmetric, "int-quantized" if rows else "pack-quantized")

    def as_dict(self, targets: list[str]) -> dict[str, Any]:
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "channel" if self.group_size is None else "group",
            "group_size": self.group_size,
            "dynamic": False,
        }
        inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token"}
        per_token = {**inputs, "dynamic": True} if self.format == "int-quantized" else None
        return {
            "targets": targets,
            "weights": weights,
            "input_activations": per_token,
            "output_activations": None,
            "format": self.format,
        }


@dataclass
class _ConfigGroups:
    """Which modules are rounded how."""

    modules: dict[_ConfigGroup, list[str]] = field(default_factory=dict)

    def add(self, module: str, scheme: _ConfigGroup) -> None:
        self.modules.setdefault(scheme, []).append(module)

    def as_dict(self, floats: list[str]) -> dict[str, Any]:
        """`quantization_config`. floats: matrices that are not rounded."""
        formats = sorted({scheme.format for scheme in self.modules})
        groups = {
            f"group_{i}": scheme.as_dict(["Linear"] if len(self.modules) == 1 else modules)
            for i, (scheme, modules) in enumerate(self.modules.items())
        }
        return {
            "quant_method": "compressed-tensors",
            "version": VERSION,
            "format": formats[0] if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": floats,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


def _write_config(place: Path, source: Source, groups: _ConfigGroups) -> None:
    config = dict(source.config)
    for key in ("dtype", "torch_dtype") if "dtype" in config else ("torch_dtype",):
        config[key] = "float32"
    if groups.modules:
        rounded = {module for modules in groups.modules.values() for module in modules}
        matrices = (n.removesuffix(".weight") for n, t in source.tensors.items() if t.shape[1:])
        linear = ["lm_head", *(m for m in matrices if m not in rounded and "embed" not in m)]
        config["quantization_config"] = groups.as_dict(list(dict.fromkeys(linear)))
    write_file(place / CONFIG, _json(config))


def _write_tokenizer(place: Path, source: Source) -> None:
    """The files of the source, or what its tokenizer says in the words of transformers."""
    if isinstance(source, HubSource):
        for name in _TOKENIZER_FILES:
            _copy(source.path / name, place / name)
        return
    files = source.tokenizer
    options = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": files.bos_token,
        "eos_token": files.eos_token,
        "chat_template": files.chat_template,
    }
    ids = {"bos_token_id": files.bos_token_id, "eos_token_id": files.eos_token_ids}
    write_file(place / "tokenizer.json", files.tokenizer_json.encode())
    write_file(place / "tokenizer_config.json", _json(_given(options)))
    write_file(place / "generation_config.json", _json(_given(ids)))


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value not in (None, [])}


def _copy(source: Path, target: Path) -> None:
    if not source.exists():
        return
    status = source.stat()
    if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_JSON:
        shutil.copyfile(source, target)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()


def _report_json(reports: list[Report]) -> str:
    tensors = {
        report.name: {"format": report.format, "error": report.error, "exact": report.exact}
        for report in reports
    }
    return json.dumps({"tensors": tensors}, ensure_ascii=False, indent=1)

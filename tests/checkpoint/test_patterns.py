"""Zeros that somebody else has left: what is found, and what `auto` makes of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacewing.checkpoint import load_model, open_weights, pattern_of, sparse_format
from lacewing.checkpoint.packing import Job
from lacewing.checkpoint.patterns import Pattern, find_sparser
from lacewing.checkpoint.tensors import SourceTensor
from lacewing.formats import PackedTensor, get_format
from tests.checkpoint.build import config, random_weights, write_hub
from tests.checkpoint.foreign import Array, group, write_quantized

Q = "model.layers.0.self_attn.q_proj.weight"


def pruned(kind: str, n: int = 64, k: int = 256, share: float = 0.5, seed: int = 0) -> Array:
    """Weights with zeros: anywhere, two in every four, or whole blocks of 16 outputs x 1 input."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((n, k)).astype(np.float32)
    if kind == "anywhere":
        return weight * (rng.random((n, k)) >= share)
    if kind == "blocks":
        kept = rng.random((-(-n // 16), k)) >= share
        return weight * np.repeat(kept, 16, axis=0)[:n]
    order = rng.random((n, k // 4, 4)).argsort(axis=2)
    return weight * (order < 2).reshape(n, k)


def slow_pattern(weight: Array) -> Pattern:
    n, k = weight.shape
    blocks = sum(
        len(weight[i : i + 16])
        for i in range(0, n, 16)
        for j in range(k)
        if weight[i : i + 16, j].any()
    )
    fours = [int((row[j : j + 4] != 0).sum()) for row in weight for j in range(0, k, 4)]
    return Pattern(n * k, int((weight != 0).sum()), blocks, max(fours))


@pytest.mark.parametrize("shape", [(1, 1), (16, 4), (33, 70), (48, 129)])
@pytest.mark.parametrize("kind", ["anywhere", "blocks"])
def test_patterns_are_counted(kind: str, shape: tuple[int, int]) -> None:
    weight = pruned(kind, *shape)
    assert pattern_of(weight) == slow_pattern(weight)


def test_runs_of_rows_add_up() -> None:
    weight = pruned("blocks", 40, 64, 0.7)
    assert pattern_of(weight[:16]) + pattern_of(weight[16:]) == pattern_of(weight)


def test_all_zeros_and_none() -> None:
    assert pattern_of(np.zeros((4, 8))) == Pattern(32, 0, 0, 0)
    assert pattern_of(np.ones((4, 8))) == Pattern(32, 32, 32, 4)


CHOSEN: list[tuple[str, float, str | None, str | None, str | None]] = [
    ("anywhere", 0.5, None, "avx512", "w8a8g64_sp"),
    ("anywhere", 0.5, None, "avx2", None),
    ("anywhere", 0.7, None, "avx2", "w8a8g64_sp"),
    ("anywhere", 0.3, None, None, None),  # larger groups for 20 % of the bytes
    ("anywhere", 0.4, None, None, "w8a8g64_sp"),
    ("anywhere", 0.5, None, "scalar", None),
    ("anywhere", 0.12, "w8a8", None, None),  # 1.25 + 8 * 0.88 is more than 8
    ("anywhere", 0.14, "w8a8g64", None, "w8a8g64_sp"),
    ("anywhere", 0.5, "w8a8g32", "avx512", None),
    ("anywhere", 0.5, "w4a8g64", "avx512", "w4a8g64_sp"),
    ("anywhere", 0.5, "w4a8g128", "avx512", "w4a8g64_sp"),
    ("anywhere", 0.5, "w4a8g32", "avx512", None),
    ("anywhere", 0.5, "w4a8g32z", "avx512", None),
    ("fours", 0.5, None, "avx512", "w8a8g64_24"),
    ("fours", 0.5, "w8a8", "avx2", "w8a8g64_24"),
    ("fours", 0.5, "w4a8g64", "avx512", "w4a8g64_24"),
    ("fours", 0.5, "w4a8g64", "avx2", None),
    ("fours", 0.5, "w8a8g64_24", "avx2", None),
    ("blocks", 0.5, "w8a8", "avx2", "w8a8_b16x1"),
    ("blocks", 0.5, "w8a8", "avx512", "w8a8_b16x1"),
    ("blocks", 0.8, None, "avx2", "w8a8g64_sp"),
    ("blocks", 0.8, "w8a8g64", "avx2", "w8a8g64_sp"),
    ("blocks", 0.5, "w3a8g64", "avx512", None),
]


@pytest.mark.parametrize(("kind", "share", "own", "machine", "format"), CHOSEN)
def test_the_smallest_that_pays(
    kind: str, share: float, own: str | None, machine: str | None, format: str | None
) -> None:
    assert sparse_format(pattern_of(pruned(kind, share=share)), own, machine) == format


@pytest.mark.parametrize("format", ["w8a8g64_sp", "w8a8g64_24", "w8a8_b16x1"])
def test_sizes_are_those_of_packed_weights(format: str) -> None:
    """The sizes that formats are chosen by, beside those of large packed weights."""
    from lacewing.checkpoint.patterns import _size

    kinds = {"w8a8g64_24": "fours", "w8a8_b16x1": "blocks"}
    weight = pruned(kinds.get(format, "anywhere"), 256, 4096)
    kind = get_format(format)
    density, size = _size(kind, pattern_of(weight))
    packed = kind.pack(kind.round(weight))
    assert density == pytest.approx(0.5, abs=0.01)
    # Padding to 64 bytes per strip, parts of blocks, scales per row: below 2 % at k = 4096.
    assert packed.bits_per_weight == pytest.approx(size, rel=0.02)


def model_with(kind: str, dtype: str = "BF16", path: Path | None = None) -> Any:
    made = config()
    weights = random_weights(made)
    for name, weight in weights.items():
        if weight.ndim == 2:
            weights[name] = pruned(kind, *weight.shape, seed=len(name)) / 16
    assert path is not None
    return write_hub(path / "model", made, weights, dtype)


@pytest.mark.parametrize(
    ("kind", "format"),
    [("anywhere", "w8a8g64_sp"), ("fours", "w8a8g64_24"), ("blocks", "w8a8g64_sp")],
)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_auto_uses_zeros(tmp_path: Path, kind: str, format: str, dtype: str) -> None:
    place = model_with(kind, dtype, tmp_path)
    model = load_model(place, machine="avx512")
    reports = {report.name: report for report in model.reports}
    packed = model.tensors[Q]
    assert isinstance(packed, PackedTensor)
    assert packed.format == reports[Q].format == format
    pattern = reports[Q].pattern
    assert pattern is not None
    weight = open_weights(place)[Q].dequantize()
    assert pattern == pattern_of(weight)
    assert "50% zeros" in str(pattern)
    embedding = reports["model.embed_tokens.weight"]
    assert (embedding.format, embedding.pattern) == ("w8a8g32", None)
    zeros = get_format(format).dequantize(packed) == 0
    assert zeros[weight == 0].all()


def test_another_format_is_taken_at_its_word(tmp_path: Path) -> None:
    place = model_with("fours", "BF16", tmp_path)
    model = load_model(place, "w8a8g64", machine="avx512")
    assert {report.format for report in model.reports} == {"w8a8g64", "w8a8g32", "f32"}
    assert all(report.pattern is None for report in model.reports)


def test_a_machine_on_which_zeros_do_not_pay(tmp_path: Path) -> None:
    model = load_model(model_with("anywhere", "BF16", tmp_path), machine="scalar")
    assert {report.format for report in model.reports} == {"w8a8g32", "f32"}


@pytest.mark.parametrize(
    ("bits", "size", "kind", "format"),
    [
        (8, None, "blocks", "w8a8_b16x1"),
        (8, 128, "fours", "w8a8g64_24"),
        (8, None, "anywhere", "w8a8g64_sp"),
        (4, 64, "fours", "w4a8g64_24"),
        (4, 128, "anywhere", "w4a8g64_sp"),
        (4, 32, "fours", None),
        (3, 64, "fours", None),
    ],
)
def test_rounded_weights_keep_their_codes(
    tmp_path: Path, bits: int, size: int | None, kind: str, format: str | None
) -> None:
    """Somebody pruned and rounded: the same codes and scales, without the zeros."""
    half = 1 << (bits - 1)
    codes = np.clip(np.round(pruned(kind) * half / 3), 1 - half, half - 1).astype(np.int8)
    scales = np.random.default_rng(1).uniform(0.001, 0.02, (64, 256 // (size or 256)))
    options: dict[str, Any] = {"num_bits": bits, "symmetric": True}
    options |= {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    parts = {"a.weight": codes, "a.weight_scale": scales.astype(np.float16)}
    stated = {**group(**options), "format": "int-quantized"}
    tensor = open_weights(write_quantized(tmp_path / "model", stated, parts))["a.weight"]
    with ThreadPoolExecutor(2) as pool:
        found = find_sparser(tensor, "avx512", pool)
    assert (found and found.kind.name) == format
    if found is None:
        return
    own = found.tensor.codes(16, 64)
    assert own is not None
    assert own[0] == format
    packed = found.kind.pack(own[1])
    assert np.array_equal(found.kind.dequantize(packed), tensor.dequantize(16, 64))


def test_auto_keeps_the_codes_of_others(tmp_path: Path) -> None:
    """A model that was pruned to 2:4 and rounded to 8 bits: packed without a bit of loss."""
    stated = config()
    tensors: dict[str, Array] = {}
    for name, weight in random_weights(stated).items():
        if weight.ndim == 1 or "layers" not in name:
            tensors[name] = weight
            continue
        codes = np.clip(pruned("fours", *weight.shape) * 40, -127, 127)
        tensors[name] = codes.astype(np.int8)
        scale = np.abs(weight[:, :1]) + np.float32(0.01)
        tensors[f"{name}_scale"] = scale.astype(np.float16)
    place = write_hub(tmp_path / "model", stated, {})
    quantization = group(num_bits=8, strategy="channel") | {"format": "int-quantized"}
    write_quantized(place, quantization, tensors, **stated)
    model = load_model(place, machine="avx2")
    reports = {report.name: report for report in model.reports}
    assert reports[Q].format == "w8a8g64_24"
    assert all(report.exact for report in model.reports if "int8" in report.source)
    packed = model.tensors[Q]
    assert isinstance(packed, PackedTensor)
    weight = open_weights(place)[Q].dequantize()
    assert np.array_equal(get_format(packed.format).dequantize(packed), weight)


@pytest.mark.parametrize("machine", ["avx512", "avx2", None])
@pytest.mark.parametrize("share", [0.13, 0.17, 0.3, 0.4, 0.5])
def test_dead_inputs_are_no_reason_for_larger_groups(
    tmp_path: Path, share: float, machine: str | None
) -> None:
    """Inputs that no output uses. What `auto` makes of them is as good as what it would have made
    without looking, or rounded in groups of 64 and less than three quarters of the size."""
    made = config()
    weights = random_weights(made)
    for name, weight in weights.items():
        if weight.ndim == 2 and "layers" in name:
            rng = np.random.default_rng(len(name))
            weight[:, rng.random(weight.shape[1]) < share] = 0
    place = write_hub(tmp_path / "model", made, weights)
    dense = {r.name: r for r in load_model(place, "w8a8g32").reports}
    for report in load_model(place, machine=machine).reports:
        before = dense[report.name]
        if report.format == before.format:
            assert report.error == before.error
        else:
            assert report.format == "w8a8g64_sp"
            assert report.nbytes < 0.75 * before.nbytes


def test_pruning_is_not_mixed_with_zeros_that_are_there(tmp_path: Path) -> None:
    model = load_model(model_with("fours", "BF16", tmp_path), sparsity=0.25, machine="avx512")
    assert {report.format for report in model.reports} == {"w8a8g32", "f32"}
    assert all(report.pattern is None for report in model.reports)


def int8_rows(tmp_path: Path, codes: Array, scales: Array) -> Any:
    stated = {**group(num_bits=8, strategy="channel"), "format": "int-quantized"}
    parts = {"a.weight": codes.astype(np.int8), "a.weight_scale": scales.astype(np.float16)}
    return open_weights(write_quantized(tmp_path / "model", stated, parts))["a.weight"]


def test_zeros_are_those_of_the_codes(tmp_path: Path) -> None:
    """A row with the scale 0 is zero whatever its codes are, and its codes are not 2:4."""
    codes = np.clip(pruned("fours") * 40, -127, 127)
    codes[0] = 1
    scales = np.full((64, 1), 0.01)
    scales[0] = 0
    tensor = int8_rows(tmp_path, codes, scales)
    with ThreadPoolExecutor(2) as pool:
        found = find_sparser(tensor, "avx512", pool)
    assert found is not None
    assert found.kind.name == "w8a8g64_sp"
    own = found.tensor.codes(0, 64)
    assert own is not None
    packed = found.kind.pack(own[1])
    assert np.array_equal(found.kind.dequantize(packed), tensor.dequantize())


def test_a_sparse_format_that_turns_out_larger(tmp_path: Path) -> None:
    """Rows of 70 inputs are padded to 128: what `auto` takes then is what it would have taken, not
    the twin of what it has tried."""
    codes = np.clip(np.abs(pruned("anywhere", 64, 70, 0.16)) * 40 + 1, 0, 127)
    codes[pruned("anywhere", 64, 70, 0.16) == 0] = 0
    tensor = int8_rows(tmp_path, codes, np.full((64, 1), 0.01))
    with ThreadPoolExecutor(2) as pool:
        found = find_sparser(tensor, None, pool)
        assert found is not None
        assert found.kind.name == "w8a8g64_sp"
        found = replace(found, most_bytes=100)
        _, packed, report = Job(pool, tensor, get_format("w8a8"), None, None, found).result()
    assert isinstance(packed, PackedTensor)
    assert (packed.format, report.format, report.instead_of) == ("w8a8", "w8a8", None)
    assert (report.pattern, report.density, report.exact) == (None, None, True)


def looked_through(density: float, elsewhere: float) -> tuple[str | None, int]:
    """What is found in a weight with these shares of weights that are not zero in the strips that
    are looked at first, and in the others; and how many rows were read."""
    n, k = 1024, 256
    weight = pruned("anywhere", n, k, 1 - elsewhere)
    for begin in (0, 512, n - 16):
        weight[begin : begin + 16] = pruned("anywhere", 16, k, 1 - density)
    watched: Any = Watched(weight)
    with ThreadPoolExecutor(1) as pool:
        found = find_sparser(watched, None, pool)
    return found and found.kind.name, watched.rows


class Watched(SourceTensor):
    """Floats that count how many rows are read."""

    name = "a.weight"

    def __init__(self, weight: Array) -> None:
        self._weight = weight
        self.shape = weight.shape
        self.rows = 0

    def dequantize(self, begin: int = 0, end: int | None = None) -> Array:
        rows = self._weight[begin:end]
        self.rows += len(rows)
        return rows


def test_what_is_looked_through() -> None:
    """The limit is a density of 0.64 (1.25 + 8 d < 0.75 * 8.5), with a margin of 0.05."""
    assert looked_through(1.0, 0.3) == (None, 48)
    assert looked_through(0.74, 0.3) == (None, 48)
    assert looked_through(0.66, 0.6) == ("w8a8g64_sp", 1024 + 48)
    assert looked_through(0.55, 0.7) == (None, 1024 + 48)
    assert looked_through(0.3, 0.3) == ("w8a8g64_sp", 1024 + 48)

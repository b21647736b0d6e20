"""Zeros that somebody else has left: what is found, and what `auto` makes of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacewing.checkpoint import load_model, open_weights, pattern_of, sparse_format
from lacewing.checkpoint.patterns import Pattern, find_sparser
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


CHOSEN: list[tuple[str, float, int, str | None, str | None]] = [
    ("anywhere", 0.5, 8, "avx512", "w8a8g64_sp"),
    ("anywhere", 0.5, 8, "avx2", None),
    ("anywhere", 0.7, 8, "avx2", "w8a8g64_sp"),
    ("anywhere", 0.1, 8, "avx512", None),
    ("anywhere", 0.5, 8, "scalar", None),
    ("anywhere", 0.2, 8, None, "w8a8g64_sp"),
    ("anywhere", 0.5, 4, "avx512", "w4a8g64_sp"),
    ("anywhere", 0.5, 16, "avx512", "bf16_sp"),
    ("fours", 0.5, 8, "avx512", "w8a8g64_24"),
    ("fours", 0.5, 8, "avx2", "w8a8g64_24"),
    ("fours", 0.5, 4, "avx512", "w4a8g64_24"),
    ("fours", 0.5, 4, "avx2", None),
    ("blocks", 0.5, 8, "avx2", "w8a8_b16x1"),
    ("blocks", 0.5, 8, "avx512", "w8a8_b16x1"),
    ("blocks", 0.5, 3, "avx512", None),
]


@pytest.mark.parametrize(("kind", "share", "bits", "machine", "format"), CHOSEN)
def test_the_smallest_that_pays(
    kind: str, share: float, bits: int, machine: str | None, format: str | None
) -> None:
    assert sparse_format(pattern_of(pruned(kind, share=share)), bits, machine) == format


@pytest.mark.parametrize("format", ["bf16_sp", "w8a8g64_sp", "w8a8g64_24", "w8a8_b16x1"])
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
        if weight.ndim == 2 and name != "model.embed_tokens.weight":
            weights[name] = pruned(kind, *weight.shape, seed=len(name)) / 16
    assert path is not None
    return write_hub(path / "model", made, weights, dtype)


@pytest.mark.parametrize(
    ("kind", "format"),
    [("anywhere", "w8a8g64_sp"), ("fours", "w8a8g64_24"), ("blocks", "w8a8_b16x1")],
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


def test_dense_weights_are_not_looked_through() -> None:
    class Watched:
        own_format = None
        shape = (4096, 64)
        rows = 0

        def dequantize(self, begin: int, end: int) -> Array:
            self.rows += end - begin
            return np.ones((end - begin, 64), np.float32)

    watched: Any = Watched()
    with ThreadPoolExecutor(1) as pool:
        assert find_sparser(watched, None, pool) is None
    assert watched.rows == 48

"""Every GGML type against a scalar reading of its block, written from ggml-common.h, and against
ggml's own Python package where that is installed."""

from __future__ import annotations

import importlib
import struct
from typing import Any

import numpy as np
import pytest

from lacewing.checkpoint import ggml
from lacewing.formats import get_format
from tests.checkpoint.build import NUMBERS, QUANTS, READABLE, TYPES, random_rows

f32 = np.float32


def half(raw: bytes) -> np.float32:
    return f32(np.frombuffer(raw, "<f2")[0])


def nibble(raw: bytes, i: int) -> int:
    """Weight i of 32: the low nibbles come first."""
    return raw[i] & 15 if i < 16 else raw[i - 16] >> 4


def bit(raw: bytes, i: int) -> int:
    return raw[i // 8] >> (i % 8) & 1


def q8_0(b: bytes) -> list[np.float32]:
    d = half(b[:2])
    return [d * f32(q) for q in struct.unpack("32b", b[2:])]


def q4_0(b: bytes) -> list[np.float32]:
    d = half(b[:2])
    return [d * f32(nibble(b[2:], i) - 8) for i in range(32)]


def q4_1(b: bytes) -> list[np.float32]:
    d, m = half(b[:2]), half(b[2:4])
    return [d * f32(nibble(b[4:], i)) + m for i in range(32)]


def q5_0(b: bytes) -> list[np.float32]:
    d, fifth = half(b[:2]), b[2:6]
    return [d * f32((nibble(b[6:], i) | bit(fifth, i) << 4) - 16) for i in range(32)]


def q5_1(b: bytes) -> list[np.float32]:
    d, m, fifth = half(b[:2]), half(b[2:4]), b[4:8]
    return [d * f32(nibble(b[8:], i) | bit(fifth, i) << 4) + m for i in range(32)]


def pair(q: bytes, j: int) -> tuple[int, int]:
    """get_scale_min_k4 of ggml-quants.c."""
    if j < 4:
        return q[j] & 63, q[j + 4] & 63
    return (q[j + 4] & 15) | (q[j - 4] >> 6) << 4, (q[j + 4] >> 4) | (q[j] >> 6) << 4


def q4_k(b: bytes) -> list[np.float32]:
    d, dmin, pairs, qs = half(b[:2]), half(b[2:4]), b[4:16], b[16:]
    out = []
    for i in range(256):
        group, at = i // 32, i % 32
        s, m = pair(pairs, group)
        byte = qs[group // 2 * 32 + at]
        q = byte >> 4 if group % 2 else byte & 15
        out.append(d * f32(s) * f32(q) - dmin * f32(m))
    return out


def q5_k(b: bytes) -> list[np.float32]:
    d, dmin, pairs, fifth, qs = half(b[:2]), half(b[2:4]), b[4:16], b[16:48], b[48:]
    out = []
    for i in range(256):
        group, at = i // 32, i % 32
        s, m = pair(pairs, group)
        byte = qs[group // 2 * 32 + at]
        q = (byte >> 4 if group % 2 else byte & 15) + (16 if fifth[at] >> group & 1 else 0)
        out.append(d * f32(s) * f32(q) - dmin * f32(m))
    return out


def q6_k(b: bytes) -> list[np.float32]:
    low, high, scales, d = b[:128], b[128:192], struct.unpack("16b", b[192:208]), half(b[208:])
    out = []
    for i in range(256):
        part, quarter, at = i // 128, i % 128 // 32, i % 32
        byte = low[part * 64 + quarter % 2 * 32 + at]
        q = (byte >> 4 if quarter >= 2 else byte & 15) | (
            high[part * 32 + at] >> (2 * quarter) & 3
        ) << 4
        out.append(d * f32(scales[i // 16]) * f32(q - 32))
    return out


def bf16(b: bytes) -> list[np.float32]:
    return [f32(struct.unpack("<f", b"\0\0" + b)[0])]


SCALAR: dict[str, Any] = {
    "F32": lambda b: [f32(struct.unpack("<f", b)[0])],
    "F16": lambda b: [half(b)],
    "BF16": bf16,
    "Q8_0": q8_0,
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
}


def bits(values: Any) -> Any:
    return np.asarray(values, np.float32).view(np.uint32)


@pytest.mark.parametrize("name", READABLE)
def test_dequantize_equals_the_scalar_reading(name: str) -> None:
    kind = TYPES[name]
    rows = random_rows(name, 3, 2 * kind.block, seed=1)
    expected = [
        [
            weight
            for at in range(0, rows.shape[1], kind.nbytes)
            for weight in SCALAR[name](row[at : at + kind.nbytes].tobytes())
        ]
        for row in rows
    ]
    assert (bits(ggml.dequantize(kind, rows)) == bits(expected)).all()


@pytest.mark.parametrize("name", READABLE)
def test_dequantize_equals_the_gguf_package(name: str) -> None:
    gguf = pytest.importorskip("gguf", reason="the package `gguf` is not installed")
    quants = importlib.import_module("gguf.quants")
    rows = random_rows(name, 5, 1024, seed=2)
    expected = quants.dequantize(rows, gguf.GGMLQuantizationType(NUMBERS[name]))
    assert (bits(ggml.dequantize(TYPES[name], rows)) == bits(expected)).all()


# Not Q8_1 (9): it is never stored, and the package has its size from before it shrank.
@pytest.mark.parametrize("number", sorted(set(NUMBERS.values()) - {9}))
def test_sizes_are_those_of_the_gguf_package(number: int) -> None:
    gguf = pytest.importorskip("gguf", reason="the package `gguf` is not installed")
    kind = ggml.GGML_TYPES[number]
    known = gguf.GGMLQuantizationType(number)
    assert (kind.block, kind.nbytes) == gguf.GGML_QUANT_SIZES[known]
    assert kind.name == known.name


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16"])
def test_codes_lose_nothing(name: str) -> None:
    kind = TYPES[name]
    rows = random_rows(name, 33, 96, seed=3)
    codes = ggml.codes(kind, rows)
    assert codes is not None
    assert kind.grid is not None
    format = get_format(kind.grid)
    expected = ggml.dequantize(kind, rows)
    assert np.array_equal(format.dequantize(codes), expected)
    assert np.array_equal(format.dequantize(format.pack(codes)), expected)


@pytest.mark.parametrize("d", [4094.0, -4094.0, 6e-8, 0.0])
def test_q5_0_is_exact_to_the_edge_of_f16(d: float) -> None:
    rows = random_rows("Q5_0", 1, 32)
    rows.view(TYPES["Q5_0"].layout)["d"] = d
    codes = ggml.codes(TYPES["Q5_0"], rows)
    assert codes is not None
    expected = ggml.dequantize(TYPES["Q5_0"], rows)
    assert np.array_equal(get_format("w5a8g32z").dequantize(codes), expected)


def test_q5_0_beyond_it_has_no_own_grid() -> None:
    rows = random_rows("Q5_0", 1, 64)
    rows.view(TYPES["Q5_0"].layout)["d"][0, 1] = 5000
    assert ggml.codes(TYPES["Q5_0"], rows) is None


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K"])
def test_near_codes_are_near(name: str) -> None:
    kind = TYPES[name]
    rows = random_rows(name, 16, 512, seed=4)
    codes = ggml.near_codes(kind, rows)
    assert codes is not None
    assert kind.near is not None
    expected = ggml.dequantize(kind, rows)
    error = np.linalg.norm(get_format(kind.near).dequantize(codes) - expected)
    assert error < 1e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", QUANTS)
def test_damaged_scales_give_no_warning(name: str) -> None:
    rows = random_rows(name, 2, 512).copy()
    rows.view(TYPES[name].layout)["d"] = np.inf
    assert not np.isfinite(ggml.dequantize(TYPES[name], rows)).all()
    ggml.codes(TYPES[name], rows)
    ggml.near_codes(TYPES[name], rows)


def test_types_without_a_grid_have_no_codes() -> None:
    for name in ("F32", "F16", "Q4_K", "Q6_K"):
        assert ggml.codes(TYPES[name], random_rows(name, 1, 256)) is None
    assert ggml.near_codes(TYPES["Q6_K"], random_rows("Q6_K", 1, 256)) is None

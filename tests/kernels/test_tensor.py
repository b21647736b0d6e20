"""What `_C` refuses: wrong shapes, wrong types, and sparse streams made to be read out of range."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from kernels.support import random_packed, tensor_of

from lacewing import _C
from lacewing.formats import FORMATS, Codes, get_format

Bytes = npt.NDArray[np.uint8]
SPARSE = [name for name in FORMATS if get_format(name).sparse]
STREAMS = [name for name in SPARSE if "stream" in get_format(name).part_names]
N, K = 40, 200


def parts_of(name: str) -> list[Bytes]:
    packed = random_packed(name, N, K)
    return [
        np.ascontiguousarray(packed.parts[p]).reshape(-1).view(np.uint8).copy()
        for p in get_format(name).part_names
    ]


def refuse(name: str, parts: list[Any], match: str, n: int = N, k: int = K) -> None:
    with pytest.raises(ValueError, match=match):
        _C.Tensor(name, n, k, parts)


@pytest.mark.parametrize("name", list(FORMATS))
def test_valid(name: str) -> None:
    tensor = _C.Tensor(name, N, K, parts_of(name))
    assert (tensor.format, tensor.n, tensor.k) == (name, N, K)


@pytest.mark.parametrize("name", list(FORMATS))
def test_sizes_must_fit(name: str) -> None:
    parts = parts_of(name)
    for p in range(len(parts)):
        for other in (parts[p][:-8], np.append(parts[p], np.zeros(8, np.uint8))):
            with pytest.raises(ValueError, match="Tensor"):
                _C.Tensor(name, N, K, [*parts[:p], other, *parts[p + 1 :]])
    refuse(name, parts, "must", n=0)
    refuse(name, parts, "below", k=1 << 40)
    refuse(name, parts[:-1], "parts")
    with pytest.raises(ValueError, match="Tensor"):
        _C.Tensor(name, N + 64, K, parts)


@pytest.mark.parametrize("name", ["w8a8", "w1.6a8", "w8a8_b16x1"])
def test_rows_that_are_too_long(name: str) -> None:
    refuse(name, parts_of(name), "131072", k=(1 << 17) + 1)


def test_unknown_format() -> None:
    with pytest.raises(ValueError, match="w8a8g32"):
        _C.Tensor("w7a8", N, K, [])


def test_parts_must_be_bytes() -> None:
    parts = parts_of("w8a8g32")
    with pytest.raises(TypeError, match="codes"):
        _C.Tensor("w8a8g32", N, K, [parts[0].view(np.int8), parts[1]])
    with pytest.raises(TypeError, match="codes"):
        _C.Tensor("w8a8g32", N, K, [parts[0][::2], parts[1]])
    raw = np.zeros(len(parts[0]) + 9, np.uint8)
    odd = raw[1 - raw.ctypes.data % 8 :][: len(parts[0])]
    refuse("w8a8g32", [odd, parts[1]], "aligned")


@pytest.mark.parametrize("name", STREAMS)
def test_hostile_offsets(name: str) -> None:
    stream, raw = parts_of(name)
    good = raw.view(np.int64)

    def with_offset(i: int, value: int) -> list[Bytes]:
        bad = good.copy()
        bad[i] = value
        return [stream, bad.view(np.uint8)]

    refuse(name, with_offset(0, 64), "start at 0")
    refuse(name, with_offset(1, int(good[1]) + 2), "multiples of 64")
    refuse(name, with_offset(1, -64), "offsets|strip")
    refuse(name, with_offset(1, 1 << 62), "beyond")
    refuse(name, with_offset(1, int(good[1]) - 64), "strip ends")
    refuse(name, with_offset(2, 0), "decrease")
    refuse(name, with_offset(len(good) - 1, int(good[-1]) + 64), "beyond")


@pytest.mark.parametrize("name", STREAMS)
def test_hostile_bitmaps(name: str) -> None:
    """Bitmaps that claim more codes than the strip holds."""
    stream, raw = parts_of(name)
    stream[32 if get_format(name).group_size else 0 :][:128] = 255
    refuse(name, [stream, raw], "strip ends")


def test_blocks_beyond_the_last_input() -> None:
    """As many bits as before, so that nothing else is wrong."""
    fmt = get_format("w8a8_b16x1")
    packed = fmt.pack(Codes(np.full((N, K), 5, np.uint8), np.ones((N, 1), np.float16)))
    stream, offsets = packed.parts["stream"].copy(), packed.parts["offsets"].view(np.uint8)
    stream[32 + K // 8 - 1] ^= 0x80
    stream[32 + K // 8] ^= 0x01
    refuse("w8a8_b16x1", [stream, offsets], "beyond k")


@pytest.mark.parametrize("name", SPARSE)
def test_random_bytes_are_refused_or_harmless(name: str, isa: str) -> None:
    """Whatever `Tensor` accepts can be multiplied: the sanitizer build proves it stays inside."""
    rng = np.random.default_rng(7)
    x = np.ones((3, K), np.float32)
    for _ in range(200):
        first, *others = parts_of(name)
        for at in rng.integers(0, len(first) - 64, rng.integers(1, 4)):
            first[at] ^= 1 << rng.integers(8)
        try:
            tensor = _C.Tensor(name, N, K, [first, *others])
        except ValueError:
            continue
        assert _C.linear(x, tensor, isa=isa).shape == (3, N)


def test_reading_past_a_part_is_a_fault() -> None:
    """What the other kernel tests rely on: their parts end at a guard page."""
    code = """
import ctypes, numpy as np
from kernels.support import guarded
part = guarded(np.arange(100, dtype=np.uint8))
assert part.tolist() == list(range(100))
ctypes.string_at(part.ctypes.data, 100)
print("inside", flush=True)
ctypes.string_at(part.ctypes.data, 101)
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert run.stdout == "inside\n", run.stderr
    assert run.returncode != 0


def test_linear_checks_its_arguments() -> None:
    weight = tensor_of(random_packed("w8a8g32", N, K))
    x = np.zeros((2, K), np.float32)
    with pytest.raises(ValueError, match="200 columns, got 199"):
        _C.linear(x[:, :-1].copy(), weight)
    with pytest.raises(ValueError, match="bias must have 40"):
        _C.linear(x, weight, np.zeros(N + 1, np.float32))
    with pytest.raises(ValueError, match="threads"):
        _C.linear(x, weight, threads=-1)
    with pytest.raises(ValueError, match="isa must be"):
        _C.linear(x, weight, isa="neon")
    with pytest.raises(ValueError, match=r"ids must be in 0\.\.39, got 40"):
        _C.gather_rows(weight, np.array([0, N], np.int32))
    with pytest.raises(ValueError, match="ids must be"):
        _C.gather_rows(weight, np.array([-1], np.int32))
    with pytest.raises(ValueError, match="group must be 32, 64, 128 or 131072"):
        _C.quantize_rows(x, 48)
    with pytest.raises(ValueError, match="strips"):
        _C.linear_into(x, weight, np.zeros((2, N), np.float32), strips=(0, 4))
    with pytest.raises(ValueError, match="y must"):
        _C.linear_into(x, weight, np.zeros((2, N - 1), np.float32))


def test_parts_stay_alive() -> None:
    want = _C.linear(np.ones((1, K), np.float32), tensor_of(random_packed("w4a8g32", N, K)))
    tensor = tensor_of(random_packed("w4a8g32", N, K))
    trash = [np.full(1 << 16, 255, np.uint8) for _ in range(64)]
    assert np.array_equal(_C.linear(np.ones((1, K), np.float32), tensor), want)
    del trash


def run_with_isa(isa: str) -> subprocess.CompletedProcess[str]:
    code = "from lacewing import _C; print(_C.default_isa())"
    env = {**os.environ, "LACEWING_ISA": isa}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def test_forced_isa() -> None:
    """LACEWING_ISA is obeyed, or refused by naming what is missing: never a silent fallback."""
    for isa in _C.isas():
        run = run_with_isa(isa["name"])
        if isa["usable"]:
            assert run.stdout.strip() == isa["name"]
        else:
            assert run.returncode != 0
            assert isa["missing"] in run.stderr and "Traceback" in run.stderr
    run = run_with_isa("neon")
    assert run.returncode != 0 and "must be one of `amx_emulated`, `scalar`" in run.stderr

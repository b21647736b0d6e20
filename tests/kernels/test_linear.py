"""Every format x ISA x shape x thread count against the numpy oracle, bit for bit.

Integer formats equal `Format.reference_linear` exactly. bf16 is held to twice the error of the
naive computation against float64, and to the same bits on every ISA; in AMX tiles, where
activations are rounded to bf16 too, to `Bf16.tolerance`. In all of them the bits of a row do not
depend on how many rows, outputs or threads are computed with it (bf16 in tiles: on how many rows
beyond 8).

Where there is no AMX its driver runs with software tiles, as `amx_emulated`.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pytest
from kernels.support import random_packed, random_rows, tensor_of

from lacewing import _C
from lacewing.formats import FORMATS, Codes, PackedTensor, get_format, quantize_rows
from lacewing.formats.base import ROW
from lacewing.formats.bf16 import Bf16, bf16_to_f32, f32_to_bf16
from tests.isas import promises_same_bits

F32 = npt.NDArray[np.float32]

INTEGER = [name for name in FORMATS if get_format(name).group_size]
FLOATS = [name for name in FORMATS if name not in INTEGER]
MS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 33, 67)
NS = (1, 16, 17, 48)


def depths(name: str) -> tuple[int, ...]:
    g = max(32, get_format(name).input_multiple)
    return (1, g - 1, g, 3 * g, 5 * g + 7, 1000, 4096)


@lru_cache(maxsize=64)
def case(name: str, n: int, k: int) -> tuple[PackedTensor, F32, F32, F32]:
    """A packed weight, activations, bias and the oracle's answer (without bias)."""
    packed = random_packed(name, n, k)
    x = random_rows(max(MS), k)
    bias = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    return packed, x, bias, get_format(name).reference_linear(x, packed)


def shapes(names: list[str]) -> list[tuple[str, int, int]]:
    return [(name, n, k) for name in names for n in NS for k in depths(name)]


def whole(name: str, x: F32, packed: PackedTensor, isa: str, bias: F32 | None = None) -> F32:
    """What `isa` must return to the last bit, computed at once by one thread: on the scalar table,
    or where `isa` has bits of its own by itself."""
    one = "scalar" if promises_same_bits(name, isa) else isa
    y: F32 = _C.linear(x, tensor_of(packed), bias, isa=one, threads=1)
    return y


def test_formats_agree_with_python() -> None:
    assert _C.format_names() == list(FORMATS)


@pytest.mark.parametrize(("name", "n", "k"), shapes(INTEGER))
def test_integer_formats_equal_the_oracle(isa: str, name: str, n: int, k: int) -> None:
    packed, x, bias, want = case(name, n, k)
    weight = tensor_of(packed)
    for m in MS:
        got = _C.linear(x[:m], weight, isa=isa, threads=1)
        assert got.shape == (m, n) and np.array_equal(got, want[:m]), f"m={m}"
    got = _C.linear(x, weight, bias, isa=isa, threads=1)
    assert np.array_equal(got, want + bias)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("name", list(FORMATS))
def test_threads_do_not_change_a_bit(isa: str, name: str, threads: int) -> None:
    packed, x, bias, _ = case(name, 48, 1000)
    weight = tensor_of(packed)
    for m in (1, 5, 33):
        got = _C.linear(x[:m], weight, bias, isa=isa, threads=threads)
        assert np.array_equal(got, whole(name, x[:m], packed, isa, bias))


@pytest.mark.parametrize(("name", "n", "k"), shapes(FLOATS))
def test_bf16(isa: str, name: str, n: int, k: int) -> None:
    packed, x, _, naive = case(name, n, k)
    weight = tensor_of(packed)
    values = get_format(name).dequantize(packed)
    exact = x.astype(np.float64) @ values.T.astype(np.float64)
    scalar = _C.linear(x, weight, isa="scalar", threads=1)
    rounded = _to_bf16(x).astype(np.float64) @ values.T.astype(np.float64)
    bound = 2 * np.abs(rounded - exact).max() + 2 * np.abs(naive - exact).max()
    assert np.abs(scalar - exact).max() <= bound
    for m in [m for m in MS if m < 8 or promises_same_bits("bf16", isa)]:
        got = _C.linear(x[:m], weight, isa=isa, threads=1)
        assert np.array_equal(got, scalar[:m]), f"m={m}"


@pytest.mark.parametrize("m", [1, 8, 19])
def test_bf16_sp_is_bf16_of_the_pruned_weight(isa: str, m: int) -> None:
    for n, k in ((17, 65), (48, 1000)):
        sparse = random_packed("bf16_sp", n, k)
        dense = get_format("bf16").pack(get_format("bf16_sp").unpack(sparse))
        x = random_rows(m, k)
        base = "scalar" if promises_same_bits("bf16", isa) else isa
        want = _C.linear(x, tensor_of(dense), isa=base, threads=1)
        assert np.array_equal(_C.linear(x, tensor_of(sparse), isa=isa, threads=1), want)


@pytest.mark.parametrize(("n", "k"), [(n, k) for n in NS for k in depths("bf16")])
def test_bf16_in_tiles(tile_isa: str, n: int, k: int) -> None:
    """Held to the tolerance; the activations are rounded to nearest even; rows are independent."""
    packed, x, bias, _ = case("bf16", n, k)
    weight, form = tensor_of(packed), get_format("bf16")
    assert isinstance(form, Bf16)
    rounded = bf16_to_f32(f32_to_bf16(x))
    error = np.abs(
        _C.linear(rounded, weight, isa=tile_isa) - form.reference_linear(rounded, packed)
    )
    assert (error <= form.tolerance(rounded, packed, tiles=True)).all()
    want = _C.linear(rounded, weight, bias, isa=tile_isa, threads=1)
    for m in [m for m in MS if m >= 8]:
        assert np.array_equal(_C.linear(x[:m], weight, bias, isa=tile_isa), want[:m]), f"m={m}"


def test_bf16_in_tiles_passes_on_what_is_not_finite(tile_isa: str) -> None:
    """A NaN or an infinity in a row reaches every output of that row and of no other."""
    packed, x = random_packed("bf16", 17, 100), random_rows(16, 100)
    want = _C.linear(x, tensor_of(packed), isa=tile_isa)
    bad = x.copy()
    bad[3, 50], bad[9, 99] = np.float32(np.inf), np.uint32(0x7FFFFFFF).view(np.float32)
    got = _C.linear(bad, tensor_of(packed), isa=tile_isa)
    assert not np.isfinite(got[[3, 9]]).any() and np.isnan(got[9]).all()
    others = [r for r in range(16) if r not in (3, 9)]
    assert np.array_equal(got[others], want[others])


def _to_bf16(x: F32) -> F32:
    bits = x.view(np.uint32)
    rounded: F32 = ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)
    return rounded


@pytest.mark.parametrize("m", [1, 3, 8, 17])
@pytest.mark.parametrize("name", list(FORMATS))
def test_writes_only_its_slice(isa: str, name: str, m: int) -> None:
    """Some of 3 strips, the last with 1, 9 or 15 outputs, into rows with room beyond n: every other
    float keeps its value."""
    k = 200
    x = random_rows(m, k)
    for n in (33, 41, 47):
        packed = random_packed(name, n, k)
        want = whole(name, x, packed, isa)
        for begin, end in ((0, 1), (1, 2), (1, 3), (2, 3), (0, 3)):
            y = np.full((m, n + 11), 777.0, np.float32)
            _C.linear_into(x, tensor_of(packed), y, strips=(begin, end), isa=isa)
            first, last = 16 * begin, min(16 * end, n)
            assert np.array_equal(y[:, first:last], want[:, first:last])
            assert (y[:, :first] == 777.0).all() and (y[:, last:] == 777.0).all()


@pytest.mark.parametrize("m", [1, 4, 19])
@pytest.mark.parametrize("name", list(FORMATS))
def test_accumulates(isa: str, name: str, m: int) -> None:
    """y = y + (acc + bias), in this order of roundings."""
    n, k = 33, 1088
    packed = random_packed(name, n, k)
    x, bias = random_rows(m, k), random_rows(1, n)[0]
    y = random_rows(m, n, seed=1)
    want = y + whole(name, x, packed, isa, bias)
    _C.linear_into(x, tensor_of(packed), y, bias=bias, accumulate=True, isa=isa)
    assert np.array_equal(y, want)


@pytest.mark.parametrize("name", list(FORMATS))
def test_gather_rows(isa: str, name: str) -> None:
    n, k = 41, 201
    packed = random_packed(name, n, k)
    values = get_format(name).dequantize(packed)
    ids = np.array([0, 40, 16, 15, 16, 33], np.int32)
    assert np.array_equal(_C.gather_rows(tensor_of(packed), ids, isa=isa), values[ids])
    assert _C.gather_rows(tensor_of(packed), ids[:0], isa=isa).shape == (0, k)


@pytest.mark.parametrize("group", [32, 64, 128, ROW])
@pytest.mark.parametrize("k", [1, 31, 32, 64, 100, 576])
def test_quantize_rows(isa: str, group: int, k: int) -> None:
    for m in (1, 2, 8, 19):
        x = random_rows(m, k)
        one = -(-k // 64) * 64 if group == ROW else group
        for got, want in zip(
            _C.quantize_rows(x, group, isa=isa), quantize_rows(x, one), strict=True
        ):
            assert got.dtype == want.dtype and np.array_equal(got, want)


@pytest.mark.parametrize("density", [0.0, 0.01, 0.3, 0.97, 1.0])
def test_blocks_of_any_density(isa: str, density: float) -> None:
    """Every pattern of four inputs, at every place of the stored block where it may begin."""
    fmt = get_format("w8a8_b16x1")
    rng = np.random.default_rng(3)
    for k in (3, 64, 333, 1000):
        q = rng.integers(0, 256, (40, k)).astype(np.uint8)
        q[np.repeat(rng.random((3, k)) >= density, 16, axis=0)[:40]] = fmt.zero_point
        packed = fmt.pack(Codes(q, rng.standard_normal((40, 1)).astype(np.float16)))
        x = random_rows(115, k)
        want = fmt.reference_linear(x, packed)
        for m in (*MS, 47, 48, 49, 56, 63, 115):  # 64 rows lie side by side, or almost as many
            got = _C.linear(x[:m], tensor_of(packed), isa=isa, threads=1)
            assert np.array_equal(got, want[:m]), (k, m)
        ids = np.arange(40, dtype=np.int32)
        values = fmt.dequantize(packed)
        assert np.array_equal(_C.gather_rows(tensor_of(packed), ids, isa=isa), values)


@pytest.mark.parametrize("k", [20480, 20481])
def test_blocks_in_rows_too_long_to_lie_side_by_side(isa: str, k: int) -> None:
    """Here the driver of many rows has no more room, and leaves them to another."""
    packed, x = random_packed("w8a8_b16x1", 17, k), random_rows(65, k)
    want = get_format("w8a8_b16x1").reference_linear(x, packed)
    assert np.array_equal(_C.linear(x, tensor_of(packed), isa=isa), want)


@pytest.mark.parametrize("name", ["w8a8", "w1.6a8", "w8a8_b16x1"])
def test_sums_of_the_longest_row(isa: str, name: str) -> None:
    """The largest integers there are, 128 * 127 * 2^17 in eight bits, of either sign."""
    fmt, m = get_format(name), 11
    x = np.full((m, ROW), 3.0, np.float32)
    x[1::2] = -3.0
    q = np.zeros((17, ROW), np.uint8)
    q[1] = fmt.max_code
    packed = fmt.pack(Codes(q, np.full((17, 1), 0.3, np.float16)))
    want = fmt.reference_linear(x, packed)
    for rows in (1, 2, 8, m):
        assert np.array_equal(_C.linear(x[:rows], tensor_of(packed), isa=isa), want[:rows])


def test_large_prefill(isa: str) -> None:
    """More rows than any driver's panel, and a depth of several panels."""
    for name in FORMATS:
        n, k, m = 80, 1600, 300
        packed = random_packed(name, n, k)
        x = random_rows(m, k)
        rows = [0, 1, 2, 3, 4, 127, 128, 255, 256, 299]
        want = whole(name, x[rows], packed, isa)
        assert np.array_equal(_C.linear(x, tensor_of(packed), isa=isa)[rows], want), name


# More strips, too, than wait in scratch at once.
MANY_STRIPS = [("bf16", 260, 820, 2100), ("w8a8g64_sp", 260, 820, 4300)]


@pytest.mark.parametrize(
    ("name", "m", "n", "k"), [*((name, 520, 40, 4200) for name in FORMATS), *MANY_STRIPS]
)
def test_sums_wait_between_chunks_of_inputs(isa: str, name: str, m: int, n: int, k: int) -> None:
    """More rows and inputs than any driver takes at once, written and added."""
    packed, x = random_packed(name, n, k), random_rows(m, k)
    bias, y = random_rows(1, n)[0], random_rows(m, n, seed=1)
    rows = [*range(9), 31, 32, 127, 128, 255, 256, m - 9, m - 8, m - 1]
    want = whole(name, x[rows], packed, isa, bias)
    got = _C.linear(x, tensor_of(packed), bias, isa=isa)
    assert np.array_equal(got[rows], want)
    sums = y + got
    _C.linear_into(x, tensor_of(packed), y, bias=bias, accumulate=True, isa=isa)
    assert np.array_equal(y, sums)


def test_many_strips(isa: str) -> None:
    """More strips than any driver's panel of outputs."""
    for name in FORMATS:
        n, k, m = 1100, 64, 20
        packed = random_packed(name, n, k)
        x = random_rows(m, k)
        want = whole(name, x, packed, isa)
        assert np.array_equal(_C.linear(x, tensor_of(packed), isa=isa, threads=1), want), name

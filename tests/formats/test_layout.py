"""The bytes of every format, against slow loops and against examples written out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lacewing.errors import FormatError
from lacewing.formats import FORMATS, Codes, Format, PackedTensor, get_format
from lacewing.formats.base import ROW
from tests.formats import naive

SHAPES = [(1, 1), (1, 64), (16, 64), (17, 65), (16, 7), (33, 130), (48, 31), (2, 200), (32, 96)]


@pytest.fixture(params=FORMATS.values(), ids=FORMATS)
def fmt(request: pytest.FixtureRequest) -> Format:
    chosen: Format = request.param
    return chosen


def assert_same(a: Codes, b: Codes) -> None:
    """Equal to the bit, and of the same types."""
    for left, right in ((a.q, b.q), (a.scales, b.scales), (a.mins, b.mins)):
        if left is None or right is None:
            assert left is right
        else:
            assert left.dtype == right.dtype
            assert left.shape == right.shape
            assert left.tobytes() == right.tobytes()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_those_of_the_slow_loops(fmt: Format, shape: tuple[int, int]) -> None:
    codes = naive.random_codes(fmt, *shape)
    packed = fmt.pack(codes)
    want = naive.parts(fmt, codes)
    assert tuple(packed.parts) == fmt.part_names
    assert {name: part.tobytes() for name, part in packed.parts.items()} == want


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpack_returns_the_codes(fmt: Format, shape: tuple[int, int]) -> None:
    codes = naive.random_codes(fmt, *shape, seed=1)
    packed = fmt.pack(codes)
    assert_same(fmt.unpack(packed), codes)


@pytest.mark.parametrize("density", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("name", ["w8a8g64_sp", "w4a8g64_sp", "bf16_sp", "w8a8_b16x1"])
def test_sparse_streams_of_any_density(name: str, density: float) -> None:
    fmt = get_format(name)
    codes = naive.random_codes(fmt, 35, 200, seed=2, density=density)
    codes.q[:, :64] = fmt.zero_point  # a group of which nothing is left
    codes.q[:, 64:128] |= 1  # and one that is full: 1 and 9 are no zero points
    packed = fmt.pack(codes)
    want = naive.parts(fmt, codes)
    assert {name: part.tobytes() for name, part in packed.parts.items()} == want
    assert_same(fmt.unpack(packed), codes)


def test_sparse_nibbles_of_one_half_only() -> None:
    fmt = get_format("w4a8g64_sp")
    for half in (slice(0, 32), slice(32, 64)):
        codes = naive.random_codes(fmt, 16, 64, seed=3, density=1.0)
        codes.q[:, half] = fmt.zero_point
        packed = fmt.pack(codes)
        assert packed.parts["stream"].tobytes() == naive.parts(fmt, codes)["stream"]
        assert_same(fmt.unpack(packed), codes)


def test_a_matrix_of_several_chunks(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = naive.random_codes(fmt, 100, 70)
    whole = fmt.pack(codes)
    monkeypatch.setattr("lacewing.formats.base.CHUNK", 16 * 70)
    monkeypatch.setattr("lacewing.formats.stream.CHUNK", 16 * 128)
    pieces = fmt.pack(codes)
    for name in fmt.part_names:
        assert pieces.parts[name].tobytes() == whole.parts[name].tobytes()
    assert_same(fmt.unpack(pieces), codes)


def test_parts_have_the_stated_shapes_types_and_alignment(fmt: Format) -> None:
    packed = fmt.pack(naive.random_codes(fmt, 40, 100))
    fmt.validate(packed)
    sizes = fmt.expected_part_bytes(40, 100)
    for name, shape in fmt.part_shapes(40, 100).items():
        part = packed.parts[name]
        assert part.dtype == fmt.part_dtypes[name]
        assert part.shape == tuple(len(part) if n == -1 else n for n in shape)
        assert sizes[name] in (part.nbytes, None)
        assert (sizes[name] is None) == (name == "stream")
        if name != "offsets":
            assert part.ctypes.data % 64 == 0


def test_absurd_shapes_have_sizes_without_overflow(fmt: Format) -> None:
    sizes = fmt.expected_part_bytes(1 << 40, 1 << 40)
    assert max(size or 0 for size in sizes.values()) >= (1 << 39)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("bf16", 16),
        ("w8a8", 8.05),
        ("w8a8g32", 8.5),
        ("w8a8g64", 8.25),
        ("w4a8g32", 4.5),
        ("w4a8g64", 4.25),
        ("w4a8g128", 4.125),
        ("w3a8g64", 3.25),
        ("w2a8g64", 2.25),
        ("w1.6a8", 1.65),
        ("w4a8g32z", 5),
        ("w5a8g32z", 6),
        ("w8a8g64_24", 5.25),
        ("w4a8g64_24", 3.25),
    ],
)
def test_bits_per_weight(name: str, bits: float) -> None:
    fmt = get_format(name)
    k = 320 if fmt.group_size == ROW else 256
    packed = fmt.pack(naive.random_codes(fmt, 64, k))
    assert packed.bits_per_weight == bits
    assert packed.nbytes * 8 == round(bits * 64 * k)
    padded = fmt.pack(naive.random_codes(fmt, 1, k))
    assert padded.bits_per_weight == pytest.approx(16 * bits)


@pytest.mark.parametrize(
    ("name", "bits", "head"),
    [("w8a8g64_sp", 8, 1.25), ("w4a8g64_sp", 4, 1.25), ("bf16_sp", 16, 1), ("w8a8_b16x1", 8, 0.09)],
)
def test_bits_per_weight_of_sparse_formats(name: str, bits: int, head: float) -> None:
    fmt = get_format(name)
    weight = np.random.default_rng(0).standard_normal((64, 1024), np.float32)
    for sparsity in (0.5, 0.75):
        packed = fmt.pack(fmt.round(weight, sparsity))
        want = head + bits * (1 - sparsity)
        # Two cursors and padding cost a little.
        assert packed.bits_per_weight == pytest.approx(want, rel=0.04)


def test_the_example_of_the_docs() -> None:
    fmt = get_format("w4a8g32")
    q = np.full((16, 32), 8, np.uint8)
    q[0, :8] = [0, 1, 2, 3, 4, 5, 6, 7]
    q[1, :8] = [15, 14, 13, 12, 11, 10, 9, 8]
    packed = fmt.pack(Codes(q, np.ones((16, 1), np.float16)))
    block = packed.parts["codes"][0, 0]
    assert bytes(block[0]).hex() == "40516273"
    assert bytes(block[1]).hex() == "bfae9d8c"
    assert bytes(block[2]).hex() == "88888888"


def test_the_longest_row() -> None:
    for fmt in FORMATS.values():
        if fmt.group_size == ROW:
            fmt.validate(fmt.pack(naive.random_codes(fmt, 1, ROW)))
            with pytest.raises(FormatError, match="k up to 131072, got 131073") as caught:
                fmt.round(np.zeros((1, ROW + 1), np.float32))
            assert "w8a8g64" in str(caught.value.hint)


def test_parts_may_be_read_only_views(fmt: Format) -> None:
    codes = naive.random_codes(fmt, 20, 70)
    parts = {}
    for name, part in fmt.pack(codes).parts.items():
        view = np.frombuffer(part.tobytes(), part.dtype).reshape(part.shape)
        assert not view.flags.writeable
        parts[name] = view
    assert_same(fmt.unpack(PackedTensor(fmt.name, (20, 70), parts)), codes)


def test_codes_need_not_be_contiguous(fmt: Format) -> None:
    codes = naive.random_codes(fmt, 64, 128)
    q = np.asfortranarray(codes.q)
    packed = fmt.pack(Codes(q, codes.scales, codes.mins))
    assert_same(fmt.unpack(packed), codes)
    half = Codes(codes.q[::2], *(None if v is None else v[::2] for v in (codes.scales, codes.mins)))
    assert_same(fmt.unpack(fmt.pack(half)), half)

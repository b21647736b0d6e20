"""Input that is not what it should be: a FormatError that says where, and no crash."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lacewing.errors import FormatError, LacewingError
from lacewing.formats import FORMATS, Codes, Format, PackedTensor, get_format, pack
from tests.formats import naive

EACH = pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
STREAMS = pytest.mark.parametrize(
    "fmt", [f for f in FORMATS.values() if "stream" in f.part_names], ids=str
)
HEAD = 160


@EACH
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(fmt: Format, value: float) -> None:
    weight = np.ones((40, 70), np.float32)
    weight[33, 5] = weight[39, 0] = value
    with pytest.raises(FormatError, match=rf"finite weights, got {value} at \[33, 5\]") as caught:
        fmt.round(weight)
    assert caught.value.hint


@EACH
@pytest.mark.parametrize("shape", [(), (5,), (0, 5), (5, 0), (2, 3, 4)], ids=str)
def test_weights_that_are_no_matrix(fmt: Format, shape: tuple[int, ...]) -> None:
    with pytest.raises(FormatError, match=r"holds a weight \[n, k\] with n, k >= 1, got \["):
        fmt.round(np.zeros(shape))


@pytest.mark.parametrize("weight", [np.array([["a"]]), np.array([[1j]]), np.array([[None]])])
def test_weights_that_are_no_numbers(weight: Any) -> None:
    with pytest.raises(FormatError, match="real numbers, got dtype"):
        pack(weight, "w8a8g32")


def test_unknown_formats_name_near_ones() -> None:
    with pytest.raises(FormatError, match="no weight format 'w4a8g23'") as caught:
        get_format("w4a8g23")
    assert "w4a8g32" in str(caught.value.hint)
    with pytest.raises(FormatError) as caught:
        get_format("zzz")
    assert all(name in str(caught.value.hint) for name in FORMATS)
    assert isinstance(caught.value, LacewingError)
    assert isinstance(caught.value, ValueError)


def replaced(codes: Codes, **fields: Any) -> Codes:
    values = {"q": codes.q, "scales": codes.scales, "mins": codes.mins}
    return Codes(**{**values, **fields})


@EACH
def test_codes_of_another_format(fmt: Format) -> None:
    codes = naive.random_codes(fmt, 20, 70)
    cases: list[tuple[Codes, str]] = [
        (replaced(codes, q=codes.q.astype(np.int32)), "codes must be uint"),
        (replaced(codes, q=codes.q[0]), r"holds a weight \[n, k\]"),
    ]
    if fmt.weight_bits < 8:
        cases.append((replaced(codes, q=codes.q | 64), "codes must be below"))
    if codes.scales is None:
        cases.append((replaced(codes, scales=np.ones((20, 2), np.float16)), "not have scales"))
    else:
        bad = codes.scales.copy()
        bad[3, -1] = np.inf
        cases += [
            (replaced(codes, scales=None), "must have scales"),
            (replaced(codes, scales=codes.scales[:, :0]), "scales must be float16"),
            (replaced(codes, scales=codes.scales.astype(np.float32)), "scales must be float16"),
            (replaced(codes, scales=bad), "scales must be finite"),
        ]
    if fmt.asymmetric:
        cases.append((replaced(codes, mins=None), "must have mins"))
    else:
        cases.append((replaced(codes, mins=np.ones((20, 2), np.float16)), "not have mins"))
    for wrong, message in cases:
        with pytest.raises(FormatError, match=message):
            fmt.pack(wrong)
        with pytest.raises(FormatError, match=message):
            fmt.dequantize(wrong)


def with_part(packed: PackedTensor, name: str, part: Any) -> PackedTensor:
    return PackedTensor(packed.format, packed.shape, {**packed.parts, name: part})


@EACH
def test_parts_of_another_shape_or_type(fmt: Format) -> None:
    packed = fmt.pack(naive.random_codes(fmt, 20, 130))
    first = fmt.part_names[0]
    part = packed.parts[first]
    wrong = [
        (PackedTensor("other", (20, 130), packed.parts), "expected a tensor in"),
        (PackedTensor(fmt.name, (20, 130), {}), "got none"),
        (PackedTensor(fmt.name, (20, 130), {**packed.parts, "x": part}), "has the parts"),
        (PackedTensor(fmt.name, (0, 130), packed.parts), "n, k >= 1"),
        (PackedTensor(fmt.name, (20, -130), packed.parts), "n, k >= 1"),
        (PackedTensor(fmt.name, (400, 130), packed.parts), "must have shape"),
        (with_part(packed, first, part.view(np.int8)), "must be uint"),
        (with_part(packed, first, part.reshape(-1)[None]), "must have shape"),
        (with_part(packed, first, np.repeat(part, 2, axis=0)[::2]), "contiguous"),
    ]
    if "stream" not in fmt.part_names:
        wrong.append((PackedTensor(fmt.name, (20, 600), packed.parts), "must have shape"))
    for tensor, message in wrong:
        with pytest.raises(FormatError, match=message):
            fmt.validate(tensor)
        with pytest.raises(FormatError, match=message):
            fmt.unpack(tensor)


@EACH
def test_a_shape_of_billions_takes_no_memory(fmt: Format) -> None:
    packed = fmt.pack(naive.random_codes(fmt, 16, 64))
    tracemalloc.start()
    try:
        for shape in [(16, 1 << 50), (16, 1 << 62), (1 << 50, 64), (1 << 62, 1 << 62)]:
            with pytest.raises(FormatError):
                fmt.unpack(PackedTensor(fmt.name, shape, packed.parts))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


# -- sparse streams -------------------------------------------------------------------------------


def damaged(fmt: Format, change: Callable[[Any, Any], tuple[Any, Any]]) -> PackedTensor:
    packed = fmt.pack(naive.random_codes(fmt, 40, 128))
    stream, offsets = change(packed.parts["stream"].copy(), packed.parts["offsets"].copy())
    parts = {"stream": np.ascontiguousarray(stream), "offsets": np.ascontiguousarray(offsets)}
    return PackedTensor(fmt.name, (40, 128), parts)


def add(offsets: Any, values: list[int]) -> Any:
    return offsets + np.array(values, np.int64)


def poke(stream: Any, at: int, value: int) -> Any:
    stream[at] = value
    return stream


HOSTILE: list[tuple[str, Callable[[Any, Any], tuple[Any, Any]], str]] = [
    ("does not begin at 0", lambda s, o: (s, add(o, [64, 0, 0, 0])), "must begin at 0"),
    ("decreases", lambda s, o: (s, add(o, [0, 1 << 20, 0, 0])), "not decrease"),
    ("negative", lambda s, o: (s, add(o, [0, -(1 << 40), 0, 0])), "not decrease"),
    ("not a multiple of 64", lambda s, o: (s, add(o, [0, 32, 0, 0])), "multiples of 64"),
    ("beyond the stream", lambda s, o: (s, add(o, [0, 0, 0, 64])), "stream must have"),
    ("huge end", lambda s, o: (s, add(o, [0, 0, 0, 1 << 60])), "stream must have"),
    ("truncated", lambda s, o: (s[:-64], o), "stream must have"),
    ("too long", lambda s, o: (np.append(s, s[:64]), o), "stream must have"),
    ("empty", lambda s, o: (s[:0], o), "stream must have"),
    (
        "strip too short for its heads",
        lambda s, o: (s, o * [0, 0, 1, 1]),
        "needs at least (320|256|64) bytes",
    ),
    ("strip too long", lambda s, o: (s, add(o, [0, 64, 0, 0])), "must end at|beyond its strip"),
    ("end too far", lambda s, o: (np.append(s, s[-64:]), add(o, [0, 0, 0, 64])), "must end at"),
    ("strip too short", lambda s, o: (s, add(o, [0, -64, 0, 0])), "beyond its strip|must end at"),
    ("fewer bits", lambda s, o: (poke_all(s, 32, 128, 0), o), r"beyond its strip|must end at byte"),
    ("all bits", lambda s, o: (poke_all(s, 32, 128, 255), o), r"beyond its strip|must end at"),
]


def poke_all(stream: Any, begin: int, end: int, value: int) -> Any:
    stream[begin:end] = value
    return stream


@STREAMS
@pytest.mark.parametrize(
    ("change", "message"), [h[1:] for h in HOSTILE], ids=[h[0] for h in HOSTILE]
)
def test_hostile_streams(
    fmt: Format, change: Callable[[Any, Any], tuple[Any, Any]], message: str
) -> None:
    packed = damaged(fmt, change)
    with pytest.raises(FormatError, match=message):
        fmt.unpack(packed)


def test_zeros_that_are_stored() -> None:
    fmt = get_format("w8a8g64_sp")
    packed = damaged(fmt, lambda s, o: (poke(s, HEAD, 128), o))
    with pytest.raises(FormatError, match="store zeros explicitly"):
        fmt.unpack(packed)


def test_blocks_of_zeros_that_are_stored() -> None:
    fmt = get_format("w8a8_b16x1")
    packed = damaged(fmt, lambda s, o: (poke_all(s, 64, 128, 128), o))
    with pytest.raises(FormatError, match="strip 0 stores zeros explicitly"):
        fmt.unpack(packed)


def test_blocks_beyond_the_last_input() -> None:
    fmt = get_format("w8a8_b16x1")
    packed = fmt.pack(naive.random_codes(fmt, 40, 100, density=1.0))
    stream = packed.parts["stream"].copy()
    stream[32 + 12] ^= 0x11  # input 96 is dropped, 100 kept: as many as before
    parts = {**packed.parts, "stream": stream}
    with pytest.raises(FormatError, match="strip 0 keeps an input beyond the last of 100"):
        fmt.unpack(PackedTensor(fmt.name, (40, 100), parts))


@STREAMS
def test_random_bytes(fmt: Format) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        stream = rng.integers(0, 256, 64 * 30, dtype=np.uint8)
        offsets = np.array([0, 64 * 29], np.int64)
        with pytest.raises(FormatError):
            fmt.unpack(PackedTensor(fmt.name, (16, 512), {"stream": stream, "offsets": offsets}))


# -- 2:4 ------------------------------------------------------------------------------------------

OF_24 = pytest.mark.parametrize("name", ["w8a8g64_24", "w4a8g64_24"])


@OF_24
def test_more_than_two_of_four(name: str) -> None:
    fmt = get_format(name)
    codes = naive.random_codes(fmt, 20, 70)
    codes.q[18, 68:] = 0  # two of a short four: fits
    fmt.pack(codes)
    codes.q[17, 5:8] = 0
    codes.q[17, 4] = fmt.zero_point
    with pytest.raises(FormatError, match=r"2 of 4 .* got 3 in row 17, inputs 4\.\.7") as caught:
        fmt.pack(codes)
    assert caught.value.hint


@OF_24
@pytest.mark.parametrize("bits", [0x1, 0x7, 0xF])
def test_bitmaps_without_two_of_four(name: str, bits: int) -> None:
    fmt = get_format(name)
    packed = fmt.pack(naive.random_codes(fmt, 40, 128))
    records = packed.parts["records"].copy()
    bitmaps = records[1, 1, -160:]  # strip 1, group 1: block 3 is its 19th
    bitmaps[8 * 3] = (bitmaps[8 * 3] & 0xF0) | bits  # outputs 0 and 1
    with pytest.raises(FormatError, match=r"2 of every 4 bits set, got \d in block 19, output 0"):
        fmt.unpack(PackedTensor(name, (40, 128), {"records": records}))


@OF_24
def test_the_pattern_prescribes_the_sparsity(name: str) -> None:
    weight = np.random.default_rng(0).standard_normal((16, 64))
    pack(weight, name, 0.5)
    with pytest.raises(FormatError, match=r"exactly half .* got sparsity 0\.7") as caught:
        pack(weight, name, 0.7)
    assert "_sp" in str(caught.value.hint)

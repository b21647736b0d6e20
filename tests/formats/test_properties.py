"""What holds for any weight: found by hypothesis, not by choice."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lacewing.formats import FORMATS, Codes, Format, PackedTensor, quantize_rows
from tests.formats import naive
from tests.formats.test_layout import assert_same

SETTINGS = settings(max_examples=60)
formats = st.sampled_from(list(FORMATS.values()))
rounding = st.sampled_from([f for f in FORMATS.values() if f.group_size])
sizes = st.tuples(st.integers(1, 40), st.integers(1, 140))
# f16 scales hold at least 65504 in every format.
floats = st.floats(-65504, 65504, width=32)


@st.composite
def weights(draw: Any, elements: st.SearchStrategy[float] = floats) -> Any:
    return draw(hnp.arrays(np.float32, draw(sizes), elements=elements))


@given(formats, sizes, st.integers(0, 999), st.floats(0, 1))
@SETTINGS
def test_unpack_inverts_pack(
    fmt: Format, shape: tuple[int, int], seed: int, density: float
) -> None:
    codes = naive.random_codes(fmt, *shape, seed=seed, density=density)
    packed = fmt.pack(codes)
    fmt.validate(packed)
    assert_same(fmt.unpack(packed), codes)
    want = naive.parts(fmt, codes)
    assert {name: part.tobytes() for name, part in packed.parts.items()} == want


@given(rounding, weights())
@example(FORMATS["w2a8g64"], np.ones((1, 1), np.float32))  # zeros beside it have no level
@SETTINGS
def test_rounding_is_within_half_a_step(fmt: Format, weight: Any) -> None:
    """The grid that sends the extreme to the last code, and clips nothing, is among the candidates:
    the squared error is at most its own, half a step for every weight. One weight may be off by
    more, for the sake of the others."""
    if fmt.fixed_sparsity:
        weight = np.where(fmt.mask(weight, None), weight, np.float32(0))
    codes = fmt.round(weight)
    fmt.check_codes(codes)
    error = np.sqrt(np.square(fmt.dequantize(codes) - weight, dtype=np.float64).mean(axis=1))
    size = np.abs(weight).max(axis=1)
    span = np.ptp(weight, axis=1) if fmt.asymmetric else size
    steps = {8: 127, 5: 31, 4: 7, 3: 3, 2: 1}[fmt.weight_bits]
    assert (error <= 0.5 * span / steps + size * 2.0**-10 + 2.0**-24).all()


@given(rounding, weights(), st.integers(1, 39))
@SETTINGS
def test_rows_are_rounded_on_their_own(fmt: Format, weight: Any, cut: int) -> None:
    whole = fmt.round(weight)
    cut = min(cut, len(weight) - 1)
    if cut:
        assert_same(fmt.round(weight[:cut]), whole.rows(0, cut))
    assert_same(fmt.round(weight[cut:]), whole.rows(cut, len(weight)))


@given(
    weights(st.floats(allow_nan=False, allow_infinity=False, width=32)), st.sampled_from([32, 64])
)
@SETTINGS
def test_quantize_rows_is_the_slow_loop(x: Any, group: int) -> None:
    q, scale, total = quantize_rows(x, group)
    m, k = x.shape
    padded = np.pad(x, ((0, 0), (0, -k % group)))
    assert q.shape == padded.shape
    for r in range(m):
        for j in range(scale.shape[1]):
            part = slice(j * group, (j + 1) * group)
            want = naive.quantize_group(list(padded[r, part]))
            assert (q[r, part].tolist(), scale[r, j], total[r, j]) == want


@given(weights(), st.sampled_from([f for f in FORMATS.values() if f.holds_zero]))
@SETTINGS
def test_zeros_stay_zeros(weight: Any, fmt: Format) -> None:
    weight[:, ::3] = 0
    assert not fmt.dequantize(fmt.round(weight))[:, ::3].any()


@given(
    st.sampled_from([f.name for f in FORMATS.values() if f.sparse]),
    st.integers(0, 10**6),
    st.data(),
)
@SETTINGS
def test_a_damaged_stream_is_an_error_or_a_tensor(name: str, seed: int, data: Any) -> None:
    """Whatever the bytes: FormatError, or codes that pack into those bytes' meaning."""
    from lacewing.errors import FormatError

    fmt = FORMATS[name]
    packed = fmt.pack(naive.random_codes(fmt, 20, 100, seed=seed % 7))
    parts = {name: part.copy() for name, part in packed.parts.items()}
    target = parts[data.draw(st.sampled_from(fmt.part_names))].view(np.uint8)
    for _ in range(data.draw(st.integers(1, 4))):
        target[data.draw(st.integers(0, len(target) - 1))] = data.draw(st.integers(0, 255))
    try:
        codes = fmt.unpack(PackedTensor(name, (20, 100), parts))
    except FormatError:
        return
    assert codes.shape == (20, 100)
    assert isinstance(codes, Codes)

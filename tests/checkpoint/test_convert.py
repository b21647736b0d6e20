"""What every source type becomes, what it costs, and that neither threads nor cuts matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacewing.checkpoint import (
    PackedModel,
    Source,
    convert,
    load_model,
    load_packed,
    open_source,
    write_packed,
)
from lacewing.checkpoint.breakeven import MACHINES, break_even, dense_twin
from lacewing.errors import FormatError, UnsupportedModelError
from lacewing.formats import FORMATS, PackedTensor, get_format
from lacewing.formats import base as formats_base
from tests.checkpoint.build import (
    HIDDEN,
    READABLE,
    VOCAB,
    Gguf,
    config,
    gguf_name,
    put_metadata,
    random_rows,
    random_weights,
    tiny_gguf,
    write_hub,
)

EMBEDDING, UP = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"
EXACT = {
    "Q8_0": "w8a8g32",
    "Q4_0": "w4a8g32",
    "Q4_1": "w4a8g32z",
    "Q5_0": "w5a8g32z",
    "Q5_1": "w5a8g32z",
}
NEAR = {"Q4_K": "w4a8g32z", "Q5_K": "w5a8g32z", "Q6_K": "w8a8g32"}
FLOATS = {"F32": "w8a8g32", "F16": "w8a8g32", "BF16": "w8a8g32"}


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return tiny_gguf("Q4_1").write(tmp_path / "model.gguf")


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if not isinstance(value, PackedTensor):
            assert np.array_equal(value, other[name])
            continue
        assert (value.format, value.shape) == (other[name].format, other[name].shape)
        assert value.parts.keys() == other[name].parts.keys()
        for part, array in value.parts.items():
            assert np.array_equal(array, other[name].parts[part]), (name, part)


def share_to_prune(format: str) -> float | None:
    """A sparsity for the formats that need one; of zeros enough for every format to pay."""
    kind = FORMATS.get(format)
    return 0.6 if kind is not None and kind.sparse and not kind.fixed_sparsity else None


def relative_error(model: PackedModel, source: Source, name: str) -> float:
    packed = model.tensors[name]
    assert isinstance(packed, PackedTensor)
    expected = source.tensors[name].dequantize().astype(np.float64)
    found = get_format(packed.format).dequantize(packed)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("type", READABLE)
def test_auto_packs_on_the_own_or_nearest_grid(tmp_path: Path, type: str) -> None:
    path = tiny_gguf(type).write(tmp_path / "model.gguf")
    model, source = load_model(path), open_source(path)
    for report in model.reports:
        vector = len(report.shape) == 1
        assert report.format == ("f32" if vector else (EXACT | NEAR | FLOATS)[type])
        assert report.source == ("F32" if vector else type)
        assert report.exact == (vector or type in EXACT)
        assert (report.error == 0) == report.exact
        assert report.nbytes == model.tensors[report.name].nbytes
    name = "model.layers.1.self_attn.k_proj.weight"
    report = next(r for r in model.reports if r.name == name)
    assert report.error == pytest.approx(relative_error(model, source, name), rel=1e-3)
    assert report.error < (1e-3 if type in ("Q4_K", "Q5_K") else 0.01)


@pytest.mark.parametrize("format", [*FORMATS])
def test_every_format(gguf: Path, format: str) -> None:
    model, source = load_model(gguf, format), open_source(gguf)
    table = format.removesuffix("_sp") if format.startswith("bf16") else "w8a8g32"
    kind = FORMATS[format]
    dense = (dense_twin(kind) or kind).name
    twin = format if kind.fixed_sparsity else dense  # nothing is pruned: sparse does not pay
    for report in model.reports:
        if len(report.shape) == 2:
            assert report.format == (table if report.name == EMBEDDING else twin)
            packed = model.tensors[report.name]
            assert isinstance(packed, PackedTensor)
            get_format(report.format).validate(packed)
            expected = relative_error(model, source, report.name)
            assert report.error == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert model.tensors.keys() == source.spec.tensor_shapes().keys()


def test_blocks_are_dropped_as_a_whole(gguf: Path) -> None:
    """The report counts what is stored: blocks, whatever single weights are zero."""
    model = load_model(gguf, "w8a8_b16x1", sparsity=0.75, machine="avx512")
    report = next(r for r in model.reports if r.name == UP)
    packed = model.tensors[UP]
    assert isinstance(packed, PackedTensor)
    assert (packed.format, report.instead_of) == ("w8a8_b16x1", None)
    weights = get_format("w8a8_b16x1").dequantize(packed)
    n, k = weights.shape
    assert report.density == pytest.approx(1 - int(k * 0.75 + 0.5) / k)
    for begin in range(0, n, 16):
        there = (weights[begin : begin + 16] != 0).any(axis=0)
        assert there.sum() == k - int(k * 0.75 + 0.5)
    assert all(
        r.format != "w8a8_b16x1"
        for r in load_model(gguf, "w8a8_b16x1", sparsity=0.75, machine="scalar").reports
    )


@pytest.mark.parametrize("format", ["w8a8g64_sp", "w4a8g64_sp", "w8a8g32", "w4a8g64"])
@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_pruning_drops_the_smallest(gguf: Path, format: str, sparsity: float) -> None:
    model, source = load_model(gguf, format, sparsity=sparsity), open_source(gguf)
    packed = model.tensors[UP]
    assert isinstance(packed, PackedTensor)
    assert packed.format == format
    weights = get_format(format).dequantize(packed)
    dropped = (weights == 0).sum(axis=1)
    assert (dropped >= int(HIDDEN * sparsity + 0.5)).all()
    size = np.abs(source.tensors[UP].dequantize())
    smallest = np.sort(size, axis=1)[:, int(HIDDEN * sparsity + 0.5) - 1]
    assert (np.where(weights != 0, size, np.inf).min(axis=1) >= smallest).all()
    embedding = model.tensors[EMBEDDING]
    assert isinstance(embedding, PackedTensor)
    assert embedding.format == "w8a8g32"
    assert relative_error(model, source, EMBEDDING) < 0.01


def test_the_machine_decides_what_pays(gguf: Path) -> None:
    """4 bits, a third of the weights zero: smaller, but on AVX2 expanding takes longer."""
    formats = {}
    for machine in (None, *MACHINES):
        model = load_model(gguf, "w4a8g64_sp", sparsity=0.4, machine=machine)
        report = next(r for r in model.reports if r.name == UP)
        formats[machine] = report.format
        assert report.instead_of == (None if report.format == "w4a8g64_sp" else "w4a8g64_sp")
        assert report.density is not None
        assert 0.4 < report.density <= 0.6
    sparse, dense = "w4a8g64_sp", "w4a8g64"
    assert formats == {None: sparse, "avx512": sparse, "avx2": dense, "scalar": dense}
    with pytest.raises(FormatError, match="`machine` must be one of avx512, avx2, scalar"):
        load_model(gguf, "w4a8g64_sp", machine="neon")


def test_every_sparse_format_has_a_dense_twin() -> None:
    for kind in FORMATS.values():
        twin = dense_twin(kind)
        assert (twin is not None) == kind.sparse
        if twin is not None:
            assert not twin.sparse
            assert twin.weight_bits == kind.weight_bits
            assert any(0 < break_even(kind, machine) <= 1 for machine in MACHINES)


def test_sparse_that_does_not_pay_becomes_dense(gguf: Path) -> None:
    """Of 4-bit weights more than a quarter must be zero; the dense twin has the same weights."""
    model = load_model(gguf, "w4a8g64_sp", sparsity=0.1)
    packed = model.tensors[UP]
    assert isinstance(packed, PackedTensor)
    assert packed.format == "w4a8g64"
    sparse = get_format("w4a8g64_sp")
    codes = sparse.round(open_source(gguf).tensors[UP].dequantize(), 0.1)
    assert np.array_equal(get_format("w4a8g64").dequantize(packed), sparse.dequantize(codes))


@pytest.mark.parametrize("format", ["w4a8g32", "auto"])
def test_the_head_has_its_own_format(tmp_path: Path, format: str) -> None:
    path = tiny_gguf("Q8_0", tie_word_embeddings=False).write(tmp_path / "model.gguf")
    for head in (None, "w8a8g64", "bf16", "w5a8g32z"):
        model = load_model(path, format, head_format=head)
        for name in (EMBEDDING, "lm_head.weight"):
            packed = model.tensors[name]
            assert isinstance(packed, PackedTensor)
            assert packed.format == (head or "w8a8g32")


def test_formats_that_cannot_be_are_refused(gguf: Path) -> None:
    with pytest.raises(FormatError, match="w4a8g48"):
        load_model(gguf, "w4a8g48")
    with pytest.raises(FormatError, match="no weight format"):
        load_model(gguf, head_format="f64")
    for sparsity in (-0.1, 1.0, 7.0, float("nan")):
        with pytest.raises(FormatError, match="sparsity"):
            load_model(gguf, "w8a8g64_sp", sparsity=sparsity)
    with pytest.raises(FormatError, match="layers") as caught:
        load_model(gguf, "w4a8g32z", sparsity=0.5)
    assert caught.value.hint is not None


@pytest.mark.parametrize("format", ["auto", "w4a8g64_sp", "w8a8g32", "bf16"])
def test_threads_do_not_matter(gguf: Path, format: str) -> None:
    one, three = (
        {name: value for name, value, _ in convert(open_source(gguf), format, threads=threads)}
        for threads in (1, 3)
    )
    assert_equal(one, three)


@pytest.mark.parametrize(
    "format", ["auto", "w4a8g64_sp", "w8a8g64_sp", "w8a8_b16x1", "w5a8g32z", "bf16"]
)
def test_cuts_do_not_matter(gguf: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sparsity = share_to_prune(format)
    whole = load_model(gguf, format, sparsity=sparsity)
    monkeypatch.setattr(formats_base, "CHUNK", 5000)
    cut = load_model(gguf, format, sparsity=sparsity)
    assert_equal(whole.tensors, cut.tensors)
    for one, other in zip(whole.reports, cut.reports, strict=True):
        assert one.error == pytest.approx(other.error, rel=1e-5)


def test_progress_counts_weights(gguf: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    model = load_model(gguf, progress=lambda *call: calls.append(call))
    assert [name for name, _, _ in calls] == list(model.tensors)
    total = sum(int(np.prod(t.shape)) for t in model.tensors.values())
    assert calls[-1][1:] == (total, total)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)


def test_a_stream_may_be_dropped(gguf: Path) -> None:
    stream = convert(open_source(gguf))
    next(stream)
    stream.close()


def test_rows_that_fill_no_strip(tmp_path: Path) -> None:
    """97 is no multiple of 16, and 160 none of 64: padding is within parts, never in shapes."""
    made = config(hidden_size=160, intermediate_size=97, head_dim=10)
    path = write_hub(tmp_path / "model", made, random_weights(made))
    for format in FORMATS:
        model = load_model(path, format)
        assert model.tensors[UP].shape == (97, 160)
        bound = {2: 0.45, 3: 0.19}.get(FORMATS[format].weight_bits, 0.15)
        if FORMATS[format].fixed_sparsity is None:  # else half of the weights are gone
            assert relative_error(model, open_source(path), UP) < bound


def test_a_type_that_cannot_be_read_is_refused_before_any_work(tmp_path: Path) -> None:
    file = Gguf()
    put_metadata(file, "llama", config(num_hidden_layers=1))
    source = tiny_gguf("Q8_0", num_hidden_layers=1)
    for name, info in source.infos.items():
        shape, size = tuple(info.dims[::-1]), int(np.prod(info.dims))
        last = name == gguf_name("model.layers.0.mlp.down_proj.weight")
        kind = "IQ4_NL" if last else "F32"
        data = bytes(size // 32 * 18) if last else random_rows("F32", 1, size).tobytes()
        file.tensor(name, shape, kind, data)
    calls: list[Any] = []
    with pytest.raises(UnsupportedModelError, match="IQ4_NL"):
        load_model(file.write(tmp_path / "a.gguf"), progress=lambda *call: calls.append(call))
    assert not calls


# -- packed directories ---------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["auto", *FORMATS])
def test_a_packed_directory_is_the_model(tmp_path: Path, gguf: Path, format: str) -> None:
    sparsity = share_to_prune(format)
    model = load_model(gguf, format, sparsity=sparsity)
    reports = write_packed(gguf, tmp_path / "packed", format, sparsity)
    for found in (load_packed(tmp_path / "packed"), load_model(tmp_path / "packed")):
        assert_equal(found.tensors, model.tensors)
        assert found.config == model.config
        assert found.tokenizer == model.tokenizer
        assert found.reports == ()
    assert tuple(reports) == model.reports
    names = sorted(path.name for path in (tmp_path / "packed").iterdir())
    assert names == ["lacewing.json", "model.safetensors", "tokenizer.json"]


def test_a_packed_directory_is_mapped(tmp_path: Path, gguf: Path) -> None:
    write_packed(gguf, tmp_path / "packed")
    for value in load_packed(tmp_path / "packed").tensors.values():
        parts = value.parts.values() if isinstance(value, PackedTensor) else [value]
        for part in parts:
            assert not part.flags.owndata
            assert not part.flags.writeable
            assert part.ctypes.data % 64 == 0


@pytest.mark.parametrize("format", ["auto", "w8a8g32", "w4a8g64_sp"])
def test_packing_again_keeps_what_fits(tmp_path: Path, gguf: Path, format: str) -> None:
    sparsity = share_to_prune(format)
    write_packed(gguf, tmp_path / "once", format, sparsity)
    reports = write_packed(tmp_path / "once", tmp_path / "twice")
    assert all(report.exact for report in reports)
    assert_equal(load_packed(tmp_path / "once").tensors, load_packed(tmp_path / "twice").tensors)


@pytest.mark.parametrize("format", ["w4a8g64_sp", "w8a8g64_sp", "w4a8g32z", "bf16"])
def test_packed_rows_are_read_in_runs(tmp_path: Path, gguf: Path, format: str) -> None:
    sparsity = share_to_prune(format)
    write_packed(gguf, tmp_path / "packed", format, sparsity)
    tensor = open_source(tmp_path / "packed").tensors[UP]
    whole = tensor.dequantize()
    assert whole.shape == tensor.shape
    for begin, end in ((0, 16), (16, 64), (5, 40), (240, 256), (0, 256)):
        assert np.array_equal(tensor.dequantize(begin, end), whole[begin:end])
    assert tensor.dtype == tensor.own_format == format


def test_packing_again_in_another_format_says_what_it_adds(tmp_path: Path, gguf: Path) -> None:
    write_packed(gguf, tmp_path / "packed", "w8a8g32")
    model, source = load_model(tmp_path / "packed", "w4a8g32"), open_source(tmp_path / "packed")
    report = next(report for report in model.reports if report.name == UP)
    assert (report.source, report.format, report.exact) == ("w8a8g32", "w4a8g32", False)
    assert report.error == pytest.approx(relative_error(model, source, UP), rel=1e-3)
    assert model.tensors[EMBEDDING].shape == (VOCAB, HIDDEN)


def test_gemma_norms_are_folded_once(tmp_path: Path) -> None:
    made = config("gemma3_text")
    weights = random_weights(made)
    write_packed(write_hub(tmp_path / "model", made, weights), tmp_path / "packed")
    write_packed(tmp_path / "packed", tmp_path / "again")
    found = load_packed(tmp_path / "again").tensors["model.norm.weight"]
    assert np.array_equal(found, weights["model.norm.weight"] + np.float32(1))

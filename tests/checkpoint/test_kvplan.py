"""The file of labels and spans: what it means, what it refuses, that it comes back as it was."""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lacewing.checkpoint import load_packed, open_source, write_packed
from lacewing.checkpoint.files import MAX_DEPTH
from lacewing.checkpoint.kvplan import (
    EVERYTHING,
    KvPlan,
    Labels,
    Span,
    fingerprint,
    kept_blocks,
)
from lacewing.errors import CheckpointError
from lacewing.formats.bf16 import bf16_to_f32, f32_to_bf16
from tests.checkpoint import build
from tests.checkpoint.hostile import refused
from tests.tiny import tiny_spec

MODEL = {"type": "llama", "layers": 3, "kv_heads": 2, "head_dim": 16, "fingerprint": "0" * 16}

# What an int32 could not hold, or a stride of almost all blocks, counts as well as small ones.
counts = st.one_of(st.integers(0, 40), st.integers(0, 1 << 20))


@st.composite
def spans(draw: st.DrawFn) -> Span:
    stride = draw(counts)
    phase = draw(st.integers(0, max(stride - 1, 0)))
    window = 16 * draw(counts)
    return Span(16 * draw(counts), window, stride, phase) if window else EVERYTHING


@st.composite
def plans(draw: st.DrawFn) -> KvPlan:
    layers, heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    found = labels = None
    if draw(st.booleans()):
        found = [[draw(spans()) for _ in range(heads)] for _ in range(layers)]
    if draw(st.booleans()):
        r = draw(st.sampled_from([4, 8, 16]))
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        channels = [[rng.permutation(16)[:r] for _ in range(heads)] for _ in range(layers)]
        scales = 10.0 ** rng.uniform(-37, 38, (layers, heads, r))
        labels = Labels(np.array(channels, np.int32), scales.astype(np.float32))
    model: dict[str, Any] = {"layers": layers, "head_dim": 16} if draw(st.booleans()) else {}
    notes = draw(st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.booleans())))
    return KvPlan(model, labels, found, notes)


# -- what a span means ----------------------------------------------------------------------------


@given(spans(), st.integers(1, 150))
def test_what_is_kept_is_what_the_last_block_reads(span: Span, blocks: int) -> None:
    read = [span.reads(blocks - 1, key) for key in range(blocks)]
    assert kept_blocks(span, blocks) == sum(read)


@given(spans(), st.integers(1, 60))
def test_what_is_not_read_once_is_not_read_later(span: Span, blocks: int) -> None:
    for key in range(blocks):
        reads = [span.reads(query, key) for query in range(key, blocks)]
        assert reads[0]
        assert reads == sorted(reads, reverse=True)


def test_a_span_by_hand() -> None:
    span = Span(sinks=16, window=32, stride=4, phase=1)
    read = [key for key in range(11) if span.reads(10, key)]
    assert read == [0, 1, 5, 9, 10]
    assert str(span) == "16+32 every 4+1"
    assert (str(EVERYTHING), str(Span(16, 64))) == ("all", "16+64")


def test_the_share_of_bytes() -> None:
    local = Span(16, 64)
    plan = KvPlan(spans=[[EVERYTHING, local], [local, local]])
    assert plan.bytes_share(1600) == (100 + 3 * 5) / 400
    assert plan.bytes_share(1585) == plan.bytes_share(1600)  # a block that is begun is kept
    assert plan.bytes_share(1) == 1
    assert KvPlan().bytes_share(1600) == 1


def test_layers_with_windows_of_their_own_are_not_counted() -> None:
    spec = tiny_spec("qwen2-window")  # the first layer has none
    spans = [[Span(16, 16)] * 2, *([[EVERYTHING] * 2] * 2)]
    assert KvPlan(spans=spans).bytes_share(160, spec) == 0.2
    assert KvPlan(spans=spans).bytes_share(160) == (2 * 2 + 4 * 10) / 60


# -- the file -------------------------------------------------------------------------------------


def same(a: KvPlan, b: KvPlan) -> bool:
    if (a.model, a.spans, a.notes) != (b.model, b.spans, b.notes):
        return False
    if a.labels is None or b.labels is None:
        return a.labels is b.labels
    equal = np.array_equal(a.labels.channels, b.labels.channels)
    return equal and a.labels.scales.tobytes() == b.labels.scales.tobytes()


@given(plan=plans())
def test_a_plan_comes_back(tmp_path_factory: pytest.TempPathFactory, plan: KvPlan) -> None:
    path = tmp_path_factory.mktemp("plan") / "kvplan.json"
    plan.save(path)
    back = KvPlan.load(path)
    assert same(plan, back)
    first = path.read_bytes()
    back.save(path, force=True)
    assert path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_plan_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"kvplan": 1, "spans": [[null, {"sinks": 16, "window": 512, "stride": 4}]]}')
    plan = KvPlan.load(path)
    assert plan.spans == [[EVERYTHING, Span(16, 512, 4, 0)]]
    assert plan.labels is None


def test_the_plan_in_the_guide(tmp_path: Path) -> None:
    guide = Path(__file__).parents[2] / "docs" / "guides" / "calibrate-kv.md"
    path = tmp_path / "plan"
    path.write_text(guide.read_text().split("```json\n")[1].split("```")[0])
    plan = KvPlan.load(path)
    assert plan.spans is not None
    assert plan.spans[1] == [Span(16, 64, 4, 1), Span(0, 1024)]
    assert plan.labels is not None
    assert plan.labels.channels.shape == (2, 2, 4)


def test_a_layer_is_a_line(tmp_path: Path) -> None:
    KvPlan(spans=[[EVERYTHING, Span(16, 64)]] * 3).save(tmp_path / "plan")
    line = '[null, {"sinks": 16, "window": 64}]'
    assert (tmp_path / "plan").read_text() == (
        f'{{"kvplan": 1,\n "spans": [{line},\n  {line},\n  {line}]}}\n'
    )


def test_what_is_no_plan_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "kvplan.json"
    plan = KvPlan(spans=[[Span(16, 64)]])
    plan.save(path)
    with pytest.raises(CheckpointError, match="path that is free") as caught:
        plan.save(path)
    assert "--force" in str(caught.value.hint)
    other = KvPlan(spans=[[Span(16, 128)]])
    other.save(path, force=True)
    assert KvPlan.load(path).spans == other.spans
    for text in ("{}", "", "novel"):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="something else"):
            plan.save(path, force=True)
        assert path.read_text() == text
    with pytest.raises(CheckpointError, match="parent directory"):
        plan.save(tmp_path / "nowhere" / "plan")
    with pytest.raises(CheckpointError, match="something else"):
        plan.save(tmp_path, force=True)


def test_a_full_disk_leaves_the_old_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kvplan.json"
    KvPlan(spans=[[Span(16, 64)]]).save(path)
    first = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        KvPlan(spans=[[Span(16, 128)]]).save(path, force=True)
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]


# -- what is refused ------------------------------------------------------------------------------


def document() -> dict[str, Any]:
    return {
        "kvplan": 1,
        "model": dict(MODEL),
        "labels": {"channels": [[[0, 3, 7, 15]] * 2] * 3, "scales": [[[0.5, 1, 2, 3.25]] * 2] * 3},
        "spans": [[{"sinks": 16, "window": 64}, None]] * 3,
        "notes": {},
    }


def put(found: Any, keys: tuple[Any, ...], value: Any) -> Any:
    """A copy of JSON with another value at `keys`."""
    if not keys:
        return value
    copy = dict(found) if isinstance(found, dict) else list(found)
    copy[keys[0]] = put(
        copy[keys[0]] if isinstance(copy, list) else copy.get(keys[0]), keys[1:], value
    )
    return copy


BAD: list[tuple[tuple[Any, ...], Any, str]] = [
    (("kvplan",), 2, "version 1"),
    (("kvplan",), True, "version 1"),
    (("more",), 1, "`more`"),
    (("model",), [], "an object"),
    (("notes",), 3, "an object"),
    (("model", "size"), 3, "`size`"),
    (("model", "layers"), 4, "4 layers"),
    (("model", "layers"), 3.0, "whole number"),
    (("model", "layers"), 10**30, "whole number"),
    (("model", "kv_heads"), 3, "3 KV heads"),
    (("model", "head_dim"), 15, "0 to 14"),
    (("model", "head_dim"), 2, "multiple of 4"),
    (("model", "type"), 7, "text"),
    (("model", "fingerprint"), "xyz", "hexadecimal"),
    (("spans",), {}, "each layer"),
    (("spans",), [], "each layer"),
    (("spans", 1), None, "`spans[1]`"),
    (("spans", 1), [], "`spans[1]`"),
    (("spans", 1), [None] * 3, "2 KV heads"),
    (("spans", 1, 0), 5, "`spans[1][0]`"),
    (("spans", 1, 0), {"widow": 16}, "`widow`"),
    (("spans", 1, 0), {"window": 64.0}, "`spans[1][0]`.window"),
    (("spans", 1, 0), {"window": True}, "`spans[1][0]`.window"),
    (("spans", 1, 0), {"window": -16}, "`spans[1][0]`.window"),
    (("spans", 1, 0), {"window": 24}, "multiple of 16"),
    (("spans", 1, 0), {"window": 1 << 40}, "`spans[1][0]`.window"),
    (("spans", 1, 0), {"window": 64, "sinks": 8}, "multiple of 16"),
    (("spans", 1, 0), {"sinks": 16}, "window 0"),
    (("spans", 1, 0), {"window": 64, "stride": 4, "phase": 4}, "4 of 4"),
    (("spans", 1, 0), {"window": 64, "phase": 1}, "1 of 0"),
    (("labels",), [], "an object"),
    (("labels",), {"channels": [[[0, 1, 2, 3]]]}, "labels.scales"),
    (("labels", "more"), [], "`more`"),
    (("labels", "channels", 0, 1), [0, 1, 2], "labels.channels[0][1]"),
    (("labels", "channels", 0, 1), 4, "labels.channels[0][1]"),
    (("labels", "channels", 0, 1, 2), "7", "labels.channels[0][1]"),
    (("labels", "channels", 0, 1, 2), 7.0, "labels.channels[0][1]"),
    (("labels", "channels", 0, 1, 2), -1, "labels.channels[0][1]"),
    (("labels", "channels", 0, 1, 2), 1 << 40, "labels.channels[0][1]"),
    (("labels", "channels", 0, 1, 2), 16, "channels from 0 to 15"),
    (("labels", "channels", 0, 1, 2), 15, "distinct"),
    (("labels", "channels"), [[[0, 3, 7, 15]] * 2] * 2, "a scale for each"),
    (("labels",), {"channels": [[[0, 3, 7, 15]]], "scales": [[[1, 2, 3, 4]]]}, "3 layers"),
    (("labels", "scales", 2, 0, 3), 0, "labels.scales[2][0]"),
    (("labels", "scales", 2, 0, 3), -1.5, "labels.scales[2][0]"),
    (("labels", "scales", 2, 0, 3), True, "labels.scales[2][0]"),
    (("labels", "scales", 2, 0, 3), 1e-46, "labels.scales[2][0]"),
    (("labels", "scales", 2, 0, 3), 1e39, "labels.scales[2][0]"),
    (("labels", "scales", 2, 0, 3), 10**400, "labels.scales[2][0]"),
    (("labels", "scales", 2, 0, 3), float("nan"), "labels.scales[2][0]"),
    (("labels", "scales", 2, 0, 3), float("inf"), "labels.scales[2][0]"),
]


@pytest.mark.parametrize(("keys", "value", "says"), BAD)
def test_a_damaged_plan_is_refused(
    tmp_path: Path, keys: tuple[Any, ...], value: Any, says: str
) -> None:
    path = tmp_path / "kvplan.json"
    path.write_text(json.dumps(document()))
    KvPlan.load(path).check(tiny_spec("llama"), "0" * 16)
    path.write_text(json.dumps(put(document(), keys, value)))
    refused(KvPlan.load, path, str(path), says)


def test_spans_and_labels_of_two_models(tmp_path: Path) -> None:
    text = put(put(document(), ("spans",), [[None] * 2] * 4), ("model",), {})
    (tmp_path / "plan").write_text(json.dumps(text))
    refused(KvPlan.load, tmp_path / "plan", "as many heads")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "JSON"),
        ("[]", "JSON object"),
        ('{"kvplan": 1, "kvplan": 1}', "twice"),
        ('{"kvplan": 1, "notes": {"a": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}}", "nested"),
        ('{"kvplan": 1, "spans": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested"),
        ('{"kvplan": 1}' + " " * 32_000_000, "32000000"),
        ('{"kvplan": 1, "spans": [[{"window": ' + "9" * 5000 + "}]]}", "JSON"),
    ],
    ids=["empty", "list", "twice", "deep", "deeper", "large", "digits"],
)
def test_no_plan_at_all(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "plan").write_text(text)
    refused(KvPlan.load, tmp_path / "plan", says)


def test_no_file(tmp_path: Path) -> None:
    refused(KvPlan.load, tmp_path / "plan", "no such file")
    refused(KvPlan.load, tmp_path, "cannot be read")


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=12,
)
places = st.sampled_from([keys for keys, _, _ in BAD])


@settings(max_examples=300)
@given(places, json_values)
def test_garbage_in_any_place(keys: tuple[Any, ...], value: Any) -> None:
    with suppress(CheckpointError):
        plan = KvPlan.from_dict(put(document(), keys, value))
        with suppress(CheckpointError):
            plan.check(tiny_spec("llama"), "0" * 16)
        assert 0 < plan.bytes_share(1000) <= 1


@given(st.binary(max_size=200))
def test_garbage_bytes(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("plan") / "kvplan.json"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError):
        KvPlan.load(path)


# -- of a model -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n_layers": 4}, "`model.layers`: needs 4"),
        ({"n_kv_heads": 1}, "`model.kv_heads`: needs 1"),
        ({"head_dim": 32}, "`model.head_dim`: needs 32"),
        ({"model_type": "qwen2"}, "`model.type`: needs qwen2"),
    ],
)
def test_a_plan_of_another_shape(change: dict[str, Any], says: str) -> None:
    spec = dataclasses.replace(tiny_spec("llama"), **change)
    plan = KvPlan.from_dict(document())
    with pytest.raises(CheckpointError, match=says) as caught:
        plan.check(spec, "0" * 16)
    assert "calibrate-kv" in str(caught.value.hint)


@pytest.mark.parametrize("key", ["spans", "labels"])
@pytest.mark.parametrize("change", [{"n_layers": 4}, {"n_kv_heads": 1}, {"head_dim": 8}])
def test_a_plan_of_another_shape_that_does_not_say_so(key: str, change: dict[str, Any]) -> None:
    spec = dataclasses.replace(tiny_spec("llama"), **change)
    plan = KvPlan.from_dict({"kvplan": 1, key: document()[key]})
    plan.check(tiny_spec("llama"), "0" * 16)
    if (key, change) == ("spans", {"head_dim": 8}):
        plan.check(spec)  # spans fit heads of any size
        return
    with pytest.raises(CheckpointError, match=f"`{key}"):
        plan.check(spec)


def test_a_plan_of_other_weights() -> None:
    plan = KvPlan.from_dict(document())
    with pytest.raises(CheckpointError, match=r"`model\.fingerprint`: needs 1234567890abcdef"):
        plan.check(tiny_spec("llama"), "1234567890abcdef")
    plan.check(tiny_spec("llama"))


def test_a_layer_with_a_window_takes_no_span() -> None:
    spec = tiny_spec("qwen2-window")
    KvPlan(spans=[[Span(16, 64)] * 2, [EVERYTHING] * 2, [EVERYTHING] * 2]).check(spec)
    with pytest.raises(CheckpointError, match=r"`spans\[1\]`.* window of its own, 7 tokens"):
        KvPlan(spans=[[Span(16, 64)] * 2] * 3).check(spec)


def test_labels_in_python_are_checked_too() -> None:
    channels, scales = np.zeros((1, 1, 4), np.int64), np.ones((1, 1, 4), np.float32)
    with pytest.raises(CheckpointError, match="int32"):
        KvPlan(labels=Labels(channels, scales))  # type: ignore[arg-type]
    distinct = np.arange(4, dtype=np.int32)[None, None]
    with pytest.raises(CheckpointError, match="a scale for each"):
        KvPlan(labels=Labels(distinct, scales[:, :, :3]))
    with pytest.raises(CheckpointError, match="finite"):
        KvPlan(labels=Labels(distinct, scales * np.nan))


def test_one_model_has_one_fingerprint_whatever_it_is_rounded_to(tmp_path: Path) -> None:
    config = build.config("llama")
    weights = build.random_weights(config)
    source = open_source(build.write_hub(tmp_path / "hub", config, weights))
    print_of_source = fingerprint(source.tensors)
    for format in ("w4a8g32", "bf16"):
        write_packed(source, tmp_path / format, format)
        assert fingerprint(load_packed(tmp_path / format).tensors) == print_of_source
    changed = {**weights, "model.norm.weight": weights["model.norm.weight"] + 0.1}
    other = open_source(build.write_hub(tmp_path / "other", config, changed))
    assert fingerprint(other.tensors) != print_of_source
    rounded = {name: bf16_to_f32(f32_to_bf16(values)) for name, values in weights.items()}
    halves = open_source(build.write_hub(tmp_path / "bf16-hub", config, rounded, "BF16"))
    assert fingerprint(halves.tensors) == print_of_source


def test_no_more_labels_than_the_kernels_take() -> None:
    for count in (64, 68):
        channels = np.tile(np.arange(count, dtype=np.int32), (1, 1, 1))
        labels = Labels(channels, np.ones(channels.shape, np.float32))
        if count == 64:
            KvPlan({"head_dim": 128}, labels)
            continue
        with pytest.raises(CheckpointError, match="a multiple of 4 channels, at most 64, got 68"):
            KvPlan({"head_dim": 128}, labels)

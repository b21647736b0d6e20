"""The report: what it says, and that it fits a terminal."""

from __future__ import annotations

import dataclasses
import json

import pytest

torch = pytest.importorskip("torch", reason="lacewing.nn needs PyTorch")

from torch import nn  # noqa: E402

from lacewing.nn import LayerReport, Report, replace_linear  # noqa: E402


def long_names() -> nn.Module:
    """Names and notes longer than a line."""
    layer: nn.Module = nn.ModuleDict({"projection_of_the_values": nn.Linear(70, 32)})
    for name in ("a_block_with_a_rather_long_name", "the_model", "wrapped_once_more_than_needed"):
        layer = nn.ModuleDict({name: layer, f"{name}_of_kind_that_stays": nn.Bilinear(3, 3, 3)})
    return layer


def test_every_line_fits() -> None:
    report = replace_linear(long_names(), "w8a8g64_sp", machine="scalar")
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 100
    assert any(line.endswith("...") or line.startswith("...") for line in lines)
    assert "instead of w8a8g64_sp" in str(report)
    assert lines[-1] == "1 layer replaced, 3 left alone: 9.0kB of weights are now 4.2kB"


def test_totals_and_lookup() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64), nn.Embedding(4, 4))
    report = replace_linear(model, "w8a8g32")
    assert report.bytes_before == 2 * 64 * 32 * 4
    assert report.bytes_after == sum(layer.packed.nbytes for layer in model[:2])
    assert len(report.replaced) == 2
    assert len(report.left_alone) == 1
    assert report["1"].bits_per_weight == 8.5
    with pytest.raises(KeyError):
        report["3"]


def test_to_dict_is_json() -> None:
    report = replace_linear(nn.Sequential(nn.Linear(64, 32), nn.Embedding(4, 4)), "w8a8g32")
    told = json.loads(json.dumps(report.to_dict()))
    assert told["replaced"] == told["left_alone"] == 1
    assert told["layers"][0]["names"] == ["0"]
    assert told["layers"][0]["shape"] == [32, 64]
    assert told["layers"][1]["reason"] == report["1"].reason
    assert set(told["layers"][0]) == {field.name for field in dataclasses.fields(LayerReport)}


def test_numbers_that_json_has_not() -> None:
    layer = LayerReport(("a",), "Linear", (1, 1), "bf16", 4, 2, error=float("nan"))
    assert Report((layer,)).to_dict()["layers"][0]["error"] is None


def test_frozen() -> None:
    report = replace_linear(nn.Sequential(nn.Linear(64, 32)), "w8a8g32")
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.notes = ()  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        report["0"].format = "bf16"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0B"), (999, "999B"), (1000, "1.0kB"), (65_536, "66kB"), (2_500_000_000_000, "2500GB")],
)
def test_bytes(count: int, text: str) -> None:
    layer = LayerReport(("a",), "Linear", (1, 1), "bf16", count, count, 16.0, 0.0)
    assert str(Report((layer,))).endswith(f"{text} of weights are now {text}")

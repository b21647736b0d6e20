"""Patterns: which layers they name, and what happens to those that name none."""

from __future__ import annotations

from typing import Any

import pytest

from lacewing.errors import RequestError

torch = pytest.importorskip("torch", reason="lacewing.nn needs PyTorch")

from torch import nn  # noqa: E402

from lacewing.nn import replace_linear  # noqa: E402


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(32, 32), nn.Linear(32, 32)


class Mine(nn.Linear):
    pass


def net() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "layers": nn.ModuleList([Attention(), Attention()]),
            "q_proj": nn.Linear(32, 32),
            "head": Mine(32, 16),
            "embed": nn.Embedding(4, 32),
        }
    )


ALL = {
    "layers.0.q_proj",
    "layers.0.k_proj",
    "layers.1.q_proj",
    "layers.1.k_proj",
    "q_proj",
    "head",
}


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("head", {"head"}),
        ("layers.0.q_proj", {"layers.0.q_proj"}),
        ("layers.1", {"layers.1.q_proj", "layers.1.k_proj"}),
        ("layers", ALL - {"q_proj", "head"}),
        ("*.q_proj", {"layers.0.q_proj", "layers.1.q_proj"}),
        ("*q_proj", {"layers.0.q_proj", "layers.1.q_proj", "q_proj"}),
        ("layers.?.k_proj", {"layers.0.k_proj", "layers.1.k_proj"}),
        ("layers.[!0].*", {"layers.1.q_proj", "layers.1.k_proj"}),
        ("re:q_proj", {"q_proj"}),
        (r"re:layers\.\d+\.[qk]_proj", ALL - {"q_proj", "head"}),
        (nn.Linear, ALL),
        (Mine, {"head"}),
        (Attention, ALL - {"q_proj", "head"}),
        (["head", Attention], ALL - {"q_proj"}),
        (iter(["head"]), {"head"}),
    ],
    ids=str,
)
def test_what_a_pattern_names(pattern: Any, names: set[str]) -> None:
    given = list(pattern) if hasattr(pattern, "__next__") else pattern
    only = replace_linear(net(), include=iter(given) if hasattr(pattern, "__next__") else given)
    assert {layer.name for layer in only.replaced} == names
    rest = replace_linear(net(), exclude=given)
    assert {layer.name for layer in rest.replaced} == ALL - names


def test_why_the_others_stay() -> None:
    report = replace_linear(net(), include=Attention, exclude="*.k_proj")
    assert report["head"].reason == "not in `include`"
    assert report["layers.0.k_proj"].reason == "excluded by '*.k_proj'"


def test_formats_per_layer() -> None:
    model = net()
    formats = {"layers.0": "w4a8g32", "*.k_proj": "bf16", Mine: None, nn.Linear: "w8a8"}
    report = replace_linear(model, per_layer=formats, exclude="layers.1.q_proj")
    assert {layer.name: layer.format for layer in report.replaced} == {
        "layers.0.q_proj": "w4a8g32",
        "layers.0.k_proj": "w4a8g32",
        "layers.1.k_proj": "bf16",
        "q_proj": "w8a8",
    }
    assert report["head"].reason == "`per_layer` has None for Mine"
    assert report["layers.1.q_proj"].reason == "excluded by 'layers.1.q_proj'"


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"exclude": "lm_head"}, "`exclude`: 'lm_head' matches no layer", "near matches: head"),
        ({"include": ["head", "*.v_proj"]}, "`include`: '*.v_proj' matches no", ".q_proj"),
        ({"per_layer": {"re:proj": None}}, "`per_layer`: 're:proj' matches no", "q_proj"),
        ({"exclude": nn.Conv2d}, "`exclude`: Conv2d matches no layer", "called like layers.0"),
    ],
    ids=str,
)
def test_a_pattern_without_a_match(options: dict[str, Any], message: str, hint: str) -> None:
    model = net()
    with pytest.raises(RequestError) as error:
        replace_linear(model, **options)
    assert message in str(error.value)
    assert hint in str(error.value.hint)
    assert type(model["q_proj"]) is nn.Linear


def test_a_match_that_is_left_alone_anyway_is_a_match() -> None:
    assert len(replace_linear(net(), exclude=nn.Embedding).replaced) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": 3}, "a pattern is a name, a glob, `re:...` or a class, got 3"),
        ({"exclude": ["head", None]}, "got None"),
        ({"exclude": ""}, "got ''"),
        ({"per_layer": {1: None}}, "`per_layer`: a pattern is"),
        ({"include": "re:("}, "'re:(' is not a regular expression"),
        ({"include": []}, "`include` is empty"),
    ],
    ids=str,
)
def test_what_is_no_pattern(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as error:
        replace_linear(net(), **options)
    assert message in str(error.value)


def test_a_model_without_layers() -> None:
    report = replace_linear(nn.Sequential(nn.ReLU()))
    assert report.layers == ()
    with pytest.raises(RequestError, match="matches no layer") as error:
        replace_linear(nn.Sequential(nn.ReLU()), include="head")
    assert "no layer that could be replaced" in str(error.value.hint)

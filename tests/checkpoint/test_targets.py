"""Expressions in the configs of strangers: which are matched, and which could take too long."""

from __future__ import annotations

import pytest

from lacewing.checkpoint.targets import matches
from lacewing.errors import CheckpointError, UnsupportedModelError

NAME = "model.layers.12.self_attn.q_proj"

ORDINARY = [
    r".*layers\.\d+\..*self_attn\..*_proj.*",
    r".*\.layers\.(\d+)\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj$",
    r"model\.layers\.\d+\.self_attn\.(q|k|v)_proj.*",
    r"model.layers.[0-9]+.self_attn.*",
    r"(?i).*SELF_ATTN.*",
    r"^model\.layers\.\d{1,2}\.[a-z_]+\.q_proj$",
    r".*lm_head|.*embed.*|.*\.q_proj|.*\.k_proj|.*\.v_proj|.*\.o_proj",
    r"(?:model\.)?layers|(model\.)?layers.*",
    r"(?!.*lm_head).*self_attn.*",
    r"model\.layers\.(?P<layer>1[0-9])\..+?_proj",
]
SLOW = [
    r"(?:a|a){40}b",
    r"(?:a?){40}b",
    r"(?:.?){40}b",
    r"(a*){30}b",
    r"(.+)+x",
    r"((?:a+))+x",
    r"(.*,){,9}x",
    r"(?:.{,}){,}x",
    ".{,}" * 5 + "#",
    ".{0,}" * 5 + "#",
    r".*.*.*.*.*#",
    r"\d+\d+\d+\d+\d+#",
    r"\d+a?\d+a?\d+a?\d+a?\d+#",
    r"[^*]+\+[^*]+\+[^*]+\+[^*]+\+[^*]+\+#",
    r"(?i)[A-Z]+a[A-Z]+a[A-Z]+a[A-Z]+a[A-Z]+#",
    "a?" * 40 + "a" * 40,
    "(a|a)" * 40 + "b",
    "(?x)#[\n.*.*.*.*.*.*x#]",
    r"(?#[).*.*.*.*.*.*x(?#])",
    r"(a)\1",
    r"(?P<a>.)(?P=a)",
    r"(a)(?(1)b|c)",
    "a" * 401,
]


@pytest.mark.parametrize("anywhere", [False, True])
@pytest.mark.parametrize("pattern", ORDINARY)
def test_ordinary_expressions(pattern: str, anywhere: bool) -> None:
    wanted = "lm_head" not in pattern or "q_proj" in pattern or "?!" in pattern
    wanted = wanted and not (pattern.startswith("(?:model") and not anywhere)
    assert matches(pattern, NAME, "here", anywhere) == (wanted or pattern.startswith("(?:model"))


@pytest.mark.parametrize("pattern", SLOW)
def test_expressions_that_could_take_long(pattern: str) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot take long") as error:
        matches(pattern, NAME, "here")
    assert error.value.hint


def test_a_match_that_begins_anywhere_is_one_more_repeat() -> None:
    assert not matches(".*a.*a.*a.*#", NAME, "here")
    with pytest.raises(UnsupportedModelError, match="cannot take long"):
        matches(".*a.*a.*a.*#", NAME, "here", anywhere=True)


@pytest.mark.parametrize("pattern", ["(", "a)", "[a", "a{2,1}"])
def test_what_is_no_expression(pattern: str) -> None:
    with pytest.raises(CheckpointError, match="a regular expression"):
        matches(pattern, NAME, "here")


def test_the_length_of_names() -> None:
    assert matches("a+$", "a" * 200, "here")
    with pytest.raises(CheckpointError, match="names of at most 200 characters"):
        matches("a+$", "a" * 201, "here")

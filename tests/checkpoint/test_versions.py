"""Packed directories of every manifest version load for ever, and mean what they meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lacewing import LLM, SamplingParams
from lacewing.formats import FORMATS

V1 = Path(__file__).resolve().parents[1] / "fixtures" / "manifest_v1"
EXPECTED = json.loads((V1 / "answers.json").read_text())


@pytest.mark.parametrize("name", sorted(EXPECTED["answers"]))
def test_version_1_still_answers_the_same(name: str) -> None:
    with LLM(V1 / name) as llm:
        assert llm.model.tensors["model.layers.0.mlp.up_proj.weight"].format == name
        params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
        assert llm.generate([EXPECTED["prompt"]], params)[0].token_ids == EXPECTED["answers"][name]


def test_version_1_has_every_format_of_its_time() -> None:
    assert set(EXPECTED["answers"]) <= set(FORMATS)
    assert len(EXPECTED["answers"]) == 9

"""The reference decoder against `transformers`, an independent computation of every architecture.

Where torch and transformers are installed they are run; elsewhere the logits that they gave, in
`transformers_logits.json`, stand for them. Write that file anew with

    HF_HUB_OFFLINE=1 PYTHONPATH=src:. python tests/models/test_transformers.py
"""

from __future__ import annotations

import importlib.util
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacewing.models import get_spec
from tests.reference import Reference
from tests.tiny import CONFIGS, tiny_spec, tiny_tokens, tiny_weights

STORED = Path(__file__).with_name("transformers_logits.json")
ROWS = (0, 6, 7, 8, 23)  # of 24 tokens: within and beyond a window of 7
COLUMNS = 32  # of 131 logits a row
TOKENS = tiny_tokens(24)

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None,
    reason="needs torch and transformers: pip install torch transformers",
)


def transformers_model(name: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = deepcopy(CONFIGS[name])  # transformers writes into nested dictionaries
    config = AutoConfig.for_model(config.pop("model_type"), **config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    gemma = config.model_type.startswith("gemma")
    state = {
        key: torch.from_numpy(value - 1 if gemma and key.endswith("norm.weight") else value)
        for key, value in tiny_weights(name).items()
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    model.tie_weights()
    return model


def transformers_logits(name: str) -> np.ndarray:
    import torch

    with torch.no_grad():
        logits: np.ndarray = transformers_model(name)(torch.tensor([TOKENS])).logits[0].numpy()
    return logits


@pytest.mark.parametrize("name", CONFIGS)
def test_reference_equals_stored_logits(name: str) -> None:
    stored = json.loads(STORED.read_text())[name]
    logits = Reference(tiny_spec(name), tiny_weights(name)).logits(TOKENS)
    for row, expected in zip(ROWS, stored, strict=True):
        assert_close(logits[row, :COLUMNS], np.array(expected))


@needs_transformers
@pytest.mark.parametrize("name", CONFIGS)
def test_reference_equals_transformers(name: str) -> None:
    logits = Reference(tiny_spec(name), tiny_weights(name)).logits(TOKENS)
    assert_close(logits, transformers_logits(name))


@needs_transformers
@pytest.mark.parametrize("name", CONFIGS)
def test_the_newer_spelling_of_a_config_gives_the_same_spec(name: str) -> None:
    newer = json.loads(json.dumps(transformers_model(name).config.to_dict()))
    assert "rope_parameters" in newer
    assert "rope_theta" not in newer
    spec, expected = get_spec(newer), tiny_spec(name)
    assert spec.layers == expected.layers
    assert spec.tensor_shapes() == expected.tensor_shapes()
    for rope, other in zip(spec.ropes, expected.ropes, strict=True):
        np.testing.assert_allclose(rope.inv_freq, other.inv_freq, rtol=1e-12)
        assert rope.attention_factor == pytest.approx(other.attention_factor)
    for field in ("attention_scale", "embedding_scale", "activation", "norm_eps", "max_context"):
        assert getattr(spec, field) == getattr(expected, field)


def assert_close(logits: np.ndarray, expected: np.ndarray) -> None:
    """Both are f32 through some ten matrices; logits are near 1. An error of any part is near 1,
    too: f32 sums in another order differ by some 1e-6."""
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=2e-5)


if __name__ == "__main__":
    found = {
        name: transformers_logits(name)[list(ROWS), :COLUMNS].astype(float) for name in CONFIGS
    }
    rounded = {name: np.round(logits, 6).tolist() for name, logits in found.items()}
    STORED.write_text(json.dumps(rounded, separators=(",", ":")).replace("],", "],\n") + "\n")

"""Queries and keys are balanced by their norms: nothing changes but what rounding loses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lacewing.checkpoint.kvplan import KvPlan, Labels
from lacewing.engine import runner as runners
from lacewing.engine.balance import balance_of
from lacewing.engine.engine import Engine
from lacewing.engine.runner import Runner
from lacewing.formats import pack
from tests.engine.fakes import ByteDecoder
from tests.tiny import tiny_spec, tiny_tokens, tiny_weights

Array = np.ndarray[Any, Any]


def uneven(name: str) -> dict[str, Array]:
    """Weights whose norms make some channels of the keys large, and of the queries small."""
    rng = np.random.default_rng(0)
    weights = dict(tiny_weights(name))
    for key, weight in tiny_weights(name).items():
        if key.endswith("k_norm.weight"):
            uneven = np.tile(np.exp2(rng.uniform(-1, 5, weight.size // 2)), 2).astype(np.float32)
            weights[key] = weight * uneven
            other = key.replace("k_norm", "q_norm")
            weights[other] = weights[other] / uneven
    return weights


def logits(name: str, kv: str, count: int = 200, plan: KvPlan | None = None) -> Array:
    weights = uneven(name)
    tensors = {k: pack(w, "w8a8g32") if w.ndim == 2 else w for k, w in weights.items()}
    before = {k: w.copy() for k, w in tensors.items() if not hasattr(w, "parts")}
    spec = replace(tiny_spec(name), max_context=1024)
    runner = Runner.load(spec, tensors, 1024, 1, None, kv, plan)
    assert all((tensors[k] == w).all() for k, w in before.items())  # the caller's stay
    return np.concatenate(list(Engine(runner, ByteDecoder, ()).logits(tiny_tokens(count))))


def labels(name: str) -> KvPlan:
    spec = tiny_spec(name)
    shape = (spec.n_layers, spec.n_kv_heads, 4)
    channels = np.argsort(np.random.default_rng(1).random((*shape[:2], spec.head_dim)), axis=-1)
    scales = np.random.default_rng(2).uniform(0.01, 0.1, shape).astype(np.float32)
    return KvPlan({}, Labels(channels[..., :4].astype(np.int32), scales))


@pytest.fixture
def unbalanced(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda: monkeypatch.setattr(runners, "balance_heads", lambda *_: None)


def test_pairs_share_a_power_of_two() -> None:
    q = np.array([1, 1, 4, 0, 1, 1, 4, 0], np.float32)
    k = np.array([16, -3, 1, 1, 16, 5, 1, 1], np.float32)
    assert balance_of(q, k).tolist() == [4, 2, 0.5, 1, 4, 2, 0.5, 1]
    assert balance_of(q, np.zeros_like(k)).tolist() == [1] * 8
    assert balance_of(q, k * 2**40).max() == 256


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
@pytest.mark.parametrize("kv", ["f32", "bf16", "f32+topk:1/8"])
def test_floats_keep_their_bits(name: str, kv: str, unbalanced: Any) -> None:
    """And the choice of blocks, whose labels are scaled with them."""
    count = 620 if "topk" in kv else 200
    plan = labels(name) if "topk" in kv else None
    found = logits(name, kv, count, plan)
    unbalanced()
    assert (found == logits(name, kv, count, plan)).all()


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_rounding_loses_less(name: str, unbalanced: Any) -> None:
    exact, balanced = logits(name, "f32"), logits(name, "int8")
    unbalanced()
    plain = logits(name, "int8")
    errors = [np.square(each - exact, dtype=np.float64).mean() for each in (balanced, plain)]
    assert errors[0] < 0.5 * errors[1]

"""Queries and keys are balanced by their norms: nothing changes but what rounding loses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lacewing.checkpoint.kvplan import KvPlan, Labels
from lacewing.engine import runner as runners
from lacewing.engine.balance import balance_heads, balance_of
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


def test_pairs_share_a_factor() -> None:
    q = np.array([1, 1, 4, 0, 1, 1, 4, 0], np.float32)
    k = np.array([16, -3, 1, 1, 16, 4, 1, 1], np.float32)
    found = balance_of(q, k)
    assert found[[0, 2, 3]].tolist() == [4, 0.5, 1]
    assert found[1] == np.float32(np.sqrt(5 / np.sqrt(2)))
    assert (found[:4] == found[4:]).all()
    assert balance_of(q, np.zeros_like(k)).tolist() == [1] * 8
    assert balance_of(q, k * 2**40).max() == 256


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
@pytest.mark.parametrize("kv", ["f16", "f32", "bf16+topk:1/8"])
def test_floats_keep_their_bits(name: str, kv: str, unbalanced: Any) -> None:
    plan = labels(name) if "topk" in kv else None
    found = logits(name, kv, 200, plan)
    unbalanced()
    assert (found == logits(name, kv, 200, plan)).all()


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_scores_and_labels_stay(name: str) -> None:
    """Query times key is what it was, and so is a label's code: key over scale."""
    spec, plan = tiny_spec(name), labels(name)
    assert plan.labels is not None
    tensors = uneven(name)
    rows = spec.n_layers * spec.n_kv_heads
    before = plan.labels.scales.reshape(rows, -1)
    kv = {"scales": before, "channels": plan.labels.channels.reshape(rows, -1)}
    found = {key: weight.copy() for key, weight in tensors.items()}
    balance_heads(spec, found, kv)
    for i in range(spec.n_layers):
        q, k = (f"model.layers.{i}.self_attn.{each}_norm.weight" for each in "qk")
        np.testing.assert_allclose(found[q] * found[k], tensors[q] * tensors[k], rtol=3e-7)
        assert not np.allclose(found[k], tensors[k])
        for h in range(i * spec.n_kv_heads, (i + 1) * spec.n_kv_heads):
            each = kv["channels"][h]
            codes, was = found[k][each] / kv["scales"][h], tensors[k][each] / before[h]
            np.testing.assert_allclose(codes, was, rtol=3e-7)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_rounding_loses_less(name: str, unbalanced: Any) -> None:
    exact, balanced = logits(name, "f32"), logits(name, "int8")
    unbalanced()
    plain = logits(name, "int8")
    errors = [np.square(each - exact, dtype=np.float64).mean() for each in (balanced, plain)]
    assert errors[0] < 0.5 * errors[1]

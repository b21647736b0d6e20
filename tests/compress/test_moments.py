"""Sums over tokens against direct ones, in float64, of what hooks on the whole block see."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

torch = pytest.importorskip("torch")

from lacewing.compress import path as path_module  # noqa: E402
from lacewing.compress.decoder import STAGES  # noqa: E402
from lacewing.compress.moments import Moments  # noqa: E402
from lacewing.compress.path import Path  # noqa: E402
from lacewing.errors import RecipeError  # noqa: E402
from tests.compress.stored import captured, decoder_of, noise  # noqa: E402

NAMES = ("llama-bias", "qwen2-window", "qwen3", "gemma3")
WINDOWS, TOKENS = 5, 12
COUNT = WINDOWS * TOKENS


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(path_module, "fast_products", nullcontext)
    monkeypatch.setattr(path_module, "_AT_ONCE", 2 * TOKENS)


def two_paths(name):
    """A dense block, and one of other weights that reads something else."""
    decoder = decoder_of(name)
    dense, other = decoder.block(1), decoder.block(1)
    for i, layer in enumerate(layer for stage in STAGES for layer in stage):
        weight = other.linear(layer).weight.data
        weight += 0.1 * weight.std() * noise(*weight.shape, seed=i)
    x = noise(WINDOWS, TOKENS, decoder.spec.hidden_size)
    seen = x + 0.2 * noise(*x.shape, seed=1)
    return Path(dense, x, torch.empty_like(x)), Path(other, seen, torch.empty_like(x))


def off(found, wanted):
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def flat(x):
    return x.flatten(0, 1).double()


@pytest.mark.parametrize("name", NAMES)
def test_direct_sums(name):
    dense, path = two_paths(name)
    with torch.no_grad():
        wanted, found = captured(dense.block, dense.x)[0], captured(path.block, path.x)[0]
        for stage, layers in enumerate(STAGES):
            if stage == 2:
                dense.pass_attention()
                path.pass_attention()
            moments = Moments.measure(stage, path, dense)
            alone = Moments.measure(stage, path, None)
            x, goal = flat(found[layers[0]]), flat(wanted[layers[0]])
            assert moments.tokens == COUNT
            # Sums of 60 products in f32, and inputs that went through other batches.
            assert off(moments.hessian, x.T @ x / COUNT) < 1e-5
            assert off(moments.lost, (goal - x).T @ x / COUNT) < 1e-4
            assert (alone.hessian == moments.hessian).all()
            assert alone.lost is None
            assert alone.stream is None
            if stage in (0, 2) or name == "gemma3":  # there a norm comes before the stream
                assert moments.stream is None
                continue
            before = (dense.x, path.x) if stage == 1 else (dense.y, path.y)
            stream = flat(before[0]) - flat(before[1])
            assert off(moments.stream, stream.T @ x / COUNT) < 1e-4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_activations_that_are_not_finite(bad):
    _, path = two_paths("llama")
    path.block.linear("mlp.up_proj").weight.data[3] = bad
    with torch.no_grad():
        path.pass_attention()
        Moments.measure(2, path, None)
        with pytest.raises(RecipeError, match=r"`model\.layers\.1\.mlp\.down_proj`: .* input 3"):
            Moments.measure(3, path, None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_of_the_dense_model_that_are_not_finite(bad):
    dense, path = two_paths("llama")
    dense.block.linear("mlp.up_proj").weight.data[3] = bad
    with torch.no_grad():
        for each in (dense, path):
            each.pass_attention()
        with pytest.raises(RecipeError, match=r"layers\.1\.mlp\.down_proj`: .* the dense model"):
            Moments.measure(3, path, dense)

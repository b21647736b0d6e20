"""Folds of a whole block: what it computes stays, and what was done is told."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from lacewing.compress.decoder import STAGES  # noqa: E402
from lacewing.compress.folding import fold_block  # noqa: E402
from lacewing.compress.path import Path  # noqa: E402
from lacewing.compress.recipe import Recipe, Rule  # noqa: E402
from lacewing.errors import RecipeError  # noqa: E402
from tests.compress.stored import LAYERS, decoder_of, noise  # noqa: E402
from tests.tiny import CONFIGS  # noqa: E402

FIRST = [f"model.layers.1.{names[0]}" for names in STAGES]


def path_of(name):
    """A block whose inputs are unlike in size."""
    decoder = decoder_of(name)
    block = decoder.block(1)
    block.linear("mlp.up_proj").weight.data[::7] *= 12
    block.linear("self_attn.v_proj").weight.data[::5] *= 9
    for norm in block.norms.values():
        norm.data[::6] *= 8
    x = noise(6, 16, decoder.spec.hidden_size)
    return Path(block, x, torch.empty_like(x))


def fold(path, solver="columns", **asked):
    recipe = Recipe((Rule("*", "w4a8g32", solver),), **asked)
    with torch.no_grad():
        return fold_block(path, dict.fromkeys(LAYERS, recipe.rules[0]), recipe)


@pytest.mark.parametrize("asked", [{"smooth": "awq"}, {"smooth": "smoothquant", "reorder": True}])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_block_computes_what_it_did(name, asked):
    path = path_of(name)
    before = {layer: path.block.linear(layer).weight.detach().clone() for layer in LAYERS}
    x = path.x.clone()
    with torch.no_grad():
        wanted = path.block(x)
        changes = fold(path, **asked)
        found = path.block(x)
    # f32, by the same sums of factors that are rounded once more, and in another order.
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 2e-5
    assert (path.x == x).all()
    changed = [
        layer for layer in LAYERS if (path.block.linear(layer).weight != before[layer]).any()
    ]
    assert changed
    assert any(change.choice is not None for change in changes)


def test_what_was_done_is_told():
    changes = fold(path_of("llama"), smooth="awq", reorder=True)
    kinds = [(change.name, change.kind) for change in changes]
    assert kinds == [
        (FIRST[0], "awq"),
        (FIRST[1], "awq"),
        (FIRST[1], "reorder"),
        (FIRST[2], "awq"),
        (FIRST[3], "awq"),
        (FIRST[3], "reorder"),
    ]
    for change in changes:
        if change.choice is None:
            assert change.after == change.before
        else:
            assert change.after < change.before
    assert isinstance(changes[0].choice, float)


def test_channels_are_ordered_as_smoothing_left_them():
    """Rounded to nearest, both are judged by one measure."""
    changes = fold(path_of("llama"), "nearest", smooth="smoothquant", reorder=True)
    for smoothing, order in ((changes[1], changes[2]), (changes[4], changes[5])):
        assert smoothing.choice is not None
        assert order.before == pytest.approx(smoothing.after, rel=1e-4)


def test_nothing_asked_nothing_done():
    path = path_of("llama")
    path.y.fill_(torch.nan)
    assert fold(path) == []
    assert path.y.isnan().all()


def test_what_comes_after_is_judged_as_it_will_be_rounded():
    """The column solver makes up for errors, round to nearest does not."""
    by_columns, to_nearest = (
        fold(path_of("llama"), s, smooth="awq") for s in ("columns", "nearest")
    )
    assert all(a.before < b.before for a, b in zip(by_columns, to_nearest, strict=True))


def test_activations_that_are_not_finite():
    path = path_of("llama")
    path.block.linear("mlp.gate_proj").weight.data[3] = 1e30
    with pytest.raises(RecipeError, match=r"`model\.layers\.1\.mlp\.down_proj`: .*finite activ"):
        fold(path, smooth="awq")

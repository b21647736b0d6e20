"""Sparsity spread over layers: the total stays, patterns stay."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from lacewing.compress import spread as module  # noqa: E402
from lacewing.compress.recipe import Calibration, Recipe, Rule  # noqa: E402
from lacewing.compress.spread import spread_sparsity  # noqa: E402
from tests.compress.stored import decoder_of, windows_of  # noqa: E402
from tests.tiny import tiny_weights  # noqa: E402

RECIPE = Recipe(
    (
        Rule("*.o_proj", "w4a8g64_24"),
        Rule("*.v_proj", "w4a8g64"),
        Rule("*.mlp.*", "w4a8g64_sp", "columns", 0.6),
        Rule("*", "bf16_sp", "wanda", 0.3),
    ),
    Calibration(288, 24),
)


def uneven(name):
    """A block of which much can go, and one with outliers."""
    weights = tiny_weights(name)
    changed = {}
    for key, value in weights.items():
        if key.startswith("model.layers.0.mlp") and value.ndim == 2:
            changed[key] = value.copy()
            changed[key][:, ::2] *= 0.01
        if key.startswith("model.layers.2.") and value.ndim == 2:
            changed[key] = value.copy()
            changed[key][:2] *= 20
    return decoder_of(name, changed)


def spread(name, method, windows=None, recipe=RECIPE):
    decoder = uneven(name)
    ids = windows_of(6) if windows is None else windows
    with torch.no_grad():
        return spread_sparsity(decoder, ids, recipe.plan(decoder.spec), method)


def dropped(shares, names):
    counts = {name: tiny_weights("llama")[name].size for name in names}
    return sum(shares[name] * counts[name] for name in names)


@pytest.mark.parametrize("method", ["owl", "curves"])
def test_the_total_stays(method):
    shares = spread("llama", method)
    plan = RECIPE.plan(decoder_of("llama").spec)
    assert shares.keys() == {name for name, rule in plan.items() if rule.prunes}
    free = [name for name in shares if not name.endswith("o_proj.weight")]
    assert all(shares[name] == 0.5 for name in shares if name not in free)
    wanted = {name: plan[name].target for name in free}
    # Sums of some twenty products in f64.
    assert math.isclose(dropped(shares, free), dropped(wanted, free), rel_tol=1e-12)
    assert all(0 <= share < 1 for share in shares.values())
    assert max(shares.values()) - min(shares.values()) > 0.05
    assert spread("llama", method) == shares


def test_owl_spreads_each_sparsity_apart():
    shares = spread("llama", "owl")
    for layers, target in ((("q", "k"), 0.3), (("up", "gate", "down"), 0.6)):
        where = "self_attn" if target == 0.3 else "mlp"
        names = [
            [f"model.layers.{i}.{where}.{layer}_proj.weight" for layer in layers] for i in range(3)
        ]
        ratios = [{shares[name] for name in block} for block in names]
        assert all(len(ratio) == 1 for ratio in ratios)
        assert len({max(ratio) for ratio in ratios}) == 3
        flat = [name for block in names for name in block]
        wanted = dict.fromkeys(flat, target)
        assert math.isclose(dropped(shares, flat), dropped(wanted, flat), rel_tol=1e-12)


def test_curves_take_what_costs_least():
    shares = spread("llama", "curves")
    easy = [shares[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    others = [shares[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert min(easy) > max(others)


def test_a_part_of_the_text_is_enough(monkeypatch):
    monkeypatch.setattr(module, "_TOKENS", 50)
    windows = windows_of(6)
    assert spread("llama", "curves", windows) == spread("llama", "curves", windows[[0, 3]])


def test_nothing_is_run_where_patterns_are_all():
    recipe = Recipe((Rule("*", "w4a8g64_24"),), Calibration(288, 24))
    decoder = decoder_of("llama")
    decoder.tensor = None  # type: ignore[method-assign, assignment]
    shares = spread_sparsity(decoder, windows_of(2), recipe.plan(decoder.spec), "owl")
    assert set(shares.values()) == {0.5}
    assert len(shares) == 21

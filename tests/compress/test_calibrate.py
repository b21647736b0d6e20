"""The loop over blocks: every architecture, what is told and kept, and what it is good for."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from lacewing.compress import calibrate as module  # noqa: E402
from lacewing.compress import path as path_module  # noqa: E402
from lacewing.compress.moments import Moments  # noqa: E402
from lacewing.compress.problem import Problem  # noqa: E402
from lacewing.compress.recipe import Recipe, Reconstruct, Rule  # noqa: E402
from lacewing.errors import RecipeError  # noqa: E402
from lacewing.formats import PackedTensor  # noqa: E402
from tests.compress import stored  # noqa: E402
from tests.compress.stored import LAYERS, decoder_of, lost, output_of, recipe_of, windows_of  # noqa: E402
from tests.tiny import CONFIGS, tiny_weights  # noqa: E402


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """The same on every CPU; what bf16 products change is said in test_path.py."""
    monkeypatch.setattr(path_module, "fast_products", nullcontext)


RECIPES = {
    "llama": recipe_of("w4a8g64_sp", "admm", 0.5, refine=1),
    "llama-bias": recipe_of("w4a8g32", "columns", reconstruct=Reconstruct(2, 1e-4)),
    "llama-linear": recipe_of("bf16_sp", "wanda", 0.5, ratios="owl"),
    "llama-llama3": recipe_of("w8a8_b16x1", "blocks", 0.5),
    "llama-yarn": recipe_of("w8a8g64_24", "magnitude", correct=0),
    "qwen2": recipe_of("w2a8g64", "nearest"),
    "qwen2-window": recipe_of("w4a8g32z", "columns", act_order=True, refine=1, smooth="awq"),
    "qwen3": recipe_of("w1.6a8", "columns", correct=1.0),
    "gemma3": recipe_of("w4a8g64_sp", "wanda", 0.5, reorder=True, smooth="smoothquant"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture(name, tmp_path):
    decoder, recipe = decoder_of(name), RECIPES[name]
    found = stored.run(tmp_path / "w", decoder, recipe)
    spec = decoder.spec
    layers = [f"model.layers.{i}.{layer}" for i in range(spec.n_layers) for layer in LAYERS]
    assert [told.split()[0] for told in found.told] == layers
    shares = [float(told.split()[1]) for told in found.told]
    assert 0 < shares[0] < shares[1] <= sorted(shares)[-1] == shares[-1] == 1
    shapes = {k: v for k, v in spec.tensor_shapes().items() if k.startswith("model.layers.")}
    if not recipe.needs_data:  # vectors stay as the model has them
        shapes = {key: shape for key, shape in shapes.items() if len(shape) == 2}
    assert {key: tuple(value.shape) for key, value in found.tensors.items()} == shapes
    weights = found.weights()
    assert [report.name for report in found.reports] == layers
    rule = recipe.rules[0]
    for report in found.reports:
        packed = found.tensors[f"{report.name}.weight"]
        assert isinstance(packed, PackedTensor)
        assert report.format == packed.format == rule.format
        assert report.solver == rule.solver
        assert report.bits_per_weight == packed.bits_per_weight
        zeros = (weights[f"{report.name}.weight"] == 0).mean()
        assert report.sparsity == pytest.approx(zeros, abs=1e-12)
        least = 0.5 / weights[f"{report.name}.weight"].shape[1]  # of a row whole weights go
        assert report.sparsity >= report.target - least
        assert 0 < report.error < (1 if rule.format in ("w2a8g64", "w1.6a8") else 0.5)
        assert report.seconds > 0
        assert report.damping == ""
    if recipe.ratios == "uniform":
        assert {report.target for report in found.reports} == {rule.target}
    if not recipe.needs_data:
        return
    # What the last block wrote is what the packed model computes, up to f32.
    again = output_of(decoder_of(name, weights), windows_of())
    assert float((again - found.output).abs().max() / again.abs().max()) < 1e-4


def held_out(tmp_path, **recipes):
    """The error on other windows of what each recipe makes."""
    seen, other = windows_of(32), windows_of(12, seed=5)
    decoder = decoder_of("llama")
    dense = output_of(decoder, other)
    return {
        key: lost(
            dense,
            output_of(
                decoder_of("llama", stored.run(tmp_path / key, decoder, recipe, seen).weights()),
                other,
            ),
        )
        for key, recipe in recipes.items()
    }


def test_what_each_part_is_good_for(tmp_path):
    plain = recipe_of("w3a8g64", correct=0)
    errors = held_out(
        tmp_path,
        nearest=recipe_of("w3a8g64", "nearest"),
        columns=plain,
        correct=replace(plain, correct=0.5),
        reconstruct=replace(plain, correct=0.5, reconstruct=Reconstruct(24, 2e-3)),
    )
    assert errors["columns"] < 0.9 * errors["nearest"]
    assert errors["correct"] < errors["columns"]
    assert errors["reconstruct"] <= errors["correct"]  # never worse; small models are hard to move


def test_pruning_by_columns_is_better_than_by_magnitude(tmp_path):
    errors = held_out(
        tmp_path,
        magnitude=recipe_of("bf16_sp", "magnitude", 0.5),
        columns=recipe_of("bf16_sp", "columns", 0.5),
    )
    assert errors["columns"] < errors["magnitude"]


# -- goes on after an end of any kind -------------------------------------------------------------

MIXED = Recipe(
    (
        Rule("*.v_proj", "w8a8g64", "nearest"),
        Rule("*.mlp.*", "bf16_sp", "wanda", 0.5),
        Rule("*", "w3a8g64", "columns"),
    ),
    recipe_of("bf16").calibration,
    ratios="owl",
    smooth="awq",
    correct=0.5,
    reconstruct=Reconstruct(2, 1e-3),
)


class Killed(BaseException):
    pass


def test_it_goes_on_to_the_same_bytes(tmp_path):
    decoder = decoder_of("llama-bias")
    whole = stored.run(tmp_path / "whole", decoder, MIXED)
    for last in (3, 7, 12, 21):  # in a block, between two, and before the last is kept
        finished = len(list((tmp_path / "w").glob("block-*.json")))
        layers = iter(range(7 * finished + 1, 22))

        def tell(name, done, of, last=last, layers=layers):
            if next(layers) == last:
                raise Killed

        with pytest.raises(Killed):
            stored.run(tmp_path / "w", decoder, MIXED, progress=tell)
    found = stored.run(tmp_path / "w", decoder, MIXED)
    assert found.told[0].startswith("model.layers.2.self_attn.q_proj 0.")
    assert found.bytes() == whole.bytes()
    assert (found.output == whole.output).all()
    plain = [[replace(report, seconds=0) for report in each.reports] for each in (found, whole)]
    assert plain[0] == plain[1]
    assert found.changes == whole.changes
    kinds = [change.kind for change in found.changes]
    assert kinds == ["awq", "awq", "awq", "awq", "reconstruct"] * 3
    assert [change.name for change in found.changes][4::5] == [
        f"model.layers.{i}" for i in range(3)
    ]


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "value", "says"),
    [
        ("model.layers.1.mlp.up_proj.weight", np.nan, "`model.layers.1.mlp.up_proj`: .*weights"),
        ("model.layers.1.mlp.up_proj.weight", -np.inf, "`model.layers.1.mlp.up_proj`: .*weights"),
        ("model.layers.0.mlp.down_proj.weight", 1e6, "down_proj`: w4a8g32 .* up to 524032, got"),
        ("model.embed_tokens.weight", np.nan, "`model.embed_tokens.weight`: w8a8g32 needs finite"),
        ("model.layers.0.input_layernorm.weight", np.inf, "0.self_attn.q_proj`: .* activations"),
        ("model.layers.0.self_attn.v_proj.bias", np.nan, "0.self_attn.o_proj`: .* activations"),
    ],
)
def test_a_damaged_model_is_told_by_its_layer(tensor, value, says, tmp_path):
    weights = tiny_weights("llama-bias")
    changed = weights[tensor].copy()
    changed[3] = value
    decoder = decoder_of("llama-bias", {tensor: changed})
    with pytest.raises(RecipeError, match=says):
        stored.run(tmp_path / "w", decoder, recipe_of("w4a8g32", "columns"))


def test_a_norm_that_nothing_reads_again(tmp_path):
    """The last norm of the last block makes no layer's inputs."""
    name = "model.layers.6.post_feedforward_layernorm.weight"
    changed = tiny_weights("gemma3")[name].copy()
    changed[3] = np.nan
    with pytest.raises(RecipeError, match=f"`{name}`: needs finite values"):
        stored.run(tmp_path / "w", decoder_of("gemma3", {name: changed}), recipe_of("w8a8g32"))


def test_dead_channels_and_few_tokens(tmp_path):
    changed = {}
    for name in ("input_layernorm", "post_attention_layernorm"):
        key = f"model.layers.1.{name}.weight"
        changed[key] = tiny_weights("llama")[key].copy()
        changed[key][[0, 50]] = 0
    decoder = decoder_of("llama", changed)
    found = stored.run(tmp_path / "w", decoder, recipe_of("w4a8g32"), windows_of(1, 8))
    assert all(np.isfinite(value).all() for value in found.weights().values())
    assert all(report.error < 0.1 for report in found.reports)
    assert all(report.damping == "" for report in found.reports)


def test_more_damping_is_told(tmp_path, monkeypatch):
    """A Hessian that is not positive by a little."""

    class Shaken(Moments):
        @staticmethod
        def measure(stage, path, dense):
            found = Moments.measure(stage, path, dense)
            if stage == 2:
                mean = found.hessian.diagonal().mean()
                least = torch.linalg.eigvalsh(found.hessian)[0]
                found.hessian.diagonal().sub_(least + 0.05 * mean)
            return found

    monkeypatch.setattr(module, "Moments", Shaken)
    found = stored.run(tmp_path / "w", decoder_of("llama"), recipe_of("w4a8g32"))
    for report in found.reports:
        shaken = report.name.endswith(("gate_proj", "up_proj"))
        assert ("0.11 of its mean diagonal" in report.damping) == shaken
        assert shaken or report.damping == ""


@pytest.mark.parametrize("reconstruct", [None, Reconstruct(2, 1e-3)])
def test_the_error_is_against_the_dense_weight(tmp_path, monkeypatch, reconstruct):
    """Not against the corrected one that the solver aims at."""
    seen, weights = {}, tiny_weights("llama")
    measure, solve = Moments.measure, module.solve

    def watch(stage, path, dense):
        seen["hessian"] = measure(stage, path, dense).hessian
        return measure(stage, path, dense)

    def note(solver, problem, *rest):
        solution = solve(solver, problem, *rest)
        w = torch.from_numpy(weights[f"{problem.name}.weight"]).double()
        h, off = seen["hessian"].double(), solution.values().double() - w
        seen[problem.name] = float(((off @ h) * off).sum() / ((w @ h) * w).sum())
        return solution

    monkeypatch.setattr(module.Moments, "measure", watch)
    monkeypatch.setattr(module, "solve", note)
    recipe = recipe_of("w3a8g64", correct=1.0, reconstruct=reconstruct)
    for report in stored.run(tmp_path / "w", decoder_of("llama"), recipe).reports:
        assert report.error == pytest.approx(seen[report.name], rel=1e-3)


def test_the_dense_twin_where_sparse_does_not_pay(tmp_path):
    """On AVX2 a share of 0.4 pays in 8 bits, on AVX-512 one of 0.77."""
    recipe = recipe_of("w8a8g64_sp", "columns", 0.5)
    decoder = decoder_of("llama")
    found = {m: stored.run(tmp_path / m, decoder, recipe, machine=m) for m in ("avx512", "avx2")}
    for machine, format in (("avx512", "w8a8g64_sp"), ("avx2", "w8a8g64")):
        each = found[machine]
        assert {report.format for report in each.reports} == {format}
        for report in each.reports:
            packed = each.tensors[f"{report.name}.weight"]
            assert (packed.format, packed.bits_per_weight) == (format, report.bits_per_weight)
            assert report.density == pytest.approx(1 - report.sparsity)
            assert report.instead_of == (None if machine == "avx512" else "w8a8g64_sp")
    weights = [each.weights() for each in found.values()]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_one_block_at_a_time(tmp_path, monkeypatch):
    """A block is gone before the next one is read."""
    alive, most = weakref.WeakSet(), []
    block = stored.Decoder.block

    def watch(self, index):
        gc.collect()
        most.append(len(alive))
        alive.add(found := block(self, index))
        return found

    monkeypatch.setattr(stored.Decoder, "block", watch)
    stored.run(tmp_path / "w", decoder_of("llama"), recipe_of("w4a8g32"))
    assert most == [0, 0, 0]


def test_what_needs_no_data(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "Moments", None)
    rules = (Rule("*.mlp.*", "w8a8g64_sp", "magnitude", 0.5), Rule("*", "w4a8g32", "nearest"))
    decoder = decoder_of("llama")
    found = stored.run(tmp_path / "w", decoder, Recipe(rules), torch.empty(0, 8, dtype=torch.int64))
    weights = tiny_weights("llama")
    for report in found.reports:
        name = f"{report.name}.weight"
        values, w = found.weights()[name], weights[name]
        off = np.square(values - w).sum() / np.square(w).sum()
        assert report.error == pytest.approx(off, rel=1e-4)
        assert report.sparsity >= report.target
    assert not Recipe(rules).needs_data
    assert replace(Recipe(rules), reorder=True).needs_data


def test_only_joint_solvers_invert(tmp_path, monkeypatch):
    made = []
    factor = Problem._factor
    monkeypatch.setattr(Problem, "_factor", lambda p, h: made.append(p.name) or factor(p, h))
    rules = (
        Rule("*.mlp.*", "bf16_sp", "wanda", 0.5),
        Rule("*.o_proj", "w4a8g32", act_order=True),
        Rule("*.q_proj", "w4a8g32", "nearest"),
        Rule("*", "w4a8g32"),
    )
    stored.run(tmp_path / "w", decoder_of("llama"), Recipe(rules, recipe_of("bf16").calibration))
    assert [name.rsplit(".", 1)[-1] for name in made] == ["k_proj", "o_proj"] * 3


def test_the_compressed_path_reads_the_stored_embedding(tmp_path):
    decoder, ids = decoder_of("llama"), windows_of()
    plan = recipe_of("w4a8g32").plan(decoder.spec)
    outs = {name: torch.empty(*ids.shape, decoder.spec.hidden_size) for name in ("dense", "other")}
    module._embed(decoder, ids, plan, outs)
    table = stored.stored_embedding(decoder, "w8a8g32")
    dense = tiny_weights("llama")["model.embed_tokens.weight"]
    assert (outs["other"].numpy() == table[ids.numpy()]).all()
    assert (outs["dense"].numpy() == dense[ids.numpy()]).all()
    assert (table != dense).any()


@pytest.mark.parametrize(
    ("format", "fast"), [("w8a8g32", False), ("bf16", False), ("w4a8g32", True)]
)
def test_fine_weights_are_worth_exact_products(tmp_path, monkeypatch, format, fast):
    used = []

    def products():
        used.append(True)
        return nullcontext()

    monkeypatch.setattr(path_module, "fast_products", products)
    stored.run(tmp_path / "w", decoder_of("llama"), recipe_of(format))
    assert bool(used) == fast


def test_one_hessian_for_the_layers_of_a_stage(tmp_path, monkeypatch):
    seen = []
    solve = module.solve

    def watch(solver, problem, *rest):
        seen.append((problem.name, problem.hessian, problem.inverse_factor))
        return solve(solver, problem, *rest)

    monkeypatch.setattr(module, "solve", watch)
    stored.run(tmp_path / "w", decoder_of("llama"), recipe_of("w8a8", "columns"))
    for i in range(0, len(seen), 7):
        stages = (seen[i : i + 3], seen[i + 3 : i + 4], seen[i + 4 : i + 6], seen[i + 6 : i + 7])
        for stage in stages:  # all are kept in `seen`, so that no two have one id by chance
            assert len({id(hessian) for _, hessian, _ in stage}) == 1
            assert len({id(factor) for _, _, factor in stage}) == 1
    assert len({id(hessian) for _, hessian, _ in seen}) == 12

"""Recipes: what they say, what they refuse, and which rule takes which weight."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lacewing.compress.recipe import PRESETS, Calibration, Recipe, Reconstruct, Rule
from lacewing.errors import RecipeError
from tests.tiny import CONFIGS, tiny_spec

WHOLE: dict[str, Any] = {
    "name": "mixed",
    "rules": [
        {"match": "*.down_proj", "format": "w8a8g64", "act_order": True},
        {"match": "re:.*\\.(q|k)_proj", "format": "w8a8g64_24", "solver": "wanda"},
        {"match": "lm_head", "format": "bf16"},
        {"match": "*", "format": "w4a8g64_sp", "sparsity": 0.5, "refine": 2},
    ],
    "calibration": {"tokens": 4096, "window": 512, "seed": 3},
    "ratios": "owl",
    "smooth": "awq",
    "reorder": True,
    "correct": 0,
    "reconstruct": {"steps": 50, "rate": 1e-4},
}
YAML = """
name: mixed
rules:
  - {match: "*.down_proj", format: w8a8g64, act_order: true}
  - match: 're:.*\\.(q|k)_proj'
    format: w8a8g64_24
    solver: wanda
  - {match: lm_head, format: bf16}
  - {match: "*", format: w4a8g64_sp, sparsity: 0.5, refine: 2}
calibration: {tokens: 4096, window: 512, seed: 3}
ratios: owl
smooth: awq
reorder: true
correct: 0
reconstruct: {steps: 50, rate: 1e-4}  # which YAML 1.1 takes for text
"""


def one(**changes: Any) -> dict[str, Any]:
    return {"rules": [{"match": "*", "format": "w4a8g64", **changes}]}


def test_the_same_recipe_in_every_form() -> None:
    made = Recipe(
        rules=(
            Rule("*.down_proj", "w8a8g64", act_order=True),
            Rule("re:.*\\.(q|k)_proj", "w8a8g64_24", "wanda"),
            Rule("lm_head", "bf16"),
            Rule("*", "w4a8g64_sp", sparsity=0.5, refine=2),
        ),
        calibration=Calibration(4096, 512, 3),
        ratios="owl",
        smooth="awq",
        reorder=True,
        correct=0,
        reconstruct=Reconstruct(50, 1e-4),
        name="mixed",
    )
    assert Recipe.from_dict(WHOLE) == made
    assert Recipe.from_dict(made.to_dict()) == made
    pytest.importorskip("yaml", reason="PyYAML is an extra")
    assert Recipe.from_yaml(YAML) == made


def test_the_digest_says_what_is_asked_for() -> None:
    recipe = Recipe.from_dict(WHOLE)
    assert recipe.digest() == Recipe.from_dict(WHOLE).digest()
    assert len(recipe.digest()) == 64
    others = [
        replace(recipe, correct=1),
        replace(recipe, calibration=Calibration(4096, 512, 4)),
        replace(recipe, rules=recipe.rules[1:]),
    ]
    assert len({recipe.digest(), *(other.digest() for other in others)}) == 4


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("model", CONFIGS)
def test_presets_fit_every_model(name: str, model: str) -> None:
    pytest.importorskip("yaml", reason="PyYAML is an extra")
    recipe = Recipe.preset(name)
    assert recipe.name == name
    spec = tiny_spec(model)
    plan = recipe.plan(spec)
    shapes = spec.tensor_shapes()
    assert list(plan) == [tensor for tensor, shape in shapes.items() if len(shape) == 2]
    size = 32 if name in ("safe", "sparse50") else 64
    assert plan["model.embed_tokens.weight"].format == f"w8a8g{size}"
    assert plan["model.embed_tokens.weight"].solver == "nearest"


def test_first_and_last_block() -> None:
    ends = (Rule("*.{first}.*", "w4a8g64"), Rule("re:.*\\.{last}\\..*", "w8a8"))
    plan = Recipe((*ends, Rule("*", "w3a8g64"))).plan(tiny_spec("llama"))
    formats = [plan[f"model.layers.{i}.mlp.up_proj.weight"].format for i in range(3)]
    assert formats == ["w4a8g64", "w3a8g64", "w8a8"]


def test_the_first_match_wins() -> None:
    plan = Recipe.from_dict(WHOLE).plan(tiny_spec("llama"))
    layer = "model.layers.1."
    assert plan[f"{layer}mlp.down_proj.weight"].format == "w8a8g64"
    assert plan[f"{layer}self_attn.k_proj.weight"].format == "w8a8g64_24"
    assert plan[f"{layer}self_attn.k_proj.weight"].target == 0.5
    assert plan[f"{layer}self_attn.v_proj.weight"].format == "w4a8g64_sp"
    assert plan["lm_head.weight"].format == "bf16"
    assert plan["lm_head.weight"].solver == "nearest"


def test_a_star_leaves_embedding_and_head_alone() -> None:
    recipe = Recipe((Rule("*", "w2a8g64"),))
    plan = recipe.plan(tiny_spec("llama"))
    assert {plan[f"{name}.weight"].format for name in ("model.embed_tokens", "lm_head")} == {
        "w8a8g32"
    }
    named = Recipe((Rule("re:model.embed_tokens|lm_head", "w4a8g32"), *recipe.rules))
    assert named.plan(tiny_spec("llama"))["lm_head.weight"].format == "w4a8g32"


def test_a_rule_for_the_head_may_follow_a_star() -> None:
    recipe = Recipe((Rule("*", "w2a8g64"), Rule("lm_head", "bf16")))
    assert recipe.plan(tiny_spec("llama"))["lm_head.weight"].format == "bf16"


@pytest.mark.parametrize(
    ("value", "says", "hint"),
    [
        ([], "`recipe`: needs a mapping", None),
        ({"rules": []}, "at least one rule", None),
        ({"rules": {}}, "`rules`: needs a list", None),
        ({**one(), "calibrate": {}}, "no key 'calibrate'", "did you mean `calibration`?"),
        (one(sparsty=0.5), "`rules[0]`: there is no key 'sparsty'", "did you mean `sparsity`?"),
        ({"rules": [{"format": "bf16"}]}, "`rules[0]`: needs `match`", None),
        (one(match=""), "text as `match`", None),
        (one(match=7), "text as `match`", None),
        (one(match="re:("), "a regular expression", None),
        (one(format="w4a8g63"), "no weight format 'w4a8g63'", "did you mean"),
        (one(format=None), "text as `format`", None),
        (one(solver="column"), "a `solver` of nearest", "did you mean `columns`?"),
        (one(sparsity=1), "[0, 1)", None),
        (one(sparsity=-0.1), "[0, 1)", None),
        (one(sparsity="half"), "[0, 1)", None),
        (one(sparsity=float("nan")), "[0, 1)", None),
        (one(sparsity=True), "[0, 1)", None),
        (one(act_order=1), "true or false", None),
        (one(refine=-1), "whole number", None),
        (one(refine=True), "whole number", None),
        (one(format="w2a8g64", sparsity=0.5), "zero is not on its grid", "symmetric"),
        (one(format="w4a8g32z", sparsity=0.5), "zero is not on its grid", "symmetric"),
        (one(format="w8a8g64_24", sparsity=0.6), "sparsity 0.5", "w8a8g64_sp"),
        (one(format="w4a8g64_sp"), "a sparsity for the sparse format", "w4a8g64"),
        (one(solver="nearest", sparsity=0.5), "prunes nothing", "magnitude"),
        (one(solver="nearest", format="w8a8g64_24"), "prunes nothing", "magnitude"),
        (one(solver="wanda"), "a sparsity for solver `wanda`", "nearest"),
        (one(solver="blocks", sparsity=0.5), "a format of blocks", "w8a8_b16x1"),
        (one(solver="nearest", act_order=True), "`act_order`", None),
        (one(solver="nearest", refine=1), "uses data for `refine`", "columns"),
        ({**one(), "ratios": "owls"}, "a `ratios` of uniform, owl", "did you mean `owl`?"),
        ({**one(), "ratios": "owl"}, "a sparsity to spread", "sparsity"),
        ({**one(), "smooth": 3}, "a `smooth` of none", None),
        ({**one(), "reorder": "yes"}, "true or false", None),
        ({**one(), "correct": 1.5}, "[0, 1]", None),
        ({**one(), "correct": True}, "[0, 1]", None),
        ({**one(), "name": 3}, "`name`", None),
        ({**one(), "reconstruct": {"steps": 3}}, "`reconstruct`: needs `rate`", None),
        ({**one(), "reconstruct": {"steps": 0, "rate": 0.1}}, "`steps`", None),
        ({**one(), "reconstruct": {"steps": 1, "rate": 0}}, "`rate` in (0, 1]", None),
        ({**one(), "reconstruct": {"steps": 1, "rate": 2}}, "(0, 1]", None),
        ({**one(), "calibration": {"tokens": 100}}, "tokens for one window of 512", None),
        ({**one(), "calibration": {"window": 1}}, "`window`", None),
        ({**one(), "calibration": {"seed": 1.5}}, "`seed`", None),
    ],
)
def test_what_cannot_be_meant(value: Any, says: str, hint: str | None) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(value)
    assert says in str(caught.value)
    assert hint is None or hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("*", "*.down_proj"),
        ("*", "re:.*down_proj"),
        ("*.mlp.*", "*.mlp.up_*"),
        ("*.mlp.*", "*.mlp.*"),
        ("re:a|b", "re:a|b"),
        ("*lm_head*", "lm_head"),
    ],
)
def test_a_rule_that_never_matches(first: str, second: str) -> None:
    with pytest.raises(RecipeError, match=r"rules\[1\].*can never match"):
        Recipe((Rule(first, "w8a8g64"), Rule(second, "w4a8g64"), Rule("x", "bf16")))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("*.mlp.up_*", "*.mlp.*"),
        ("*.mlp.?", "*.mlp.*"),
        ("*", "lm_head"),
        ("model.layers.1.*", "model.layers.1*"),
        ("re:.*", "*"),
    ],
)
def test_a_rule_that_may_match(first: str, second: str) -> None:
    Recipe((Rule(first, "w8a8g64"), Rule(second, "w4a8g64")))


@pytest.mark.parametrize(
    ("rules", "says", "hint"),
    [
        ((Rule("*.mlp.*", "w8a8g64"),), "self_attn.q_proj`: no rule matches", 'match: "*"'),
        ((Rule("*.dwn_proj", "w8a8g64"), Rule("*", "bf16")), "matches no weight", "down_proj"),
        ((Rule("*norm", "w8a8g64"), Rule("*", "bf16")), "matches no weight", ""),
        (
            (Rule("lm_head", "w8a8g64", sparsity=0.5), Rule("*", "bf16")),
            "`lm_head`: embedding and head are not pruned",
            "lm_head",
        ),
    ],
)
def test_rules_that_do_not_fit_the_model(rules: Any, says: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe(rules).plan(tiny_spec("llama"))
    assert says in str(caught.value)
    assert hint in (caught.value.hint or "")


def test_a_head_that_is_the_embedding() -> None:
    recipe = Recipe((Rule("lm_head", "bf16"), Rule("*", "bf16")))
    with pytest.raises(RecipeError, match="matches no weight") as caught:
        recipe.plan(tiny_spec("gemma3"))
    assert "model.embed_tokens" in (caught.value.hint or "")


def test_rows_that_are_too_long() -> None:
    with pytest.raises(RecipeError, match=r"`mlp\.up`: w8a8 holds rows of up to 131072"):
        Recipe((Rule("*", "w8a8"),)).plan({"mlp.up.weight": (4, 1 << 18)})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "needs a mapping"),
        ("rules: [", "line 1"),
        ("rules: &a []\nname: *a", "anchors"),
        ("name: a\nname: b", "line 2: `name` is there twice"),
        ("? [a]\n: b", "needs a word as key"),
        ("rules: !!python/object/apply:os.system [ls]", "line 1"),
        ("[" * 10000, "nested at most 16 deep"),
        ("a" * 70000, "characters"),
        ("name: 2020-99-99", "YAML"),
    ],
)
def test_yaml_that_is_none(text: str, says: str) -> None:
    pytest.importorskip("yaml", reason="PyYAML is an extra")
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(text)
    assert says in str(caught.value)


def test_files_and_presets_by_name(tmp_path: Any) -> None:
    pytest.importorskip("yaml", reason="PyYAML is an extra")
    path = tmp_path / "my.yaml"
    path.write_text(YAML)
    assert Recipe.open(path) == Recipe.from_dict(WHOLE)
    assert Recipe.open("safe") == Recipe.preset("safe")
    with pytest.raises(RecipeError, match="a preset or a YAML file") as caught:
        Recipe.open("balance")
    assert caught.value.hint == "did you mean balanced?"
    path.write_text("rule: []")
    with pytest.raises(RecipeError, match=r"my\.yaml: `recipe`: there is no key 'rule'"):
        Recipe.open(path)
    path.write_bytes(b"name: \xff")
    with pytest.raises(RecipeError, match="UTF-8"):
        Recipe.open(path)
    with pytest.raises(RecipeError, match=r"my\.yml"):
        Recipe.open(tmp_path / "my.yml")


def test_the_recipe_of_the_guide() -> None:
    pytest.importorskip("yaml", reason="PyYAML is an extra")
    guide = Path(__file__).resolve().parents[2] / "docs" / "guides" / "compress.md"
    (text,) = re.findall(r"^```yaml\n(.*?)^```", guide.read_text(), re.M | re.S)
    recipe = Recipe.from_yaml(text)
    plan = recipe.plan(tiny_spec("llama"))
    assert plan["model.layers.1.mlp.up_proj.weight"].sparsity == 0.5


# -- what is odd ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rules", [None, 3, "*", [{"match": "re:" + "(" * 5000 + ")" * 5000, "format": "w8a8g32"}]]
)
def test_odd_rules(rules):
    with pytest.raises(RecipeError, match="rule"):
        Recipe.from_dict({"rules": rules})
    if not isinstance(rules, list):
        with pytest.raises(RecipeError, match="`rules`: needs a list"):
            Recipe(rules)


def test_a_count_that_no_expression_can_have():
    with pytest.raises(RecipeError, match="too large"):
        Rule("re:a{99999999999999999999}", "w8a8g32")


def test_the_text_of_a_recipe_as_its_path():
    with pytest.raises(RecipeError, match="a preset or a YAML file"):
        Recipe.open("rules:\n" + "  - {match: '*', format: w8a8g32}\n" * 200)


def test_a_rule_that_never_wins():
    """Each of the first two takes a part of what the third one names."""
    rules = (
        Rule("*.q_proj", "w4a8g32"),
        Rule("re:.*\\.[ko]_proj", "w8a8g32"),
        Rule("re:.*\\.[qko]_proj", "w4a8g64"),
        Rule("*", "w4a8g32"),
    )
    shapes = {
        f"model.layers.0.self_attn.{name}_proj.weight": (32, 32) for name in ("q", "k", "v", "o")
    }
    with pytest.raises(RecipeError, match=r"`re:.*\[qko\]_proj`: never wins: `\*\.q_proj`"):
        Recipe(rules).plan(shapes)
    assert len(Recipe((*rules[:2], rules[3])).plan(shapes)) == 4

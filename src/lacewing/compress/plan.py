"""Rules against the tensors of a model: which one compresses what."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from lacewing.checkpoint.files import shown
from lacewing.checkpoint.tensors import FLOATS_TO, TABLES
from lacewing.compress.recipe import Rule
from lacewing.errors import RecipeError
from lacewing.formats import get_format
from lacewing.formats.base import ROW

__all__ = ["layer_of", "make_plan"]

_BLOCK = re.compile(r"model\.layers\.(\d+)\.")


def layer_of(tensor: str) -> str:
    """The name of a layer, given that of its weight: what rules and errors call it."""
    return tensor.removesuffix(".weight")


def make_plan(rules: Sequence[Rule], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Rule]:
    """See `Recipe.plan`."""
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    n_layers = _block_count(matrices)
    plan: dict[str, Rule] = {}
    winners: dict[Rule, Rule] = {}
    for name, shape in matrices.items():
        matching = [rule for rule in rules if _takes(rule, name, n_layers)]
        for each in matching:
            winners[each] = each if each is matching[0] else winners.get(each, matching[0])
        rule = matching[0] if matching else _default(name)
        if rule is None:
            raise RecipeError(
                f"`{layer_of(name)}`: no rule matches it",
                hint='end the rules with one for the rest: `match: "*"`',
            )
        plan[name] = _for_table(name, rule) if name in TABLES else rule
        _check_shape(name, shape, rule)
    _check_used(rules, winners, [layer_of(name) for name in matrices])
    return plan


def _block_count(names: Iterable[str]) -> int:
    numbers = (int(found[1]) for found in map(_BLOCK.match, names) if found)
    return 1 + max(numbers, default=-1)


def _takes(rule: Rule, tensor: str, n_layers: int) -> bool:
    if tensor in TABLES and not rule.names_tables:
        return False
    return rule.matches(layer_of(tensor), n_layers)


def _default(tensor: str) -> Rule | None:
    return Rule(layer_of(tensor), FLOATS_TO, "nearest") if tensor in TABLES else None


def _for_table(tensor: str, rule: Rule) -> Rule:
    if rule.prunes:
        raise RecipeError(
            f"`{layer_of(tensor)}`: embedding and head are not pruned, rule `{shown(rule.match)}`"
            f" has sparsity {rule.target:g}",
            hint=f"give it a rule of its own before: `match: {layer_of(tensor)}, format: w8a8g32`",
        )
    return replace(rule, solver="nearest", act_order=False, refine=0)


def _check_shape(tensor: str, shape: tuple[int, ...], rule: Rule) -> None:
    if get_format(rule.format).group_size == ROW and shape[1] > ROW:
        raise RecipeError(
            f"`{layer_of(tensor)}`: {rule.format} holds rows of up to {ROW} inputs, got {shape[1]}",
            hint="use a format with groups, such as `w8a8g64`",
        )


def _check_used(rules: Sequence[Rule], winners: Mapping[Rule, Rule], layers: Sequence[str]) -> None:
    """winners: of every rule that matches something, itself, or one that takes what it matches."""
    for rule in rules:
        winner = winners.get(rule)
        if winner is rule:
            continue
        if winner is not None:
            raise RecipeError(
                f"rule `{shown(rule.match)}`: never wins: `{shown(winner.match)}` before it takes"
                " weights that it matches, and others the rest",
                hint="the first rule that matches wins: put the general one last",
            )
        near = difflib.get_close_matches(rule.match.removeprefix("re:"), layers, 3, cutoff=0.4)
        hint = f"near matches: {', '.join(near)}" if near else f"names are like {layers[-1]}"
        if rule.names_tables and "lm_head" not in layers:
            hint = "the model's head is its embedding, `model.embed_tokens`"
        raise RecipeError(f"rule `{shown(rule.match)}`: matches no weight of this model", hint=hint)

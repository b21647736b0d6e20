"""Smoothing and channel order, folded into a block before any of its layers is rounded."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lacewing.compress.decoder import STAGES
from lacewing.compress.folds import expand
from lacewing.compress.path import Path, tokens_at_once
from lacewing.compress.problem import Problem, check_hessian
from lacewing.compress.recipe import JOINT, Recipe, Rule
from lacewing.compress.reorder import Reordering, reorder_stage
from lacewing.compress.rounding import Inputs, conditional_variance
from lacewing.compress.session import Change
from lacewing.compress.smooth import Smoothing, smooth_stage
from lacewing.formats import get_format

__all__ = ["fold_block"]

_ROWS = 512
"""Tokens on which the rounding of activations is judged."""
_ORDERED = (1, 3)
"""Stages whose channels may change places within the block."""


def fold_block(path: Path, rules: Mapping[str, Rule], recipe: Recipe) -> list[Change]:
    """Chooses and folds what `recipe` asks for, in place, stage by stage; returns what was done.
    rules: of every layer of the block, by names such as `mlp.down_proj`. Uses `path.y`.

    Raises RecipeError, naming the layer, for activations that are not finite.
    """
    done: list[Change] = []
    if recipe.smooth == "none" and not recipe.reorder:
        return done
    spec = path.block.spec
    for stage, names in enumerate(STAGES):
        kinds = [get_format(rules[name].format) for name in names]
        by_columns = all(rules[name].solver in JOINT for name in names)
        where = f"model.layers.{path.block.index}.{names[0]}"
        if stage == 2:
            path.pass_attention()
        inputs = _read(path, stage, by_columns)
        if recipe.smooth != "none":
            found = smooth_stage(path.block, stage, kinds, inputs, recipe.smooth)
            inputs = inputs.divided(expand(spec, stage, found.scales))
            done.append(_change(where, found.method, found.alpha, found))
        if recipe.reorder and stage in _ORDERED:
            order = reorder_stage(path.block, stage, kinds, inputs)
            done.append(_change(where, "reorder", order.key, order))
    return done


def _change(
    name: str, kind: str, choice: float | str | None, found: Smoothing | Reordering
) -> Change:
    before, after = (x if math.isfinite(x) else None for x in (found.before, found.after))
    return Change(name, kind, choice, before, after)


def _read(path: Path, stage: int, by_columns: bool) -> Inputs:
    """What the layers of a stage read, over all windows."""
    k = path.block.linear(STAGES[stage][0]).in_features
    hessian, absmax = torch.zeros(k, k), torch.zeros(k)
    rows: list[Tensor] = []
    count = 0
    total = path.x.shape[0] * path.x.shape[1]
    for part in tokens_at_once(*path.x.shape[:2]):
        x = path.inputs(stage, part)[0].flatten(0, 1)
        hessian.addmm_(x.t(), x)
        absmax = torch.maximum(absmax, x.abs().amax(0))
        rows.append(x[:: max(1, total // _ROWS)].clone())
        count += len(x)
    hessian /= count
    name = f"model.layers.{path.block.index}.{STAGES[stage][0]}"
    check_hessian(name, hessian)
    problem = Problem(name, path.block.linear(STAGES[stage][0]).weight, hessian, count)
    known = conditional_variance(problem) if by_columns else None
    return Inputs(hessian, absmax, torch.cat(rows), known)

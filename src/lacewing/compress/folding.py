"""Smoothing and channel order, folded into a block before any of its layers is rounded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lacewing.compress.decoder import STAGES
from lacewing.compress.folds import expand
from lacewing.compress.path import Path, tokens_at_once
from lacewing.compress.problem import Problem
from lacewing.compress.recipe import Recipe
from lacewing.compress.reorder import Reordering, reorder_stage
from lacewing.compress.rounding import Inputs, conditional_variance
from lacewing.compress.smooth import Smoothing, smooth_stage
from lacewing.formats import get_format

__all__ = ["fold_block"]

_ROWS = 512
"""Tokens on which the rounding of activations is judged."""
_ORDERED = (1, 3)
"""Stages whose channels may change places within the block."""


def fold_block(
    path: Path, formats: Mapping[str, str], recipe: Recipe
) -> list[Smoothing | Reordering]:
    """Chooses and folds what `recipe` asks for, in place, stage by stage; returns what was done.
    formats: of every layer of the block, by names such as `mlp.down_proj`. Uses `path.y`."""
    done: list[Smoothing | Reordering] = []
    if recipe.smooth == "none" and not recipe.reorder:
        return done
    by_columns = any(rule.solver != "nearest" for rule in recipe.rules)
    spec = path.block.spec
    for stage, names in enumerate(STAGES):
        kinds = [get_format(formats[name]) for name in names]
        if stage == 2:
            path.pass_attention()
        inputs = _read(path, stage, by_columns)
        if recipe.smooth != "none":
            found = smooth_stage(path.block, stage, kinds, inputs, recipe.smooth)
            inputs = inputs.divided(expand(spec, stage, found.scales))
            done.append(found)
        if recipe.reorder and stage in _ORDERED:
            done.append(reorder_stage(path.block, stage, kinds, inputs))
    return done


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
    problem = Problem(name, path.block.linear(STAGES[stage][0]).weight, hessian, count)
    known = conditional_variance(problem) if by_columns else None
    return Inputs(hessian, absmax, torch.cat(rows), known)

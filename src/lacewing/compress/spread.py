"""A model's sparsity spread over its layers: those that suffer more keep more.

One pass of the dense model over some of the calibration text, before anything is compressed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lacewing.compress.decoder import STAGES, Decoder
from lacewing.compress.moments import Moments
from lacewing.compress.path import Path
from lacewing.compress.plan import layer_of
from lacewing.compress.problem import Problem
from lacewing.compress.ratios import curve_ratios, error_curve, outlier_share, owl_ratios
from lacewing.compress.recipe import Rule
from lacewing.formats import get_format

__all__ = ["spread_sparsity"]

_TOKENS = 8192
"""Of the calibration text, which are enough to tell layers apart."""
_SPARSITIES = (0.0, 0.2, 0.35, 0.5, 0.65, 0.75, 0.85, 0.95)


def spread_sparsity(
    decoder: Decoder, windows: Tensor, plan: Mapping[str, Rule], method: str
) -> dict[str, float]:
    """The sparsity of every matrix that its rule prunes, the total of all of them as the rules say.

    method: `owl`, which spreads it over blocks by their outliers (arXiv:2310.05175), apart for
    matrices of each sparsity, or `curves`, over all matrices by how their error grows. Matrices of
    formats with a pattern of their own keep its sparsity.
    """
    fixed = {n: r.target for n, r in plan.items() if r.prunes and not _free(r)}
    free = {n: r for n, r in plan.items() if r.prunes and _free(r)}
    if not free:
        return fixed
    seen = _some(windows)
    costs: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    x = decoder.embed(seen, decoder.embedding())
    for index in range(decoder.spec.n_layers):
        path = Path(decoder.block(index), x, torch.empty_like(x))
        for name, problem in _problems(path):
            if name in free:
                counts[name] = problem.weight.numel()
                costs[name] = _cost(problem, free[name], method)
        path.pass_mlp()
        x = path.y
    if method == "owl":
        groups: dict[float, dict[str, list[float]]] = {}
        for name, rule in free.items():
            groups.setdefault(rule.target, {})[name] = costs[name]
        for target, group in groups.items():
            fixed |= _owl(group, counts, target)
        return fixed
    total = sum(free[n].target * counts[n] for n in free) / sum(counts.values())
    return fixed | curve_ratios(costs, _SPARSITIES, counts, total)


def _some(windows: Tensor) -> Tensor:
    """By an even stride: windows of one file lie side by side."""
    count = min(len(windows), max(1, _TOKENS // windows.shape[1]))
    return windows[torch.arange(count) * len(windows) // count]


def _free(rule: Rule) -> bool:
    return get_format(rule.format).fixed_sparsity is None


def _problems(path: Path) -> Iterator[tuple[str, Problem]]:
    """Of the layers of a block, one stage's Hessian at a time."""
    for stage, names in enumerate(STAGES):
        if stage == 2:
            path.pass_attention()
        moments = Moments.measure(stage, path, None)
        for layer in names:
            name = f"model.layers.{path.block.index}.{layer}.weight"
            weight = path.block.linear(layer).weight.detach()
            yield name, Problem(layer_of(name), weight, moments.hessian, moments.tokens)


def _cost(problem: Problem, rule: Rule, method: str) -> list[float]:
    if method == "owl":
        return [outlier_share(problem.weight, problem.diagonal)]
    return error_curve(problem, get_format(rule.format), _SPARSITIES)


def _owl(
    costs: Mapping[str, list[float]], counts: Mapping[str, int], total: float
) -> dict[str, float]:
    """One ratio for all of these matrices that are in one block, as in the paper."""
    blocks: dict[str, list[str]] = {}
    for name in costs:
        blocks.setdefault(".".join(name.split(".")[:3]), []).append(name)
    weights = {block: sum(counts[n] for n in names) for block, names in blocks.items()}
    shares = {
        block: sum(costs[n][0] * counts[n] for n in names) / weights[block]
        for block, names in blocks.items()
    }
    ratios = owl_ratios(shares, weights, total)
    return {name: ratios[block] for block, names in blocks.items() for name in names}

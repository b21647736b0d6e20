"""Block after block: what its layers read in the compressed model, and codes that change its
outputs least.

Two paths go through the model side by side: that of the dense model, and that of the compressed
one, with all blocks so far as they will be. A block is compressed in four stages
(`decoder.STAGES`); the layers of a stage are solved before the next one is fed. Activations
`[windows, tokens, hidden]` lie in files (`session.py`); in memory are one block of each path and
the Hessian of one stage.

    for every block
        fold smoothing scales and channel orders into it      smooth.py, reorder.py
        for every stage
            H, C, R of its inputs over all windows            `Moments`
            for every layer: target, solver, codes            target.py, solve.py
        descend on the block's output                         reconstruct.py
        send both paths on; keep codes and activations        session.py
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lacewing.compress.columns import Solution
from lacewing.compress.decoder import STAGES, Decoder
from lacewing.compress.folding import fold_block
from lacewing.compress.grid import Grid
from lacewing.compress.moments import Moments
from lacewing.compress.path import Path, tokens_at_once
from lacewing.compress.problem import DAMPING, Problem
from lacewing.compress.recipe import Recipe, Rule
from lacewing.compress.reconstruct import reconstruct
from lacewing.compress.refine import refine
from lacewing.compress.session import Change, LayerReport, Packed, Session
from lacewing.compress.solvers import solve
from lacewing.compress.spread import spread_sparsity
from lacewing.compress.target import corrected
from lacewing.errors import RecipeError
from lacewing.formats import get_format

__all__ = ["compress_blocks"]

Progress = Callable[[str, int, int], None]
"""Called with the name of a layer, and how many are done of how many."""


def compress_blocks(
    decoder: Decoder,
    windows: Tensor,
    plan: Mapping[str, Rule],
    recipe: Recipe,
    session: Session,
    progress: Progress | None = None,
) -> None:
    """Compresses every block that `session` has not finished, and leaves it there.

    windows: token ids, int64 `[windows, tokens]`. plan: the rule of every matrix.

    Raises RecipeError, naming the layer, for activations that are not finite and for Hessians that
    cannot be inverted; CheckpointError where the disk is full.
    """
    with torch.no_grad():
        _compress_blocks(decoder, windows, plan, recipe, session, progress)


def _compress_blocks(
    decoder: Decoder,
    windows: Tensor,
    plan: Mapping[str, Rule],
    recipe: Recipe,
    session: Session,
    progress: Progress | None,
) -> None:
    names = ["compressed"]
    if recipe.correct > 0 or recipe.reconstruct is not None:
        names.append("dense")
    if session.finished == 0:
        _embed(decoder, windows, [session.activations(name)[0] for name in names])
    shares = _shares(decoder, windows, plan, recipe, session)
    layers = decoder.spec.n_layers * sum(len(stage) for stage in STAGES)
    done = session.finished * sum(len(stage) for stage in STAGES)
    for index in range(session.finished, decoder.spec.n_layers):
        work = _Work(decoder, index, plan, shares, recipe, session, names)
        for name in work.stages():
            done += 1
            if progress is not None:
                progress(name, done, layers)
        packed, reports = work.finish()
        session.finish_block(index, packed, reports, work.changes)


def _embed(decoder: Decoder, windows: Tensor, outs: Sequence[Tensor]) -> None:
    table = decoder.embedding()
    for part in tokens_at_once(*windows.shape):
        x = decoder.embed(windows[part], table)
        for out in outs:
            out[part] = x


def _shares(
    decoder: Decoder, windows: Tensor, plan: Mapping[str, Rule], recipe: Recipe, session: Session
) -> dict[str, float]:
    """The sparsity of every matrix that is pruned."""
    wanted = {name: rule.target for name, rule in plan.items() if rule.prunes}
    if recipe.ratios == "uniform" or not wanted:
        return wanted
    return session.remember(
        "shares", lambda: spread_sparsity(decoder, windows, plan, recipe.ratios)
    )


class _Work:
    """One block under way."""

    def __init__(
        self,
        decoder: Decoder,
        index: int,
        plan: Mapping[str, Rule],
        shares: Mapping[str, float],
        recipe: Recipe,
        session: Session,
        names: Sequence[str],
    ) -> None:
        self.index, self.recipe = index, recipe
        self.plan, self.shares = plan, shares
        self.prefix = f"model.layers.{index}."
        self.path = Path(decoder.block(index), *session.activations("compressed"))
        for name in _layers():
            grid = Grid(get_format(self._rule(name).format))
            grid.check(f"{self.prefix}{name}", self._weight(name))
        rules = {name: self._rule(name) for name in _layers()}
        self.changes = fold_block(self.path, rules, recipe)
        self.dense: Path | None = None
        if "dense" in names:
            twin = copy.deepcopy(self.path.block)
            self.dense = Path(twin, *session.activations("dense"))
        self.solutions: dict[str, Solution] = {}
        self.errors: dict[str, float] = {}
        self.damping: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    def _rule(self, name: str) -> Rule:
        return self.plan[f"{self.prefix}{name}.weight"]

    def _weight(self, name: str) -> Tensor:
        """Of a layer: that of the dense model, until it is solved."""
        return self.path.block.linear(name).weight.detach()

    def stages(self) -> Iterator[str]:
        """Solves layer after layer; yields the name of each when it is done."""
        for stage, names in enumerate(STAGES):
            dense = self.dense if self.recipe.correct > 0 else None
            found = Moments.measure(stage, self.path, dense)
            first = f"{self.prefix}{names[0]}"
            base = Problem(first, self._weight(names[0]), found.hessian, found.tokens)
            for name in names:
                self._solve(name, base, found)
                yield f"{self.prefix}{name}"
            if stage == 1:
                for path in self._paths():
                    path.pass_attention()

    def _paths(self) -> list[Path]:
        return [path for path in (self.path, self.dense) if path is not None]

    def _solve(self, name: str, base: Problem, found: Moments) -> None:
        begin = time.perf_counter()
        rule = self._rule(name)
        if rule.solver not in ("nearest", "magnitude"):
            _ = base.inverse_factor  # made once for all layers of the stage
        problem = base.aiming(self._weight(name), f"{self.prefix}{name}")
        if found.lost is not None and rule.solver != "nearest":
            problem = corrected(problem, found.lost, found.stream, self.recipe.correct)
        sparsity = self.shares.get(f"{self.prefix}{name}.weight", rule.target)
        grid = Grid(get_format(rule.format))
        solution = solve(rule.solver, problem, grid, sparsity, rule.act_order)
        if rule.refine:
            mask = solution.values() != 0 if rule.prunes else None
            solution = refine(problem, solution, mask, rule.refine)
        values = solution.values()
        self.errors[name] = problem.error(values)
        self.damping[name] = problem.damping
        self.path.block.linear(name).weight.data = values
        self.solutions[name] = solution
        self.seconds[name] = time.perf_counter() - begin

    def finish(self) -> tuple[dict[str, Packed], list[LayerReport]]:
        """Sends both paths on; the packed tensors and the reports of the block."""
        if self.dense is not None:
            self.dense.pass_mlp()
        if self.recipe.reconstruct is not None:
            self._reconstruct()
        else:
            self.path.pass_mlp()
        packed: dict[str, Packed] = {}
        reports = []
        for name in _layers():
            solution = self.solutions[name]
            grid = solution.grid
            codes = grid.codes(solution.levels, solution.scales)
            tensor = grid.format.pack(codes)
            packed[f"{self.prefix}{name}.weight"] = tensor
            reports.append(self._report(name, solution, tensor.bits_per_weight))
        for name, values in self._vectors():
            packed[f"{self.prefix}{name}"] = values
        return packed, reports

    def _vectors(self) -> Iterator[tuple[str, np.ndarray[Any, np.dtype[np.float32]]]]:
        """Weights of norms, and biases, as they are after folding."""
        block = self.path.block
        found = {f"{name.replace('/', '.')}.weight": norm for name, norm in block.norms.items()}
        biases = ((f"{name}.bias", block.linear(name).bias) for name in _layers())
        for name, values in (*found.items(), *biases):
            if values is not None:
                yield name, _finite(f"{self.prefix}{name}", values.detach()).numpy()

    def _reconstruct(self) -> None:
        assert self.dense is not None and self.recipe.reconstruct is not None
        masks = {
            name: solution.values() != 0 if self._rule(name).prunes else None
            for name, solution in self.solutions.items()
        }
        with torch.enable_grad():
            found = reconstruct(
                self.path.block,
                self.solutions,
                self.path.x,
                self.dense.y,
                steps=self.recipe.reconstruct.steps,
                rate=self.recipe.reconstruct.rate,
                seed=self.recipe.calibration.seed + self.index,
                masks=masks,
            )
        self.solutions.update(found.solutions)
        where = self.prefix.removesuffix(".")
        self.changes.append(Change(where, "reconstruct", None, found.before, found.after))
        self.path.pass_attention()
        self.path.pass_mlp()

    def _report(self, name: str, solution: Solution, bits: float) -> LayerReport:
        rule = self._rule(name)
        zeros = 1 - np.count_nonzero(solution.values().numpy()) / solution.levels.numel()
        return LayerReport(
            name=f"{self.prefix}{name}",
            format=rule.format,
            solver=rule.solver,
            target=self.shares.get(f"{self.prefix}{name}.weight", rule.target),
            sparsity=zeros,
            error=self.errors[name],
            bits_per_weight=bits,
            seconds=self.seconds[name],
            damping=_said(self.damping[name]),
        )


def _layers() -> list[str]:
    return [name for stage in STAGES for name in stage]


def _finite(name: str, values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise RecipeError(
            f"`{name}`: needs finite values, got NaN or infinity", hint="is the model damaged?"
        )
    return values


def _said(damping: float) -> str:
    """Nothing of the usual damping."""
    if damping == DAMPING:
        return ""
    return f"the Hessian took damping by {damping:g} of its mean diagonal, not {DAMPING:g}"

"""Block after block: what its layers read in the compressed model, and codes that change its
outputs least.

Two paths go through the model side by side: that of the dense model, and that of the compressed
one, with all blocks so far as they will be. A block is compressed in four stages (`decoder.STAGES`); the
layers of a stage are solved before the next one is fed. Activations `[windows, tokens, hidden]` lie
in files (`session.py`); in memory are one block of each path and the Hessian of one stage.

    for every block
        fold smoothing scales and channel orders into it      smooth.py, reorder.py
        for every stage
            H, C, R of its inputs over all windows            `Moments`
            for every layer: target, solver, codes            target.py, solve.py
        descend on the block's output                         reconstruct.py
        send both paths on; keep codes and activations        session.py
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lacewing.compress.columns import Solution
from lacewing.compress.decoder import STAGES, Block, Decoder
from lacewing.compress.folding import fold_block
from lacewing.compress.grid import Grid
from lacewing.compress.moments import Moments
from lacewing.compress.path import Path, tokens_at_once
from lacewing.compress.problem import Problem, check_hessian
from lacewing.compress.recipe import Recipe, Rule
from lacewing.compress.reconstruct import reconstruct
from lacewing.compress.refine import refine
from lacewing.compress.session import LayerReport, Packed, Session
from lacewing.compress.solvers import solve
from lacewing.compress.spread import spread_sparsity
from lacewing.compress.target import corrected
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
        session.finish_block(index, packed, reports)


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
        self.folds = fold_block(self.path, self._formats(), recipe)
        self.weights = {
            name: self.path.block.linear(name).weight.detach().clone() for name in _layers()
        }
        self.dense: Path | None = None
        if "dense" in names:
            twin = decoder.block(index)
            _copy(self.path.block, twin)
            self.dense = Path(twin, *session.activations("dense"))
        self.solutions: dict[str, Solution] = {}
        self.problems: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    def _formats(self) -> dict[str, str]:
        return {name: self._rule(name).format for name in _layers()}

    def _rule(self, name: str) -> Rule:
        return self.plan[f"{self.prefix}{name}.weight"]

    def stages(self) -> Iterator[str]:
        """Solves layer after layer; yields the name of each when it is done."""
        for stage, names in enumerate(STAGES):
            dense = self.dense if self.recipe.correct > 0 else None
            found = Moments.measure(stage, self.path, dense)
            first = f"{self.prefix}{names[0]}"
            check_hessian(first, found.hessian)
            base = Problem(first, self.weights[names[0]], found.hessian, found.tokens)
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
        problem = base.aiming(self.weights[name], f"{self.prefix}{name}")
        if found.lost is not None and rule.solver != "nearest":
            problem = corrected(problem, found.lost, found.stream, self.recipe.correct)
        sparsity = self.shares.get(f"{self.prefix}{name}.weight", rule.target)
        grid = Grid(get_format(rule.format))
        solution = solve(rule.solver, problem, grid, sparsity, rule.act_order)
        if rule.refine:
            mask = solution.values() != 0 if rule.prunes else None
            solution = refine(problem, solution, mask, rule.refine)
        values = solution.values()
        self.problems[name] = problem.error(values)
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
        for name, norm in self.path.block.norms.items():
            values = norm.detach().numpy().astype(np.float32)
            packed[f"{self.prefix}{name.replace('/', '.')}.weight"] = values
        for name in _layers():
            bias = self.path.block.linear(name).bias
            if bias is not None:
                packed[f"{self.prefix}{name}.bias"] = bias.detach().numpy()
        return packed, reports

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
            error=self.problems[name],
            bits_per_weight=bits,
            seconds=self.seconds[name],
        )


def _layers() -> list[str]:
    return [name for stage in STAGES for name in stage]


def _copy(source: Block, target: Block) -> None:
    """The folds of one block, in the other."""
    for mine, theirs in zip(target.parameters(), source.parameters(), strict=True):
        mine.data.copy_(theirs.data)

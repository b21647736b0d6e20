"""Block after block: what its layers read in the compressed model, and codes that change its
outputs least.

Two paths go through the model side by side: that of the dense model, and that of the compressed
one, with all blocks so far as they will be. A block is compressed in four stages
(`decoder.STAGES`); the layers of a stage are solved before the next one is fed. Activations
`[windows, tokens, hidden]` lie in files (`session.py`); in memory are one block of each path and
the Hessian of one stage. A recipe that only rounds, or drops the smallest weights, needs none of
this: its blocks are packed without data.

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

from lacewing.checkpoint.breakeven import dense_twin, pays
from lacewing.checkpoint.packing import round_rows
from lacewing.compress.columns import Solution
from lacewing.compress.decoder import EMBEDDING, LAYERS, STAGES, Decoder
from lacewing.compress.estimate import layer_work
from lacewing.compress.folding import fold_block
from lacewing.compress.grid import Grid
from lacewing.compress.moments import Moments
from lacewing.compress.path import Path, tokens_at_once
from lacewing.compress.problem import DAMPING, Problem
from lacewing.compress.recipe import JOINT, WITHOUT_DATA, Recipe, Rule
from lacewing.compress.reconstruct import reconstruct
from lacewing.compress.refine import refine
from lacewing.compress.session import Change, LayerReport, Packed, Session
from lacewing.compress.solvers import solve
from lacewing.compress.spread import spread_sparsity
from lacewing.compress.target import corrected
from lacewing.errors import FormatError, RecipeError
from lacewing.formats import PackedTensor, get_format
from lacewing.formats.base import row_chunks

__all__ = ["compress_blocks"]

Progress = Callable[[str, int, int], None]
"""Called with the name of a layer, and how much of how much work is done (`layer_work`)."""

_COARSE = 8
"""Bits of a weight, below which it is off by more than bf16 products are."""


def compress_blocks(
    decoder: Decoder,
    windows: Tensor,
    plan: Mapping[str, Rule],
    recipe: Recipe,
    session: Session,
    machine: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Compresses every block that `session` has not finished, and leaves it there.

    windows: token ids, int64 `[windows, tokens]`; none are needed unless `recipe.needs_data`. plan:
    the rule of every matrix. machine: where a sparse weight must be faster than its dense twin
    (`breakeven`), which takes its place otherwise; None: only bytes count.

    Raises RecipeError, naming the layer, for activations that are not finite and for Hessians that
    cannot be inverted; CheckpointError where the disk is full.
    """
    tell = _Told(decoder, plan, windows.numel(), session.finished, progress)
    with torch.no_grad():
        if not recipe.needs_data:
            _round_blocks(decoder, plan, session, machine, tell)
            return
        names = ["compressed"]
        if recipe.correct > 0 or recipe.reconstruct is not None:
            names.append("dense")
        if session.finished == 0:
            _embed(decoder, windows, plan, {n: session.activations(n)[0] for n in names})
        shares = _shares(decoder, windows, plan, recipe, session)
        for index in range(session.finished, decoder.spec.n_layers):
            _compress_block(
                _Work(decoder, index, plan, shares, recipe, session, names, machine), session, tell
            )


def _compress_block(work: _Work, session: Session, tell: _Told) -> None:
    """A call of its own: its block is gone before the next one is made."""
    for name in work.layers():
        tell(name)
    packed, reports = work.finish()
    session.finish_block(work.index, packed, reports, work.changes)


class _Told:
    """How far it is, in work: layers differ a hundredfold in what they take."""

    def __init__(
        self,
        decoder: Decoder,
        plan: Mapping[str, Rule],
        tokens: int,
        finished: int,
        progress: Progress | None,
    ) -> None:
        shapes = decoder.spec.tensor_shapes()
        self._work: dict[str, int] = {}
        for index in range(decoder.spec.n_layers):
            for name in LAYERS:
                tensor = f"model.layers.{index}.{name}.weight"
                n, k = shapes[tensor]
                work = layer_work(n, k, plan[tensor], tokens)
                self._work[tensor.removesuffix(".weight")] = int(work)
        self._total = sum(self._work.values())
        self._done = sum(list(self._work.values())[: finished * len(LAYERS)])
        self._progress = progress

    def __call__(self, name: str) -> None:
        self._done += self._work[name]
        if self._progress is not None:
            self._progress(name, self._done, self._total)


def _embed(
    decoder: Decoder, windows: Tensor, plan: Mapping[str, Rule], outs: Mapping[str, Tensor]
) -> None:
    """The compressed path begins with the embedding as it will be stored."""
    for path, out in outs.items():
        table = decoder.embedding() if path == "dense" else _stored_embedding(decoder, plan)
        for part in tokens_at_once(*windows.shape):
            out[part] = decoder.embed(windows[part], table)
        del table


def _stored_embedding(decoder: Decoder, plan: Mapping[str, Rule]) -> Tensor:
    tensor, kind = decoder.source.tensors[EMBEDDING], get_format(plan[EMBEDDING].format)
    table = torch.empty(tensor.shape)
    for begin, end in row_chunks(*table.shape):
        try:
            codes = round_rows(tensor, kind, begin, end)
        except FormatError as error:
            raise RecipeError(f"`{EMBEDDING}`: {error}", hint=error.hint) from None
        table[begin:end] = torch.from_numpy(kind.dequantize(codes))
    tensor.release()
    return table


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


# -- without data ---------------------------------------------------------------------------------


def _round_blocks(
    decoder: Decoder,
    plan: Mapping[str, Rule],
    session: Session,
    machine: str | None,
    tell: _Told,
) -> None:
    for index in range(session.finished, decoder.spec.n_layers):
        packed: dict[str, Packed] = {}
        reports = []
        for layer in (f"model.layers.{index}.{name}" for name in LAYERS):
            begin = time.perf_counter()
            name = f"{layer}.weight"
            rule, weight = plan[name], decoder.tensor(name)
            grid = Grid(get_format(rule.format))
            grid.check(layer, weight)
            problem = Problem(layer, weight, torch.empty(0), 0)
            solution = solve(rule.solver, problem, grid, rule.target)
            packed[name], report = _packed(layer, rule, rule.target, solution, machine)
            error = (solution.values() - weight).square().sum() / weight.square().sum()
            report["error"] = float(error) if weight.any() else 0.0
            reports.append(LayerReport(**report, seconds=time.perf_counter() - begin))
            tell(layer)
        session.finish_block(index, packed, reports)


def _packed(
    name: str, rule: Rule, target: float, solution: Solution, machine: str | None
) -> tuple[PackedTensor, dict[str, Any]]:
    """A layer's codes, in the dense twin of a sparse format where that is smaller or faster: its
    products are the same. With what a LayerReport says of them."""
    kind = solution.grid.format
    codes = solution.grid.codes(solution.levels, solution.scales)
    packed = kind.pack(codes)
    report: dict[str, Any] = {"name": name, "solver": rule.solver, "target": target}
    report["sparsity"] = 1 - np.count_nonzero(solution.values().numpy()) / codes.q.size
    twin = dense_twin(kind)
    if twin is not None:
        density = kind.stored(codes) / codes.q.size
        report["density"] = density
        if not pays(packed, density, machine):
            packed = twin.pack(codes)
            report["instead_of"] = kind.name
    report |= {"format": packed.format, "bits_per_weight": packed.bits_per_weight}
    return packed, report


# -- with data ------------------------------------------------------------------------------------


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
        machine: str | None,
    ) -> None:
        self.index, self.recipe, self.machine = index, recipe, machine
        self.plan, self.shares = plan, shares
        self.prefix = f"model.layers.{index}."
        rules = {name: self._rule(name) for name in LAYERS}
        # 8 bits and more are worth products in f32.
        fast = all(get_format(rule.format).weight_bits < _COARSE for rule in rules.values())
        block = decoder.block(index)
        for name in LAYERS:
            grid = Grid(get_format(rules[name].format))
            grid.check(f"{self.prefix}{name}", block.linear(name).weight.detach())
        self.path = Path(block, *session.activations("compressed"), fast)
        self.changes = fold_block(self.path, rules, recipe)
        self.dense: Path | None = None
        if "dense" in names:
            self.dense = Path(copy.deepcopy(block), *session.activations("dense"), fast)
        self.solutions: dict[str, Solution] = {}
        self.errors: dict[str, float] = {}
        self.damping: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def _rule(self, name: str) -> Rule:
        return self.plan[f"{self.prefix}{name}.weight"]

    def _target(self, name: str) -> float:
        return self.shares.get(f"{self.prefix}{name}.weight", self._rule(name).target)

    def layers(self) -> Iterator[str]:
        """Solves layer after layer; yields the name of each when it is done."""
        for stage in range(len(STAGES)):
            yield from self._stage(stage)
            if stage == 1:
                for path in self._paths():
                    path.pass_attention()

    def _stage(self, stage: int) -> Iterator[str]:
        """What it knows of its inputs is gone before the next stage is measured."""
        names = STAGES[stage]
        dense = self.dense if self.recipe.correct > 0 else None
        found = Moments.measure(stage, self.path, dense)
        first = self.path.block.linear(names[0]).weight.detach()
        base = Problem(f"{self.prefix}{names[0]}", first, found.hessian, found.tokens)
        for name in names:
            self._solve(name, base, found)
            yield f"{self.prefix}{name}"

    def _paths(self) -> list[Path]:
        return [path for path in (self.path, self.dense) if path is not None]

    def _solve(self, name: str, base: Problem, found: Moments) -> None:
        begin = time.perf_counter()
        rule = self._rule(name)
        linear = self.path.block.linear(name)
        problem = dense = base.aiming(linear.weight.detach(), f"{self.prefix}{name}")
        if found.lost is not None and rule.solver not in WITHOUT_DATA:
            problem = corrected(dense, found.lost, found.stream, self.recipe.correct)
        grid = Grid(get_format(rule.format))
        solution = solve(rule.solver, problem, grid, self._target(name), rule.act_order)
        if rule.refine:
            mask = solution.values() != 0 if rule.prunes else None
            solution = refine(problem, solution, mask, rule.refine)
        values = solution.values()
        self.errors[name] = dense.error(values)
        self.damping[name] = _said(problem.damping) if rule.solver in JOINT else ""
        linear.weight.data = values
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
        for name in LAYERS:
            layer, rule = f"{self.prefix}{name}", self._rule(name)
            packed[f"{layer}.weight"], report = _packed(
                layer, rule, self._target(name), self.solutions[name], self.machine
            )
            report |= {"error": self.errors[name], "damping": self.damping[name]}
            reports.append(LayerReport(**report, seconds=self.seconds[name]))
        for name, values in self._vectors():
            packed[f"{self.prefix}{name}"] = values
        return packed, reports

    def _vectors(self) -> Iterator[tuple[str, np.ndarray[Any, np.dtype[np.float32]]]]:
        """Weights of norms, and biases, as they are after folding."""
        block = self.path.block
        found = {f"{name.replace('/', '.')}.weight": norm for name, norm in block.norms.items()}
        biases = ((f"{name}.bias", block.linear(name).bias) for name in LAYERS)
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

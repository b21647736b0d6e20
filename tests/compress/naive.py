"""The papers' formulas in float64 numpy, one column at a time, written to be read."""

from __future__ import annotations

import numpy as np
import torch

from lacewing.compress.grid import Grid, Scales
from lacewing.compress.problem import DAMPING, Problem
from lacewing.formats import get_format


def inputs(tokens, k, seed=0):
    """Correlated inputs of unlike size, f64 `[tokens, k]`."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((tokens, max(2, k // 3)))
    x = hidden @ rng.standard_normal((hidden.shape[1], k)) / np.sqrt(hidden.shape[1])
    return (x + 0.5 * rng.standard_normal((tokens, k))) * np.exp(0.5 * rng.standard_normal(k))


def problem(n, k, seed=0, tokens=None, x=None):
    """A layer and what calibration knows of it."""
    rng = np.random.default_rng(seed + 100)
    x = inputs(tokens or 4 * k, k, seed) if x is None else x
    weight = rng.standard_normal((n, k)) / np.sqrt(k)
    hessian = x.T @ x / len(x)
    as_f32 = [torch.from_numpy(a.astype(np.float32)) for a in (weight, hessian)]
    return Problem("layer", *as_f32, len(x))


def damped(p):
    """GPTQ's damping; the identity if no input was ever anything but zero."""
    h = p.hessian.double().numpy()
    mean = np.diag(h).mean()
    return h + (DAMPING * mean or 1.0) * np.eye(len(h))


def error(p, weight):
    """Mean squared error of the outputs over the tokens, as tr(E H E^T)."""
    e = np.asarray(weight, np.float64) - p.weight.double().numpy()
    return np.trace(e @ p.hessian.double().numpy() @ e.T)


def inverses(h):
    """Row 0 of the inverse of h[i:, i:] for every i: an input is eliminated from an inverse by
    one step of Gauss (OBQ, arXiv:2208.11580, eq. 4)."""
    inverse = np.linalg.inv(h)
    for _ in range(len(h)):
        yield inverse[0]
        inverse = inverse[1:, 1:] - np.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]


class Watched(Grid):
    """A grid that notes what scales were fitted to, and the scales."""

    def __init__(self, name):
        super().__init__(get_format(name))
        self.fits = []

    def fit(self, w, importance=None):
        scales = super().fit(w, importance)
        self.fits.append((w.clone(), importance.expand_as(w).clone(), scales))
        return scales


class Sweep:
    """Optimal brain surgeon: fix one input after the other, and after each move the inputs that
    are left to where they make up for its error (OBQ, arXiv:2208.11580, with one order for all
    rows as in GPTQ).

    found: the solution to check, on a `Watched` grid. Its weights in f32 are off by as much as
    `slack`, so a weight in the middle of two levels may go to the other one, in the search for a
    scale too, and all that comes after it in its row is then another path. The sweep follows:
    it takes the level of `found` where both are as near, and the scales of `found` if they were
    fitted to these weights. All else must be equal.

    rows[j]: of the inverse of the Hessian of j and all that come after it, the row of j.
    """

    def __init__(self, p, found, order):
        self.w = p.weight.double().numpy().copy()
        self.h, self.order = damped(p), list(order)
        self.importance = np.diag(self.h)
        self.found, self.grid, self.format = found, found.grid, found.grid.format
        self.fits = iter(self.grid.fits)
        # One rounding to f32 for each of the columns that move a weight.
        self.slack = len(self.order) * 2.0**-24 * np.abs(self.w).max()
        self.levels = np.zeros_like(self.w)
        self.kept = np.ones(self.w.shape, bool)
        self.scales = {}
        self.rows = dict(zip(self.order, inverses(self.h[np.ix_(order, order)]), strict=True))

    def costs(self, columns):
        """w_j^2 / [H_F^-1]_jj, F being j and all that come after it in the order."""
        return np.stack([self.w[:, j] ** 2 / self.rows[j][0] for j in columns], axis=1)

    def fit(self, group):
        """The scales of a group, which must be those of the weights as they are now."""
        size = self.grid.group_size(self.w.shape[1])
        part = slice(group * size, (group + 1) * size)
        w, importance, self.scales[group] = next(self.fits)
        np.testing.assert_allclose(w, (self.w * self.kept)[:, part], rtol=0, atol=self.slack)
        expected = np.where(self.kept, self.importance, 0)[:, part]
        np.testing.assert_allclose(importance, expected, rtol=2.0**-22)

    def fix(self, j):
        """Rounds input j, or drops it, and moves the others."""
        group = j // self.grid.group_size(self.w.shape[1])
        if group not in self.scales:
            self.fit(group)
        scale, column = self.scales[group], self.w[:, j]
        level = self.nearest(column, scale)
        theirs = self.nearest(self.value(self.found.levels[:, j].double().numpy(), scale), scale)
        near, other = (np.abs(self.value(each, scale) - column) for each in (level, theirs))
        level = np.where(other - near <= 2 * self.slack, theirs, level)
        self.levels[:, j] = level * self.kept[:, j]
        value = self.kept[:, j] * self.value(level, scale)
        left = self.order[self.order.index(j) :]
        row = self.rows[j]
        self.w[:, left] -= np.outer((column - value) / row[0], row)

    def nearest(self, column, scales: Scales):
        if scales.scale is None:
            return torch.from_numpy(column).float().bfloat16().double().numpy()
        levels = self.all_levels()
        values = self.value(levels[:, None], scales)
        chosen = levels[np.abs(values - column).argmin(0)].astype(float)
        return np.where((scales.scale == 0).numpy(), 0.0, chosen)

    def all_levels(self):
        zero = 0 if self.format.asymmetric else self.format.zero_point
        return np.arange(self.format.max_code + 1) * self.format.code_step - zero

    def value(self, level, scales: Scales):
        if scales.scale is None:
            return level
        value = level * scales.scale.double().numpy()
        return value if scales.base is None else value + scales.base.double().numpy()


def gptq(p, found, act_order=False, kept=None):
    """The sweep over all weights; kept: a mask that is given (GPTQ, arXiv:2210.17323)."""
    k = p.weight.shape[1]
    importance = np.diag(damped(p))
    order = np.argsort(-importance, kind="stable") if act_order else np.arange(k)
    sweep = Sweep(p, found, order.tolist())
    if kept is not None:
        sweep.kept = kept
    if act_order:
        for group in range(-(-k // sweep.grid.group_size(k))):
            sweep.fit(group)
    for j in sweep.order:
        sweep.fix(j)
    return sweep


def sparsegpt(p, found, sparsity, block=128):
    """In every block of columns the weights of the lowest cost go
    (SparseGPT, arXiv:2301.00774, algorithm 1)."""
    k = p.weight.shape[1]
    sweep = Sweep(p, found, list(range(k)))
    name = sweep.format.name
    if sweep.grid.group_size(k) == k:  # one scale per row: of the weights that would stay now
        sweep.kept = lowest_dropped(sweep.costs(range(k)), name, sparsity, 0)
        sweep.fit(0)
    for begin in range(0, k, block):
        columns = list(range(begin, min(begin + block, k)))
        sweep.kept[:, columns] = lowest_dropped(sweep.costs(columns), name, sparsity, begin)
        for j in columns:
            if name.endswith("_24") and j % 4 == 0:
                four = columns[j - begin : j - begin + 4]
                sweep.kept[:, four] = lowest_dropped(sweep.costs(four), name, sparsity, begin)
            sweep.fix(j)
    return sweep


def lowest_dropped(cost, name, sparsity, before):
    """The pattern of the format; blocks of columns drop in sum what the whole matrix would."""
    n, k = cost.shape
    kept = np.ones((n, k), bool)

    def count(per_column):
        last, first = per_column * (before + k) * sparsity, per_column * before * sparsity
        return int(np.floor(last + 0.5)) - int(np.floor(first + 0.5))

    if name.endswith("_24"):
        for row in range(n):
            for at in range(0, k, 4):
                four = cost[row, at : at + 4]
                kept[row, at + np.argsort(four, kind="stable")[: max(0, len(four) - 2)]] = False
    elif name.endswith("_b16x1"):
        for at in range(0, n, 16):
            lowest = np.argsort(cost[at : at + 16].sum(0), kind="stable")[: count(1)]
            kept[at : at + 16, lowest] = False
    else:
        kept.reshape(-1)[np.argsort(cost, axis=None, kind="stable")[: count(n)]] = False
    return kept

"""What a compression will take and give, before it is begun: `--dry-run`.

Bytes are exact for dense formats, and for sparse ones those of a sample of random weights. Memory
and time are estimates: they count what is large, and matrix products.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from lacewing.checkpoint import Source
from lacewing.checkpoint.breakeven import dense_twin, pays
from lacewing.compress.admm import REFITS, STEPS
from lacewing.compress.decoder import LAYERS, STAGES
from lacewing.compress.recipe import JOINT, WITHOUT_DATA, Recipe, Rule
from lacewing.formats import get_format
from lacewing.formats.tiles import STRIP
from lacewing.models import DecoderSpec

__all__ = ["Estimate", "estimate", "layer_work"]

_SAMPLE = 64
"""Outputs of the sample that says how large a sparse weight is."""
_PROGRAM = 400 << 20
"""Bytes of Python and PyTorch themselves."""
_BATCH = 4096
"""Tokens of one step of a reconstruction, and of one pass through a block."""
_COLUMN = 1e-4
"""Seconds that one column costs beside its products."""


@dataclass(frozen=True)
class Estimate:
    """nbytes, bits_per_weight: of all tensors of the output. memory: bytes at the peak, without the
    activations, which lie in files. disk: bytes of the work directory. seconds: of this machine.
    windows, window: of calibration text."""

    nbytes: int
    bits_per_weight: float
    memory: int
    disk: int
    seconds: float
    windows: int
    window: int


def estimate(
    source: Source,
    plan: Mapping[str, Rule],
    recipe: Recipe,
    machine: str | None = None,
    rate: float | None = None,
) -> Estimate:
    """machine: as in `compress`. rate: floating point operations per second of a matrix product;
    None: measured."""
    shapes = source.spec.tensor_shapes()
    nbytes = sum(_bytes(shape, plan.get(name), machine) for name, shape in shapes.items())
    weights = sum(math.prod(shape) for shape in shapes.values())
    found = recipe.calibration
    activations = found.windows * found.window * source.spec.hidden_size * 4
    paths = 2 if _follows_dense(recipe) else 1
    return Estimate(
        nbytes=nbytes,
        bits_per_weight=8 * nbytes / weights,
        memory=_memory(source.spec, recipe),
        disk=2 * paths * activations + nbytes,
        seconds=_seconds(source.spec, plan, recipe, rate or _rate()),
        windows=found.windows,
        window=found.window,
    )


def _follows_dense(recipe: Recipe) -> bool:
    """Whether the dense model is computed beside the compressed one."""
    return recipe.correct > 0 or recipe.reconstruct is not None


def _bytes(shape: tuple[int, ...], rule: Rule | None, machine: str | None) -> int:
    if rule is None:
        return 4 * math.prod(shape)
    n, k = shape
    sizes = get_format(rule.format).expected_part_bytes(n, k).values()
    exact = [size for size in sizes if size is not None]
    if len(exact) == len(sizes):
        return sum(exact)
    return math.ceil(n / _SAMPLE * _sample_bytes(rule.format, k, rule.target, machine))


@cache
def _sample_bytes(format: str, k: int, sparsity: float, machine: str | None) -> int:
    """Of the dense twin, where that would be written."""
    kind = get_format(format)
    weight = np.random.Generator(np.random.PCG64(0)).standard_normal((_SAMPLE, k))
    codes = kind.round(weight.astype(np.float32), sparsity)
    packed, twin = kind.pack(codes), dense_twin(kind)
    if twin is None or pays(packed, kind.stored(codes) / codes.q.size, machine):
        return packed.nbytes
    return twin.pack(codes).nbytes


# -- memory ---------------------------------------------------------------------------------------


def _memory(spec: DecoderSpec, recipe: Recipe) -> int:
    """The larger of the embedding and a block at work, dense and compressed, with a pass through
    it, and of the inputs of its widest layer H, H damped, what they have lost, and two matrices in
    float64 while H is inverted (later, in their place, the factor and eigenvectors), with as much
    again of LAPACK's own."""
    block = sum(math.prod(shape) for shape in _layers(spec).values())
    widest = max(k for _, k in _layers(spec).values())
    inner = 2 * spec.intermediate_size + 6 * spec.hidden_size
    batch = max(_BATCH, recipe.calibration.window)
    copies = 5 if recipe.reconstruct else 2  # gradients and the moments of Adam
    known = (3 * 4 + 3 * 8) * widest**2 + 4 * spec.hidden_size * widest
    work = 4 * copies * block + known + 4 * batch * inner
    table = 4 * spec.vocab_size * spec.hidden_size
    return _PROGRAM + max(work, table)


def _layers(spec: DecoderSpec) -> dict[str, tuple[int, int]]:
    """`[n, k]` of the layers of one block."""
    shapes = spec.tensor_shapes()
    return {name: shapes[f"model.layers.0.{name}.weight"] for name in LAYERS}  # type: ignore[misc]


# -- time -----------------------------------------------------------------------------------------


def _seconds(spec: DecoderSpec, plan: Mapping[str, Rule], recipe: Recipe, rate: float) -> float:
    tokens = recipe.calibration.windows * recipe.calibration.window if recipe.needs_data else 0
    dense = _follows_dense(recipe)
    shapes = spec.tensor_shapes()
    names = [name for name in plan if name.startswith("model.layers.")]
    work = overhead = 0.0
    for name in names:
        n, k = shapes[name]
        work += layer_work(n, k, plan[name], tokens, dense)
        if plan[name].solver in JOINT:
            overhead += k * _COLUMN * (1 + plan[name].refine)
    for stage in STAGES:  # H of a stage, and what its inputs have lost
        k = _layers(spec)[stage[0]][1]
        work += spec.n_layers * tokens * 2 * k * k * (2 if recipe.correct > 0 else 1)
    if recipe.reconstruct:
        weights = sum(n * k for n, k in _layers(spec).values())
        work += spec.n_layers * recipe.reconstruct.steps * _BATCH * 8 * weights
    return work / rate + overhead


def layer_work(n: int, k: int, rule: Rule, tokens: int, dense: bool = True) -> float:
    """Floating point operations that one layer takes, beside what its stage does once: passes of
    both paths, the correction, and the solver. dense: whether there are two paths."""
    work = 2.0 * tokens * n * k * (4 if dense else 2)  # each path is measured, then sent on
    if rule.solver in WITHOUT_DATA:
        return work + n * k
    if dense and tokens:
        work += 4 * n * k**2 + k**3 / 3  # W C, and a solution with one factor
        work += 2 * tokens * n * k  # R
    if rule.solver in JOINT:
        work += 2 * k**3 + n * k**2  # the factor of the inverse, in float64; the columns
    if rule.solver == "admm" and rule.prunes:
        # Eigenvectors, two products for a step and one for a refit.
        work += 10 * k**3 + (4 * STEPS + 2 * REFITS) * n * k**2
    if rule.solver == "blocks":
        work += 1.2 * k**3 * math.ceil(n / STRIP)
    return work + 4 * n * k**2 * rule.refine


def _rate() -> float:
    """Operations per second of one product that takes some 10 ms."""
    size = 1024
    a = torch.ones(size, size)
    a @ a
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best

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
from lacewing.compress.decoder import STAGES
from lacewing.compress.recipe import Recipe, Rule
from lacewing.formats import get_format
from lacewing.models import DecoderSpec

__all__ = ["Estimate", "estimate"]

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
    source: Source, plan: Mapping[str, Rule], recipe: Recipe, rate: float | None = None
) -> Estimate:
    """rate: floating point operations per second of a matrix product; None: measured."""
    shapes = source.spec.tensor_shapes()
    nbytes = sum(_bytes(shape, plan.get(name)) for name, shape in shapes.items())
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


def _bytes(shape: tuple[int, ...], rule: Rule | None) -> int:
    if rule is None:
        return 4 * math.prod(shape)
    n, k = shape
    sizes = get_format(rule.format).expected_part_bytes(n, k).values()
    exact = [size for size in sizes if size is not None]
    if len(exact) == len(sizes):
        return sum(exact)
    return math.ceil(n / _SAMPLE * _sample_bytes(rule.format, k, rule.target))


@cache
def _sample_bytes(format: str, k: int, sparsity: float) -> int:
    kind = get_format(format)
    weight = np.random.Generator(np.random.PCG64(0)).standard_normal((_SAMPLE, k))
    return kind.pack(kind.round(weight.astype(np.float32), sparsity)).nbytes


# -- memory ---------------------------------------------------------------------------------------


def _memory(spec: DecoderSpec, recipe: Recipe) -> int:
    """The larger of the embedding and a block at work, dense and compressed, with the Hessian of
    its widest layer in both precisions, its factors, and a pass through the block."""
    block = sum(math.prod(shape) for shape in _layers(spec).values())
    widest = max(k for _, k in _layers(spec).values())
    inner = 2 * spec.intermediate_size + 6 * spec.hidden_size
    batch = max(_BATCH, recipe.calibration.window)
    copies = 5 if recipe.reconstruct else 2  # gradients and the moments of Adam
    work = 4 * copies * block + (4 + 3 * 8) * widest**2 + 4 * batch * inner
    table = 4 * spec.vocab_size * spec.hidden_size
    return _PROGRAM + max(work, 2 * table)


def _layers(spec: DecoderSpec) -> dict[str, tuple[int, int]]:
    """`[n, k]` of the layers of one block."""
    shapes = spec.tensor_shapes()
    names = [name for stage in STAGES for name in stage]
    return {name: shapes[f"model.layers.0.{name}.weight"] for name in names}  # type: ignore[misc]


# -- time -----------------------------------------------------------------------------------------


def _seconds(spec: DecoderSpec, plan: Mapping[str, Rule], recipe: Recipe, rate: float) -> float:
    layers = _layers(spec)
    tokens = recipe.calibration.windows * recipe.calibration.window
    weights = sum(n * k for n, k in layers.values())
    seen = spec.n_heads * spec.head_dim * recipe.calibration.window
    per_token = 2 * weights + 2 * seen  # half of the window, for scores and for values
    passes = 3 if _follows_dense(recipe) else 2  # dense, compressed to calibrate, compressed
    work = spec.n_layers * passes * tokens * per_token
    if recipe.reconstruct:
        work += spec.n_layers * recipe.reconstruct.steps * _BATCH * 4 * per_token
    inputs = [layers[stage[0]][1] for stage in STAGES]
    work += spec.n_layers * tokens * sum(2 * k * k for k in inputs)
    overhead = 0.0
    for name, rule in plan.items():
        if not name.startswith("model.layers.") or rule.solver in ("nearest", "magnitude"):
            continue
        n, k = layers[name.split(".", 3)[3].removesuffix(".weight")]
        # The factor of the inverse in float64 at half the rate, the columns, and the sweeps.
        work += 4 * k**3 + n * k**2 * (1 + 2 * rule.refine)
        overhead += k * _COLUMN * (1 + rule.refine)
    return work / rate + overhead


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

"""Tiny models as a decoder reads them, and one compression of them from end to end of the loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lacewing.checkpoint import SourceTensor
from lacewing.compress.calibrate import compress_blocks
from lacewing.compress.decoder import EMBEDDING, LAYERS, Block, Decoder
from lacewing.compress.recipe import Calibration, Recipe, Rule
from lacewing.compress.session import Change, LayerReport, Packed, Session
from lacewing.formats import PackedTensor, get_format
from tests.tiny import tiny_spec, tiny_tokens, tiny_weights

WINDOWS, TOKENS = 12, 24


class Stored(SourceTensor):
    """A tensor of a file: it may be read only, and what was read is gone once it is released."""

    dtype = "F32"

    def __init__(self, name: str, values: np.ndarray) -> None:
        self.name, self.values = name, values
        self.shape, self.nbytes = values.shape, values.nbytes
        self.read: list[np.ndarray] = []

    def dequantize(self, begin: int = 0, end: int | None = None) -> np.ndarray:
        self.read.append(self.values[begin:end].copy())
        return self.read[-1]

    def release(self) -> None:
        assert self.read
        for rows in self.read:
            rows[:] = np.nan


class Model:
    """A tiny model; `changed`: tensors to put in the place of its own."""

    def __init__(self, name: str, changed: Mapping[str, np.ndarray] | None = None) -> None:
        self.spec = tiny_spec(name)
        weights = tiny_weights(name) | dict(changed or {})
        self.tensors = {key: Stored(key, value) for key, value in weights.items()}


def decoder_of(name: str, changed: Mapping[str, np.ndarray] | None = None) -> Decoder:
    source: Any = Model(name, changed)
    return Decoder(source)


def windows_of(count: int = WINDOWS, tokens: int = TOKENS, seed: int = 11) -> Tensor:
    return torch.tensor(tiny_tokens(count * tokens, seed)).view(count, tokens)


def recipe_of(format: str, solver: str = "columns", sparsity: float = 0.0, **more: Any) -> Recipe:
    """One rule for all. more: of the rule or of the recipe."""
    own = {key: more.pop(key) for key in ("act_order", "refine") if key in more}
    rule = Rule("*", format, solver, sparsity, **own)
    return Recipe((rule,), Calibration(WINDOWS * TOKENS, TOKENS), **more)


@dataclass
class Compressed:
    """What a session holds at its end."""

    tensors: dict[str, Packed]
    reports: list[LayerReport]
    changes: list[Change]
    output: Tensor
    told: list[str]
    embedding: np.ndarray

    def weights(self) -> dict[str, np.ndarray]:
        """As floats, with the embedding."""
        found = {name: floats(value) for name, value in self.tensors.items()}
        return {**found, EMBEDDING: self.embedding}

    def bytes(self) -> dict[str, bytes]:
        found = {}
        for name, value in self.tensors.items():
            parts = value.parts if isinstance(value, PackedTensor) else {"": value}
            found |= {f"{name}.{part}": array.tobytes() for part, array in parts.items()}
        return found


def floats(value: Packed) -> np.ndarray:
    if isinstance(value, PackedTensor):
        return get_format(value.format).dequantize(value)
    return np.asarray(value)


@contextmanager
def session_of(place: Path, decoder: Decoder, windows: Tensor) -> Iterator[Session]:
    shape = (*windows.shape, decoder.spec.hidden_size)
    with Session.open(place, "digest", decoder.spec.n_layers, shape) as session:
        yield session


def run(
    place: Path,
    decoder: Decoder,
    recipe: Recipe,
    windows: Tensor | None = None,
    progress: Any = None,
    machine: str | None = None,
) -> Compressed:
    """Compresses all blocks, from where the last session ended, into `place`."""
    ids = windows_of() if windows is None else windows
    told: list[str] = []
    with session_of(place, decoder, ids) as session:
        tell = progress or (lambda name, done, of: told.append(f"{name} {done / of:.4f}"))
        plan = recipe.plan(decoder.spec)
        compress_blocks(decoder, ids, plan, recipe, session, machine, tell)
        tensors = {}
        for index in range(session.blocks):
            tensors |= session.tensors(index)
        output = torch.empty(0)
        if recipe.needs_data:
            output = session.activations("compressed")[0].clone()
        return Compressed(
            tensors,
            session.reports(),
            session.changes(),
            output,
            told,
            stored_embedding(decoder, plan[EMBEDDING].format),
        )


def stored_embedding(decoder: Decoder, format: str) -> np.ndarray:
    kind = get_format(format)
    return kind.dequantize(kind.round(decoder.source.tensors[EMBEDDING].dequantize()))


def output_of(decoder: Decoder, windows: Tensor) -> Tensor:
    """What the last block returns, in f32, in one pass."""
    with torch.no_grad():
        x = decoder.embed(windows, decoder.embedding())
        for i in range(decoder.spec.n_layers):
            x = decoder.block(i)(x)
    return x


def lost(dense: Tensor, found: Tensor) -> float:
    """The mean over tokens of the squared error over the square."""
    return float(((found - dense).square().sum(-1) / dense.square().sum(-1)).mean())


def captured(block: Block, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What every layer of a block reads in a pass of `x`, by hooks, and what the block returns."""
    seen: dict[str, Tensor] = {}
    hooks = [
        block.linear(name).register_forward_hook(
            lambda _, inputs, output, name=name: seen.__setitem__(name, inputs[0].clone())
        )
        for name in LAYERS
    ]
    out = block(x)
    for hook in hooks:
        hook.remove()
    return seen, out


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

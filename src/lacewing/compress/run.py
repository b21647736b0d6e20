"""`lacewing.compress`: a model, a recipe and some text in, a packed directory out."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module

from lacewing.checkpoint import Report, Source, open_source
from lacewing.checkpoint.convert import memory_of, pack_all
from lacewing.checkpoint.files import check_target, new_directory, write_file
from lacewing.checkpoint.manifest import MANIFEST, TOKENIZER, VECTOR, WEIGHTS, manifest_json
from lacewing.checkpoint.safetensors import SafetensorsWriter
from lacewing.compress.data import Windows, read_windows
from lacewing.compress.decoder import Decoder
from lacewing.compress.estimate import Estimate, estimate
from lacewing.compress.fingerprint import digest_of
from lacewing.compress.module import ModuleSource
from lacewing.compress.recipe import Recipe, Rule
from lacewing.compress.session import Change, LayerReport, Packed, Session
from lacewing.errors import RecipeError
from lacewing.formats import PackedTensor, get_format
from lacewing.version import __version__

__all__ = ["Compression", "Progress", "compress"]

Progress = Callable[[str, int, int], None]
"""What is being done, and how much of how much is done."""
Files = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True, eq=False)
class Compression:
    """What was written.

    layers: one for every layer of a block. others: embedding, head and what else was packed as it
    is. nbytes: of all tensors. record: what the manifest keeps under `recipe`.
    """

    path: Path
    seconds: float
    nbytes: int
    bits_per_weight: float
    layers: tuple[LayerReport, ...]
    others: tuple[Report, ...]
    record: Mapping[str, Any]


def compress(
    model_or_path: Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any],
    data: Files = (),
    *,
    seed: int | None = None,
    tokens: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    force: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    tokenizer: str | os.PathLike[str] | None = None,
) -> Compression | Estimate:
    """Prunes and rounds a model block by block, calibrated on text, into a packed directory.

    model_or_path: anything `lacewing run` takes, or a model of transformers in memory, with the
    directory of its `tokenizer`. recipe: a preset (`safe`, `balanced`, `small`, `sparse50`), a YAML
    file, or a Recipe. data: text files (`data.py`). seed, tokens: in place of the recipe's.
    threads: of PyTorch; None leaves them. force: replace an existing packed directory. dry_run:
    only estimate; needs no data.

    `out` appears complete or not at all. Finished blocks are kept beside it, in `<out>.work`, until
    it is complete: called again with the same arguments after a kill, it goes on from there to the
    same result, and with `restart` from the beginning. Same arguments, versions and threads make
    the same bytes.

    Raises RecipeError (recipe or data), CheckpointError (the model is damaged, `out` exists or
    cannot be written), UnsupportedModelError, FormatError.
    """
    start = time.perf_counter()
    target = Path(os.path.realpath(out))
    source = _open(model_or_path, tokenizer)
    asked = _fitted(_recipe(recipe), source, seed, tokens)
    plan = asked.plan(source.spec)
    check_target(target, MANIFEST, force)
    with _threads(threads):
        if dry_run:
            return estimate(source, plan, asked)
        files = [data] if isinstance(data, (str, os.PathLike)) else list(data)
        windows = read_windows(files, source.tokenizer, source.spec.vocab_size, asked.calibration)
        with _session(target, asked, source, windows, restart) as session:
            if session.finished < session.blocks:
                _compress_blocks(source, windows, plan, asked, session, progress)
            result = _write(source, target, plan, asked, windows, session, force)
            session.remove()
    return replace(result, seconds=time.perf_counter() - start)


# -- what is given --------------------------------------------------------------------------------


def _open(
    model: Module | str | os.PathLike[str], tokenizer: str | os.PathLike[str] | None
) -> Source:
    if isinstance(model, Module):
        return ModuleSource(model, tokenizer)
    if tokenizer is not None:
        raise RecipeError("`tokenizer` is for models in memory: a file or directory has its own")
    return open_source(model)


def _recipe(given: Recipe | str | os.PathLike[str] | Mapping[str, Any]) -> Recipe:
    if isinstance(given, Recipe):
        return given
    return Recipe.from_dict(given) if isinstance(given, Mapping) else Recipe.open(given)


def _fitted(recipe: Recipe, source: Source, seed: int | None, tokens: int | None) -> Recipe:
    """The recipe as it is followed: with the seed and tokens asked for, and windows that are no
    longer than the model's context or all tokens."""
    found = recipe.calibration
    wanted = found.tokens if tokens is None else tokens
    window = min(found.window, source.spec.max_context, max(wanted, 8))
    found = replace(found, tokens=wanted, window=window, seed=found.seed if seed is None else seed)
    return replace(recipe, calibration=found)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        if type(count) is not int or count < 1:
            raise RecipeError(f"`threads` must be a whole number from 1 on, got {count!r}")
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- blocks, then the rest ------------------------------------------------------------------------


def _session(
    target: Path, recipe: Recipe, source: Source, windows: Windows, restart: bool
) -> Session:
    spec = source.spec
    shape = (*windows.ids.shape, spec.hidden_size)
    place = target.with_name(f"{target.name}.work")
    digest = digest_of(recipe, source, windows)
    return Session.open(place, digest, spec.n_layers, shape, restart)


def _compress_blocks(
    source: Source,
    windows: Windows,
    plan: Mapping[str, Rule],
    recipe: Recipe,
    session: Session,
    progress: Progress | None,
) -> None:
    from lacewing.compress.calibrate import compress_blocks

    ids = torch.from_numpy(windows.ids)
    told = progress or (lambda name, done, total: None)
    compress_blocks(Decoder(source), ids, plan, recipe, session, told)


def _write(
    source: Source,
    target: Path,
    plan: Mapping[str, Rule],
    recipe: Recipe,
    windows: Windows,
    session: Session,
    force: bool,
) -> Compression:
    """The whole model: the blocks from the session, the rest from the source."""
    done = {n: v for i in range(session.blocks) for n, v in session.tensors(i).items()}
    missing = [name for name in plan if name.startswith("model.layers.") and name not in done]
    assert not missing, missing
    layers = session.reports()
    record = _record(recipe, windows, layers, session.changes())
    others: list[Report] = []
    tensors: dict[str, Packed] = {}
    with memory_of(source), new_directory(target, MANIFEST, force) as place:
        names = source.spec.tensor_shapes()
        parts = [f"{name}.{part}" for name in names for part in ("stream", "offsets")]
        with SafetensorsWriter(place / WEIGHTS, parts, {"format": "lacewing"}) as out:
            for name, value in _all(source, plan, done, others):
                _add(out, name, value)
                tensors[name] = value
        stated = {name: _stated(value) for name, value in tensors.items()}
        manifest = manifest_json(source.config, source.tokenizer, stated, record)
        write_file(place / TOKENIZER, source.tokenizer.tokenizer_json.encode())
        write_file(place / MANIFEST, manifest.encode())
    nbytes = sum(value.nbytes for value in tensors.values())
    bits = 8 * nbytes / sum(math.prod(value.shape) for value in tensors.values())
    return Compression(target, 0.0, nbytes, bits, tuple(layers), tuple(others), record)


def _all(
    source: Source, plan: Mapping[str, Rule], done: Mapping[str, Packed], others: list[Report]
) -> Iterator[tuple[str, Packed]]:
    """Every tensor, in the model's order."""
    rest = {
        name: (source.tensors[name], get_format(plan[name].format) if name in plan else None)
        for name in source.spec.tensor_shapes()
        if name not in done
    }
    packing = pack_all(rest, None, None, None, None, search=False)
    for name in source.spec.tensor_shapes():
        if name in done:
            yield name, done[name]
        else:
            found, value, report = next(packing)
            assert found == name
            if isinstance(value, PackedTensor):
                others.append(report)
            yield name, value


def _add(out: SafetensorsWriter, name: str, value: Packed) -> None:
    if isinstance(value, PackedTensor):
        for part, array in value.parts.items():
            out.add(f"{name}.{part}", array)
    else:
        out.add(name, value)


def _stated(value: Packed) -> tuple[str, tuple[int, ...]]:
    return (value.format if isinstance(value, PackedTensor) else VECTOR), value.shape


def _record(
    recipe: Recipe, windows: Windows, layers: Sequence[LayerReport], changes: Sequence[Change]
) -> dict[str, Any]:
    """What lacewing.json keeps. No times: the same compression writes the same bytes."""
    rows = [asdict(layer) for layer in layers]
    for row in rows:
        del row["seconds"]
        row["error"] = row["error"] if math.isfinite(row["error"]) else None
    return {
        "lacewing": __version__,
        "recipe": recipe.to_dict(),
        "data": {
            "files": [asdict(file) for file in windows.files],
            "tokens": windows.ids.size,
            "seed": recipe.calibration.seed,
            "digest": windows.digest(),
        },
        "layers": rows,
        "changes": [asdict(change) for change in changes],
    }

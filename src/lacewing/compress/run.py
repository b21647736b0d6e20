"""`lacewing.compress`: a model, a recipe and some text in, a packed directory out."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import Module

from lacewing.checkpoint import Report, Source, open_source
from lacewing.checkpoint.breakeven import MACHINES
from lacewing.checkpoint.convert import add_to, memory_of, pack_all
from lacewing.checkpoint.files import check_target, new_directory, write_file
from lacewing.checkpoint.manifest import MANIFEST, TOKENIZER, VECTOR, WEIGHTS, manifest_json
from lacewing.checkpoint.safetensors import SafetensorsWriter
from lacewing.compress.data import Windows, read_windows
from lacewing.compress.decoder import Decoder
from lacewing.compress.estimate import Estimate, estimate
from lacewing.compress.fingerprint import digest_of
from lacewing.compress.module import ModuleSource
from lacewing.compress.recipe import Calibration, Recipe, Rule
from lacewing.compress.session import Change, LayerReport, Packed, Session
from lacewing.compress.threads import torch_threads
from lacewing.errors import RecipeError
from lacewing.formats import PackedTensor, get_format
from lacewing.models import DecoderSpec
from lacewing.version import __version__

__all__ = ["Compression", "Progress", "compress"]

Progress = Callable[[str, int, int], None]
"""What is being done, and how much of how much is done."""
Files = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


_LEAST = 1024
"""Tokens of calibration, for models whose hidden size is not smaller."""


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
    machine: str | None = None,
) -> Compression | Estimate:
    """Prunes and rounds a model block by block, calibrated on text, into a packed directory.

    model_or_path: anything `lacewing run` takes, or a model of transformers in memory, with the
    directory of its `tokenizer`. recipe: a preset (`safe`, `balanced`, `small`, `sparse50`), a YAML
    file, or a Recipe. data: text files (`data.py`). seed, tokens: in place of the recipe's.
    threads: of PyTorch; None leaves them. force: replace an existing packed directory. dry_run:
    only estimate; needs no data. machine: `avx512`, `avx2` or `scalar`, on which a sparse weight
    must be faster than its dense twin, or that is written (`checkpoint.breakeven`); None: where
    only bytes count.

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
    if machine not in (None, *MACHINES):
        raise RecipeError(f"`machine` must be one of {', '.join(MACHINES)}, got {machine!r}")
    asked = _fitted(_recipe(recipe), source, seed, tokens)
    plan = asked.plan(source.spec)
    check_target(target, MANIFEST, force)
    with torch_threads(threads):
        if dry_run:
            return estimate(source, plan, asked, machine)
        windows = _windows(data, source, asked)
        digest = digest_of(asked, source, windows, machine)
        with _session(target, source, windows, digest, restart) as session:
            if session.finished < session.blocks:
                _compress_blocks(source, windows, plan, asked, session, machine, progress)
            result = _write(source, target, plan, asked, windows, session, machine, force)
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
    fitted = replace(recipe, calibration=found)
    if fitted.needs_data:
        _check_enough(found, source.spec)
    return fitted


def _check_enough(calibration: Calibration, spec: DecoderSpec) -> None:
    """With fewer tokens than a layer has inputs, most directions are never seen."""
    least = min(_LEAST, spec.hidden_size)
    got = calibration.windows * calibration.window
    if calibration.windows < 2 or got < least:
        raise RecipeError(
            f"calibration: needs at least 2 windows and {least} tokens, got {calibration.windows}"
            f" of {calibration.window} tokens",
            hint="ask for more tokens: 32768 are usual",
        )


def _windows(data: Files, source: Source, recipe: Recipe) -> Windows:
    if not recipe.needs_data:
        return Windows(np.empty((0, recipe.calibration.window), np.int64), ())
    files = [data] if isinstance(data, (str, os.PathLike)) else list(data)
    return read_windows(files, source.tokenizer, source.spec.vocab_size, recipe.calibration)


# -- blocks, then the rest ------------------------------------------------------------------------


def _session(target: Path, source: Source, windows: Windows, digest: str, restart: bool) -> Session:
    spec = source.spec
    shape = (*windows.ids.shape, spec.hidden_size)
    place = target.with_name(f"{target.name}.work")
    return Session.open(place, digest, spec.n_layers, shape, restart)


def _compress_blocks(
    source: Source,
    windows: Windows,
    plan: Mapping[str, Rule],
    recipe: Recipe,
    session: Session,
    machine: str | None,
    progress: Progress | None,
) -> None:
    from lacewing.compress.calibrate import compress_blocks

    ids = torch.from_numpy(windows.ids)
    told = progress or (lambda name, done, total: None)
    compress_blocks(Decoder(source), ids, plan, recipe, session, machine, told)


def _write(
    source: Source,
    target: Path,
    plan: Mapping[str, Rule],
    recipe: Recipe,
    windows: Windows,
    session: Session,
    machine: str | None,
    force: bool,
) -> Compression:
    """The whole model: the blocks from the session, the rest from the source."""
    done = {n: v for i in range(session.blocks) for n, v in session.tensors(i).items()}
    missing = [name for name in plan if name.startswith("model.layers.") and name not in done]
    assert not missing, missing
    layers = session.reports()
    widest = max(value.shape[1] for value in done.values() if isinstance(value, PackedTensor))
    record = _record(recipe, machine, windows, layers, session.changes(), widest)
    others: list[Report] = []
    tensors: dict[str, Packed] = {}
    with memory_of(source), new_directory(target, MANIFEST, force) as place:
        names = source.spec.tensor_shapes()
        parts = [f"{name}.{part}" for name in names for part in ("stream", "offsets")]
        with SafetensorsWriter(place / WEIGHTS, parts, {"format": "lacewing"}) as out:
            for name, value in _all(source, plan, done, machine, others):
                add_to(out, name, value)
                tensors[name] = value
        stated = {name: _stated(value) for name, value in tensors.items()}
        manifest = manifest_json(source.config, source.tokenizer, stated, record)
        write_file(place / TOKENIZER, source.tokenizer.tokenizer_json.encode())
        write_file(place / MANIFEST, manifest.encode())
    nbytes = sum(value.nbytes for value in tensors.values())
    bits = 8 * nbytes / sum(math.prod(value.shape) for value in tensors.values())
    return Compression(target, 0.0, nbytes, bits, tuple(layers), tuple(others), record)


def _all(
    source: Source,
    plan: Mapping[str, Rule],
    done: Mapping[str, Packed],
    machine: str | None,
    others: list[Report],
) -> Iterator[tuple[str, Packed]]:
    """Every tensor, in the model's order."""
    rest = {
        name: (source.tensors[name], get_format(plan[name].format) if name in plan else None)
        for name in source.spec.tensor_shapes()
        if name not in done
    }
    packing = pack_all(rest, None, None, None, machine, search=False)
    for name in source.spec.tensor_shapes():
        if name in done:
            yield name, done[name]
        else:
            found, value, report = next(packing)
            assert found == name
            if isinstance(value, PackedTensor):
                others.append(report)
            yield name, value


def _stated(value: Packed) -> tuple[str, tuple[int, ...]]:
    return (value.format if isinstance(value, PackedTensor) else VECTOR), value.shape


def _record(
    recipe: Recipe,
    machine: str | None,
    windows: Windows,
    layers: Sequence[LayerReport],
    changes: Sequence[Change],
    widest: int,
) -> dict[str, Any]:
    """What lacewing.json keeps. No times: the same compression writes the same bytes."""
    rows = [asdict(layer) for layer in layers]
    for row in rows:
        del row["seconds"]
        row["error"] = row["error"] if math.isfinite(row["error"]) else None
    return {
        "lacewing": __version__,
        "recipe": recipe.to_dict(),
        "machine": machine,
        "data": {
            "files": [asdict(file) for file in windows.files],
            "tokens": windows.ids.size,
            "seed": recipe.calibration.seed,
            "digest": windows.digest(),
        },
        "layers": rows,
        "changes": [asdict(change) for change in changes],
        "notes": _notes(recipe, windows, widest),
    }


def _notes(recipe: Recipe, windows: Windows, widest: int) -> list[str]:
    tokens = windows.ids.size
    if not recipe.needs_data:
        return ["no rule looks at data: nothing was calibrated"]
    if tokens < widest:
        return [
            f"{tokens:,} tokens are fewer than the {widest:,} inputs of the widest layer: more, at"
            " least as many, would be better"
        ]
    return []

"""What of its KV cache a model reads, found on text: labels for every head and, under a budget,
spans. Both are those of the dense model; no weight is changed."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lacewing.checkpoint import Source, open_source
from lacewing.checkpoint.kvplan import (
    BLOCK,
    EVERYTHING,
    KVPLAN,
    KvPlan,
    Span,
    check_free,
    fingerprint,
    kept_blocks,
)
from lacewing.checkpoint.kvplan_values import MOST_CHANNELS
from lacewing.compress.checks import fail
from lacewing.compress.data import Windows, read_windows
from lacewing.compress.decoder import Decoder
from lacewing.compress.influence import INFLUENCE_WORK, SINKS, span_losses
from lacewing.compress.labels import find_labels
from lacewing.compress.recipe import Calibration
from lacewing.compress.spans import choose
from lacewing.compress.threads import torch_threads
from lacewing.models import DecoderSpec

__all__ = ["Found", "calibrate_kv"]

Progress = Callable[[str, float, float], None]
"""What was done, and how much of how much is done."""
F64 = npt.NDArray[np.float64]

_SHORTEST = 64
"""Tokens of the shortest window that is tried."""
_LEAST = 256
"""Tokens of calibration."""


@dataclass(frozen=True, eq=False)
class Found:
    """path: of the plan. window: tokens of calibration. windows: the layers' own, 0 for none. loss:
    of all spans, added up as if they did not depend on each other; nats per token, 0 without a
    budget. share: of the dense cache of `window` tokens that is kept, in layers without a window of
    their own; 1 without a budget."""

    path: Path
    plan: KvPlan
    window: int
    windows: tuple[int, ...]
    loss: float
    share: float
    seconds: float


def calibrate_kv(
    model: str | os.PathLike[str],
    data: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    *,
    budget: float | None = None,
    tokens: int = 8192,
    window: int = 4096,
    seed: int = 0,
    labels: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> Found:
    """Writes the labels of a model's KV cache and, with a budget, spans of its heads to a file.

    model: anything `lacewing run` takes. data: text files (`data.py`). out: None is `kvplan.json`
    in a packed directory. budget: the share of the dense cache, at `window` tokens, that spans may
    keep, 0 to 1. labels: channels per head, a multiple of 4; None is a quarter of them. tokens,
    window: of the text, in pieces of `window` tokens, or of as many as `tokens` and the model's
    context allow. threads: of PyTorch. force: replace a plan that is there. Same arguments,
    versions and threads make the same bytes.

    Raises RecipeError (options, data, activations that are not finite; a budget that cannot be met
    says the least), CheckpointError (the model is damaged, `out` exists or cannot be written),
    UnsupportedModelError.
    """
    start = time.perf_counter()
    source = open_source(model)
    place = _place(source, out, force)
    spec = source.spec
    r = _label_count(spec, labels)
    asked = _calibration(spec, tokens, window, seed)
    search = None if budget is None else _Search(spec, budget, asked)
    windows = read_windows(data, source.tokenizer, spec.vocab_size, asked)
    ids = torch.from_numpy(windows.ids)
    told = _Told(spec.n_layers * len(ids), search is not None, progress)
    with torch_threads(threads):
        decoder = Decoder(source)
        found = find_labels(decoder, ids, r, told)
        spans, loss = (None, 0.0) if search is None else search.run(decoder, ids, told)
    plan = KvPlan(_model(source), found, spans, _notes(windows, asked, budget, loss))
    plan.check(spec)
    plan.save(place, force)
    share = plan.bytes_share(asked.window, spec)
    own = tuple(layer.window for layer in spec.layers)
    return Found(place, plan, asked.window, own, loss, share, time.perf_counter() - start)


class _Told:
    """How far it is. passes: windows times layers."""

    def __init__(self, passes: int, spans: bool, progress: Progress | None) -> None:
        self._done, self._progress = 0.0, progress
        self._total = float(passes * (2 + INFLUENCE_WORK if spans else 1))

    def __call__(self, text: str, work: float) -> None:
        self._done += work
        if self._progress is not None:
            self._progress(text, self._done, self._total)


class _Search:
    """For spans: sinks and a window of 64, 128, .. tokens below those of calibration, or all."""

    def __init__(self, spec: DecoderSpec, budget: float, asked: Calibration) -> None:
        """Raises RecipeError for a budget that no choice of these meets."""
        self.seed, self.spec = asked.seed, spec
        self.lengths = _lengths(asked.window)
        self.spans = [*(Span(SINKS, length) for length in self.lengths), EVERYTHING]
        blocks = asked.window // BLOCK
        self.costs = [kept_blocks(span, blocks) for span in self.spans]
        self.layers = [i for i, layer in enumerate(spec.layers) if layer.window == 0]
        self._check(budget, blocks)
        # A millionth of a block is what rounding may take from a budget that is met exactly.
        self.budget = int(budget * blocks * len(self.layers) * spec.n_kv_heads + 1e-6)

    def _check(self, budget: float, blocks: int) -> None:
        if not self.layers:
            wanted = "a layer that reads everything, to give it spans"
            fail("budget", wanted, "windows in all layers", "leave out --budget")
        if not 0 < budget <= 1:
            fail("budget", "a share of the dense cache, above 0 and at most 1", budget)
        least = self.costs[0] / blocks
        if budget < least:
            said = math.ceil(least * 1e4) / 1e4
            fail(
                "budget",
                f"at least {said:.4f} at {blocks * BLOCK} tokens, where every head reads"
                f" {SINKS}+{_SHORTEST} of them",
                budget,
                "ask for more, or for a longer --window",
            )

    def run(
        self, decoder: Decoder, ids: Tensor, told: Callable[[str, float], None]
    ) -> tuple[list[list[Span]], float]:
        """The spans of all heads, and the sum of their losses."""
        windowed = span_losses(decoder, ids, self.lengths, self.seed, told)
        losses = np.pad(windowed, ((0, 0), (0, 0), (0, 1)))  # everything: no loss
        heads = losses[self.layers].reshape(-1, len(self.costs))
        chosen = choose(heads, self.costs, self.budget)
        spans = [[EVERYTHING] * self.spec.n_kv_heads for _ in self.spec.layers]
        for number, choice in enumerate(chosen):
            layer, head = divmod(number, self.spec.n_kv_heads)
            spans[self.layers[layer]][head] = self.spans[choice]
        return spans, float(heads[np.arange(len(chosen)), chosen].sum())


def _lengths(window: int) -> list[int]:
    lengths = [_SHORTEST]
    while 2 * lengths[-1] < window:
        lengths.append(2 * lengths[-1])
    return lengths


# -- what is asked for ----------------------------------------------------------------------------


def _place(source: Source, out: str | os.PathLike[str] | None, force: bool) -> Path:
    if out is None and source.kind != "packed":
        actual = f"none for {source.path}, which is no packed directory"
        fail("calibrate-kv", "a file to write", actual, f"name one: --out {KVPLAN}")
    place = source.path / KVPLAN if out is None else Path(out)
    check_free(place, force)
    return place


def _label_count(spec: DecoderSpec, labels: int | None) -> int:
    """A quarter of the channels, rounded down to a multiple of 4, if nothing is said."""
    most = min(spec.head_dim // 4 * 4, MOST_CHANNELS)
    r = min(most, max(4, spec.head_dim // 16 * 4)) if labels is None else labels
    if type(r) is not int or r % 4 or not 4 <= r <= most:
        fail("labels", f"a multiple of 4 channels, 4 to {most}", r)
    return r


def _calibration(spec: DecoderSpec, tokens: int, window: int, seed: int) -> Calibration:
    """As it is done: windows are whole blocks, no longer than the model's context or all tokens."""
    for name, value in (("tokens", tokens), ("window", window)):
        if type(value) is not int or value < _LEAST:
            fail(name, f"at least {_LEAST} tokens", value)
    if spec.max_context < _LEAST:
        fail("calibrate-kv", f"a model that reads {_LEAST} tokens at once", spec.max_context)
    fitted = min(window, tokens, spec.max_context) // BLOCK * BLOCK
    return Calibration(tokens, fitted, seed)


# -- what is written ------------------------------------------------------------------------------


def _model(source: Source) -> dict[str, Any]:
    spec = source.spec
    return {
        "type": spec.model_type,
        "layers": spec.n_layers,
        "kv_heads": spec.n_kv_heads,
        "head_dim": spec.head_dim,
        "fingerprint": fingerprint(source.tensors),
    }


def _notes(
    windows: Windows, asked: Calibration, budget: float | None, loss: float
) -> dict[str, Any]:
    """No times: the same calibration writes the same bytes."""
    notes: dict[str, Any] = {
        "files": [asdict(file) for file in windows.files],
        "tokens": windows.ids.size,
        "window": asked.window,
        "seed": asked.seed,
    }
    return notes if budget is None else notes | {"budget": budget, "loss": loss}

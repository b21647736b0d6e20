"""A stand-in for the loop over blocks: rounds every layer to nearest, and keeps to the session's
contract as the real one does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch

from lacewing.compress.decoder import STAGES, Decoder
from lacewing.compress.recipe import Recipe, Rule
from lacewing.compress.session import LayerReport, Session
from lacewing.formats import get_format

Tell = Callable[[str, int, int], None]


def compress_blocks(
    decoder: Decoder,
    windows: torch.Tensor,
    plan: Mapping[str, Rule],
    recipe: Recipe,
    session: Session,
    machine: str | None,
    progress: Tell,
) -> None:
    if session.finished == 0:
        session.activations("compressed")[0].copy_(decoder.embed(windows, decoder.embedding()))
    for index in range(session.finished, session.blocks):
        current, following = session.activations("compressed")
        packed, reports = {}, []
        block = decoder.block(index).requires_grad_(False)
        for name in (layer for stage in STAGES for layer in stage):
            layer = f"model.layers.{index}.{name}"
            rule = plan[f"{layer}.weight"]
            linear = block.linear(name)
            kind = get_format(rule.format)
            codes = kind.round(linear.weight.numpy(), rule.target or None)
            packed[f"{layer}.weight"] = kind.pack(codes)
            values = torch.from_numpy(kind.dequantize(codes))
            error = (values - linear.weight).norm() / linear.weight.norm()
            linear.weight.data = values
            report = (rule.target, float((values == 0).float().mean()), float(error))
            bits = packed[f"{layer}.weight"].bits_per_weight
            reports.append(LayerReport(layer, rule.format, rule.solver, *report, bits, 0.1 * index))
        following.copy_(block(current))
        session.finish_block(index, packed, reports)
        progress(f"block {index}", index + 1, session.blocks)


def install(monkeypatch: pytest.MonkeyPatch, blocks: Any = compress_blocks) -> None:
    """Puts `blocks` in the place of the real loop."""
    module = ModuleType("lacewing.compress.calibrate")
    module.compress_blocks = blocks  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)

"""A block's stages over files of activations, against the block itself."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

torch = pytest.importorskip("torch")

from lacewing.compress import path as path_module  # noqa: E402
from lacewing.compress.decoder import STAGES  # noqa: E402
from lacewing.compress.path import Path, tokens_at_once  # noqa: E402
from tests.compress.stored import captured, decoder_of, noise  # noqa: E402
from tests.tiny import CONFIGS  # noqa: E402

SHAPE = (5, 12)


def bf16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.fixture(params=[nullcontext, bf16], ids=["f32", "bf16"])
def tolerance(request, monkeypatch):
    """Of the largest value: f32 sums of some hundred in another order; or bf16 products, whose
    factors are off by 2^-9 each, one after the other in four stages, one of them a softmax."""
    monkeypatch.setattr(path_module, "fast_products", request.param)
    return 1e-5 if request.param is nullcontext else 2**-4


def off(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("at_once", [12, 30, 4096], ids=["one", "two", "all"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_block(name, at_once, tolerance, monkeypatch):
    monkeypatch.setattr(path_module, "_AT_ONCE", at_once)
    decoder = decoder_of(name)
    block = decoder.block(1)
    x = noise(*SHAPE, decoder.spec.hidden_size)
    before = x.clone()
    with torch.no_grad():
        seen, whole = captured(block, x)
        path = Path(block, x, torch.full_like(x, torch.nan))
        streams = {}
        for stage, layers in enumerate(STAGES):
            for part in tokens_at_once(*SHAPE):
                h, stream = path.inputs(stage, part)
                streams[stage] = stream.clone()
                assert h.dtype == stream.dtype == torch.float32
                for layer in layers:
                    assert off(h, seen[layer][part]) < tolerance
            if stage == 1:
                path.pass_attention()
        attended = path.y.clone()
        path.pass_mlp()
    assert off(path.y, whole) < tolerance
    assert (x == before).all()
    assert (streams[1] == before[part]).all()
    assert (streams[3] == attended[part]).all()


def test_parts_are_whole_windows(monkeypatch):
    monkeypatch.setattr(path_module, "_AT_ONCE", 30)
    parts = list(tokens_at_once(5, 12))
    assert [(p.start, p.stop) for p in parts] == [(0, 2), (2, 4), (4, 5)]
    assert [(p.start, p.stop) for p in tokens_at_once(2, 100)] == [(0, 1), (1, 2)]

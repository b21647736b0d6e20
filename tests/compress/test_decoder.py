"""The torch twin of the decoder against the numpy reference, on every architecture."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from lacewing.compress.decoder import STAGES, Decoder  # noqa: E402
from tests.compress.stored import Model  # noqa: E402
from tests.reference import Reference  # noqa: E402
from tests.tiny import CONFIGS, VOCAB, tiny_spec, tiny_tokens, tiny_weights  # noqa: E402


def twin_logits(name, windows):
    decoder = Decoder(Model(name))
    with torch.no_grad():
        x = decoder.embed(torch.tensor(windows), decoder.embedding())
        for i in range(decoder.spec.n_layers):
            x = decoder.block(i)(x)
        return decoder.logits(x, *decoder.head()).numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits(name):
    windows = [tiny_tokens(20, seed) for seed in (1, 2)]  # longer than the sliding windows
    exact = Reference(tiny_spec(name), tiny_weights(name), dtype=np.float64)
    plain = Reference(tiny_spec(name), tiny_weights(name))
    found = twin_logits(name, windows)
    assert found.shape == (2, 20, VOCAB)
    for window, logits in zip(windows, found, strict=True):
        expected = exact.logits(window)
        rounding = np.abs(plain.logits(window) - expected).max()
        # Both are f32, in other orders of summation: of the error of one, the other has at most a
        # few times as much.
        assert np.abs(logits - expected).max() <= 4 * rounding


@pytest.mark.parametrize("name", CONFIGS)
def test_stages_are_the_block(name):
    """What the layers of each stage read, and nothing else, decides what they give: fed by hand,
    the stages make up the block."""
    decoder = Decoder(Model(name))
    block = decoder.block(0)
    x = torch.randn(2, 9, decoder.spec.hidden_size, generator=torch.Generator().manual_seed(0))
    seen = {}
    for layer in (layer for stage in STAGES for layer in stage):
        block.linear(layer).register_forward_hook(
            lambda _, inputs, output, layer=layer: seen.update({layer: inputs[0]})
        )
    with torch.no_grad():
        whole = block(x)
        h = block.attention_input(x)
        a = block.attend(h)
        after = block.add_attention(x, a)
        m = block.mlp_input(after)
        d = block.gate(m)
        assert (block.add_mlp(after, d) == whole).all()
    for stage, fed in zip(STAGES, (h, a, m, d), strict=True):
        assert all((seen[layer] == fed).all() for layer in stage)


def test_a_block_holds_every_weight_of_its_layer():
    for name in CONFIGS:
        decoder = Decoder(Model(name))
        expected = sum(value.numel() for value in decoder.block_weights(1).values())
        assert sum(p.numel() for p in decoder.block(1).parameters()) == expected

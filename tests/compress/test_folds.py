"""Every fold leaves every tiny model's logits as they were; planted wrong ones do not.

Float64 throughout. A logit is a chain of some 15 sums per block, none longer than k = 160, over at
most 7 blocks: rounding moves it by less than 7 * 15 * 160 * 2^-53 = 1.9e-12 of the terms, and the
signs of the roundings are as good as random, which leaves its root, 2e-14: 1e-12 is generous to
that and far below any fold that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch", reason="compression needs PyTorch")

from lacewing.compress import folds  # noqa: E402
from lacewing.compress.decoder import STAGES  # noqa: E402
from lacewing.errors import RecipeError  # noqa: E402
from tests.compress.blocks import Tiny, difference, tiny_block  # noqa: E402
from tests.tiny import CONFIGS  # noqa: E402

TOLERANCE = 1e-12
STAGE_NUMBERS = range(len(STAGES))


def scales_for(size: int) -> torch.Tensor:
    """From a sixteenth to 16."""
    generator = torch.Generator().manual_seed(3)
    return 2 ** (8 * torch.rand(size, generator=generator, dtype=torch.float64) - 4)


def order_for(size: int) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(5))


def head_order(heads: int, dim: int) -> torch.Tensor:
    """Another order in every head."""
    generator = torch.Generator().manual_seed(5)
    parts = [torch.randperm(dim, generator=generator) + h * dim for h in range(heads)]
    return torch.cat(parts)


def changed_by(name: str, fold: Callable[[Tiny], None]) -> float:
    model = Tiny(name)
    before = model.logits()
    fold(model)
    return difference(before, model.logits())


@pytest.mark.parametrize("stage", STAGE_NUMBERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_scales_of_inputs_change_nothing(name: str, stage: int) -> None:
    def fold(model: Tiny) -> None:
        for block in model.blocks:
            folds.scale_inputs(block, stage, scales_for(folds.channels(model.spec, stage)))

    assert changed_by(name, fold) < TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_orders_change_nothing(name: str) -> None:
    def fold(model: Tiny) -> None:
        spec = model.spec
        for block in model.blocks:
            folds.permute_inputs(block, 1, head_order(spec.n_kv_heads, spec.head_dim))
            folds.permute_inputs(block, 3, order_for(spec.intermediate_size))

    assert changed_by(name, fold) < TOLERANCE


@pytest.mark.parametrize("name", ["llama-bias", "qwen3", "gemma3"])
def test_all_of_them_together(name: str) -> None:
    def fold(model: Tiny) -> None:
        spec = model.spec
        for block in model.blocks:
            for stage in STAGE_NUMBERS:
                folds.scale_inputs(block, stage, scales_for(folds.channels(spec, stage)))
            folds.permute_inputs(block, 1, head_order(spec.n_kv_heads, spec.head_dim))
            folds.permute_inputs(block, 3, order_for(spec.intermediate_size))

    assert changed_by(name, fold) < TOLERANCE


@pytest.mark.parametrize("name", ["llama-bias", "gemma3"])
@pytest.mark.parametrize("stage", STAGE_NUMBERS)
def test_half_a_fold_is_seen(name: str, stage: int) -> None:
    """What the tests above would say of a fold that forgets one of its sides."""

    def fold(model: Tiny) -> None:
        for block in model.blocks:
            folds.scale_inputs(block, stage, scales_for(folds.channels(model.spec, stage)))
            for layer in STAGES[stage]:
                inputs = folds.expand(
                    model.spec, stage, scales_for(folds.channels(model.spec, stage))
                )
                block.linear(layer).weight /= inputs

    assert changed_by(name, fold) > 1e-3


def test_a_forgotten_bias_is_seen() -> None:
    def fold(model: Tiny) -> None:
        for block in model.blocks:
            kept = block.linear("self_attn.v_proj").bias.clone()
            folds.scale_inputs(block, 1, scales_for(folds.channels(model.spec, 1)))
            block.linear("self_attn.v_proj").bias.copy_(kept)

    assert changed_by("qwen2", fold) > 1e-3


def test_orders_move_the_very_numbers() -> None:
    block, plain = tiny_block("qwen2"), tiny_block("qwen2")
    spec = block.spec
    order = head_order(spec.n_kv_heads, spec.head_dim)
    folds.permute_inputs(block, 1, order)
    v, o = "self_attn.v_proj", "self_attn.o_proj"
    assert torch.equal(block.linear(v).weight, plain.linear(v).weight[order])
    assert torch.equal(block.linear(v).bias, plain.linear(v).bias[order])
    inputs = folds.input_order(spec, 1, order)
    assert torch.equal(block.linear(o).weight, plain.linear(o).weight[:, inputs])
    group = spec.n_heads // spec.n_kv_heads
    for head in range(spec.n_heads):
        for i in range(spec.head_dim):
            expected = int(order[head // group * spec.head_dim + i]) % spec.head_dim
            assert int(inputs[head * spec.head_dim + i]) == head * spec.head_dim + expected


def test_groups_of_heads_merge_and_expand() -> None:
    spec = tiny_block("llama").spec  # 6 heads, 2 of them for keys and values
    values = torch.arange(96.0)
    merged = folds.merge(spec, 1, values)
    heads = values.view(6, 16)
    assert torch.equal(merged.view(2, 16)[1], heads[3:].mean(0))
    assert torch.equal(folds.merge(spec, 1, values, True).view(2, 16)[0], heads[2])
    wide = folds.expand(spec, 1, merged).view(6, 16)
    assert torch.equal(wide[4], merged.view(2, 16)[1])
    assert folds.expand(spec, 3, values) is values


def test_what_is_divided_is_foretold() -> None:
    for stage, name in enumerate(["input_layernorm", "v", "pre_feedforward_layernorm", "up"]):
        block = tiny_block("gemma3")
        scales = scales_for(folds.channels(block.spec, stage)).float()
        foretold = folds.divided_by(block, stage, scales)
        folds.scale_inputs(block, stage, scales)
        layers = {"v": "self_attn.v_proj", "up": "mlp.up_proj"}
        found = block.linear(layers[name]).weight if name in layers else block.norm(name)
        torch.testing.assert_close(foretold, found.detach(), rtol=2**-22, atol=0)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_must_be_positive_and_finite(value: float) -> None:
    block = tiny_block("llama")
    scales = torch.ones(160)
    scales[7] = value
    with pytest.raises(RecipeError, match=r"block 0.*mlp.down_proj.*positive.*channel 7"):
        folds.scale_inputs(block, 3, scales)


def test_query_heads_of_a_group_share_scales() -> None:
    with pytest.raises(RecipeError, match=r"o_proj.*needs 32 scales, got shape \[96\]"):
        folds.scale_inputs(tiny_block("llama"), 1, torch.ones(96))

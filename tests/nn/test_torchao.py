"""Layers of torchao and packed layers in one model."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from tiny_transformers import logits, packed_layers, prompt, tiny, torch, twin

from lacewing.nn import Linear, replace_linear

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    quantization = pytest.importorskip("torchao.quantization", reason="torchao quantizes too")

pytestmark = pytest.mark.filterwarnings("ignore")  # of theirs, about each other
CONFIGS = {
    "int8 weights": lambda: quantization.Int8WeightOnlyConfig(),
    "int8 activations": lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
}


def quantized_by_torchao(model: Any) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and type(module.weight.data) is not torch.Tensor
    }


@pytest.mark.parametrize("config", CONFIGS)
def test_torchao_leaves_packed_layers_alone(config: str) -> None:
    """`quantize_` as it is called, without a filter."""
    model = tiny("llama")
    replace_linear(model, "w4a8g32", include="*.mlp.*")
    before = packed_layers(model)
    quantization.quantize_(model, CONFIGS[config]())
    assert packed_layers(model) == before and len(before) == 6
    assert len(quantized_by_torchao(model)) == 9  # attention, and the head
    assert torch.equal(logits(model, prompt(2)), logits(twin(model), prompt(2)))


@pytest.mark.parametrize("config", CONFIGS)
def test_layers_of_torchao_are_left_alone(config: str) -> None:
    model = tiny("llama")
    quantization.quantize_(model, CONFIGS[config](), lambda module, name: name.endswith("o_proj"))
    theirs = quantized_by_torchao(model)
    assert len(theirs) == 2
    report = replace_linear(model, "w4a8g32")
    assert quantized_by_torchao(model) == theirs
    for name in theirs:
        assert "quantized or distributed already" in (report[name].reason or "")
    assert len(packed_layers(model)) == 13
    assert torch.equal(logits(model, prompt(2)), logits(twin(model), prompt(2)))


def test_both_generate() -> None:
    model = tiny("llama")
    replace_linear(model, "w4a8g32", include="*.mlp.*")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    options = {"max_new_tokens": 6, "do_sample": False}
    tokens = prompt(2)
    assert torch.equal(model.generate(tokens, **options), twin(model).generate(tokens, **options))


def test_a_packed_layer_is_a_linear_layer_for_all_others() -> None:
    layer = Linear.from_dense(torch.nn.Linear(32, 16), "w8a8g32")
    assert isinstance(layer, torch.nn.Linear)

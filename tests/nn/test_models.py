"""Whole models with random weights: in `bf16`, whose products are float32 sums, they compute what
their dense twins with the dequantized weights do; in `w8a8g32` they run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="lacewing.nn needs PyTorch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

from torch import nn  # noqa: E402

from lacewing.nn import Linear, replace_linear  # noqa: E402
from tests.nn.twins import twin_of  # noqa: E402

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
WORDS: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 64, shape)


def build(name: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    head = next(
        tail
        for tail in ("ForConditionalGeneration", "ForCausalLM", "LMHeadModel", "Model")
        if hasattr(transformers, name + tail)
    )
    return getattr(transformers, name + head)(
        getattr(transformers, f"{name}Config")(**config)
    ).eval()


def vit() -> tuple[nn.Module, dict[str, Any]]:
    model = build("ViT", **SIZES, image_size=16, patch_size=4)
    return model, {"pixel_values": torch.randn(2, 3, 16, 16)}


def bert() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, vocab_size=64)
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, -2:] = 0
    model = transformers.BertForMaskedLM(config).eval()
    return model, {"input_ids": tokens(2, 7), "attention_mask": mask}


def gpt2() -> tuple[nn.Module, dict[str, Any]]:
    return build("GPT2", n_embd=64, n_layer=2, n_head=4, n_positions=32, **WORDS), {
        "input_ids": tokens(2, 7)
    }


def llama() -> tuple[nn.Module, dict[str, Any]]:
    config = {**SIZES, **WORDS, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return build("Llama", **config), {"input_ids": tokens(2, 7)}


def t5() -> tuple[nn.Module, dict[str, Any]]:
    config = {**WORDS, "decoder_start_token_id": 0, "tie_word_embeddings": True}
    model = build("T5", d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, **config)
    return model, {"input_ids": tokens(2, 7), "decoder_input_ids": tokens(2, 3)}


def whisper() -> tuple[nn.Module, dict[str, Any]]:
    model = build(
        "Whisper",
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        num_mel_bins=16,
        max_source_positions=20,
        max_target_positions=16,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **WORDS,
    )
    return model, {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": tokens(2, 3)}


class Separable(nn.Sequential):
    """A block of MobileNet: a convolution per channel, then 1x1."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False),
            nn.BatchNorm2d(inputs),
            nn.ReLU6(),
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU6(),
        )


def mobilenet() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        Separable(16, 32),
        Separable(32, 64, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    ).eval()
    return model, {"input": torch.randn(2, 3, 16, 16)}


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, dict[str, Any]]], int]] = {
    "vit": (vit, 13),
    "bert": (bert, 14),
    "gpt2": (gpt2, 9),
    "llama": (llama, 15),
    "t5": (t5, 33),
    "whisper": (whisper, 33),
    "mobilenet": (mobilenet, 3),
}
"""Each with the number of its layers."""


def result(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out = model(**inputs)
    if isinstance(out, torch.Tensor):
        return out
    return out.logits if "logits" in out else out.last_hidden_state


@pytest.mark.parametrize("name", MODELS)
def test_computes_with_the_dequantized_weights(name: str) -> None:
    make, count = MODELS[name]
    dense, inputs = make()
    model = copy.deepcopy(dense)
    report = replace_linear(model, "bf16")
    assert len(report.replaced) == count
    assert max(map(len, str(report).splitlines())) <= 100
    want = result(twin_of(dense, model), inputs)
    # float32 sums in another order through a few layers of numbers of size 1
    torch.testing.assert_close(result(model, inputs), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_runs_in_eight_bits_and_loads_its_state(name: str) -> None:
    dense, inputs = MODELS[name][0]()
    model, other = copy.deepcopy(dense), copy.deepcopy(dense)
    replace_linear(model, "w8a8g32")
    want, got = result(dense, inputs), result(model, inputs)
    # 8 bits for weights and activations: well below a tenth of the norm
    assert (got - want).norm() < 0.1 * want.norm()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    replace_linear(other, "w8a8g32")
    other.load_state_dict(model.state_dict())
    assert torch.equal(result(other, inputs), got)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "whisper"])
def test_ties_do_not_come_back(name: str) -> None:
    dense, inputs = MODELS[name][0]()
    model = copy.deepcopy(dense)
    tied = copy.deepcopy(model.config.tie_word_embeddings)
    report = replace_linear(model, "w8a8g32")
    head = model.get_output_embeddings()
    assert type(head) is Linear
    before = result(model, inputs)
    model.tie_weights()
    assert model.get_output_embeddings() is head
    assert torch.equal(result(model, inputs), before)
    assert any("ties" in note and "no more" in note for note in report.notes)
    assert model.config.tie_word_embeddings == tied
    embedding = model.get_input_embeddings().weight
    assert type(embedding) is nn.Parameter
    assert any("stays dense" in note for layer in report.replaced for note in layer.notes)
    # what is tied beside the head stays tied, and other models of the class are as they were
    dense.tie_weights()
    assert dense.get_output_embeddings().weight is dense.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "whisper"])
def test_generates_what_the_twin_does(name: str) -> None:
    dense, inputs = MODELS[name][0]()
    with torch.no_grad():
        for parameter in dense.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)  # so that logits are apart
    model = copy.deepcopy(dense)
    replace_linear(model, "bf16")
    prompt = {key: value for key, value in inputs.items() if not key.startswith("decoder")}
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    want = twin_of(dense, model).generate(**prompt, **options)
    assert torch.equal(model.generate(**prompt, **options), want)


def test_an_excluded_head_stays_tied() -> None:
    model, _ = llama()
    report = replace_linear(model, exclude="lm_head")
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert report.notes == ()


def test_channels_last() -> None:
    dense, inputs = mobilenet()
    model = copy.deepcopy(dense)
    replace_linear(model, "bf16")
    want = result(twin_of(dense, model), inputs)
    model = model.to(memory_format=torch.channels_last)
    x = inputs["input"].contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result(model, {"input": x}), want, rtol=0, atol=1e-4)

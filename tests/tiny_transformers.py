"""Tiny models of transformers with random weights, and their twins in numpy.

A twin has in the place of every packed layer one that calls `Format.reference_linear` on the packed
weight: what the model has to compute, to the bit, in integer formats.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="lacewing.nn needs PyTorch")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what transformers finds and imports
    transformers = pytest.importorskip("transformers", "5.0", reason="needs transformers 5")
    importlib.import_module("transformers.quantizers.auto")

from lacewing.formats import get_format  # noqa: E402
from lacewing.nn import Linear  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCABULARY = 128
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_ENCODER_DECODER = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# model_type -> model, configuration
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_DECODER, "tie_word_embeddings": False}),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {
            **_DECODER,
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_DECODER, "head_dim": 16}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_DECODER, "head_dim": 16, "sliding_window": 8, "tie_word_embeddings": True},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "t5": ("T5ForConditionalGeneration", "T5Config", _ENCODER_DECODER),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            **_DECODER,
            "head_dim": 16,
            "moe_intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
}
ARCHITECTURES = ("llama", "qwen3", "gemma3", "gpt2", "t5")


def tiny(architecture: str, seed: int = 0, **options: Any) -> Any:
    """A dense model with random weights, in float32."""
    model, config, values = _MODELS[architecture]
    torch.manual_seed(seed)
    made = getattr(transformers, model)(getattr(transformers, config)(**{**values, **options}))
    for parameter in made.parameters():  # what transformers begins with is nearly linear
        parameter.data.mul_(3) if parameter.ndim > 1 else parameter.data.add_(0.1)
    return made.eval()


def reload(path: Any, **options: Any) -> Any:
    """Of whatever architecture."""
    config = transformers.AutoConfig.from_pretrained(path)
    auto = transformers.AutoModelForCausalLM
    if config.is_encoder_decoder:
        auto = transformers.AutoModelForSeq2SeqLM
    return auto.from_pretrained(path, **options)


def prompt(rows: int = 1, length: int = 7, seed: int = 3) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def logits(model: Any, tokens: Any) -> Any:
    """[rows, length, vocabulary]."""
    given = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=tokens, **given).logits


class Reference(torch.nn.Module):
    """The oracle in the place of a packed layer."""

    def __init__(self, layer: Linear) -> None:
        super().__init__()
        self.format = get_format(layer.format)
        self.codes = self.format.unpack(layer.packed)
        self.bias = None if layer.bias is None else layer.bias.detach().float().numpy()
        self.weight = layer.weight  # some models look at its type

    def forward(self, x: Any) -> Any:
        rows = x.detach().float().reshape(-1, x.shape[-1]).numpy()
        y = torch.from_numpy(self.format.reference_linear(rows, self.codes, self.bias))
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def twin(model: Any) -> Any:
    """A copy of a model, with a Reference for every packed layer."""
    made = copy.deepcopy(model)
    for name, module in list(made.named_modules()):
        if isinstance(module, Linear):
            made.set_submodule(name, Reference(module))
    return made


def packed_layers(model: Any) -> dict[str, Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear)}

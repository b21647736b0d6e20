"""`LacewingConfig`: transformers packs a model while it loads, saves it, and loads it again."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_transformers import (
    ARCHITECTURES,
    logits,
    packed_layers,
    prompt,
    reload,
    tiny,
    torch,
    transformers,
    twin,
)

import lacewing
from lacewing import checkpoint
from lacewing.checkpoint.safetensors import read_safetensors
from lacewing.errors import FormatError, LacewingError, RequestError
from lacewing.nn import Conv2d, Linear, PackedExperts, replace_linear
from lacewing.nn.huggingface import LacewingConfig
from lacewing.nn.huggingface.quantizer import _Packing

safetensors_torch = pytest.importorskip("safetensors.torch", reason="safetensors writes the files")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Architecture -> directory of a dense model."""
    made: dict[str, Path] = {}

    def directory(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp(architecture)
            tiny(architecture).save_pretrained(made[architecture])
        return made[architecture]

    return directory


def load(path: Path, format: str = "w4a8g32", **options: Any) -> Any:
    config = LacewingConfig(format, **options)
    return reload(path, quantization_config=config)


# -- packing on load ------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packing_while_loading_is_loading_and_replacing(dense: Any, architecture: str) -> None:
    model = load(dense(architecture))
    replaced = reload(dense(architecture))
    replace_linear(replaced, "w4a8g32", per_layer={"lm_head": "w8a8g32"})
    ours, theirs = packed_layers(model), packed_layers(replaced)
    assert ours.keys() == theirs.keys() and "lm_head" in ours
    for name, layer in ours.items():
        assert (
            layer.format == theirs[name].format == ("w8a8g32" if name == "lm_head" else "w4a8g32")
        )
        for part, array in theirs[name].packed.parts.items():
            assert (layer.packed.parts[part] == array).all(), (name, part)
    assert torch.equal(logits(model, prompt()), logits(replaced, prompt()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_computes_what_the_oracle_says(dense: Any, architecture: str) -> None:
    model = load(dense(architecture))
    assert torch.equal(logits(model, prompt(2)), logits(twin(model), prompt(2)))


def test_one_dense_weight_at_a_time(dense: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    pack = _Packing._pack

    def watched(self: Any, name: str, weight: Any) -> Any:
        gc.collect()
        assert not any(old() is not None for old in seen), name
        seen.append(weakref.ref(weight))
        return pack(self, name, weight)

    monkeypatch.setattr(_Packing, "_pack", watched)
    load(dense("llama"))
    assert len(seen) == 15


def test_tied_embeddings_stay_dense(dense: Any, tmp_path: Path) -> None:
    model = load(dense("gemma3"))
    assert model.config.tie_word_embeddings
    table = model.get_input_embeddings().weight
    assert type(table) is torch.nn.Parameter
    assert model.lm_head.format == "w8a8g32"
    assert model.lm_head.packed.shape == tuple(table.shape)
    model.tie_weights()  # leaves the packed head alone
    assert isinstance(model.lm_head, Linear)
    model.save_pretrained(tmp_path)
    again = reload(tmp_path)
    again.tie_weights()
    assert isinstance(again.lm_head, Linear)
    assert torch.equal(logits(model, prompt()), logits(again, prompt()))


def test_what_is_packed_can_be_said(dense: Any, tmp_path: Path) -> None:
    model = load(
        dense("llama"),
        "w8a8g64_sp",
        sparsity=0.7,
        exclude="*.k_proj",
        per_layer={"*.down_proj": "w4a8g64", "lm_head": None, "re:.*layers.1.*up_proj": "bf16"},
    )
    formats = {name: layer.format for name, layer in packed_layers(model).items()}
    assert "lm_head" not in formats and not any("k_proj" in name for name in formats)
    assert formats["model.layers.0.mlp.down_proj"] == "w4a8g64"
    assert formats["model.layers.1.mlp.up_proj"] == "bf16"
    assert set(formats.values()) == {"w8a8g64_sp", "w4a8g64", "bf16"}
    model.save_pretrained(tmp_path)
    again = reload(tmp_path)
    assert {name: layer.format for name, layer in packed_layers(again).items()} == formats
    assert torch.equal(logits(model, prompt()), logits(again, prompt()))


def test_the_head_is_not_pruned(dense: Any) -> None:
    model = load(dense("llama"), "w4a8g32", sparsity=0.5)
    zeros = {
        n: (m.weight.dequantized() == 0).float().mean() for n, m in packed_layers(model).items()
    }
    assert zeros.pop("lm_head") < 0.1
    assert min(zeros.values()) >= 0.5
    assert load(dense("llama"), "bf16").lm_head.format == "bf16"


def test_a_config_for_several_models(dense: Any) -> None:
    config = LacewingConfig("w4a8g32")
    first = reload(dense("llama"), quantization_config=config)
    second = reload(dense("gpt2"), quantization_config=config)
    assert config.layers is None
    assert len(first.config.quantization_config.layers) == 15
    assert len(second.config.quantization_config.layers) == 9


def test_a_layer_that_the_checkpoint_does_not_have_stays_dense(dense: Any) -> None:
    """It has random weights, which are there to be trained."""
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(dense("llama"), quantization_config=LacewingConfig("w4a8g32"))
    assert type(model.score) is torch.nn.Linear and not model.score.weight.is_meta
    assert len(packed_layers(model)) == 14


def test_weights_that_are_not_finite(dense: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*nan"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_other_types(dense: Any, tmp_path: Path, architecture: str, dtype: Any) -> None:
    """transformers keeps some layers of T5 in float32 (in float16; before 5.2 in bfloat16 too)."""
    config = LacewingConfig("w4a8g32")
    model = reload(dense(architecture), quantization_config=config, dtype=dtype)
    layers = packed_layers(model)
    whole = reload(dense(architecture), dtype=dtype)
    types = {name: whole.get_submodule(name).weight.dtype for name in layers}
    assert {name: layer.dtype for name, layer in layers.items()} == types
    if dtype == torch.float16:
        assert set(types.values()) == (
            {dtype} if architecture == "llama" else {dtype, torch.float32}
        )
    model.save_pretrained(tmp_path)
    again = reload(tmp_path, dtype=dtype)
    assert {name: layer.dtype for name, layer in packed_layers(again).items()} == {
        name: layer.dtype for name, layer in layers.items()
    }
    assert torch.equal(logits(model, prompt()), logits(again, prompt()))


def test_experts(tmp_path: Path) -> None:
    model = tiny("qwen3_moe")
    model.save_pretrained(tmp_path / "dense")
    packed = load(tmp_path / "dense", "w4a8g64_sp", sparsity=0.6)
    stacks = [name for name, m in packed.named_modules() if isinstance(m, PackedExperts)]
    if not hasattr(model.model.layers[0].mlp.experts, "has_gate"):
        pytest.skip("this version of transformers does not say how its experts lie")
    assert len(stacks) == 4
    packed.save_pretrained(tmp_path / "packed")
    again = reload(tmp_path / "packed")
    assert [n for n, m in again.named_modules() if isinstance(m, PackedExperts)] == stacks
    assert torch.equal(logits(packed, prompt()), logits(again, prompt()))


def test_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[32, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=32,
        num_labels=5,
    )
    auto = transformers.SegformerForSemanticSegmentation
    auto(config).save_pretrained(tmp_path / "dense")
    model = auto.from_pretrained(tmp_path / "dense", quantization_config=LacewingConfig("w8a8g32"))
    assert isinstance(model.decode_head.classifier, Conv2d)
    model.save_pretrained(tmp_path / "packed")
    again = auto.from_pretrained(tmp_path / "packed")
    assert isinstance(again.decode_head.classifier, Conv2d)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(pixels).logits, model(pixels).logits)
    with pytest.raises(RequestError, match=r"linear_fuse\.weight`: only linear layers"):
        model.dequantize()


def test_an_attention_layer_is_not_saved(dense: Any, tmp_path: Path) -> None:
    """`from_pretrained` leaves it dense."""
    model = reload(dense("llama"))
    model.extra = torch.nn.MultiheadAttention(64, 4)
    replace_linear(model, "w4a8g32")
    with pytest.raises(RequestError, match="`extra`: save_pretrained cannot store") as caught:
        model.save_pretrained(tmp_path)
    assert "exclude" in (caught.value.hint or "")
    assert not list(tmp_path.glob("*.safetensors"))


# -- saving and loading ---------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reloading_is_equal_to_the_bit(dense: Any, tmp_path: Path, architecture: str) -> None:
    model = load(dense(architecture))
    model.save_pretrained(tmp_path)
    again, said = reload(tmp_path, output_loading_info=True)
    assert not any(said.values())  # no warning about marks, or whatever
    assert not again.training
    ours, theirs = packed_layers(model), packed_layers(again)
    assert ours.keys() == theirs.keys()
    for name, layer in ours.items():
        for part, array in layer.packed.parts.items():
            loaded = theirs[name].packed.parts[part]
            assert (loaded == array).all() and loaded.ctypes.data % 64 == 0
    assert torch.equal(logits(model, prompt()), logits(again, prompt()))


def test_shards(dense: Any, tmp_path: Path) -> None:
    model = load(dense("llama"))
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert torch.equal(logits(model, prompt()), logits(reload(tmp_path), prompt()))


def test_a_packed_model_is_saved_again(dense: Any, tmp_path: Path) -> None:
    model = load(dense("qwen3"))
    model.save_pretrained(tmp_path / "first")
    reload(tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = (tmp_path / name / "model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    model = reload(tmp_path / "first")
    model.save_pretrained(tmp_path / "first")  # over what it was read from
    assert torch.equal(logits(model, prompt()), logits(reload(tmp_path / "second"), prompt()))


def test_replaced_layers_are_saved_too(dense: Any, tmp_path: Path) -> None:
    model = reload(dense("llama"))
    replace_linear(model, "w8a8g64", exclude="lm_head")
    model.save_pretrained(tmp_path)
    again = reload(tmp_path)
    assert packed_layers(again).keys() == packed_layers(model).keys()
    assert torch.equal(logits(model, prompt()), logits(again, prompt()))


def test_a_model_inside_one_that_was_replaced_is_saved(dense: Any, tmp_path: Path) -> None:
    whole = reload(dense("llama"))
    replace_linear(whole, "w8a8g64")
    for model in (whole, load(dense("llama"))):
        model.model.save_pretrained(tmp_path)
        again = transformers.AutoModel.from_pretrained(tmp_path)
        with torch.no_grad():
            want = model.model(prompt()).last_hidden_state
            assert torch.equal(again(prompt()).last_hidden_state, want)


def test_two_models_side_by_side(dense: Any, tmp_path: Path) -> None:
    both = torch.nn.ModuleList([reload(dense("llama")), reload(dense("qwen3"))])
    replace_linear(both, "w8a8g64")
    for model in both:
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(model, prompt()), logits(reload(tmp_path), prompt()))


@pytest.mark.parametrize("inside", ["model", "model.layers"])
def test_a_model_around_one_that_was_replaced(dense: Any, tmp_path: Path, inside: str) -> None:
    """It cannot know: what it saved would load with random weights."""
    model = reload(dense("llama"))
    replace_linear(model.get_submodule(inside), "w8a8g64")
    with pytest.raises(
        RequestError, match=r"model\.layers\.0\.self_attn\.q_proj` is packed"
    ) as caught:
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    assert "replace_linear on that model" in (caught.value.hint or "")
    assert replace_linear(model, include="model.layers").replaced == ()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model, prompt()), logits(reload(tmp_path), prompt()))


def test_the_names_in_the_file(dense: Any, tmp_path: Path) -> None:
    model = load(dense("llama"))
    model.save_pretrained(tmp_path)
    file = read_safetensors(tmp_path / "model.safetensors")
    for name, layer in packed_layers(model).items():
        mark = file.array(f"{name}.weight")
        assert mark.shape == (1,) * 5 and np.isnan(mark).all()
        for part, array in layer.packed.parts.items():
            assert (file.array(f"{name}.weight.{part}") == array).all()
    # Nothing else is there but what is not packed: no codes under a name that others read.
    left = {name for name in file.tensors if ".weight." not in name}
    assert left == {name for name, _ in tiny("llama").named_parameters()}
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "lacewing" and entry["version"] == 1
    assert entry["layers"]["lm_head"] == {"format": "w8a8g32", "shape": [128, 64]}


@pytest.mark.parametrize(
    ("architecture", "format"),
    [("llama", "w4a8g32"), ("llama", "w8a8g64_sp"), ("qwen3", "w8a8g64"), ("gemma3", "w4a8g64")],
)
def test_the_engine_reads_it(dense: Any, tmp_path: Path, architecture: str, format: str) -> None:
    model = load(dense(architecture), format, sparsity=0.7)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    source = checkpoint.open_source(tmp_path)
    packed = {name: value for name, value, _ in checkpoint.convert(source)}
    assert packed.keys() == source.spec.tensor_shapes().keys()
    tied = {"lm_head"} if model.config.tie_word_embeddings else set()
    for name, layer in packed_layers(model).items():
        if name in tied:  # the embedding is there, from which it came
            continue
        ours = packed[f"{name}.weight"]
        assert ours.format == layer.format
        for part, array in layer.packed.parts.items():
            assert (ours.parts[part] == array).all() and ours.parts[part].ctypes.data % 64 == 0
    dense_model = reload(dense(architecture))
    replace_linear(dense_model, "auto", checkpoint=tmp_path)
    assert torch.equal(logits(dense_model, prompt()), logits(model, prompt()))


class _NoDense(torch.overrides.TorchFunctionMode):  # type: ignore[misc]
    """Notes the shapes of floats that are made in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not made.is_meta and made.is_floating_point():
            self.shapes.add(tuple(made.shape))
        return made


def test_loading_makes_no_dense_weight(
    dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a mode sees its own thread
    load(dense("llama")).save_pretrained(tmp_path)
    with _NoDense() as packed:
        reload(tmp_path)
    with _NoDense() as whole:
        reload(dense("llama"))
    assert (96, 64) in whole.shapes  # of up_proj: the method sees it
    assert (96, 64) not in packed.shapes and (128, 64) in packed.shapes  # the embedding


def test_the_base_model_of_a_model_with_a_head(dense: Any, tmp_path: Path) -> None:
    model = load(dense("llama"))
    model.save_pretrained(tmp_path / "head")
    base = transformers.AutoModel.from_pretrained(tmp_path / "head")
    assert len(packed_layers(base)) == 14
    with torch.no_grad():
        wanted = model.model(prompt()).last_hidden_state
        assert torch.equal(base(prompt()).last_hidden_state, wanted)
    base.save_pretrained(tmp_path / "base")
    with_head = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert len(packed_layers(with_head)) == 14


def test_it_can_be_made_dense_again(dense: Any, tmp_path: Path) -> None:
    model = load(dense("llama"))
    weights = {name: m.weight.dequantized() for name, m in packed_layers(model).items()}
    model.save_pretrained(tmp_path / "packed")
    model.dequantize()
    assert not packed_layers(model)
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
    model.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(model, prompt()), logits(reload(tmp_path / "dense"), prompt()))


def test_merged_names_of_a_checkpoint(dense: Any, tmp_path: Path) -> None:
    """Where a checkpoint has one tensor for two layers, transformers splits it while loading and
    joins it while saving: not what is packed."""
    loading = pytest.importorskip("transformers.core_model_loading")
    model = tiny("llama")
    weights = model.state_dict()
    for i in range(2):
        mlp = f"model.layers.{i}.mlp"
        pair = [weights.pop(f"{mlp}.{name}_proj.weight") for name in ("gate", "up")]
        weights[f"{mlp}.w_in.weight"] = torch.cat(pair)
    model.config.save_pretrained(tmp_path / "dense")
    safetensors_torch.save_file(weights, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    split = loading.WeightConverter(
        source_patterns="mlp.w_in.weight",
        target_patterns=["mlp.gate_proj.weight", "mlp.up_proj.weight"],
        operations=[loading.Chunk(dim=0)],
    )
    packed = load_with(tmp_path / "dense", split)
    model.save_pretrained(tmp_path / "plain")
    wanted = logits(load(tmp_path / "plain"), prompt())
    assert torch.equal(logits(packed, prompt()), wanted)
    packed.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(reload(tmp_path / "packed"), prompt()), wanted)


def load_with(path: Path, conversion: Any) -> Any:
    from transformers import modeling_utils

    def mapping(*args: Any, **kwargs: Any) -> list[Any]:
        return [conversion]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_utils, "get_model_conversion_mapping", mapping)
        return load(path)


# -- where it may live ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device_map", ["cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}]
)
def test_device_maps(dense: Any, tmp_path: Path, device_map: Any) -> None:
    pytest.importorskip("accelerate", reason="device maps need accelerate")
    if device_map == "auto" and torch.accelerator.is_available():
        pytest.skip("`auto` is another device than the CPU here")
    wanted = logits(load(dense("gemma3")), prompt())
    config = LacewingConfig("w4a8g32")
    model = reload(dense("gemma3"), quantization_config=config, device_map=device_map)
    assert torch.equal(logits(model, prompt()), wanted)
    load(dense("gemma3")).save_pretrained(tmp_path)
    assert torch.equal(logits(reload(tmp_path, device_map=device_map), prompt()), wanted)


@pytest.mark.parametrize("place", ["disk", "cuda:0", 0, "meta"])
def test_places_without_packed_layers(dense: Any, place: Any) -> None:
    pytest.importorskip("accelerate", reason="device maps need accelerate")
    with pytest.raises(RequestError, match=rf"`device_map`.*got .*{place}"):
        reload(
            dense("llama"),
            quantization_config=LacewingConfig("w4a8g32"),
            device_map={"model": "cpu", "lm_head": place},
        )


@pytest.mark.parametrize("hooks", ["dispatch_model", "cpu_offload", "disk_offload"])
def test_hooks_of_accelerate(dense: Any, tmp_path: Path, hooks: str) -> None:
    accelerate = pytest.importorskip("accelerate", reason="what is tested is accelerate")
    model = load(dense("llama"))
    wanted = logits(model, prompt())
    cpu = torch.device("cpu")
    if hooks == "dispatch_model":
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    elif hooks == "cpu_offload":
        accelerate.cpu_offload(model, execution_device=cpu)
    else:
        accelerate.disk_offload(model, tmp_path, execution_device=cpu)
    assert torch.equal(logits(model, prompt()), wanted)


# -- the configuration ----------------------------------------------------------------------------


def test_a_config_is_a_dictionary() -> None:
    config = LacewingConfig("w8a8g64_sp", sparsity=0.5, exclude="lm_head", per_layer={"*.o": None})
    again = LacewingConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert again.exclude == ["lm_head"] and again.layers is None
    known = transformers.quantizers.auto.AutoQuantizationConfig
    assert type(known.from_dict(config.to_dict())) is LacewingConfig


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"format": "w4a8g63"}, FormatError, "no weight format 'w4a8g63'"),
        ({"sparsity": 1.0}, FormatError, r"sparsity must be in \[0, 1\)"),
        ({"exclude": [torch.nn.Linear]}, RequestError, "`exclude`.*names"),
        ({"per_layer": {torch.nn.Linear: None}}, RequestError, "`per_layer`.*names"),
    ],
)
def test_configs_that_cannot_be(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        LacewingConfig(**options)


def test_a_pattern_without_a_match(dense: Any) -> None:
    with pytest.raises(RequestError, match="`exclude`: 'q_projj' matches no layer"):
        load(dense("llama"), exclude="q_projj")


def test_transformers_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("lacewing.nn.huggingface")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers.core_model_loading", None)
    monkeypatch.delitem(vars(lacewing), "LacewingConfig", raising=False)
    with pytest.raises(LacewingError, match="needs transformers 5") as caught:
        lacewing.LacewingConfig("w4a8g64")
    assert "replace_linear" in (caught.value.hint or "")

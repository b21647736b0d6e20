"""`replace_linear(checkpoint=...)`: weights that come from a file instead of the model."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacewing.checkpoint import load_model, open_weights, write_packed
from lacewing.errors import CheckpointError, FormatError, RequestError
from lacewing.formats import PackedTensor, get_format
from tests.checkpoint import build

torch = pytest.importorskip("torch", reason="lacewing.nn needs PyTorch")

from torch import nn  # noqa: E402

from lacewing.nn import Linear, replace_linear  # noqa: E402

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


class Net(nn.Module):
    """One of every kind of layer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(64, 96)
        self.attn = nn.MultiheadAttention(32, 2, kdim=40, vdim=48)
        self.self_attn = nn.MultiheadAttention(32, 2)
        self.conv = nn.Conv2d(32, 48, 1)
        pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
        self.old = pytorch_utils.Conv1D(48, 64)
        self.old.weight.data.normal_()


def save(path: Path, model: nn.Module, prefix: str = "", dtype: str = "F32") -> Path:
    path.mkdir()
    tensors = {prefix + k: v.detach().float().numpy() for k, v in model.state_dict().items()}
    build.write_safetensors(path / "model.safetensors", tensors, dtype)
    return path


def untouched(model: nn.Module) -> bool:
    return not any(type(each).__module__.startswith("lacewing") for each in model.modules())


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    layers = {name: each for name, each in model.named_modules() if isinstance(each, Linear)}
    return {name: each.weight.dequantized() for name, each in layers.items()}


@pytest.mark.parametrize(("ours", "theirs"), [("", ""), ("", "model."), ("", "a.b."), ("0.", "")])
def test_every_kind_of_layer_under_any_prefix(tmp_path: Path, ours: str, theirs: str) -> None:
    source, model = Net(0), Net(1)
    path = save(tmp_path / "saved", source, theirs)
    whole: nn.Module = nn.Sequential(model) if ours else model
    report = replace_linear(whole, "w8a8g32", checkpoint=path)
    replace_linear(source, "w8a8g32")
    want, got = weights_of(source), weights_of(model)
    assert len(got) == 11
    assert want.keys() == got.keys()
    for name in want:
        assert torch.equal(want[name], got[name]), name
    assert len(report.replaced) == 5
    assert model.up.bias is not None and not torch.equal(model.up.bias, source.up.bias)


def test_bf16_in_the_file_is_exact(tmp_path: Path) -> None:
    path = save(tmp_path / "saved", nn.Sequential(nn.Linear(64, 32)), dtype="BF16")
    model = nn.Sequential(nn.Linear(64, 32))
    report = replace_linear(model, "bf16", checkpoint=path)
    want = open_weights(path)["0.weight"].dequantize()
    assert (model[0].weight.dequantized().numpy() == want).all()
    assert report["0"].error == 0


def test_what_peft_puts_between_names_does_not_count(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    path = save(tmp_path / "saved", nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64)))
    config = peft.LoraConfig(r=4, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64)), config)
    report = replace_linear(model, checkpoint=path)
    assert len(report.replaced) == 2


def test_a_tied_head_that_the_file_has_only_as_embedding(tmp_path: Path) -> None:
    def tied() -> nn.ModuleDict:
        parts = {"embed": nn.Embedding(32, 64), "head": nn.Linear(64, 32, bias=False)}
        model = nn.ModuleDict({**parts, "up": nn.Linear(64, 64)})
        model["head"].weight = model["embed"].weight
        return model

    source, model = tied(), tied()
    tensors = {k: v.detach().numpy() for k, v in source.state_dict().items()}
    del tensors["head.weight"]
    (tmp_path / "saved").mkdir()
    build.write_safetensors(tmp_path / "saved" / "model.safetensors", tensors)
    replace_linear(model, checkpoint=tmp_path / "saved")
    replace_linear(source)
    assert torch.equal(model["head"].weight.dequantized(), source["head"].weight.dequantized())


def test_a_model_on_the_meta_device(tmp_path: Path) -> None:
    """It has never had dense weights; what is not read from the file must be there."""
    source = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 64))
    path = save(tmp_path / "saved", source)
    model = nn.Sequential(nn.Linear(64, 32, bias=False, device="meta"), nn.Linear(32, 64))
    replace_linear(model, checkpoint=path)
    replace_linear(source)
    assert torch.equal(model[0].weight.dequantized(), source[0].weight.dequantized())
    model(torch.randn(2, 64))
    biased = nn.Sequential(nn.Linear(64, 32, device="meta"))
    with pytest.raises(RequestError, match="`0` is on the meta device"):
        replace_linear(biased, checkpoint=path)


# -- weights that are packed or quantized already -------------------------------------------------


def llama(path: Path, **changes: Any) -> nn.Module:
    """The model whose config lies in a directory, with weights of its own."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**build.config(**changes))).eval()


def test_a_packed_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    config = build.config(tie_word_embeddings=False)
    hub = build.write_hub(tmp_path / "hub", config, build.random_weights(config))
    write_packed(hub, tmp_path / "packed", "w4a8g32")
    model = llama(hub, tie_word_embeddings=False)
    report = replace_linear(model, "auto", checkpoint=tmp_path / "packed")
    formats = {layer.name: layer.format for layer in report.replaced}
    assert formats.pop("lm_head") == "w8a8g32"
    assert set(formats.values()) == {"w4a8g32"}
    assert all(layer.error == 0 for layer in report.replaced)
    other = llama(hub, tie_word_embeddings=False)
    replace_linear(other, "w4a8g32", checkpoint=hub, exclude="lm_head")
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(model.get_submodule(name).codes, other.get_submodule(name).codes)


def test_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    build.tiny_gguf("Q4_0").write(path)
    model = llama(path)
    report = replace_linear(model, "auto", checkpoint=path)
    assert {layer.format for layer in report.replaced} == {"w4a8g32"}
    assert all(layer.error == 0 for layer in report.replaced)


@pytest.mark.parametrize(
    ("fixture", "format"),
    [
        ("foreign/packed-4-symmetric", "w4a8g32"),
        ("foreign/packed-4-asymmetric", "w4a8g32z"),
        ("foreign_gptq/auto-round-auto_gptq-4", "w4a8g32z"),
        ("foreign/sparse-24-bitmask-bfloat16", "w8a8g32"),
    ],
)
def test_what_others_have_quantized(fixture: str, format: str) -> None:
    path = FIXTURES / fixture
    expected = np.load(path / "expected.npy").astype(np.float32)
    inner = nn.ModuleDict({"up_proj": nn.Linear(96, len(expected), bias=False)})
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": inner})])})
    report = replace_linear(model, "auto", checkpoint=path, machine="avx512")
    layer = inner["up_proj"]
    assert layer.format == format
    error = np.linalg.norm(layer.weight.dequantized().numpy() - expected) / np.linalg.norm(expected)
    # the same codes, with scales and minima rounded to f16; floats are rounded to 8 bits
    bound = 0.01 if format == "w8a8g32" else 2.0**-10
    assert error < bound
    assert report.replaced[0].error < bound


def test_auto_is_that_of_the_engine(tmp_path: Path) -> None:
    """A layer that was pruned to 2:4, and one that was not: as `load_model` packs them."""
    config = build.config(tie_word_embeddings=False)
    weights = build.random_weights(config)
    for name, weight in weights.items():
        if "up_proj" in name:
            weight.reshape(len(weight), -1, 4)[:, :, [0, 3]] = 0
    hub = build.write_hub(tmp_path / "hub", config, weights)
    packed = load_model(hub, machine="avx512")
    formats = {r.name.removesuffix(".weight"): r.format for r in packed.reports}
    model = llama(hub, tie_word_embeddings=False)
    report = replace_linear(model, "auto", checkpoint=hub, machine="avx512")
    assert {layer.format for layer in report.replaced} == {"w8a8g32", "w8a8g64_24"}
    for layer in report.replaced:
        assert layer.format == formats[layer.name]
    name = "model.layers.1.mlp.up_proj"
    want = packed.tensors[f"{name}.weight"]
    assert isinstance(want, PackedTensor)
    got = model.get_submodule(name).weight.dequantized().numpy()
    assert np.array_equal(got, get_format(want.format).dequantize(want))
    pruned = llama(hub, tie_word_embeddings=False)
    report = replace_linear(pruned, "auto", checkpoint=hub, sparsity=0.25, machine="avx512")
    assert {layer.format for layer in report.replaced} == {"w8a8g32"}


def test_stacks_of_experts_keep_one_format(tmp_path: Path) -> None:
    """An expert that was pruned, beside others that were not."""
    from tests.nn.test_experts import mixture

    source = mixture("Mixtral")
    stack = source.model.layers[0].mlp.experts.gate_up_proj
    with torch.no_grad():
        stack[0].view(stack.shape[1], -1, 4)[:, :, :2] = 0
    source.save_pretrained(tmp_path / "saved")
    report = replace_linear(source, "auto", checkpoint=tmp_path / "saved", machine="avx512")
    assert {layer.format for layer in report.replaced} == {"w8a8g32"}


# -- checkpoints that do not fit ------------------------------------------------------------------


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    path = save(tmp_path / "saved", nn.ModuleDict({"up_project": nn.Linear(64, 32)}))
    model = nn.ModuleDict({"up_proj": nn.Linear(64, 32)})
    with pytest.raises(
        CheckpointError, match=r"`up_proj\.weight` must be in a checkpoint"
    ) as error:
        replace_linear(model, checkpoint=path)
    assert str(error.value.hint).startswith("near matches: up_project.weight")
    assert untouched(model)


def test_a_layer_that_is_missing(tmp_path: Path) -> None:
    path = save(tmp_path / "saved", nn.Sequential(nn.Linear(64, 32)), "model.")
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
    with pytest.raises(CheckpointError, match=r"`1\.weight` must be in"):
        replace_linear(model, checkpoint=path)
    assert untouched(model)
    assert len(replace_linear(model, checkpoint=path, exclude="1").replaced) == 1


def test_a_layer_of_another_shape(tmp_path: Path) -> None:
    path = save(tmp_path / "saved", nn.Sequential(nn.Linear(64, 32), nn.Linear(64, 32)))
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
    message = r"`1\.weight` must be \[64, 32\] as in the model, got \[32, 64\]"
    with pytest.raises(CheckpointError, match=message):
        replace_linear(model, checkpoint=path)
    assert untouched(model)


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    source = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
    with torch.no_grad():
        source[1].weight[5, 6] = float("nan")
    path = save(tmp_path / "saved", source)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
    with pytest.raises(FormatError, match=r"`1\.weight`.*finite"):
        replace_linear(model, checkpoint=path)
    assert untouched(model)


@pytest.mark.parametrize("cut", [4, 100, -100])
def test_a_file_that_is_cut_off(tmp_path: Path, cut: int) -> None:
    path = save(tmp_path / "saved", nn.Sequential(nn.Linear(64, 32)))
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    model = nn.Sequential(nn.Linear(64, 32))
    with pytest.raises(CheckpointError):
        replace_linear(model, checkpoint=path)
    assert untouched(model)


def test_a_header_that_lies(tmp_path: Path) -> None:
    path = save(tmp_path / "saved", nn.Sequential(nn.Linear(64, 32)))
    raw = (path / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["0.weight"]["shape"] = [64, 1 << 40]
    (path / "model.safetensors").write_bytes(build.safetensors_bytes(header, raw[8 + size :]))
    with pytest.raises(CheckpointError):
        replace_linear(nn.Sequential(nn.Linear(64, 32)), checkpoint=path)


def test_integers_where_weights_should_be(tmp_path: Path) -> None:
    path = save(tmp_path / "saved", nn.Sequential(nn.Linear(64, 32)))
    raw = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(raw.replace(b'"F32"', b'"I32"'))
    with pytest.raises(Exception, match="needs a type of F32") as error:
        replace_linear(nn.Sequential(nn.Linear(64, 32)), checkpoint=path)
    assert type(error.value).__module__ == "lacewing.errors"


def test_a_checkpoint_that_may_only_be_read(tmp_path: Path) -> None:
    path = save(tmp_path / "saved", nn.Sequential(nn.Linear(64, 32)))
    (path / "model.safetensors").chmod(0o400)
    path.chmod(0o500)
    try:
        model = nn.Sequential(nn.Linear(64, 32))
        replace_linear(model, checkpoint=str(path))
    finally:
        path.chmod(0o700)
    before = model[0].weight.dequantized()
    shutil.rmtree(path)
    assert torch.equal(model[0].weight.dequantized(), before)


@pytest.mark.parametrize("given", [3, {}, nn.Linear(1, 1)], ids=repr)
def test_what_is_no_path(given: Any) -> None:
    with pytest.raises(RequestError, match="`checkpoint` must be the path"):
        replace_linear(nn.Sequential(nn.Linear(64, 32)), checkpoint=given)


def test_nothing_there(tmp_path: Path) -> None:
    for name in ("nothing", "nothing.safetensors"):
        with pytest.raises(CheckpointError):
            replace_linear(nn.Sequential(nn.Linear(64, 32)), checkpoint=tmp_path / name)
    with pytest.raises(CheckpointError):
        replace_linear(nn.Sequential(nn.Linear(64, 32)), checkpoint=tmp_path)


# -- experts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["w8a8g32", "bf16"])
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_experts_as_transformers_saves_them(tmp_path: Path, name: str, format: str) -> None:
    """One matrix per expert and projection (Mixtral, Qwen), or stacks (GPT-OSS)."""
    from tests.nn.test_experts import mixture

    source = mixture(name).bfloat16()
    source.save_pretrained(tmp_path / "saved")
    model = copy.deepcopy(source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    report = replace_linear(model, format, checkpoint=tmp_path / "saved")
    replace_linear(source, format)
    for projection in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{projection}"
        want, got = source.get_submodule(name), model.get_submodule(name)
        assert torch.equal(want.dequantized(), got.dequantized())
        assert report[name].error == 0 or format != "bf16"


def test_an_expert_of_another_shape(tmp_path: Path) -> None:
    from tests.nn.test_experts import mixture

    source = mixture("Qwen3Moe")
    source.save_pretrained(tmp_path / "saved")
    tensors = {n: t.dequantize() for n, t in open_weights(tmp_path / "saved").items()}
    name = next(name for name in tensors if name.endswith("experts.2.up_proj.weight"))
    tensors[name] = tensors[name][:-1]
    build.write_safetensors(tmp_path / "saved" / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"experts\.2.* must be \[64, 64\] as in the model"):
        replace_linear(source, checkpoint=tmp_path / "saved")
    assert untouched(source)

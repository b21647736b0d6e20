"""`replace_linear`: what is replaced, by what, and what stays."""

from __future__ import annotations

import copy
import subprocess
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

import lacewing
from lacewing.errors import FormatError, RequestError
from lacewing.formats import FORMATS, get_format

torch = pytest.importorskip("torch", reason="lacewing.nn needs PyTorch")

from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, prune  # noqa: E402

from lacewing.nn import Linear, plan, replace_linear  # noqa: E402
from tests.nn.twins import reference, twin_of  # noqa: E402


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(64, 10))


def linears(model: nn.Module) -> list[str]:
    """Names of the dense ones."""
    return [name for name, each in model.named_modules() if type(each) is nn.Linear]


# -- what is replaced -----------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_every_format(format: str) -> None:
    kind = get_format(format)
    model = net()
    x = torch.randn(3, 64)
    sparsity = 0.8 if kind.sparse and kind.fixed_sparsity is None else None
    report = lacewing.replace_linear(model, format, sparsity=sparsity, machine="avx512")
    assert linears(model) == []
    assert [layer.name for layer in report.replaced] == ["0.up", "0.down", "1.up", "1.down", "2"]
    assert report.left_alone == ()
    for name in ("0.up", "2"):
        layer = model.get_submodule(name)
        if kind.group_size:
            assert torch.equal(layer(x), reference(layer, x))
        dense = net().get_submodule(name).weight
        error = (layer.weight - dense.detach()).norm() / dense.detach().norm()
        assert report[name].error == pytest.approx(float(error), rel=1e-3)
        assert report[name].bytes_after == layer.packed.nbytes
        assert report[name].bits_per_weight == pytest.approx(layer.packed.bits_per_weight)


def test_the_model_computes_with_the_dequantized_weights() -> None:
    dense = net()
    model = copy.deepcopy(dense)
    replace_linear(model, "bf16")
    x = torch.randn(2, 5, 64)
    # float32, in another order: hundreds of units of 2^-24 of numbers below 16
    torch.testing.assert_close(model(x), twin_of(dense, model)(x), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_of_models(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    bias = model[2].bias.detach().clone()
    report = replace_linear(model, "w8a8g32")
    layer: Any = model[2]
    assert layer.weight.dtype == dtype
    assert layer.bias.dtype == dtype
    assert torch.equal(layer.bias, bias)
    assert not layer.bias.requires_grad
    assert report["2"].bytes_before == 640 * dtype.itemsize
    assert model(torch.randn(2, 64, dtype=dtype)).dtype == dtype


def test_bf16_weights_in_bf16_are_exact() -> None:
    model = net().bfloat16()
    weight = model[2].weight.detach().clone()
    report = replace_linear(model, "bf16")
    assert torch.equal(model[2].weight, weight)
    assert report["2"].error == 0
    assert "exact" in str(report)


def test_a_lazy_layer_once_it_has_weights() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    with pytest.raises(RequestError, match="`0` is lazy"):
        replace_linear(model)
    assert isinstance(model[1], nn.Linear) and not isinstance(model[1], Linear)
    replace_linear(model, exclude="0")
    model(torch.randn(2, 64))
    report = replace_linear(model)
    assert report["0"].shape == (8, 64)
    assert isinstance(model[0], Linear)


def test_conv1d_of_transformers() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason="needs transformers")
    torch.manual_seed(1)
    dense = nn.Sequential(pytorch_utils.Conv1D(48, 64))
    model = copy.deepcopy(dense)
    report = replace_linear(model, "bf16")
    assert report["0"].kind == "Conv1D"
    assert report["0"].shape == (48, 64)
    assert model[0].nf == 48
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(model(x), twin_of(dense, model)(x), rtol=0, atol=2e-5)


def test_large_layers_in_runs_of_rows() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3000, 1000), nn.Linear(1000, 3000))
    whole = [lacewing.pack(each.weight, "w4a8g64") for each in model]
    replace_linear(model, "w4a8g64", threads=3)
    for layer, want in zip(model, whole, strict=True):
        for name, part in want.parts.items():
            assert (layer.packed.parts[name] == part).all()


def test_mode_and_other_attributes() -> None:
    model = net().eval()
    model[2].train()
    model[2].mark = "mine"
    replace_linear(model)
    assert not model[0].up.training
    assert model[2].training
    assert model[2].mark == "mine"


def test_parameters_and_state_dict() -> None:
    model, other = net(), net()
    replace_linear(model, "w8a8g64")
    names = {name for name, _ in model.named_parameters()}
    assert names == {"0.up.bias", "1.up.bias", "2.bias"}
    assert "0.up.weight.codes" in model.state_dict()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    replace_linear(other, "w8a8g64")
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(model(x), other(x))


# -- shared ---------------------------------------------------------------------------------------


def test_a_shared_module_is_replaced_once() -> None:
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": shared})
    report = replace_linear(model)
    assert model["a"][0] is model["b"]
    assert isinstance(model["b"], Linear)
    assert report.replaced[0].names == ("a.0", "b")
    assert len(report.layers) == 1
    assert "also called b" in str(report)


@pytest.mark.parametrize("by", ["parameter", "memory"])
def test_tied_layers_share_their_bytes(by: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False))
    if by == "parameter":
        model[1].weight = model[0].weight
    else:
        model[1].weight.data = model[0].weight.data
    report = replace_linear(model, "w8a8g64")
    assert model[0].codes.data_ptr() == model[1].codes.data_ptr()
    assert model[0].bias is not None and model[1].bias is None
    assert report["1"].bytes_before == report["1"].bytes_after == 0
    assert report.bytes_after == model[0].packed.nbytes
    assert "shares its packed weight" in str(report)


def test_a_class_around_any_of_its_places() -> None:
    shared = nn.Linear(64, 64)
    model = nn.ModuleList([nn.ModuleDict({"a": shared}), nn.Sequential(shared), nn.Linear(64, 64)])
    report = replace_linear(model, exclude=nn.Sequential)
    assert [layer.name for layer in report.replaced] == ["2"]


def test_tied_layers_in_two_formats() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    replace_linear(model, "w8a8g64", per_layer={"1": "w4a8g64"})
    assert [layer.format for layer in model] == ["w8a8g64", "w4a8g64"]


def test_a_head_tied_to_an_embedding() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(32, 64), "head": nn.Linear(64, 32, bias=False)})
    model["head"].weight = model["embed"].weight
    weight = model["embed"].weight
    report = replace_linear(model)
    assert isinstance(model["head"], Linear)
    assert model["embed"].weight is weight
    assert report["head"].notes == ("tied to embed.weight, which stays dense",)
    assert report["head"].bytes_before == 0
    assert "looked up" in str(report["embed"].reason)


# -- sparse ---------------------------------------------------------------------------------------


def test_zeros_that_are_there_are_used() -> None:
    model = nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 256))
    prune.l1_unstructured(model[0], "weight", 0.75)
    prune.remove(model[0], "weight")
    report = replace_linear(model, "w8a8g64_sp", machine="avx512")
    assert report["0"].format == "w8a8g64_sp"
    assert report["0"].density == pytest.approx(0.25, abs=0.01)
    assert report["0"].instead_of is None
    assert report["1"].format == "w8a8g64"
    assert report["1"].instead_of == "w8a8g64_sp"
    assert "instead of w8a8g64_sp: 100% of the weights" in str(report)
    replaced = nn.Sequential(nn.Linear(256, 64))
    replace_linear(replaced, "w8a8g64_sp", sparsity=0.7, machine="scalar")
    assert replaced[0].format == "w8a8g64"


def test_pruning() -> None:
    model = net()
    replace_linear(model, "w8a8g64", sparsity=0.5)
    zeros = (model[0].up.weight.dequantized() == 0).float().mean(1)
    assert (zeros >= 0.5).all()


# -- left alone -----------------------------------------------------------------------------------


class OwnForward(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Renamed(nn.Linear):
    """Nothing of its own."""


def reasons(model: nn.Module, **options: Any) -> dict[str, str]:
    report = replace_linear(model, "w8a8g32", **options)
    return {layer.name: str(layer.reason) for layer in report.left_alone}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # by the quantized layer
def test_why_layers_are_left_alone() -> None:
    hooked = nn.Linear(32, 32)
    hooked.register_state_dict_post_hook(lambda *args: None)
    patched = nn.Linear(32, 32)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    pruned = prune.l1_unstructured(nn.Linear(32, 32), "weight", 0.5)
    model = nn.ModuleDict(
        {
            "own": OwnForward(32, 32),
            "doubled": nn.Linear(32, 32).double(),
            "hooked": hooked,
            "patched": patched,
            "normed": parametrizations.weight_norm(nn.Linear(32, 32)),
            "pruned": pruned,
            "empty": nn.Linear(32, 32),
            "rnn": nn.LSTM(32, 32),
            "bilinear": nn.Bilinear(4, 4, 4),
            "quantized": torch.ao.nn.quantized.dynamic.Linear(32, 32),
            "integer": nn.Linear(32, 32),
            "sub": Renamed(32, 32),
        }
    )
    model["empty"].weight = nn.Parameter(torch.zeros(32, 0))
    integers = torch.zeros(32, 32, dtype=torch.int8)
    model["integer"].weight = nn.Parameter(integers, requires_grad=False)
    before = dict(model._modules)
    why = reasons(model)
    assert type(model["sub"]) is Linear
    assert {name: model[name] for name in why} == {name: before[name] for name in why}
    assert "OwnForward has a forward of its own" in why["own"]
    assert "torch.float64" in why["doubled"]
    assert "hooks on its state_dict" in why["hooked"]
    assert "replaced on the instance" in why["patched"]
    assert "computed from others" in why["normed"]
    assert "computed from others" in why["pruned"]
    assert "no weights" in why["empty"]
    assert "LSTM is not known" in why["rnn"]
    assert "Bilinear" in why["bilinear"]
    assert "not a torch.nn.Linear" in why["quantized"]
    assert "torch.int8" in why["integer"]
    assert len(why) == 11


class Scaled(nn.Linear):
    """It has a method more, which a packed layer would not have."""

    def scale(self) -> float:
        return float(self.weight.abs().max())


class OwnState(nn.Linear):
    def _save_to_state_dict(self, *args: Any) -> None:
        return None


def test_what_a_packed_layer_would_lose() -> None:
    made = [nn.Linear(32, 32) for _ in range(3)]
    made[0].register_buffer("smooth", torch.ones(32))
    made[1].register_parameter("gate", nn.Parameter(torch.ones(1)))
    made[2].add_module("inner", nn.Identity())
    conv = nn.Conv2d(8, 8, 1)
    attention, projection = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)
    conv.register_buffer("mean", torch.ones(8))
    attention.register_buffer("cache", torch.ones(8))
    projection.out_proj.register_buffer("smooth", torch.ones(8))
    model = nn.Sequential(*made, conv, attention, projection, Scaled(8, 8), OwnState(8, 8))
    why = reasons(model)
    assert list(why.values()) == [
        "it has a buffer `smooth` of its own",
        "it has a parameter `gate` of its own",
        "it has a module `inner` of its own",
        "it has a buffer `mean` of its own",
        "it has a buffer `cache` of its own",
        "its out_proj: it has a buffer `smooth` of its own",
        "Scaled has `scale`, which the packed layer would not have",
        "OwnState has a _save_to_state_dict of its own",
    ]


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 8), lambda: nn.Conv1d(8, 8, 1)])
def test_a_compiled_layer_stays(make: Any) -> None:
    """What it was compiled to would go on to run the dense one."""
    wrapped = torch.compile(make(), backend="eager")
    model = nn.Sequential(make(), nn.MultiheadAttention(8, 2), wrapped)
    model[0].compile(backend="eager")
    model[1].out_proj.compile(backend="eager")
    why = reasons(model)
    assert why["0"] == "it is compiled: replace first, then compile"
    assert why["1"] == f"its out_proj: {why['0']}"
    assert why["2._orig_mod"] == why["0"]


def test_quantized_by_torchao() -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    torchao.quantize_(model[0], torchao.Int8WeightOnlyConfig())
    why = reasons(model)
    assert "quantized or distributed already" in why["0"]
    assert set(why) == {"0"}


def test_a_second_time_changes_nothing() -> None:
    model = net()
    replace_linear(model)
    before = dict(model.named_modules())
    report = replace_linear(model, "w4a8g64")
    assert report.replaced == ()
    assert all(layer.reason == "packed already: w8a8g64" for layer in report.left_alone)
    assert dict(model.named_modules()) == before


def test_adapters_stay_and_what_they_adapt_is_replaced() -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(r=4, target_modules=["up"])
    model = peft.get_peft_model(net(), config)
    report = replace_linear(model, "w8a8g32")
    up = model.base_model.model[0].up
    assert type(up.base_layer) is Linear
    assert type(up.lora_A["default"]) is nn.Linear
    assert report["base_model.model.0.up.lora_A.default"].reason == "part of an adapter"
    model(torch.randn(2, 64)).sum().backward()
    assert up.lora_B["default"].weight.grad is not None


def test_adapters_on_packed_layers() -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    packed = net()
    replace_linear(packed, "w8a8g32")
    x = torch.randn(2, 64)
    want = packed(x)
    model = peft.get_peft_model(packed, peft.LoraConfig(r=4, target_modules=["up", "2"]))
    torch.testing.assert_close(model(x), want)
    model(x).sum().backward()
    trained = [name for name, each in model.named_parameters() if each.grad is not None]
    assert trained
    assert all("lora_" in name for name in trained)


# -- hooks ----------------------------------------------------------------------------------------


def test_hooks_move_to_the_new_layer() -> None:
    model = net()
    seen: list[str] = []
    layer = model[2]
    handles = [
        layer.register_forward_pre_hook(lambda *_: seen.append("before")),
        layer.register_forward_hook(lambda m, *_: seen.append(type(m).__module__)),
        layer.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append("named"), with_kwargs=True
        ),
        layer.register_full_backward_hook(lambda *_: seen.append("backward")),
        layer.register_full_backward_pre_hook(lambda *_: seen.append("before backward")),
        layer.register_forward_hook(lambda *_: seen.append("always"), always_call=True),
    ]
    report = replace_linear(model)
    model(torch.randn(2, 64, requires_grad=True)).sum().backward()
    ahead = ["before", "named"]
    behind = ["before backward", "backward"]
    assert seen == [*ahead, "lacewing.nn.linear", "always", *behind]
    assert "keeps its hooks" in report["2"].notes
    with pytest.raises(FormatError):
        model[2](torch.randn(2, 63))
    assert seen[6:] == [*ahead, "always"]
    for handle in handles:
        handle.remove()
    model(torch.randn(2, 64))
    assert len(seen) == 9


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", [nn.Linear(8, 8), nn.Conv2d(8, 8, 1), nn.MultiheadAttention(8, 2)])
def test_the_model_itself(root: nn.Module) -> None:
    with pytest.raises(RequestError, match="the model itself is a") as error:
        replace_linear(root)
    assert "torch.nn.Sequential(model)" in str(error.value.hint)


def test_not_a_model() -> None:
    with pytest.raises(RequestError, match=r"must be a torch\.nn\.Module, got dict"):
        replace_linear({})  # type: ignore[arg-type]


def test_meta_tensors() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, device="meta"))
    with pytest.raises(RequestError, match="`1` is on the meta device"):
        replace_linear(model)
    assert type(model[0]) is nn.Linear
    assert len(replace_linear(model, exclude="1").replaced) == 1


def test_another_device() -> None:
    """There is none here: a tensor that says it is elsewhere."""
    with pytest.raises(RequestError, match="`head` is on cuda:0") as error:
        plan._check_place("head", SimpleNamespace(device=torch.device("cuda:0")))
    assert error.value.hint == 'move the model first: model.to("cpu")'


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "w8a8g46"}, "no weight format 'w8a8g46'"),
        ({"format": "auto"}, "`auto` is the format that a checkpoint"),
        ({"per_layer": {"2": "w9"}}, "no weight format 'w9'"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": float("nan")}, "sparsity"),
        ({"format": "w4a8g32z", "sparsity": 0.5}, "cannot hold pruned weights"),
        ({"per_layer": {"2": "w4a8g32z"}, "sparsity": 0.5}, "cannot hold pruned weights"),
        ({"format": "w8a8g64_24", "sparsity": 0.7}, "drops exactly half"),
        ({"machine": "z80"}, "`machine` must be one of"),
        ({"format": None}, "`format` must be the name of a weight format, got None"),
        ({"sparsity": "0.5"}, r"`sparsity` must be a number in \[0, 1\) or None, got '0.5'"),
        ({"per_layer": {"2": ["w8a8g64"]}}, r"`per_layer\['2'\]` must be the name"),
    ],
    ids=str,
)
def test_bad_formats(options: dict[str, Any], message: str) -> None:
    model = net()
    seen: list[Any] = []
    with pytest.raises(FormatError, match=message):
        replace_linear(model, progress=lambda *call: seen.append(call), **options)
    assert seen == []  # before a weight is read
    assert len(linears(model)) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_layer": [("2", "w8a8g64")]}, "`per_layer` must be a mapping of patterns, got"),
        ({"per_layer": []}, r"`per_layer` must be a mapping of patterns, got \[\]"),
        ({"progress": 3}, "`progress` must be callable or None, got 3"),
    ],
    ids=str,
)
def test_other_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        replace_linear(net(), **options)


@pytest.mark.parametrize("threads", [0, 1.5, "2"])
def test_bad_threads(threads: Any) -> None:
    with pytest.raises(RequestError, match="`threads`"):
        replace_linear(net(), threads=threads)


def test_inputs_that_no_group_divides_are_padded_and_it_is_said() -> None:
    model = nn.Sequential(nn.Linear(70, 20))
    report = replace_linear(model, "w8a8g64")
    assert report["0"].notes == ("inputs padded from 70 to 128",)
    x = torch.randn(3, 70)
    assert torch.equal(model(x), reference(model[0], x))


# -- memory ---------------------------------------------------------------------------------------


def test_the_dense_weights_are_gone() -> None:
    model = net()
    gone = [weakref.ref(model[0].up), weakref.ref(model[0].up.weight)]
    replace_linear(model)
    assert [ref() for ref in gone] == [None, None]


@pytest.mark.parametrize("format", ["w8a8g64", "w8a8g64_sp"])
def test_peak_memory_is_the_model_and_one_layer(format: str) -> None:
    """24 layers of 8 MB: packed they are 50 MB, which at no time may lie beside the dense ones.
    What is allowed is a layer packed (2 MB) and the temporary memory of two threads (2 x 20 MB,
    see formats/base.py)."""
    code = """
import sys, torch
from torch import nn
from lacewing.nn import replace, replace_linear
def resident():
    return [int(line.split()[1]) for line in open("/proc/self/status") if "VmRSS" in line][0]
def net(count):
    return nn.Sequential(*[nn.Linear(2048, 1024, bias=False) for _ in range(count)])
options = {"format": sys.argv[1], "machine": "avx512", "threads": 2}
options |= {"sparsity": 0.5} if "_sp" in sys.argv[1] else {}
model = net(24)  # first: what has been freed once, glibc does not give back to the system
replace_linear(net(4), **options)  # memory that stays is taken before
before = resident()
seen = []
in_memory = replace.in_memory
def read_back(packed):
    seen.append(resident())
    return in_memory(packed)
replace.in_memory = read_back
replace_linear(model, progress=lambda *_: seen.append(resident()), **options)
print(max(seen) - before, resident() - before)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, format],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    most, after = map(int, run.stdout.split())
    assert most < 45 << 10, f"{most} kB more than the model"
    assert after < -(100 << 10), f"{after} kB"

"""Stacks of experts: as code reads a parameter, and in models of transformers."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacewing import formats
from lacewing.errors import FormatError, RequestError

torch = pytest.importorskip("torch", reason="lacewing.nn needs PyTorch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from lacewing.nn import PackedExperts, PackedWeight, replace_linear  # noqa: E402
from lacewing.nn.experts import join  # noqa: E402
from tests.nn.twins import twin_of  # noqa: E402

EXPERTS, N_OUT, K_IN = 3, 40, 72
FORMATS = ("w8a8g64", "w4a8g32", "bf16", "w8a8g64_sp", "w8a8g64_24", "w1.6a8")


def stack(format: str = "w8a8g64", transposed: bool = False) -> PackedExperts:
    rng = np.random.default_rng(0)
    sparsity = 0.6 if format.endswith("_sp") else None
    each = [
        formats.pack(rng.standard_normal((N_OUT, K_IN), np.float32), format, sparsity)
        for _ in range(EXPERTS)
    ]
    return PackedExperts(join(each), transposed=transposed)


def dequantized(experts: PackedExperts) -> torch.Tensor:
    kind = formats.get_format(experts.format)
    each = [torch.from_numpy(kind.dequantize(packed)) for packed in experts.packed]
    return torch.stack([w.T if experts.transposed else w for w in each])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_one_expert_multiplies_by_its_packed_weight(format: str, transposed: bool) -> None:
    experts = stack(format, transposed)
    kind = formats.get_format(format)
    x = torch.randn(4, K_IN)
    for i in range(EXPERTS):
        weight = experts[torch.tensor(i)]
        assert weight.shape == ((K_IN, N_OUT) if transposed else (N_OUT, K_IN))
        got = x @ weight if transposed else F.linear(x, weight)
        want = torch.from_numpy(kind.reference_linear(x.numpy(), experts.packed[i]))
        if kind.group_size:
            assert torch.equal(got, want)
        else:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
def test_reads_as_the_parameter(transposed: bool) -> None:
    experts = stack("w4a8g32", transposed)
    want = dequantized(experts)
    assert experts.shape == want.shape
    assert experts.size(1) == want.size(1)
    assert (experts.ndim, experts.dim(), len(experts)) == (3, 3, EXPERTS)
    assert experts.numel() == want.numel()
    assert experts.dtype == torch.float32
    assert experts.device.type == "cpu"
    assert not experts.requires_grad
    assert torch.equal(experts.dequantized(), want)
    chosen = torch.tensor([2, 0, 2])
    assert torch.equal(experts[chosen], want[chosen])
    assert torch.equal(experts[1:, :3], want[1:, :3])
    assert torch.equal(experts.transpose(1, 2), want.transpose(1, 2))
    assert torch.equal(torch.sum(experts, 0), want.sum(0))
    x = torch.randn(EXPERTS, 2, want.shape[1])
    if not transposed:
        torch.testing.assert_close(torch.bmm(x, experts), torch.bmm(x, want))


def test_all_experts_at_once() -> None:
    """As Llama 4 does."""
    experts = stack("w8a8g32", transposed=True)
    x = torch.randn(EXPERTS, 5, K_IN)
    y = torch.bmm(x, experts)
    for i in range(EXPERTS):
        assert torch.equal(y[i], x[i] @ experts[i])


def test_a_transposed_weight_elsewhere() -> None:
    weight = stack(transposed=True)[1]
    want = weight.dequantized()
    assert torch.equal(torch.add(weight, 1), want + 1)
    assert torch.equal(weight.T, want.T)
    assert torch.equal(torch.matmul(weight, torch.ones(N_OUT)), want @ torch.ones(N_OUT))


@pytest.mark.parametrize("format", ["w8a8g64", "w8a8g64_sp"])
def test_state_dict_round_trip(format: str) -> None:
    experts = stack(format)
    parts = experts.state_dict()
    assert set(parts) == set(formats.get_format(format).part_names)
    rng = np.random.default_rng(9)
    sparsity = 0.6 if format.endswith("_sp") else None
    weights = [rng.standard_normal((N_OUT, K_IN), np.float32) for _ in range(EXPERTS)]
    other = PackedExperts(join([formats.pack(w, format, sparsity) for w in weights]))
    assert not torch.equal(other.dequantized(), experts.dequantized())
    other.load_state_dict({name: part.clone() for name, part in parts.items()})
    assert torch.equal(other.dequantized(), experts.dequantized())
    for other in (copy.deepcopy(experts), copy.copy(experts), pickle.loads(pickle.dumps(experts))):
        assert torch.equal(other[1].dequantized(), experts[1].dequantized())
        assert set(other.state_dict()) == set(parts)


@pytest.mark.parametrize("format", ["w8a8g64", "w8a8g64_sp"])
def test_damaged_state_dicts(format: str) -> None:
    experts = stack(format)
    before = experts.dequantized()
    whole = experts.state_dict()
    first, second = whole
    for broken in (
        {first: whole[first]},
        {**whole, "more": torch.zeros(1)},
        {**whole, first: whole[first][:-1]},
        {**whole, second: whole[second][:-1]},
        {**whole, second: whole[second].float()},
        {**whole, second: whole[second].flatten()},
        {**whole, second: whole[second].to("meta")},
        {**whole, second: "text"},
        {**whole, second: whole[second].to(torch.complex64)},
        {first: whole[first][:2], second: whole[second][:2]},
    ):
        with pytest.raises(RuntimeError, match="PackedExperts"):
            experts.load_state_dict(broken)
        assert torch.equal(experts.dequantized(), before)


def test_torch_does_not_save_it_as_a_pickle(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"torch\.save: a module with packed layers"):
        torch.save(nn.Sequential(stack()), tmp_path / "model.pt")
    torch.save(stack().state_dict(), tmp_path / "parts.pt")
    assert set(torch.load(tmp_path / "parts.pt")) == set(stack().state_dict())


def test_only_the_chosen_are_dequantized(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, dequantize = stack(), PackedWeight.dequantized
    want, seen = experts.dequantized(), []

    def counted(self: PackedWeight) -> torch.Tensor:
        seen.append(self)
        return dequantize(self)

    monkeypatch.setattr(PackedWeight, "dequantized", counted)
    assert torch.equal(experts[torch.tensor([2, 0, 2, 2])], want[[2, 0, 2, 2]])
    assert [id(each) for each in seen] == [id(experts._experts[0]), id(experts._experts[2])]


def test_offsets_that_lead_out_of_the_stream() -> None:
    experts = stack("w8a8g64_sp")
    whole = experts.state_dict()
    for change in (1 << 40, -(1 << 40), 64):
        offsets = whole["offsets"].clone()
        offsets[1] += change
        with pytest.raises(RuntimeError, match="not experts in w8a8g64_sp"):
            experts.load_state_dict({**whole, "offsets": offsets})


def test_a_stream_of_other_bytes() -> None:
    experts = stack("w8a8g64_sp")
    whole = experts.state_dict()
    with pytest.raises(RuntimeError, match="not experts in w8a8g64_sp"):
        experts.load_state_dict({**whole, "stream": torch.full_like(whole["stream"], 255)})


def test_stays_where_and_what_it_is() -> None:
    experts = stack()
    experts.to(torch.float32)
    with pytest.raises(RequestError, match=r"asked for torch\.float64"):
        experts.double()
    with pytest.raises(RequestError, match="on meta"):
        experts.to("meta")


def test_experts_of_two_shapes() -> None:
    a, b = (formats.pack(np.ones((16, k), np.float32), "w8a8g32") for k in (32, 64))
    with pytest.raises(FormatError, match="one format and one shape"):
        join([a, b])


# -- transformers ---------------------------------------------------------------------------------


def mixture(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    own: dict[str, Any] = {
        "Mixtral": {"num_local_experts": 4},
        "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    }[name]
    config = getattr(transformers, f"{name}Config")(**sizes, **own)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 3:
                parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_models_with_experts(name: str) -> None:
    dense = mixture(name)
    model = copy.deepcopy(dense)
    report = replace_linear(model, "bf16")
    experts = [layer for layer in report.replaced if ".experts." in layer.name]
    assert len(experts) == 4
    assert all(len(layer.shape) == 3 for layer in experts)
    assert any("experts_implementation" in note for note in report.notes)
    assert model.config._experts_implementation == "eager"
    twin = twin_of(dense, model)
    tokens = torch.randint(3, 64, (2, 9))
    with torch.no_grad():
        want = twin(tokens).logits
        for implementation in ("eager", "grouped_mm", "batched_mm"):
            model.set_experts_implementation(implementation)
            torch.testing.assert_close(model(tokens).logits, want, rtol=0, atol=1e-4)


def test_eager_experts_are_not_dequantized(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Mixtral", "GptOss"):
        model = mixture(name)
        replace_linear(model, "w8a8g32", include="re:.*experts.*")

        def dequantized(self: Any) -> torch.Tensor:
            raise AssertionError("dequantized")

        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(PackedWeight, "dequantized", dequantized)
            model(torch.randint(3, 64, (2, 9)))


def test_sparse_experts() -> None:
    dense = mixture("Mixtral")
    model = copy.deepcopy(dense)
    report = replace_linear(model, "bf16_sp", sparsity=0.7, include="*.experts.*", machine="avx512")
    layer = report["model.layers.0.mlp.experts.down_proj"]
    assert layer.format == "bf16_sp"
    # of 96 inputs 67 are dropped (0.7 * 96 + 0.5, rounded down)
    assert layer.density == pytest.approx(29 / 96)
    tokens = torch.randint(3, 64, (2, 9))
    with torch.no_grad():
        want = twin_of(dense, model)(tokens).logits
        torch.testing.assert_close(model(tokens).logits, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("format", ["w8a8g64", "w8a8g64_sp"])
def test_what_is_loaded_is_copied(format: str) -> None:
    experts = stack(format)
    wanted = experts.dequantized()
    state = {
        name: torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:].view(tensor.shape)
        for name, tensor in experts.state_dict().items()
    }
    experts.load_state_dict(state)
    for tensor in state.values():
        tensor.zero_()
    assert torch.equal(experts.dequantized(), wanted)


def test_one_expert_without_zeros_makes_all_of_them_dense() -> None:
    dense = mixture("Mixtral")
    weights = dense.model.layers[0].mlp.experts.down_proj
    with torch.no_grad():
        weights[1:] *= torch.rand_like(weights[1:]) < 0.2
    model = copy.deepcopy(dense)
    report = replace_linear(model, "w8a8g64_sp", include="*.layers.0.*.down_proj", machine="avx512")
    (layer,) = report.replaced
    assert (layer.format, layer.instead_of) == ("w8a8g64", "w8a8g64_sp")
    stack = model.model.layers[0].mlp.experts.down_proj
    assert layer.bytes_after == sum(part.nbytes for part in stack.buffers())
    plain = copy.deepcopy(dense)
    replace_linear(plain, "w8a8g64", include="*.layers.0.*.down_proj")
    tokens = torch.randint(3, 64, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, plain(tokens).logits)


def llama4() -> tuple[nn.Module, tuple[Any, ...]]:
    llama = pytest.importorskip("transformers.models.llama4.modeling_llama4")
    config = llama.Llama4TextConfig(hidden_size=64, intermediate_size=32, num_local_experts=3)
    return llama.Llama4TextExperts(config), (torch.randn(3 * 5, 64),)


def jetmoe() -> tuple[nn.Module, tuple[Any, ...]]:
    jet = pytest.importorskip("transformers.models.jetmoe.modeling_jetmoe")
    return jet.JetMoeParallelExperts(3, 64, 48), (torch.randn(9, 64), [4, 0, 5])


@pytest.mark.parametrize("make", [llama4, jetmoe])
def test_experts_that_do_not_say_how_they_lie(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, inputs = make()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.normal_(std=0.2)
    model = copy.deepcopy(dense)
    report = replace_linear(model, "bf16")
    assert all(layer.replaced for layer in report.layers)
    want = twin_of(dense, model)(*inputs)
    with monkeypatch.context() as patch:
        patch.setattr(PackedWeight, "dequantized", None)  # is not called
        torch.testing.assert_close(model(*inputs), want, rtol=0, atol=1e-4)


def test_stacks_that_are_not_known() -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 3, 4))

    model = nn.Sequential(Stacked(), nn.Linear(4, 4))
    report = replace_linear(model, "w8a8g32")
    assert "Stacked is not known to multiply" in str(report["0"].reason)

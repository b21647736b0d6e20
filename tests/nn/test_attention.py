"""`lacewing.nn.MultiheadAttention` against the dense one with the dequantized weights."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest

from lacewing.errors import RequestError

torch = pytest.importorskip("torch", reason="lacewing.nn needs PyTorch")

from torch import nn  # noqa: E402

from lacewing.nn import Linear, MultiheadAttention, replace_linear  # noqa: E402
from tests.nn.twins import reference, twin_of  # noqa: E402

E, HEADS, L, S, N = 48, 4, 5, 7, 3
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 2e-5}
"""float32: sums of 48 products of normal numbers, softmax, and 48 more, in another order: a few
hundred units of 2^-24 of numbers below 16."""


def pair(**options: Any) -> tuple[nn.Module, Any]:
    """(the dense layer with the dequantized weights, the packed one)."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.MultiheadAttention(E, HEADS, **options)).eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.normal_(std=0.2)
    model = copy.deepcopy(dense)
    replace_linear(model, "bf16")
    assert isinstance(model[0], MultiheadAttention)
    return twin_of(dense, model)[0], model[0]


def inputs(options: dict[str, Any], batched: bool = True) -> list[torch.Tensor]:
    """Query, key, value."""
    sizes = [(L, E), (S, options.get("kdim") or E), (S, options.get("vdim") or E)]
    if not batched:
        return [torch.randn(size) for size in sizes]
    first = options.get("batch_first", False)
    return [torch.randn((N, *size) if first else (size[0], N, size[1])) for size in sizes]


OPTIONS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"kdim": 40, "vdim": 56},
    {"kdim": 40, "vdim": 56, "bias": False, "batch_first": True},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
]
CALLS = [
    dict(zip(("need_weights", "average_attn_weights"), flags, strict=True))
    for flags in ((True, True), (True, False), (False, True))
]


def assert_same(dense: Any, packed: Any, args: Any, **call: Any) -> None:
    with torch.no_grad():
        want, want_weights = dense(*args, **call)
        got, got_weights = packed(*args, **call)
    torch.testing.assert_close(got, want, **CLOSE)
    assert (got_weights is None) == (want_weights is None)
    if got_weights is not None:
        torch.testing.assert_close(got_weights, want_weights, **CLOSE)


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cross_attention(options: dict[str, Any], call: dict[str, Any]) -> None:
    dense, packed = pair(**options)
    assert_same(dense, packed, inputs(options), **call)
    assert_same(dense, packed, inputs(options, batched=False), **call)


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"add_bias_kv": True}], ids=str)
def test_masks(options: dict[str, Any], call: dict[str, Any]) -> None:
    dense, packed = pair(**options)
    args = inputs(options)
    keep = torch.zeros(N, S, dtype=torch.bool)
    keep[0, -2:] = keep[1, :1] = True
    bars = torch.zeros(L, S, dtype=torch.bool)
    bars[1, 3] = bars[4, :2] = True
    each = torch.rand(N * HEADS, L, S) > 0.9
    each[..., 0] = False
    floats = torch.randn(L, S)
    for attn_mask, padding in itertools.product((None, bars, each), (None, keep)):
        assert_same(dense, packed, args, attn_mask=attn_mask, key_padding_mask=padding, **call)
    assert_same(dense, packed, args, attn_mask=floats, **call)
    assert_same(dense, packed, args, key_padding_mask=torch.randn(N, S), **call)


def test_masks_without_a_batch() -> None:
    dense, packed = pair()
    args = inputs({}, batched=False)
    padding = torch.zeros(S, dtype=torch.bool)
    padding[2] = True
    each = torch.randn(HEADS, L, S)
    assert_same(dense, packed, args, key_padding_mask=padding)
    assert_same(dense, packed, args, attn_mask=each)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_causal_self_attention(call: dict[str, Any]) -> None:
    dense, packed = pair(batch_first=True)
    x = torch.randn(N, L, E)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    assert_same(dense, packed, (x, x, x), attn_mask=mask, is_causal=True, **call)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[0, -1] = True
    bars = torch.ones(L, L, dtype=torch.bool).triu(1)
    assert_same(
        dense, packed, (x, x, x), attn_mask=bars, key_padding_mask=padding, is_causal=True, **call
    )


def test_causal_without_a_mask() -> None:
    _, packed = pair()
    with pytest.raises(RequestError, match="`is_causal`"):
        packed(*inputs({}), is_causal=True)


def test_a_mask_of_another_width() -> None:
    _, packed = pair()
    with pytest.raises(RequestError, match="one column per key, 7, got"):
        packed(*inputs({}), attn_mask=torch.zeros(L, 1))


def test_projections_have_the_bits_of_the_oracle() -> None:
    torch.manual_seed(1)
    dense = nn.Sequential(nn.MultiheadAttention(E, HEADS))
    model = copy.deepcopy(dense)
    replace_linear(model, "w8a8g32")
    x = torch.randn(4, E)
    rows = dense[0].in_proj_weight.detach().split(E)
    for linear, want in zip((model[0].q_proj, model[0].k_proj, model[0].v_proj), rows, strict=True):
        assert torch.equal(linear(x), reference(linear, x))
        error = (linear.weight - want).norm() / want.norm()
        assert error < 0.01  # 8 bits: half a step of 1/127 of the largest, at most
    assert torch.equal(model[0].out_proj(x), reference(model[0].out_proj, x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # of the dense twin
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("exclude", [(), nn.MultiheadAttention, "re:.*linear[12]"], ids=str)
def test_encoder_and_decoder(norm_first: bool, training: bool, exclude: Any) -> None:
    """PyTorch's fused paths must not read packed weights; padding masks lead to nested tensors."""
    torch.manual_seed(2)
    options: dict[str, Any] = {"batch_first": True, "norm_first": norm_first, "dropout": 0.0}
    encoder = nn.TransformerEncoderLayer(E, HEADS, 96, **options)
    decoder = nn.TransformerDecoderLayer(E, HEADS, 96, **options)
    dense = nn.ModuleDict(
        {
            "encoder": nn.TransformerEncoder(encoder, 2, enable_nested_tensor=not norm_first),
            "decoder": nn.TransformerDecoder(decoder, 2),
        }
    )
    model = copy.deepcopy(dense)
    report = replace_linear(model, "bf16", exclude=exclude)
    assert len(report.replaced) == {(): 14, nn.MultiheadAttention: 8}.get(exclude, 6)
    twin = twin_of(dense, model).train(training)
    model.train(training)
    source, target = torch.randn(N, S, E), torch.randn(N, L, E)
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1, -2:] = True
    results = []
    for each in (twin, model):
        with torch.no_grad():
            memory = each["encoder"](source, src_key_padding_mask=padding)
            y = each["decoder"](target, memory, memory_key_padding_mask=padding)
        memory = memory.masked_fill(padding[..., None], 0)
        results.append((memory, y))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-4)


def test_dropout_only_in_training() -> None:
    _, packed = pair(dropout=0.5)
    args = inputs({})
    assert torch.equal(packed(*args)[0], packed(*args)[0])
    packed.train()
    assert not torch.equal(packed(*args)[0], packed(*args)[0])
    weights = packed(*args)[1]
    assert (weights == 0).any()


def test_state_dict_copies_and_attributes() -> None:
    _, packed = pair(add_bias_kv=True)
    assert set(packed.state_dict()) == {
        "bias_k",
        "bias_v",
        *(
            f"{proj}.{key}"
            for proj in ("q_proj", "k_proj", "v_proj", "out_proj")
            for key in ("weight.values", "bias")
        ),
    }
    args = inputs({})
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(other(*args)[0], packed(*args)[0])
        assert not other._qkv_same_embed_dim
    assert packed.in_proj_weight is None
    assert packed.in_proj_bias.shape == (3 * E,)
    assert packed.q_proj_weight.shape == (E, E)
    assert isinstance(packed.out_proj, Linear)


def test_what_was_set_on_the_output_projection() -> None:
    model = nn.Sequential(nn.MultiheadAttention(E, HEADS)).eval()
    model[0].out_proj.mark = "mine"
    model[0].mark = "too"
    replace_linear(model, "w8a8g32")
    assert (model[0].out_proj.mark, model[0].mark) == ("mine", "too")
    assert not any(each.training for each in model.modules())


def test_a_pattern_for_the_output_projection_names_the_layer() -> None:
    model = nn.Sequential(nn.MultiheadAttention(E, HEADS))
    report = replace_linear(model, "w8a8g32", exclude="*.out_proj")
    assert report.replaced == ()
    assert type(model[0]) is nn.MultiheadAttention

"""`lacewing.nn.Linear` and its operators against `Format.reference_linear`."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest

import lacewing
from lacewing.errors import FormatError, RequestError
from lacewing.formats import FORMATS, get_format

torch = pytest.importorskip("torch", reason="lacewing.nn needs PyTorch")

from torch import nn  # noqa: E402
from torch.library import opcheck  # noqa: E402

from lacewing.nn import Linear, PackedWeight, ops  # noqa: E402

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SPARSITY = {name: 0.5 for name, kind in FORMATS.items() if kind.sparse and not kind.fixed_sparsity}


def dense(n: int, k: int, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(k, n, bias=bias)


def packed(format: str = "w4a8g64", n: int = 72, k: int = 200, bias: bool = True) -> Linear:
    return Linear.from_dense(dense(n, k, bias), format, SPARSITY.get(format)).eval()


def reference(layer: Linear, x: torch.Tensor) -> torch.Tensor:
    """The oracle in float32, rounded to the type of x."""
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], layer.out_features)
    rows = x.detach().float().reshape(-1, layer.in_features).numpy()
    bias = None if layer.bias is None else layer.bias.detach().float().numpy()
    y = get_format(layer.format).reference_linear(rows, layer.packed, bias)
    return torch.from_numpy(y).to(x.dtype).reshape(*x.shape[:-1], layer.out_features)


def assert_same(layer: Linear, x: torch.Tensor) -> None:
    """Integer formats have the bits of the oracle. Float formats: adding k products of 24-bit
    floats in any order is off by at most k 2^-24 of the sum of their magnitudes; twice that."""
    with torch.no_grad():
        y = layer(x)
    wanted = reference(layer, x)
    assert y.dtype == x.dtype
    if get_format(layer.format).group_size:
        assert torch.equal(y, wanted)
        return
    whole = x.float().abs() @ layer.weight.float().abs().T
    step = torch.finfo(x.dtype).eps * wanted.float().abs() if x.dtype != torch.float32 else 0.0
    bound = whole * layer.in_features * 2.0**-23 + step
    assert (y.float() - wanted.float()).abs().le(bound).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_and_float_type(format: str, dtype: torch.dtype) -> None:
    layer = packed(format)
    for shape in ((1, 200), (2, 5, 200), (33, 200)):
        assert_same(layer, torch.randn(shape).to(dtype))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_of_pytorch_give_the_same_bits(threads: int) -> None:
    """Large enough for a parallel region, with a narrow last strip; bf16 in several pieces."""
    layer = packed("w8a8g64", n=1003, k=320)
    x = torch.randn(130, 320)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype in FLOATS:
            assert_same(layer, x.to(dtype))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("format", FORMATS)
def test_many_rows_by_a_small_weight(format: str, threads: int) -> None:
    """Threads share the rows there, by 64; each takes up to 256 at once, and the last are fewer."""
    layer = packed(format)
    x = torch.randn(3, 279, 200)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype in FLOATS:
            assert_same(layer, x.to(dtype))
        assert_same(layer, x.transpose(0, 1))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_outputs_beyond_one_piece(dtype: torch.dtype) -> None:
    """16-bit outputs go through a megabyte of floats: 700 rows fill it with 23 strips."""
    assert_same(packed("w8a8", n=900, k=64), torch.randn(700, 64).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x.flip(0).permute(2, 0, 1).contiguous().permute(1, 2, 0),
        lambda x: x[..., 0, :].expand(7, -1, -1),
        lambda x: x[0, 0],
        lambda x: x[:0],
        lambda x: x[:, :0],
    ],
    ids=["as it is", "transposed", "every other", "columns", "expanded", "vector", "0 rows", "0"],
)
def test_any_leading_shape_and_strides(
    view: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
) -> None:
    layer = packed()
    x = view(torch.randn(4, 6, 200).to(dtype))
    assert_same(layer, x)
    assert layer(x).shape == (*x.shape[:-1], 72)
    assert layer(x).is_contiguous()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bias_of_any_float_type(dtype: torch.dtype) -> None:
    layer = Linear.from_dense(dense(72, 200).to(dtype), "w8a8g32")
    assert layer.bias is not None
    assert layer.bias.dtype == layer.weight.dtype == dtype
    assert_same(layer, torch.randn(3, 200))
    assert_same(packed("w8a8g32", bias=False), torch.randn(3, 200))


def test_it_is_a_linear_of_pytorch() -> None:
    layer = packed()
    assert not layer.training
    assert Linear.from_dense(dense(72, 200)).training
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (200, 72)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert "format=w4a8g64" in repr(layer)


def test_weight_is_the_dequantized_matrix() -> None:
    layer = packed()
    wanted = torch.from_numpy(get_format("w4a8g64").dequantize(layer.packed))
    weight = layer.weight
    assert isinstance(weight, PackedWeight)
    assert (weight.shape, weight.dtype, weight.device.type) == (wanted.shape, torch.float32, "cpu")
    assert torch.equal(weight + 0, wanted)
    assert torch.equal(weight[3:5], wanted[3:5])
    assert torch.equal(weight.T.contiguous(), wanted.T)
    assert torch.equal(weight.data.clone(), wanted)
    x = torch.randn(5, 200)
    with torch.no_grad():
        assert torch.equal(nn.functional.linear(x, weight, layer.bias), layer(x))


# -- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["w4a8g64", "bf16", "w8a8g64_sp", "w8a8_b16x1"])
def test_backward_through_input_and_bias(format: str) -> None:
    layer = packed(format)
    assert layer.bias is not None
    layer.bias.requires_grad_(True)
    x = torch.randn(2, 3, 200, requires_grad=True)
    grad = torch.randn(2, 3, 72)
    layer(x).backward(grad)
    # Sums of 72 and of 6 products in f32, in another order than autograd's.
    wanted = grad @ (layer.weight + 0)
    bound = (grad.abs() @ layer.weight.abs()) * 72 * 2.0**-23
    assert x.grad is not None
    assert (x.grad - wanted).abs().le(bound).all()
    assert layer.bias.grad is not None
    assert torch.allclose(layer.bias.grad, grad.sum((0, 1)), rtol=0, atol=6 * 2.0**-23 * 6)


def test_bias_alone_takes_a_gradient_and_gradients_have_gradients() -> None:
    layer = packed("w8a8g64")
    assert layer.bias is not None
    layer.bias.requires_grad_(True)
    layer(torch.randn(4, 200)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((72,), 4.0))
    x = torch.randn(2, 200, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    # d/dx of sum(2 y W) is 2 W^T W 1, the same for every row.
    dense = (layer.weight + 0).double()
    wanted = 2 * dense.T @ dense.sum(1)
    bound = 2 * dense.abs().T @ dense.abs().sum(1) * 272 * 2.0**-23
    assert (second.double() - wanted).abs().le(bound).all()


def test_the_default_type_does_not_change_the_gradient() -> None:
    layer = packed("w8a8g64")
    grad = torch.randn(5, 72)
    before = ops.linear_backward(grad, *layer.parts(), "w8a8g64", 72, 200)
    torch.set_default_dtype(torch.float16)
    try:
        assert torch.equal(ops.linear_backward(grad, *layer.parts(), "w8a8g64", 72, 200), before)
    finally:
        torch.set_default_dtype(torch.float32)


def test_backward_of_a_weight_that_is_dequantized_in_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = packed("w8a8g64")
    grad = torch.randn(5, 72)
    whole = ops.linear_backward(grad, *layer.parts(), "w8a8g64", 72, 200)
    monkeypatch.setattr(ops, "_BACKWARD_WEIGHTS", 200 * 7)
    pieces = ops.linear_backward(grad, *layer.parts(), "w8a8g64", 72, 200)
    bound = (grad.abs() @ layer.weight.abs()) * 72 * 2.0**-23
    assert (whole - pieces).abs().le(bound).all()


def test_the_weight_takes_no_gradient() -> None:
    layer = packed()
    attempts: list[Callable[[], Any]] = [
        lambda: layer.weight.requires_grad_(True),
        lambda: setattr(layer.weight, "requires_grad", True),
        lambda: setattr(layer.weight, "data", torch.ones(72, 200)),
        lambda: layer.weight.add_(1),
        lambda: layer.weight.data.mul_(2),
        lambda: layer.weight.copy_(torch.ones(72, 200)),
        lambda: layer.weight.share_memory_(),
        lambda: setattr(layer, "weight", torch.ones(72, 200)),
        lambda: setattr(layer, "weight", nn.Parameter(torch.ones(72, 200))),
    ]
    before = layer.weight + 0
    for attempt in attempts:
        with pytest.raises(RequestError, match=r"frozen|cannot be assigned"):
            attempt()
    assert torch.equal(layer.weight + 0, before)
    assert layer.train().training  # adapters and dropout on top of it train


# -- operators ------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["w4a8g64", "bf16", "w8a8g64_sp"])
def test_opcheck(format: str) -> None:
    layer = packed(format)
    parts = layer.parts()
    for x in (torch.randn(2, 200), torch.randn(3, 2, 200, requires_grad=True), torch.randn(0, 200)):
        opcheck(ops.linear, (x, *parts, layer.bias, format, 72, 200))
    opcheck(ops.linear_no_grad, (torch.randn(2, 200), *parts, None, format, 72, 200))
    opcheck(ops.linear_backward, (torch.randn(2, 72), *parts, format, 72, 200))
    opcheck(ops.dequantize, (*parts, format, 72, 200))


def test_compiled_whole() -> None:
    model = nn.Sequential(packed("w8a8g64"), nn.ReLU(), packed("w4a8g64", 16, 72)).eval()
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(5, 200)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    with torch.inference_mode():
        assert torch.equal(compiled(x), model(x))
    layer = packed("w8a8g64")
    read = torch.compile(lambda x: x @ layer.weight.T + layer.weight.sum(), backend="aot_eager")
    assert torch.equal(read(x), x @ (layer.weight + 0).T + (layer.weight + 0).sum())
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(a).sum().backward()
    model(b).sum().backward()
    assert a.grad is not None
    assert torch.equal(a.grad, b.grad)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # PyTorch 2.10's own
@pytest.mark.parametrize("strict", [False, True])
def test_exported_saved_and_loaded(strict: bool) -> None:
    model = nn.Sequential(packed("w8a8g64"), nn.ReLU()).eval()
    x = torch.randn(5, 200)
    dynamic = {0: torch.export.Dim("rows", min=2)}
    program = torch.export.export(model, (x,), dynamic_shapes=(dynamic,), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    more = torch.randn(9, 200)
    assert torch.equal(loaded(more), model(more))


def test_autocast() -> None:
    layer = packed()
    x = torch.randn(3, 200)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        by_weight = nn.functional.linear(x, layer.weight, layer.bias)
        for other in (torch.float64, torch.int64):  # autocast leaves these alone
            with pytest.raises(FormatError, match="needs x in float32, bfloat16"):
                layer(x.to(other))
    assert y.dtype == by_weight.dtype == torch.bfloat16
    assert torch.equal(y, layer(x.bfloat16()))
    assert torch.equal(y, by_weight)


def test_an_older_pytorch_gets_the_same_through_numpy() -> None:
    layer = packed("w8a8g64")
    for dtype in FLOATS:
        x = torch.randn(2, 3, 200).to(dtype)
        arguments = (x, *layer.parts(), layer.bias, "w8a8g64", 72, 200)
        assert torch.equal(ops.linear_by_numpy(*arguments), ops.linear_no_grad(*arguments))


def test_the_operator_checks_what_it_is_given() -> None:
    layer = packed("w8a8g64_sp")
    stream, offsets = layer.parts()
    assert offsets is not None
    x = torch.randn(2, 200)

    def call(
        x: Any = x,
        part_0: Any = stream,
        part_1: Any = offsets,
        bias: Any = None,
        format: Any = "w8a8g64_sp",
        n: Any = 72,
        k: Any = 200,
    ) -> Any:
        return ops.linear_no_grad(x, part_0, part_1, bias, format, n, k)

    call()
    wrong = torch.from_numpy(offsets.numpy().copy())
    wrong[1] += 64
    cases: list[tuple[dict[str, Any], str]] = [
        ({"x": x.double()}, "float32, bfloat16 or float16"),
        ({"x": torch.tensor(1.0)}, "scalar"),
        ({"x": x[:, :64]}, r"x must be \[..., 200\], got 64"),
        ({"x": x[:, :199]}, r"x must be \[..., 200\], got 199"),
        ({"part_1": None}, "`offsets` is missing"),
        ({"part_1": wrong}, "strip"),
        ({"part_0": stream[8:]}, "not in w8a8g64_sp"),
        ({"part_0": stream[1:]}, "aligned"),
        ({"bias": torch.ones(71)}, "bias must be"),
        ({"bias": torch.ones(144)[::2]}, "contiguous"),
        ({"part_0": stream.repeat_interleave(2)[::2]}, "parts must be contiguous"),
        ({"part_0": stream[:1].expand(len(stream))}, "parts must be contiguous"),
        ({"part_0": stream.to("meta")}, "must be on the CPU"),
        ({"bias": torch.ones(72, device="meta")}, "must be on the CPU"),
        ({"bias": torch.ones(72, dtype=torch.int64)}, "bias must be float32"),
        ({"format": "w9a9"}, "no weight format `w9a9`"),
        ({"n": 81}, "not in w8a8g64_sp"),
        ({"n": -1}, "not in w8a8g64_sp"),
    ]
    for arguments, message in cases:
        with pytest.raises(RuntimeError, match=message):
            call(**arguments)


# -- errors, copies, files ------------------------------------------------------------------------


def test_wrong_inputs() -> None:
    layer = packed()
    with pytest.raises(FormatError, match=r"needs x \[..., 200\], got \[3, 7\]"):
        layer(torch.ones(3, 7))
    with pytest.raises(FormatError, match=r"got torch\.int32"):
        layer(torch.ones(3, 200, dtype=torch.int32))
    with pytest.raises(FormatError, match=r"got torch\.float64"):
        layer(torch.ones(3, 200, dtype=torch.float64))
    assert layer(torch.ones(3, 200, device="meta")).shape == (3, 72)  # shapes are known


def test_wrong_constructions() -> None:
    good = packed().packed
    with pytest.raises(FormatError, match=r"bias must be one of .* got torch\.float64"):
        Linear(good, torch.ones(72, dtype=torch.float64))
    strided = Linear(good, torch.ones(72, 2)[:, 0])
    assert_same(strided, torch.randn(3, 200))
    for wrong in (packed(), nn.Linear(200, 72, device="meta")):
        with pytest.raises(RequestError, match="needs a dense layer on the CPU"):
            Linear.from_dense(wrong)
    strided.bias = nn.Parameter(torch.ones(3))
    with pytest.raises(FormatError, match=r"needs a bias \[72\], got \[3\]"):
        strided(torch.randn(3, 200))
    with pytest.raises(FormatError, match=r"bias must be \[72\], got \[3\]"):
        Linear(good, torch.ones(3))
    with pytest.raises(FormatError, match="`dtype`"):
        Linear(good, dtype=torch.int8)
    lying = lacewing.PackedTensor("w4a8g64", (72, 264), good.parts)
    with pytest.raises(FormatError):
        Linear(lying)


def test_it_stays_where_and_what_it_is() -> None:
    model = nn.Sequential(packed(), nn.Linear(72, 4))
    for move in (
        lambda: model.to("meta"),
        lambda: model[0].to("cuda"),
        lambda: model.half(),
        lambda: model.bfloat16(),
        lambda: model.double(),
        lambda: model.to(torch.bfloat16),
    ):
        with pytest.raises(RequestError, match=r"lives on the CPU|stands for a weight"):
            move()
    model.float().to("cpu").eval()
    half = Linear.from_dense(dense(72, 200).bfloat16(), "w8a8g64")
    assert half.to(torch.bfloat16).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("format", ["w4a8g64", "bf16", "w8a8g64_sp"])
def test_state_dict_round_trip(format: str) -> None:
    model = nn.Sequential(packed(format), nn.ReLU())
    other = nn.Sequential(
        Linear.from_dense(dense(72, 200, seed=1), format, SPARSITY.get(format)), nn.ReLU()
    )
    state = model.state_dict()
    names = {f"0.weight.{part}" for part in get_format(format).part_names}
    assert set(state) == {*names, "0.bias"}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    x = torch.randn(3, 200)
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), model(x))
    assert torch.equal(other[0].weight + 0, model[0].weight + 0)


@pytest.mark.parametrize("format", ["w4a8g64", "w8a8g64_sp"])
def test_what_is_loaded_is_copied(format: str) -> None:
    """A file's parts begin anywhere; what is written to them afterwards is not read."""
    layer, x = packed(format), torch.randn(3, 200)
    wanted = layer(x)
    state = {
        name: torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:].view(tensor.shape)
        for name, tensor in layer.state_dict().items()
    }
    layer.load_state_dict(state)
    for tensor in state.values():
        tensor.zero_()
    assert torch.equal(layer(x), wanted)


def test_buffers_and_children_of_ones_own() -> None:
    layer = packed()
    layer.register_buffer("smooth", torch.arange(3.0))
    layer.extra = nn.Linear(2, 2)
    other = packed()
    other.register_buffer("smooth", torch.zeros(3))
    other.extra = nn.Linear(2, 2)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.smooth, layer.smooth)
    assert torch.equal(other.extra.weight, layer.extra.weight)
    copied = pickle.loads(pickle.dumps(layer))
    assert torch.equal(copied.smooth, layer.smooth)
    layer._apply(lambda tensor: tensor + 1)  # of what is not packed, all
    assert layer.bias is not None
    assert other.bias is not None
    assert torch.equal(layer.bias, other.bias + 1)
    assert torch.equal(layer.smooth, other.smooth + 1)
    assert torch.equal(layer.codes, other.codes)


def test_lying_state_dicts() -> None:
    model = nn.Sequential(packed("w8a8g64_sp"))
    x = torch.randn(3, 200)
    before = model(x)
    good = model.state_dict()
    offsets = good["0.weight.offsets"].clone()
    offsets[2] += 64
    cases: list[tuple[dict[str, Any], str]] = [
        ({"0.weight.offsets": offsets}, "w8a8g64_sp"),
        ({"0.weight.stream": good["0.weight.stream"][:-64].clone()}, "w8a8g64_sp"),
        ({"0.weight.stream": good["0.weight.stream"].to(torch.int16)}, "must be uint8"),
        ({"0.weight.stream": good["0.weight.stream"].to("meta")}, "on the CPU, got one on meta"),
        ({"0.weight.stream": "a stream"}, "tensors on the CPU, got str"),
        ({"0.weight.offsets": good["0.weight.offsets"].bfloat16()}, "got torch.bfloat16"),
        ({"0.bias": torch.ones(3)}, "size mismatch for 0.bias"),
        ({"0.weight": torch.ones(72, 200)}, "is dense"),
        ({"0.weight.scales": torch.ones(3)}, "Unexpected"),
    ]
    for change, message in cases:
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict({**good, **change})
        model.load_state_dict(good)
    for name in good:
        with pytest.raises(RuntimeError, match="Missing"):
            model.load_state_dict({key: value for key, value in good.items() if key != name})
    assert torch.equal(model(x), before)


def test_copies() -> None:
    layer = packed()
    assert layer.bias is not None
    x = torch.randn(3, 200)
    shallow, deep = copy.copy(layer), copy.deepcopy(layer)
    assert deep.bias is not None
    assert torch.equal(shallow(x), layer(x))
    assert torch.equal(deep(x), layer(x))
    with torch.no_grad():
        deep.bias += 1
    assert not torch.equal(deep(x), layer(x))
    assert shallow.bias is layer.bias
    shallow.bias = None
    shallow.register_buffer("mine", torch.ones(1))
    assert layer.bias is not None
    assert "mine" not in dict(layer.named_buffers())
    assert torch.equal(copy.deepcopy(layer.weight) + 0, layer.weight + 0)
    assert deep.codes.data_ptr() == layer.codes.data_ptr()  # never changes, so it is shared


def _doubled(module: Any, inputs: Any, output: Any) -> Any:
    return 2 * output


@pytest.mark.parametrize("format", ["w4a8g64", "bf16", "w8a8g64_sp"])
def test_pickled(format: str) -> None:
    model = nn.Sequential(packed(format), nn.ReLU(), packed("w8a8", 8, 72, bias=False)).eval()
    copied = pickle.loads(pickle.dumps(model))
    x = torch.randn(3, 200)
    assert torch.equal(copied(x), model(x))
    assert not copied[0].training
    hooked = packed()
    hooked.register_forward_hook(_doubled)
    assert hooked.bias is not None
    hooked.bias.requires_grad_(True)
    again = pickle.loads(pickle.dumps(hooked))
    assert torch.equal(again(x), 2 * packed()(x))
    assert again.bias.requires_grad
    with pytest.raises(RequestError, match=r"torch\.save") as caught:
        torch.save(model, io.BytesIO())
    assert caught.value.hint is not None
    assert "state_dict" in caught.value.hint

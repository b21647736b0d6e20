"""1x1 convolutions against the dense ones with the dequantized weights, and against the oracle."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

import lacewing
from lacewing.errors import FormatError, RequestError
from lacewing.formats import FORMATS

torch = pytest.importorskip("torch", reason="lacewing.nn needs PyTorch")

from torch import nn  # noqa: E402

from lacewing.nn import Conv1d, Conv2d, replace_linear  # noqa: E402
from tests.nn.twins import reference, twin_of  # noqa: E402


def packed(dense: nn.Module, format: str = "bf16") -> Any:
    model = nn.Sequential(copy.deepcopy(dense))
    replace_linear(model, format)
    return model[0]


CONVS = {
    "1d": (lambda **o: nn.Conv1d(40, 24, 1, **o), (3, 40, 7)),
    "2d": (lambda **o: nn.Conv2d(40, 24, 1, **o), (3, 40, 5, 6)),
}


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"bias": False}], ids=str)
@pytest.mark.parametrize("which", CONVS)
def test_is_the_convolution_of_the_dequantized_weight(
    which: str, options: dict[str, Any], batched: bool
) -> None:
    make, shape = CONVS[which]
    torch.manual_seed(0)
    dense = make(**options)
    model = nn.Sequential(dense)
    new = packed(dense)
    assert isinstance(new, Conv1d if which == "1d" else Conv2d)
    x = torch.randn(shape)
    x = x if batched else x[0]
    want = twin_of(model, nn.Sequential(new))(x)
    got = new(x)
    assert got.shape == want.shape
    assert got.is_contiguous()
    # 40 products of floats in another order, twice
    torch.testing.assert_close(got, want, rtol=0, atol=40 * 2.0**-23 * 40)


@pytest.mark.parametrize("name", [name for name, kind in FORMATS.items() if kind.group_size])
def test_integer_formats_have_the_bits_of_the_oracle(name: str) -> None:
    torch.manual_seed(1)
    new = packed(nn.Conv2d(70, 33, 1), name)
    x = torch.randn(2, 70, 3, 4)
    rows = x.permute(0, 2, 3, 1).reshape(-1, 70)
    want = reference(new.linear, rows).reshape(2, 3, 4, 33).permute(0, 3, 1, 2)
    assert torch.equal(new(x), want)
    assert torch.equal(new(x.contiguous(memory_format=torch.channels_last)), want)


def test_channels_last_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    new = packed(nn.Conv2d(32, 48, 1, stride=2))
    x = torch.randn(2, 32, 6, 8).contiguous(memory_format=torch.channels_last)
    seen = []
    forward = type(new.linear).forward

    def spy(self: Any, rows: torch.Tensor) -> torch.Tensor:
        seen.append(rows.data_ptr())
        return forward(self, rows)

    monkeypatch.setattr(type(new.linear), "forward", spy)
    y = new(x)
    assert seen == [x.data_ptr()]
    assert y.shape == (2, 48, 3, 4)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_a_model_can_become_channels_last_afterwards() -> None:
    torch.manual_seed(2)
    dense = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 16, 1))
    model = copy.deepcopy(dense)
    replace_linear(model, "w8a8g32")
    x = torch.randn(1, 3, 8, 8)
    before = model(x)
    after = model.to(memory_format=torch.channels_last)(x)
    torch.testing.assert_close(before, after, rtol=0.05, atol=0.05)  # the 3x3 has other bits


def test_what_is_not_1x1_stays() -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 8, 1, groups=2),
        nn.Conv2d(8, 8, 1, padding=1),
        nn.Conv2d(8, 8, 1, dilation=2),
        nn.Conv2d(8, 8, 1, padding="same"),
        nn.ConvTranspose2d(8, 8, 1),
    )
    report = replace_linear(model, "w8a8g32")
    assert [layer.name for layer in report.replaced] == ["3", "4"]
    reasons = [layer.reason for layer in report.left_alone]
    assert "kernel 3x3" in str(reasons[0])
    assert "2 groups" in str(reasons[1])
    assert "padding (1, 1)" in str(reasons[2])
    assert "ConvTranspose2d is not known" in str(reasons[3])


class Doubled(nn.Conv2d):
    def _conv_forward(self, *args: Any) -> torch.Tensor:
        return 2 * super()._conv_forward(*args)


def test_a_convolution_of_its_own_stays() -> None:
    report = replace_linear(nn.Sequential(Doubled(8, 8, 1)), "w8a8g32")
    assert "Doubled has a _conv_forward of its own" in str(report["0"].reason)


def test_the_weight_reads_as_that_of_a_convolution() -> None:
    new = packed(nn.Conv2d(32, 48, 1), "w8a8g32")
    assert new.weight.shape == (48, 32, 1, 1)
    assert torch.equal(new.weight[:, :, 0, 0], new.linear.weight.dequantized())
    assert new.kernel_size == (1, 1)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_what_cannot_be_assigned(name: str) -> None:
    new = packed(nn.Conv2d(32, 48, 1))
    with pytest.raises(RequestError, match=f"lacewing.nn.Conv2d: `{name}` is that of its `linear`"):
        setattr(new, name, nn.Parameter(torch.ones(48)))
    new.linear.bias = nn.Parameter(torch.ones(48))
    assert torch.equal(new.bias, torch.ones(48))


def test_state_dict_and_copies() -> None:
    model = nn.Sequential(nn.Conv2d(32, 48, 1))
    other = nn.Sequential(nn.Conv2d(32, 48, 1))
    replace_linear(model, "w4a8g32")
    replace_linear(other, "w4a8g32")
    x = torch.randn(1, 32, 3, 3)
    assert not torch.equal(model(x), other(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x), other(x))
    assert torch.equal(model(x), copy.deepcopy(model)(x))
    assert torch.equal(model(x), pickle.loads(pickle.dumps(model))(x))


@pytest.mark.parametrize("shape", [(2, 31, 3, 3), (32,), (1, 2, 32, 3, 3)])
def test_wrong_inputs(shape: tuple[int, ...]) -> None:
    with pytest.raises(FormatError, match=r"Conv2d needs x \[N, 32, \*, \*\] or \[32, \*, \*\]"):
        packed(nn.Conv2d(32, 48, 1))(torch.zeros(shape))


def test_gradients_go_through() -> None:
    torch.manual_seed(3)
    dense = nn.Conv2d(32, 48, 1)
    new = packed(dense)
    twin = twin_of(nn.Sequential(dense), nn.Sequential(new))
    x = torch.randn(2, 32, 3, 3, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    new(x).square().sum().backward()
    twin(z).square().sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-4, atol=1e-4)


def test_top_level_name() -> None:
    assert lacewing.nn.Conv2d is Conv2d

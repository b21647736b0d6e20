"""`replace_linear` succeeds whole or leaves the model as it was."""

from __future__ import annotations

import os
import signal
import tempfile
from typing import Any

import pytest

from lacewing.errors import FormatError

torch = pytest.importorskip("torch", reason="lacewing.nn needs PyTorch")

from torch import nn  # noqa: E402

from lacewing.nn import Linear, PackedExperts, replace, replace_linear, spill  # noqa: E402
from tests.nn.test_experts import mixture  # noqa: E402
from tests.nn.test_replace import net  # noqa: E402


def snapshot(model: nn.Module) -> Any:
    """Which objects the model consists of, and what is in its parameters."""
    return (
        [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)],
        [
            (name, id(each), each.data_ptr(), each.detach().clone().nan_to_num())
            for name, each in model.named_parameters(remove_duplicate=False)
        ],
    )


def assert_untouched(model: nn.Module, before: Any) -> None:
    modules, parameters = snapshot(model)
    assert modules == before[0]
    assert [each[:3] for each in parameters] == [each[:3] for each in before[1]]
    for (*_, now), (*_, then) in zip(parameters, before[1], strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("format", ["w8a8g64", "bf16", "w8a8g64_sp", "w4a8g32z"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite(value: float, format: str, dtype: torch.dtype) -> None:
    model = net().to(dtype)
    with torch.no_grad():
        model[2].weight[3, 5] = value
    before = snapshot(model)
    with pytest.raises(FormatError, match=r"`2\.weight`.*finite"):
        replace_linear(model, format)
    assert_untouched(model, before)


def test_weights_beyond_the_range_of_the_format() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight[3, 5] = 1e30
    before = snapshot(model)
    with pytest.raises(FormatError, match=r"`2\.weight`"):
        replace_linear(model, "w8a8g64")
    assert_untouched(model, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("enough"), MemoryError])
@pytest.mark.parametrize("after", [1, 5])
def test_an_exception_in_the_progress_callback(error: Any, after: int) -> None:
    model = net()
    before = snapshot(model)
    calls: list[tuple[str, int, int]] = []

    def progress(name: str, done: int, total: int) -> None:
        calls.append((name, done, total))
        if len(calls) == after:
            raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        replace_linear(model, progress=progress)
    assert_untouched(model, before)
    replace_linear(model)
    assert isinstance(model[2], Linear)


def test_progress() -> None:
    calls: list[tuple[str, int, int]] = []
    replace_linear(net(), progress=lambda *call: calls.append(call))
    total = 4 * 64 * 96 + 640
    assert [name for name, *_ in calls] == ["0.up", "0.down", "1.up", "1.down", "2"]
    assert [done for _, done, _ in calls] == [6144, 12288, 18432, 24576, total]
    assert {whole for *_, whole in calls} == {total}


def test_an_error_in_the_last_stack_of_experts() -> None:
    model = mixture("Mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 0, 0] = float("nan")
    before = snapshot(model)
    implementation = model.config._experts_implementation
    with pytest.raises(FormatError, match="finite"):
        replace_linear(model)
    assert_untouched(model, before)
    assert model.config._experts_implementation == implementation
    assert model._tied_weights_keys is type(model)._tied_weights_keys


def test_an_error_while_a_layer_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    before = snapshot(model)
    count = iter(range(100))
    init = Linear.__init__

    def failing(self: Any, *args: Any, **options: Any) -> None:
        if next(count) == 4:
            raise MemoryError
        init(self, *args, **options)

    monkeypatch.setattr(Linear, "__init__", failing)
    with pytest.raises(MemoryError):
        replace_linear(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("step", ["_put_in_place", "_settle"])
def test_ctrl_c_while_layers_are_put_in_place_waits(
    monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    model = net()
    work = getattr(replace, step)

    def interrupted(*args: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        work(*args)

    monkeypatch.setattr(replace, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_linear(model)
    assert all(isinstance(each, Linear) for each in (model[0].up, model[1].down, model[2]))
    model(torch.randn(2, 64))


# -- the temporary file ---------------------------------------------------------------------------


def test_without_a_temporary_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **options: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    assert len(replace_linear(net()).replaced) == 5


def test_without_room_for_the_temporary_file(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def seek(self, at: int) -> None:
            return None

        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            return None

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **options: Full())
    model = net()
    assert len(replace_linear(model).replaced) == 5
    model(torch.randn(2, 64))


def test_without_memory_for_the_copy_the_file_stays_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    want, model = net(), mixture("Mixtral")
    other = net()
    replace_linear(want)

    def none(*args: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(spill, "aligned_copy", none)
    replace_linear(other)
    x = torch.randn(2, 64)
    assert torch.equal(want(x), other(x))
    replace_linear(model)
    assert isinstance(model.model.layers[0].mlp.experts.down_proj, PackedExperts)
    model(torch.randint(3, 64, (2, 9)))


def test_few_file_descriptors_for_many_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process has 1024 as a rule. The file is mapped in runs, each as long as all before."""
    monkeypatch.setattr(spill, "_FIRST_MAP", 1 << 13)
    want, model = many(), many()
    for layer in want:
        layer.weight.data = Linear.from_dense(layer).weight.dequantized()
    before, most = descriptors(), []
    replace_linear(model, progress=lambda *_: most.append(descriptors()))
    assert max(most) - before <= 10  # the file, and maps of 2^13 to 2^19 bytes
    assert descriptors() == before
    for layer, dense in zip(model, want, strict=True):
        assert torch.equal(layer.weight.dequantized(), dense.weight)


def many() -> Any:
    torch.manual_seed(5)
    return nn.Sequential(*[nn.Linear(64, 64) for _ in range(60)])


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_file_that_takes_little_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    real = tempfile.TemporaryFile

    class Slow:
        def __init__(self, **options: Any) -> None:
            self.file: Any = real(**options)

        def write(self, data: Any) -> Any:
            return self.file.write(data[:100])

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    want, other = net(), net()
    replace_linear(want)
    monkeypatch.setattr(tempfile, "TemporaryFile", Slow)
    replace_linear(other)
    x = torch.randn(2, 64)
    assert torch.equal(want(x), other(x))

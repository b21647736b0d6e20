"""What `import lacewing` gives: lazy names, and `linear` in front of the kernels."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import lacewing
from lacewing import formats


def test_import_loads_nothing_heavy() -> None:
    code = "import sys, lacewing; print(sorted(m for m in sys.modules if m in ('numpy', 'torch')))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def has_transformers() -> bool:
    """Whether there is one that LacewingConfig works with: 5.0 or newer."""
    if importlib.util.find_spec("transformers") is None:
        return False
    return importlib.util.find_spec("transformers.core_model_loading") is not None


def test_every_public_name_is_there() -> None:
    with_torch = {"nn", "Report", "replace_linear"}
    absent = with_torch if importlib.util.find_spec("torch") is None else set()
    if absent or not has_transformers():
        absent.add("LacewingConfig")
    for name in set(lacewing.__all__) - absent:
        assert getattr(lacewing, name) is not None
    assert set(lacewing.__all__) <= set(dir(lacewing))
    assert lacewing.pack is formats.pack
    assert lacewing.SamplingParams is importlib.import_module("lacewing.engine").SamplingParams


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lines'"):
        _ = lacewing.lines  # type: ignore[attr-defined]


def packed_weight(n: int = 33, k: int = 70, name: str = "w8a8g32") -> formats.PackedTensor:
    weight = np.random.default_rng(n + k).standard_normal((n, k)).astype(np.float32)
    return formats.pack(weight, name)


def activations(*shape: int) -> Any:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", sorted(formats.FORMATS))
def test_linear_is_what_the_oracle_says(name: str) -> None:
    packed = packed_weight(name=name)
    x, bias = activations(3, 70), activations(33)
    oracle = formats.get_format(name)
    for add in (None, bias):
        y = lacewing.linear(x, packed, add)
        wanted = oracle.reference_linear(x, packed, add)
        assert y.dtype == np.float32
        if oracle.group_size:
            assert (y == wanted).all()
        else:
            np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [None, 1, 2])
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (1, 1, 4), (0,), (2, 0)], ids=str)
def test_leading_dimensions(lead: tuple[int, ...], threads: int | None) -> None:
    packed = packed_weight()
    x = activations(*lead, 70)
    y = lacewing.linear(x, packed, threads=threads)
    assert y.shape == (*lead, 33)
    assert (y.reshape(-1, 33) == lacewing.linear(x.reshape(-1, 70), packed)).all()


def test_any_strides_and_types() -> None:
    packed = packed_weight()
    x = activations(4, 70)
    wanted = lacewing.linear(x, packed)
    wide = np.zeros((4, 140), np.float32)
    wide[:, ::2] = x
    for other in (x.astype(np.float64), np.asfortranarray(x), wide[:, ::2], x[::-1][::-1]):
        assert (lacewing.linear(other, packed) == wanted).all()
    assert (lacewing.linear(x.tolist(), packed) == wanted).all()


class TensorLike:
    """As much of a torch tensor as `linear` asks for."""

    device = "a device"

    def __init__(self, array: Any, dtype: str = "bf16") -> None:
        self.array, self.dtype = array, dtype

    def detach(self) -> TensorLike:
        return self

    float = cpu = detach

    def numpy(self) -> Any:
        return self.array

    def to(self, device: str, dtype: str) -> TensorLike:
        assert device == self.device
        return TensorLike(self.array, dtype)


def test_torch_in_torch_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Torch:
        from_numpy = TensorLike

    monkeypatch.setitem(sys.modules, "torch", Torch)  # type: ignore[arg-type]
    packed, x, bias = packed_weight(), activations(2, 70), activations(33)
    y = lacewing.linear(TensorLike(x), packed, TensorLike(bias))
    assert isinstance(y, TensorLike)
    assert y.dtype == "bf16"
    assert (y.array == lacewing.linear(x, packed, bias)).all()


@pytest.mark.parametrize("name", ["replace_linear", "LacewingConfig", "nn"])
def test_what_needs_torch_says_so_without_it(name: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; import lacewing; lacewing.{name}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "LacewingError" in run.stderr
    assert "needs torch, which is not installed" in run.stderr


def test_real_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch is an extra")
    packed, x = packed_weight(), torch.randn(2, 3, 70, dtype=torch.bfloat16)
    y = lacewing.linear(x, packed)
    assert y.dtype == torch.bfloat16
    assert y.shape == (2, 3, 33)


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (activations(2, 69), None, r"x must be \[\.\.\., 70\].*got \[2, 69\]"),
        (np.float32(1), None, r"got \[\]"),
        (activations(2, 70), activations(32), r"bias must be \[33\], got \[32\]"),
        (activations(2, 70), activations(1, 33), r"bias must be \[33\], got \[1, 33\]"),
    ],
)
def test_shapes_that_do_not_fit(x: Any, bias: Any, message: str) -> None:
    with pytest.raises(lacewing.FormatError, match=message):
        lacewing.linear(x, packed_weight(), bias)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_threads_out_of_range(threads: Any) -> None:
    with pytest.raises(lacewing.RequestError, match="`threads` must be"):
        lacewing.linear(activations(1, 70), packed_weight(), threads=threads)


def test_an_isa_that_does_not_run() -> None:
    code = """
import lacewing, numpy as np
packed = lacewing.pack(np.ones((16, 32), np.float32), "w8a8g32")
try:
    lacewing.linear(np.ones((1, 32), np.float32), packed)
except lacewing.UnsupportedCpuError as error:
    print(error, error.hint)
"""
    env = {**os.environ, "LACEWING_ISA": "mmx"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert "LACEWING_ISA must be one of" in run.stdout
    assert "lacewing doctor" in run.stdout


def test_a_damaged_weight_is_an_error() -> None:
    whole = packed_weight()
    parts = {name: part[:1] for name, part in whole.parts.items()}
    with pytest.raises(lacewing.FormatError):
        lacewing.linear(activations(1, 70), formats.PackedTensor("w8a8g32", (33, 70), parts))
    with pytest.raises(lacewing.FormatError, match="missing"):
        lacewing.linear(activations(1, 70), formats.PackedTensor("w8a8g32", (33, 70), {}))

"""A model beside its replaced copy, and `lacewing bench torch`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lacewing.errors import LacewingError, RequestError

torch = pytest.importorskip("torch", reason="lacewing.nn needs PyTorch")

from torch import nn  # noqa: E402

from lacewing.nn import replace_linear  # noqa: E402
from lacewing.nn.compare import compare  # noqa: E402
from lacewing.nn.opening import Work, open_model  # noqa: E402


def stack() -> nn.Module:
    torch.manual_seed(0)
    block = [nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(3)]
    return nn.Sequential(*block, nn.Linear(64, 10)).eval()


def test_both_models_are_run_and_compared() -> None:
    model, x = stack(), torch.randn(5, 64)
    steps: list[tuple[str, int, int]] = []
    found = compare(
        model,
        {"forward": lambda model: model(x), "words": lambda model: {"ids": model(x).argmax(-1)}},
        "w4a8g64",
        rounds=3,
        progress=lambda *step: steps.append(step),
    )
    assert all(type(block[0]) is nn.Linear for block in list(model)[:3])  # it stays as it is
    forward, words = found.timings
    assert (forward.run, words.run, forward.rounds) == ("forward", "words", 3)
    assert min(forward.dense, forward.replaced, forward.dense_layers) > 0
    assert forward.error is not None
    assert 0 < forward.error < 0.2
    assert forward.cosine is not None
    assert forward.cosine > 0.98
    assert words.error is words.cosine is None
    assert words.agreement == forward.agreement
    assert steps[-1][1:] == (2 * 5, 2 * 5 + 1)


def test_the_error_is_that_of_the_outputs() -> None:
    model, x = nn.Sequential(nn.Linear(64, 10)).eval(), torch.randn(5, 64)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(10, 64))
        assert model[0].bias is not None
        model[0].bias.zero_()
    found = compare(model, {"forward": lambda model: model(x)}, "bf16", rounds=1)
    assert found.timings[0].error == 0
    assert found.timings[0].agreement == 1
    halved = compare(
        model, {"forward": lambda m: m(x) * (1 if type(m[0]) is nn.Linear else -1)}, "bf16"
    )
    assert halved.timings[0].error == 2
    assert halved.timings[0].cosine == pytest.approx(-1)


def test_layers_of_a_stack_are_added_up_by_place() -> None:
    x = torch.randn(5, 64)
    found = compare(stack(), {"forward": lambda model: model(x)}, rounds=1)
    assert [layer.name for layer in found.layers] == ["0.0", "1.0", "2.0", "3"]
    places = {place.name: place for place in found.by_place()}
    assert {name: place.count for name, place in places.items()} == {"*.*": 3, "3": 1}
    assert places["*.*"].dense == sum(layer.dense for layer in found.layers[:3])
    assert found.replaced_bytes < found.dense_bytes
    assert json.loads(json.dumps(found.to_dict()))["timings"][0]["run"] == "forward"


def test_nothing_to_compare() -> None:
    with pytest.raises(RequestError, match="no layer of the model was replaced"):
        compare(nn.Sequential(nn.ReLU()), {"forward": lambda model: model(torch.ones(1))})
    with pytest.raises(RequestError, match="no tensors"):
        compare(stack(), {"forward": lambda model: "text"})


@pytest.mark.parametrize("rounds", [0, -1, 1.5, True])
def test_bad_rounds(rounds: Any) -> None:
    with pytest.raises(RequestError, match="`rounds` must be an integer >= 1, got"):
        compare(stack(), {"forward": lambda model: model(torch.ones(1, 64))}, rounds=rounds)


def test_outputs_of_zeros() -> None:
    """Their relative error is no number that JSON has."""
    found = compare(stack(), {"forward": lambda model: model(torch.ones(1, 64)) * 0}, rounds=1)
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["timings"][0]["error"] is None


# -- models to measure ----------------------------------------------------------------------------

MODULE = """
import torch

def pair():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 32)), torch.randn(3, 64)

def keywords():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(64, 32)
        def forward(self, x, scale):
            return self.fc(x) * scale
    return Model(), {"x": torch.randn(3, 64), "scale": 2}

def without_bias():
    return torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False)), torch.randn(3, 64)

def alone():
    return torch.nn.Linear(64, 32)

def nothing():
    return 3

number = 3
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_models.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_models", raising=False)
    return tmp_path


@pytest.mark.parametrize("function", ["pair", "keywords"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_function_of_ones_own(own_module: Path, function: str, dtype: str) -> None:
    model, runs = open_model(f"own_models:{function}", dtype, Work())
    found = compare(model, runs, rounds=1)
    assert found.timings[0].error is not None
    assert found.timings[0].error < 0.02


def test_the_inputs_of_both_have_one_type(own_module: Path) -> None:
    """A replaced model without biases has no parameters to read a type of."""
    model, runs = open_model("own_models:without_bias", "bf16", Work())
    dense = runs["forward"](model)
    replace_linear(model)
    assert dense.dtype == runs["forward"](model).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_models:alone", "without inputs"),
        ("own_models:nothing", "needs to return a torch.nn.Module"),
        ("own_models:number", "needs a function, got int"),
        ("own_models:absent", "cannot be imported"),
        ("no_such_module:f", "cannot be imported"),
        ("neither", "found neither"),
        (".", "cannot open it"),
    ],
)
def test_what_cannot_be_opened(own_module: Path, name: str, message: str) -> None:
    if name == ".":
        pytest.importorskip("transformers")
    with pytest.raises(LacewingError, match=message):
        open_model(name, "f32", Work())


def test_wrong_dtype() -> None:
    with pytest.raises(RequestError, match="`dtype` must be one of f32, bf16, f16"):
        open_model("own_models:pair", "f64", Work())


def command(place: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lacewing.cli", "bench", "torch", *arguments],
        cwd=place,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_prints_tables_and_json(own_module: Path) -> None:
    run = command(own_module, "own_models:pair", "--rounds", "1", "--threads", "1")
    assert run.returncode == 0, run.stderr
    assert "packed ms" in run.stdout
    assert "1 x 32x64" in run.stdout
    assert "1 threads" in run.stderr
    run = command(own_module, "own_models:pair", "--rounds", "1", "--json", "--format", "w4a8g64")
    found: dict[str, Any] = json.loads(run.stdout)
    assert found["layers"][0]["format"] == "w4a8g64"
    assert found["timings"][0]["rounds"] == 1


def test_the_command_without_pytorch(own_module: Path) -> None:
    (own_module / "torch.py").write_text("raise ImportError('none here')", encoding="utf-8")
    run = command(own_module, "own_models:pair", PYTHONPATH=str(own_module))
    assert run.returncode == 1
    assert "needs PyTorch" in run.stderr
    assert "hint: pip install" in run.stderr


def test_a_hugging_face_directory(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="opens Hugging Face directories")
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    model, runs = open_model(str(tmp_path), "f32", Work(batch=2, tokens=8, new_tokens=4))
    assert list(runs) == ["forward 2 x 8", "generate 2 x 4"]
    found = compare(model, runs, rounds=1)
    assert len(found.report.replaced) == 15
    assert found.timings[1].error is None
    vision = transformers.ViTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    transformers.ViTModel(vision).save_pretrained(tmp_path / "vision")
    model, runs = open_model(str(tmp_path / "vision"), "f32", Work(batch=2))
    assert list(runs) == ["2 images"]
    assert compare(model, runs, rounds=1).report.replaced

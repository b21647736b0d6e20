"""Checkpoints of packed models that lie, are damaged, or meet a process without Lacewing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_transformers import logits, prompt, reload, tiny, torch, transformers

from lacewing.errors import CheckpointError
from lacewing.nn.huggingface import LacewingConfig

files = pytest.importorskip("safetensors.torch", reason="safetensors writes the files")

UP = "model.layers.0.mlp.up_proj"
FORMATS = {"*.up_proj": "w8a8g64_sp"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model, dense and sparse layers, with biases."""
    path = tmp_path_factory.mktemp("saved")
    tiny("llama", attention_bias=True).save_pretrained(path / "dense")
    config = LacewingConfig("w4a8g32", sparsity=0.8, per_layer=FORMATS)
    reload(path / "dense", quantization_config=config).save_pretrained(path / "packed")
    return path / "packed"


Tensors = dict[str, Any]
Change = Callable[[Tensors, dict[str, Any]], None]


def write(source: Path, target: Path, change: Change) -> Path:
    """A copy with other tensors, and another `quantization_config`."""
    tensors = files.load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    change(tensors, config["quantization_config"])
    target.mkdir()
    files.save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_the_copy_itself_loads(saved: Path, tmp_path: Path) -> None:
    copy = write(saved, tmp_path / "copy", lambda tensors, config: None)
    assert torch.equal(logits(reload(copy), prompt()), logits(reload(saved), prompt()))


def changed(key: str, change: Callable[[Any], Any]) -> Change:
    def apply(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[key] = change(tensors[key]).contiguous()

    return apply


def removed(key: str) -> Change:
    return lambda tensors, config: tensors.pop(key)


def said(key: str, value: Any) -> Change:
    return lambda tensors, config: config.update({key: value})


def listed(name: str, **entry: Any) -> Change:
    def apply(tensors: Tensors, config: dict[str, Any]) -> None:
        config["layers"].setdefault(name, {}).update(entry)

    return apply


def unlisted(name: str) -> Change:
    return lambda tensors, config: config["layers"].pop(name)


DOWN = "model.layers.1.mlp.down_proj"
DAMAGE: dict[str, tuple[Change, str]] = {
    "no codes": (removed(f"{DOWN}.weight.codes"), rf"`{DOWN}.weight.codes`: needed"),
    "no stream": (removed(f"{UP}.weight.stream"), rf"`{UP}.weight.stream`: needed"),
    "no bias": (
        removed("model.layers.0.self_attn.q_proj.bias"),
        r"`model.layers.0.self_attn.q_proj.bias`: needed",
    ),
    "short codes": (
        changed(f"{DOWN}.weight.codes", lambda t: t[:-1]),
        rf"`{DOWN}.weight`: .*`codes`.*must have shape",
    ),
    "scales of another type": (
        changed(f"{DOWN}.weight.scales", lambda t: t.to(torch.bfloat16)),
        rf"`{DOWN}.weight.scales`: needs F16, got BF16",
    ),
    "flat scales": (
        changed(f"{DOWN}.weight.scales", lambda t: t.flatten()),
        rf"`{DOWN}.weight`: .*`scales`.*must have shape",
    ),
    "short stream": (
        changed(f"{UP}.weight.stream", lambda t: t[:64]),
        rf"`{UP}.weight`: ",
    ),
    "offsets beyond the stream": (
        changed(f"{UP}.weight.offsets", lambda t: t * 1000),
        rf"`{UP}.weight`: ",
    ),
    "negative offsets": (changed(f"{UP}.weight.offsets", lambda t: -t), rf"`{UP}.weight`: "),
    "another shape": (
        listed(DOWN, shape=[64, 128]),
        rf"layers.{DOWN}`: needs the shape \[64, 96\] of the model, got \[64, 128\]",
    ),
    "another format": (listed(DOWN, format="w8a8g32"), rf"`{DOWN}.weight`: .*must have shape"),
    "an unknown format": (listed(DOWN, format="w9"), rf"layers.{DOWN}.format`.*got w9"),
    "a format that is no word": (listed(DOWN, format=[1]), rf"layers.{DOWN}.format`"),
    "a shape of text": (listed(DOWN, shape="64"), rf"layers.{DOWN}.shape`"),
    "a huge shape": (listed(DOWN, shape=[1 << 40, 96]), rf"layers.{DOWN}.shape`"),
    "a type that is none": (listed(DOWN, dtype="save"), rf"layers.{DOWN}.dtype`.*got save"),
    "a layer that is not there": (
        listed("model.layers.9.mlp.up_proj", format="w4a8g32", shape=[96, 64]),
        r"layers.model.layers.9.mlp.up_proj`: needs a layer of the model",
    ),
    "a layer that is none": (
        listed("model.norm", format="w4a8g32", shape=[1, 64]),
        r"layers.model.norm`: needs a layer of the model",
    ),
    "no layers": (said("layers", None), r"layers`: needs the packed layers, got None"),
    "layers of text": (said("layers", "all"), r"layers`: needs a mapping"),
    "only other layers": (
        said("layers", {"encoder.up": {"format": "w4a8g32", "shape": [96, 64]}}),
        r"layers`: needs layers of the model, got none of encoder.up",
    ),
    "a later version": (said("version", 2), r"version`: needs 1, got 2"),
    "a version of text": (said("version", "1"), r"version`: needs 1"),
    "sparsity of text": (said("sparsity", "0.5"), r"sparsity`: needs a number"),
    "patterns of numbers": (said("exclude", [1]), r"exclude`: needs a list of patterns"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_an_error(saved: Path, tmp_path: Path, what: str) -> None:
    change, message = DAMAGE[what]
    copy = write(saved, tmp_path / "copy", change)
    with pytest.raises(CheckpointError, match=message) as caught:
        reload(copy)
    assert caught.value.hint


def test_a_layer_that_is_not_listed_is_no_dense_one(saved: Path, tmp_path: Path) -> None:
    """Its codes would be left out, and its weight be random: the mark does not fit."""
    copy = write(saved, tmp_path / "copy", unlisted(DOWN))
    with pytest.raises((CheckpointError, RuntimeError), match=r"not listed|mismatched_sizes"):
        reload(copy)


@pytest.mark.parametrize("size", [0, 7, 100, 5000])
def test_a_file_that_ends_early(saved: Path, tmp_path: Path, size: int) -> None:
    copy = write(saved, tmp_path / "copy", lambda tensors, config: None)
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        reload(copy)


def test_the_weights_of_another_model(saved: Path, tmp_path: Path) -> None:
    tiny("llama", intermediate_size=160, attention_bias=True).save_pretrained(tmp_path / "dense")
    other = reload(tmp_path / "dense", quantization_config=LacewingConfig("w4a8g32"))
    other.save_pretrained(tmp_path / "other")
    theirs = files.load_file(tmp_path / "other" / "model.safetensors")
    copy = write(saved, tmp_path / "copy", lambda tensors, config: tensors.update(theirs))
    with pytest.raises(
        CheckpointError, match=r"`model.layers.0.mlp.\w+.weight`: .*must have shape"
    ):
        reload(copy)


def test_dense_weights_of_another_model(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "one")
    tiny("llama", intermediate_size=160).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "config.json").replace(tmp_path / "one" / "config.json")
    with pytest.raises(CheckpointError, match=r"mlp.\w+.weight`: needs \[.*160.*\] by config.json"):
        reload(tmp_path / "one", quantization_config=LacewingConfig("w4a8g32"))


# -- where there is no Lacewing -------------------------------------------------------------------

_WITHOUT = """
import sys
sys.modules["lacewing"] = None
import transformers
transformers.logging.set_verbosity_error()
try:
    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
    print("loaded")
except RuntimeError as error:
    print("refused", error)
"""

_AFTERWARDS = """
import sys
import lacewing.nn
assert "transformers" not in sys.modules
import transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.lm_head).__module__)
"""


def run(code: str, path: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "ignore", "-c", code, str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return ran.stdout


def test_transformers_alone_refuses_to_load_it(saved: Path) -> None:
    """It would leave out what it does not know, and begin with random weights."""
    assert run(_WITHOUT, saved).startswith("refused You set `ignore_mismatched_sizes`")


def test_transformers_that_comes_after_lacewing_knows_it(saved: Path) -> None:
    assert run(_AFTERWARDS, saved).strip() == "lacewing.nn.linear"


def test_a_dense_model_does_not_take_the_tensors(saved: Path) -> None:
    model = tiny("llama", attention_bias=True)
    tensors = files.load_file(saved / "model.safetensors")
    with pytest.raises(RuntimeError, match=f"size mismatch for {DOWN}.weight"):
        model.load_state_dict(tensors, strict=False)
    for name, mark in tensors.items():
        if mark.ndim == 5:
            with pytest.raises(RuntimeError):  # not even by broadcasting
                model.get_parameter(name).data.copy_(mark)


def test_another_quantizer_is_not_mixed_in(saved: Path) -> None:
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match="LacewingConfig"):
        reload(saved, quantization_config=config)

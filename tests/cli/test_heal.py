"""`lacewing heal`: what it prints, makes and refuses."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from tests.cli.conftest import Call

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("yaml", reason="PyYAML is not installed")


@pytest.fixture
def packed(call: Call, tiny_gguf: Path, tmp_path: Path) -> Path:
    path = tmp_path / "packed"
    assert call("compress", tiny_gguf, path, "--format", "w2a8g64").status == 0
    return path


SHORT = ("--window", 32, "--tokens", 64, "--rate", 0.01)


def test_it_heals(call: Call, packed: Path, tiny_gguf: Path, text: Path, tmp_path: Path) -> None:
    given = ("heal", packed, tmp_path / "out", "--dense", tiny_gguf, "--data", text)
    status, out, err = call(*given, "--steps", 4, "--json", *SHORT)
    assert status == 0, err
    found = json.loads(out)
    assert found["steps_done"] == 4
    assert found["tokens_seen"] == 256
    assert found["helped"] == (found["after"] < found["before"])
    assert call("info", tmp_path / "out").status == 0
    told = call(*given, "--steps", 1, "--lora", 2, "--force", *SHORT)
    assert told.status == 0
    assert "KL before" in told.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "packed", "text.txt"]


def test_its_defaults_are_those_of_python() -> None:
    from lacewing.cli.heal import heal
    from lacewing.compress.heal import Healing

    healing = Healing(steps=1)
    shown = inspect.signature(heal).parameters
    for option, field in (("rate", "rate"), ("tokens", "tokens"), ("mix", "mix"), ("bf16", "bf16")):
        assert shown[option].default == getattr(healing, field)


def test_it_says_that_no_step_fitted(
    call: Call,
    packed: Path,
    tiny_gguf: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", asked.append)
    given = ("heal", packed, tmp_path / "out", "--dense", tiny_gguf, "--data", text)
    found = call(*given, "--minutes", 0, "--threads", 1, *SHORT)
    assert found.status == 0
    assert asked[0] == 1
    assert "no step fitted" in found.out + found.err


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (("--steps", 1, "--minutes", 1), 2, "--minutes or --steps, not both"),
        (("--steps", 0), 1, "`steps` must be from 1"),
        (("--steps", 1, "--window", 4096), 1, "text.txt: needs"),
        (("--steps", 1, "--rate", 7), 1, "`rate` must be from 0 to 1"),
    ],
)
def test_it_refuses(
    more: tuple[object, ...],
    status: int,
    message: str,
    call: Call,
    packed: Path,
    tiny_gguf: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    given = ("heal", packed, tmp_path / "out", "--dense", tiny_gguf, "--data", text)
    found = call(*given, *more)
    assert found.status == status
    assert message in found.err
    assert not (tmp_path / "out").exists()


def test_only_packed_models_are_healed(
    call: Call, tiny_gguf: Path, text: Path, tmp_path: Path
) -> None:
    found = call("heal", tiny_gguf, tmp_path / "out", "--dense", tiny_gguf, "--data", text)
    assert found.status == 1
    assert "healing needs a packed directory, got a gguf model" in found.err
    assert "lacewing compress" in found.err

"""`lacewing calibrate-kv`: what it prints, writes and refuses."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from lacewing.checkpoint.kvplan import KvPlan
from tests.cli.conftest import Call

pytest.importorskip("torch", reason="PyTorch is not installed")


@pytest.fixture
def packed(call: Call, tiny_gguf: Path, tmp_path: Path) -> Path:
    path = tmp_path / "packed"
    assert call("compress", tiny_gguf, path).status == 0
    return path


SHORT = ("--window", 256, "--tokens", 512)


def test_a_plan_beside_a_packed_model(call: Call, packed: Path, text: Path) -> None:
    given = ("calibrate-kv", packed, "--data", text, *SHORT)
    status, out, err = call(*given)
    assert (status, out) == (0, "")
    assert "labels: 16 channels of each head's keys" in err
    assert f"{packed / 'kvplan.json'}: calibrated on 512 tokens, seed 0" in err
    plan = KvPlan.load(packed / "kvplan.json")
    assert plan.labels is not None
    assert plan.spans is None
    assert call("info", packed).status == 0  # it is still a model

    status, out, err = call(*given)
    assert (status, out) == (1, "")
    assert "path that is free" in err
    assert "hint: replace it with --force" in err

    status, out, err = call(*given, "--budget", 0.6, "--force", "--threads", 1)
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0].split() == ["layer", "head", "0", "head", "1"]
    spans = KvPlan.load(packed / "kvplan.json").spans
    assert spans is not None
    assert [line.split() for line in lines[2:]] == [
        [str(index), *map(str, layer)] for index, layer in enumerate(spans)
    ]
    assert "of the dense cache at 256 tokens, at a loss of about" in err


def test_json(call: Call, tiny_gguf: Path, text: Path, tmp_path: Path) -> None:
    out_file = tmp_path / "mine.json"
    given = ("calibrate-kv", tiny_gguf, "--data", text, "--out", out_file, "--budget", 0.6, *SHORT)
    status, out, err = call(*given, "--labels", 8, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["out"] == str(out_file)
    assert found["labels"] == 8
    assert 0.3 < found["share"] <= 0.6
    assert found["spans"] == json.loads(out_file.read_text())["spans"]


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        (("--budget", 0.01), 1, "budget: needs at least 0.3125 at 256 tokens"),
        (("--budget", "half"), 2, "--budget"),
        (("--labels", 5), 1, "labels: needs a multiple of 4"),
        (("--tokens", 100_000), 1, "hint: give more text"),
        ((), 1, "hint: name one: --out kvplan.json"),
    ],
)
def test_what_is_refused(
    call: Call,
    tiny_gguf: Path,
    text: Path,
    tmp_path: Path,
    more: tuple[object, ...],
    status: int,
    says: str,
) -> None:
    place = ("--out", tmp_path / "plan") if more else ()
    found = call("calibrate-kv", tiny_gguf, "--data", text, *SHORT, *place, *more)
    assert (found.status, found.out) == (status, "")
    assert says in found.err
    assert not (tmp_path / "plan").exists()


def test_it_needs_data(call: Call, tiny_gguf: Path) -> None:
    found = call("calibrate-kv", tiny_gguf)
    assert (found.status, found.out) == (2, "")
    assert "missing option" in found.err.lower()


def test_its_defaults_are_those_of_python() -> None:
    from lacewing.cli.calibratekv import calibrate_kv as verb
    from lacewing.compress.calibrate_kv import calibrate_kv

    shown, meant = (inspect.signature(function).parameters for function in (verb, calibrate_kv))
    for option in ("budget", "tokens", "window", "seed", "labels", "threads", "force", "out"):
        assert shown[option].default == meant[option].default

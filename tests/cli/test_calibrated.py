"""`lacewing compress --recipe`: with a stand-in for the loop over blocks."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="lacewing.compress needs PyTorch")
pytest.importorskip("yaml", reason="PyYAML is an extra")

from tests.checkpoint import build
from tests.cli.conftest import Call
from tests.compress import nearest

RECIPE = """
name: mixed
rules:
  - {match: "*.down_proj", format: w8a8g64}
  - {match: "*", format: w4a8g64_sp, solver: magnitude, sparsity: 0.5}
calibration: {tokens: 256, window: 64}
"""


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    nearest.install(monkeypatch)


@pytest.fixture
def given(tmp_path: Path) -> tuple[Path, list[Any]]:
    """The output, and the options of a compression."""
    recipe, text = tmp_path / "mixed.yaml", tmp_path / "some.txt"
    recipe.write_text(RECIPE)
    text.write_text("".join(np.random.default_rng(0).choice(build.BYTES, 1000)))
    return tmp_path / "out", ["--recipe", recipe, "--data", text]


def test_table_and_info(call: Call, tiny_hub: Path, given: Any) -> None:
    out, options = given
    status, shown, err = call("compress", tiny_hub, out, *options)
    assert status == 0, err
    rows = [line.split() for line in shown.splitlines()[2:]]
    assert [row[0] for row in rows][:2] == ["self_attn.q_proj", "self_attn.k_proj"]
    down = next(row for row in rows if row[0] == "mlp.down_proj")
    assert down[1:4] == ["w8a8g64", "columns", "2"]
    assert "calibrated on 256 tokens, seed 0" in err
    assert f"lacewing run {out}" in err
    status, shown, _ = call("info", out)
    assert status == 0
    assert "mixed" in shown
    assert "256 tokens of some.txt, seed 0" in shown


def test_json(call: Call, tiny_hub: Path, given: Any) -> None:
    out, options = given
    more = ("--seed", "3", "--calibration-tokens", "320", "--json")
    status, shown, err = call("compress", tiny_hub, out, *options, *more)
    assert status == 0, err
    found = json.loads(shown)
    assert found["recipe"]["name"] == "mixed"
    assert (found["data"]["tokens"], found["data"]["seed"]) == (320, 3)
    assert len(found["layers"]) == 14
    assert found["bytes"] > 0


def test_a_dry_run(call: Call, tiny_hub: Path, given: Any) -> None:
    out, options = given
    status, shown, err = call("compress", tiny_hub, out, *options, "--dry-run")
    assert (status, err) == (0, "")
    for word in (
        "output",
        "bits per weight",
        "memory",
        "work directory",
        "4 windows of 64",
        "time",
    ):
        assert word in shown
    status, shown, _ = call("compress", tiny_hub, out, "--recipe", "small", "--dry-run", "--json")
    assert status == 0
    assert json.loads(shown)["windows"] == 256  # as long as the whole context
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--recipe", "safe", "--data", "x", "--format", "w8a8g32"), "--format"),
        (("--recipe", "safe", "--data", "x", "--sparsity", "0.5"), "--sparsity"),
        (("--recipe", "safe", "--data", "x", "--head-format", "bf16"), "--head-format"),
        (("--recipe", "safe", "--data", "x", "--as", "compressed-tensors"), "--as"),
        (("--data", "x"), "--data"),
        (("--seed", "1"), "--seed"),
        (("--calibration-tokens", "1"), "--calibration-tokens"),
        (("--dry-run",), "--dry-run"),
        (("--restart",), "--restart"),
    ],
)
def test_options_that_contradict(
    call: Call, tiny_hub: Path, tmp_path: Path, options: tuple[str, ...], names: str
) -> None:
    status, out, err = call("compress", tiny_hub, tmp_path / "out", *options)
    assert (status, out) == (2, "")
    assert names in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "says", "hint"),
    [
        (("--recipe", "balance", "--data", "x"), "a preset or a YAML file", "balanced"),
        (("--recipe", "safe", "--data", "x"), "no such file", ""),
        (("--recipe", "safe"), "needs data", "--data"),
        (("--recipe", "safe", "--data", "x", "--machine", "sse"), "avx512, avx2, scalar", ""),
    ],
)
def test_errors_of_the_recipe(
    call: Call, tiny_hub: Path, tmp_path: Path, options: tuple[str, ...], says: str, hint: str
) -> None:
    status, out, err = call("compress", tiny_hub, tmp_path / "out", *options)
    assert (status, out) == (1, "")
    assert says in err
    assert hint in err
    assert not list(tmp_path.iterdir())


def test_interrupted_and_taken_up(
    call: Call, tiny_hub: Path, given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, options = given
    blocks: list[str] = []

    def interrupted(*arguments: Any) -> None:
        def tell(name: str, done: int, total: int) -> None:
            blocks.append(name)
            if done == 1:
                signal.raise_signal(signal.SIGINT)

        nearest.compress_blocks(*arguments[:-1], tell)

    nearest.install(monkeypatch, interrupted)
    status, shown, err = call("compress", tiny_hub, out, *options)
    assert (status, shown) == (130, "")
    assert "goes on from there" in err
    assert not out.exists()
    assert call("info", out.with_name("out.work")).status == 1
    status, _, err = call("compress", tiny_hub, out, *options, "--seed", "1")
    assert status == 1
    assert "--restart" in err
    assert call("compress", tiny_hub, out, *options).status == 0
    assert blocks == ["block 0", "block 1"]


def test_info_of_a_recipe_that_is_none(call: Call, tiny_hub: Path, given: Any) -> None:
    out, options = given
    assert call("compress", tiny_hub, out, *options).status == 0
    path = out / "lacewing.json"
    document = json.loads(path.read_text())
    for strange in (3, {}, {"recipe": [], "data": {"files": 3}}, {"data": {"files": [None]}}):
        path.write_text(json.dumps(document | {"recipe": strange}))
        assert call("info", out).status == 0


@pytest.mark.parametrize("machine", ["avx512", "avx2"])
def test_the_dense_twin_is_told(call: Call, tiny_hub: Path, given: Any, machine: str) -> None:
    """Without the stand-in, and without data: at a half 4 bits pay on AVX-512 alone."""
    out, (_, recipe, *_) = given
    recipe.write_text(RECIPE.replace("w8a8g64}", "w8a8g64, solver: nearest}"))
    sys.modules.pop("lacewing.compress.calibrate")
    status, _, err = call("compress", tiny_hub, out, "--recipe", recipe, "--machine", machine)
    assert status == 0, err
    assert "nothing was calibrated" in err
    assert ("12 tensors are w4a8g64 instead of w4a8g64_sp" in err) == (machine == "avx2")
    record = json.loads((out / "lacewing.json").read_text())["recipe"]
    assert record["machine"] == machine
    assert record["layers"][0]["format"] == ("w4a8g64" if machine == "avx2" else "w4a8g64_sp")
    assert call("info", out).status == 0


def test_few_tokens_are_told(
    call: Call, tiny_hub: Path, given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lacewing.compress import run

    monkeypatch.setattr(run, "_LEAST", 100)
    out, options = given
    more = ("--calibration-tokens", "64")
    status, _, err = call("compress", tiny_hub, out, *options, *more)
    assert status == 1
    assert "at least 2 windows" in err
    more = ("--calibration-tokens", "128")
    status, _, err = call("compress", tiny_hub, out, *options, *more)
    assert (status, "fewer than the" in err) == (0, True)


def test_info_shows_a_strange_name_plainly(call: Call, tiny_hub: Path, given: Any) -> None:
    out, options = given
    assert call("compress", tiny_hub, out, *options).status == 0
    path = out / "lacewing.json"
    document = json.loads(path.read_text())
    document["recipe"]["recipe"]["name"] = "x" * 100_000 + "\n"
    path.write_text(json.dumps(document))
    status, shown, _ = call("info", out)
    assert (status, len(shown) < 5000) == (0, True)


def test_without_torch(tiny_hub: Path, given: Any) -> None:
    out, options = given
    code = "import sys; sys.modules['torch'] = None; from lacewing.cli.__main__ import main; main()"
    command = [sys.executable, "-c", code, "compress", tiny_hub, out, *options]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (1, "")
    assert "needs torch, which is not installed" in run.stderr
    assert "pip install 'lacewing[compress]'" in run.stderr

"""Healing: what is kept, what gets better, what a kill or bad input does."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from lacewing.checkpoint import open_source  # noqa: E402
from lacewing.compress import savepoint  # noqa: E402
from lacewing.compress.heal import Healed, Healing, _schedule, heal_windows  # noqa: E402
from lacewing.compress.master import Master  # noqa: E402
from lacewing.compress.student import Student  # noqa: E402
from lacewing.errors import CheckpointError, RecipeError  # noqa: E402
from lacewing.formats import FORMATS  # noqa: E402
from tests.compress import training  # noqa: E402
from tests.compress.training import FAMILIES, tokens, weights, write_model  # noqa: E402
from tests.tiny import CONFIGS  # noqa: E402

SHORT = Healing(steps=30, rate=5e-3, tokens=256, held_out=4, bf16=False)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return write_model(tmp_path / "dense", weights(), "bf16")


def heal(compressed: Path, dense: Path, out: Path, how: Healing = SHORT, **more: Any) -> Healed:
    windows = more.pop("windows", tokens(64))
    return heal_windows(open_source(compressed), open_source(dense), out, windows, how, **more)


def same(a: Path, b: Path) -> bool:
    return (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def identical(a: Path, b: Path) -> bool:
    return same(a, b) and (a / "lacewing.json").read_bytes() == (b / "lacewing.json").read_bytes()


@pytest.mark.parametrize("lora", [None, 4])
@pytest.mark.parametrize("format", FAMILIES)
def test_it_comes_nearer_and_keeps_masks(
    format: str, lora: int | None, tmp_path: Path, dense: Path
) -> None:
    before = write_model(tmp_path / "before", weights(), format)
    how = replace(SHORT, lora_rank=lora, steps=60, rate=2e-3)
    how = replace(SHORT, lora_rank=lora, steps=60, rate=2e-3)
    found = heal(before, dense, tmp_path / "after", how)
    assert found.helped
    assert found.after < 0.95 * found.before
    old, new = open_source(before), open_source(tmp_path / "after")
    for name in old.spec.tensor_shapes():
        a, b = old.tensors[name], new.tensors[name]
        assert a.dtype == b.dtype
        if FORMATS.get(a.dtype) is not None and FORMATS[a.dtype].sparse:
            assert not b.dequantize()[a.dequantize() == 0].any()
        if name in training.TABLES:
            assert np.array_equal(a.dequantize(), b.dequantize())
    assert not (tmp_path / "after.work").exists()


@pytest.mark.parametrize("name", ["gemma3", "qwen3", "qwen2-window", "llama-llama3"])
@pytest.mark.parametrize("bf16", [False, True])
def test_every_architecture_heals(
    name: str, bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms of heads and of outputs, windows, biases; in bf16 too. With a head of its own: a random
    model whose head is its embedding repeats the last token, whatever its layers say."""
    config = CONFIGS[name] | {"tie_word_embeddings": False}
    monkeypatch.setattr(training, "CONFIG", config)
    dense = write_model(tmp_path / "dense", weights(config), "bf16")
    before = write_model(tmp_path / "before", weights(config), "w3a8g64")
    how = replace(SHORT, steps=8, rate=2e-3, bf16=bf16)
    found = heal(before, dense, tmp_path / "after", how)
    assert found.steps_done == 8
    # Norms of heads make a random model chaotic: 3 bits are 3.8 nats away, no step is small.
    assert found.helped or name == "qwen3"


def pruned(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The smaller half of every row of every layer is zero."""
    out = dict(found)
    for name, values in found.items():
        if values.ndim == 2 and name not in training.TABLES:
            least = np.median(np.abs(values), axis=1, keepdims=True)
            out[name] = np.where(np.abs(values) < least, np.float32(0), values)
    return out


def record(**recipe: Any) -> dict[str, Any]:
    """As `compress` writes it, of layers whose half was pruned."""
    names = [f"model.layers.{i}.{name}" for i in range(2) for name in training.LAYERS]
    layers = [{"name": name, "target": 0.5} for name in names]
    return {"recipe": {"smooth": "none", "reorder": False} | recipe, "layers": layers}


@pytest.mark.parametrize("told", [None, record(), record(smooth="awq"), record(reorder=True)])
@pytest.mark.parametrize("format", ["bf16", "w8a8g64", "w4a8g32"])
def test_what_was_pruned_in_a_dense_format_stays(
    format: str, told: dict[str, Any] | None, tmp_path: Path, dense: Path
) -> None:
    before = write_model(tmp_path / "before", pruned(weights()), format, told)
    found = heal(before, dense, tmp_path / "after", replace(SHORT, steps=4))
    assert found.helped
    old, new = open_source(before), open_source(tmp_path / "after")
    for name in old.spec.tensor_shapes():
        zero = old.tensors[name].dequantize() == 0
        assert not new.tensors[name].dequantize()[zero].any()


def masters(before: Path, dense: Path) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
    """What the masters of a student begin with: mask, and original weight."""
    found = []

    def make(solution: Any, mask: Any, near: Any, index: int) -> Master:
        found.append((mask, near))
        return Master(solution, mask, near)

    Student(open_source(before), open_source(dense), make, torch.float32)
    return found


def test_zeros_of_rounding_may_go(tmp_path: Path, dense: Path) -> None:
    """A model that was rounded and not pruned has no masks."""
    for format in ("bf16", "w8a8g64", "w4a8g32", "w4a8g32z", "w1.6a8"):
        before = write_model(tmp_path / format, weights(), format)
        assert all(mask is None for mask, _ in masters(before, dense))


def test_folded_weights_have_no_original(tmp_path: Path, dense: Path) -> None:
    for i, (told, known) in enumerate(
        [(record(), True), (record(smooth="awq"), False), (record(reorder=True), False)]
    ):
        before = write_model(tmp_path / str(i), weights(), "w4a8g32", told)
        assert all((near is not None) == known for _, near in masters(before, dense))


@pytest.mark.parametrize("told", [{"recipe": 3, "layers": [1, {"target": "x"}]}, {"layers": 7}])
def test_a_record_of_something_else_says_nothing(
    told: dict[str, Any], tmp_path: Path, dense: Path
) -> None:
    before = write_model(tmp_path / "before", weights(), "w4a8g32", told)
    assert all(near is not None for _, near in masters(before, dense))


def test_the_rate_rises_over_steps_then_falls() -> None:
    long = [_schedule(step, step / 1000) for step in range(1000)]
    assert long[:20] == pytest.approx([(i + 1) / 20 for i in range(20)], rel=2e-3)
    assert all(a >= b for a, b in itertools.pairwise(long[19:]))
    assert long[-1] < 1e-5
    short = [_schedule(step, step / 30) for step in range(30)]
    assert max(short) == short[3]


def test_the_rest_of_the_directory_stays(tmp_path: Path, dense: Path) -> None:
    before = write_model(tmp_path / "before", weights(), "w4a8g32")
    found = heal(before, dense, tmp_path / "after")
    manifest = json.loads((tmp_path / "after/lacewing.json").read_text())
    assert manifest["recipe"] == {"name": "kept"}
    healed = manifest["healed"]
    assert (healed["dense"], healed["windows"], healed["window"]) == ("dense", 64, 16)
    assert (healed["steps"], healed["rate"], healed["seed"]) == (30, 5e-3, 0)
    assert (healed["before"], healed["after"]) == (found.before, found.after)
    assert [step for step, _ in healed["history"]] == [0, 15, 30]
    assert (tmp_path / "after/tokenizer.json").read_text() == training.TOKENS.tokenizer_json


def test_what_is_reported_is_what_was_written(tmp_path: Path, dense: Path) -> None:
    """The held-out KL of the directory, worked out anew by another run on the same windows."""
    before = write_model(tmp_path / "before", weights(), "w3a8g64")
    found = heal(before, dense, tmp_path / "after")
    again = heal(tmp_path / "after", dense, tmp_path / "twice", replace(SHORT, steps=1))
    assert again.before == pytest.approx(found.after, rel=1e-5)


def test_it_never_makes_a_model_worse(tmp_path: Path, dense: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("lacewing.compress.heal._schedule", lambda *_: 1.0)
    before = write_model(tmp_path / "before", weights(), "w4a8g32")
    found = heal(before, dense, tmp_path / "after", replace(SHORT, rate=1.0, steps=4))
    assert not found.helped
    assert found.after == found.before
    assert same(before, tmp_path / "after")


def test_the_best_look_is_kept(tmp_path: Path, dense: Path, monkeypatch: Any) -> None:
    """Where a run gets worse at its end, what it was at its best is written."""
    monkeypatch.setattr(
        "lacewing.compress.heal._schedule", lambda _, share: 200 * (share > 0.5) + 1
    )
    before = write_model(tmp_path / "before", weights(), "w3a8g64")
    found = heal(before, dense, tmp_path / "after")
    losses = [loss for _, _, loss in found.history]
    assert losses[-1] > losses[0] > found.after == min(losses)
    monkeypatch.undo()
    again = heal(tmp_path / "after", dense, tmp_path / "twice", replace(SHORT, steps=1))
    assert again.before == pytest.approx(found.after, rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 3}, {"mix": 0.5, "learn_scales": False}])
def test_steps_are_reproducible(changes: dict[str, Any], tmp_path: Path, dense: Path) -> None:
    before = write_model(tmp_path / "before", weights(), "w4a8g32")
    how = replace(SHORT, steps=6, bf16=True, **changes)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        heal(before, dense, tmp_path / name, replace(how, seed=seed))
    assert identical(tmp_path / "a", tmp_path / "b")
    assert not same(tmp_path / "a", tmp_path / "c")


def stop_after(step: int, file: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on every step is saved, and a signal comes when this file of this step has been."""
    save = savepoint.save

    def saved(path: Path, tensors: Any, facts: Any) -> None:
        save(path, tensors, facts)
        if path.name == file and facts.get("step", step) == step:
            signal.raise_signal(getattr(signal, how))

    monkeypatch.setattr(savepoint, "save", saved)
    monkeypatch.setattr("lacewing.compress.heal._SAVE_EVERY", (-1.0, -1.0))


def stop_in_look(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the held-out windows are looked at after this step."""
    from lacewing.compress import heal as module

    loss = module._Run._loss

    def stopped(self: Any, picked: torch.Tensor, mix: float) -> torch.Tensor:
        if self.step == step and not torch.is_grad_enabled():
            signal.raise_signal(signal.SIGINT)
        return loss(self, picked, mix)

    monkeypatch.setattr(module._Run, "_loss", stopped)


KILLED = """
import sys
from pathlib import Path
import pytest, torch
from tests.compress import test_heal as test

torch.set_num_threads(int(sys.argv[4]))
test.stop_after(5, "best.5.safetensors", "SIGKILL", pytest.MonkeyPatch())
test.heal(*map(Path, sys.argv[1:4]), test.NINE)
"""
NINE = replace(SHORT, steps=9)
REPO = Path(__file__).resolve().parents[2]


def test_a_killed_run_goes_on(tmp_path: Path, dense: Path, monkeypatch: Any) -> None:
    """Killed in a look that was a better one, interrupted after a step, interrupted in the last
    look, then not: the same bytes as at once; nothing is left beside."""
    before = write_model(tmp_path / "before", weights(), "w8a8g64_sp")
    heal(before, dense, tmp_path / "whole", NINE)
    out, state = tmp_path / "out", tmp_path / "out.work/state.safetensors"
    arguments = [before, dense, out, torch.get_num_threads()]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(REPO)])}
    command = [sys.executable, "-c", KILLED, *map(str, arguments)]
    assert subprocess.run(command, env=paths).returncode == -signal.SIGKILL
    assert savepoint.read_facts(state)["step"] == 5
    with monkeypatch.context() as patch:
        stop_after(7, "state.safetensors", "SIGINT", patch)
        with pytest.raises(KeyboardInterrupt):
            heal(before, dense, out, NINE)
    assert savepoint.read_facts(state)["step"] == 7
    with monkeypatch.context() as patch:
        stop_in_look(9, patch)
        with pytest.raises(KeyboardInterrupt):
            heal(before, dense, out, NINE)
    assert savepoint.read_facts(state)["step"] == 9
    assert not out.exists()
    heal(before, dense, out, NINE)
    assert identical(out, tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["before", "dense", "out", "whole"]


def test_minutes_are_a_limit(tmp_path: Path, dense: Path, monkeypatch: Any) -> None:
    """By a clock of which every look takes a second."""
    clock = SimpleNamespace(monotonic=itertools.count(0.0, 1.0).__next__)
    monkeypatch.setattr("lacewing.compress.heal.time", clock)
    before = write_model(tmp_path / "before", weights(), "w4a8g32")
    ticks: list[tuple[float, str]] = []
    how = replace(SHORT, steps=None, minutes=1.0)
    found = heal(before, dense, tmp_path / "after", how, progress=lambda *t: ticks.append(t))
    assert 0 < found.steps_done < 30
    assert 55 < found.seconds <= 65
    assert len(found.history) == 3
    assert found.history[-1][0] == found.steps_done
    shares = [share for share, _ in ticks]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert "tokens/s" in ticks[-1][1]


def test_time_that_is_up_before_the_first_step(tmp_path: Path, dense: Path) -> None:
    before = write_model(tmp_path / "before", weights(), "w4a8g32")
    found = heal(before, dense, tmp_path / "after", replace(SHORT, steps=None, minutes=0.0))
    assert (found.steps_done, found.helped, len(found.history)) == (0, False, 1)
    assert same(before, tmp_path / "after")


# -- bad input ------------------------------------------------------------------------------------


def test_divergence_is_an_error_that_loses_nothing(
    tmp_path: Path, dense: Path, monkeypatch: Any
) -> None:
    """The state of the last good step is kept, and a run at a lower rate goes on from it."""
    from lacewing.compress import heal as module

    before = write_model(tmp_path / "before", weights(), "w4a8g32")
    monkeypatch.setattr(module, "_SAVE_EVERY", (-1.0, -1.0))
    gradients = module._Run._gradients

    def spoilt(self: Any, picked: torch.Tensor) -> float:
        return gradients(self, picked) if self.step < 5 else float("nan")

    monkeypatch.setattr(module._Run, "_gradients", spoilt)
    with pytest.raises(RecipeError, match=r"diverged: .* in step 5 at rate 0\.005") as caught:
        heal(before, dense, tmp_path / "after")
    assert "0.002" in str(caught.value.hint)
    assert not (tmp_path / "after").exists()
    monkeypatch.setattr(module._Run, "_gradients", gradients)
    found = heal(before, dense, tmp_path / "after", replace(SHORT, rate=2e-3))
    assert found.steps_done == 30
    assert found.history[0][2] == found.before


def test_another_run_is_not_gone_on_with(tmp_path: Path, dense: Path) -> None:
    before = write_model(tmp_path / "before", weights(), "w4a8g32")
    work = tmp_path / "after.work"
    work.mkdir()
    (work / "run").write_text("something else")
    with pytest.raises(RecipeError, match=r"after\.work: needs the arguments") as caught:
        heal(before, dense, tmp_path / "after")
    assert "delete" in str(caught.value.hint)
    assert not (tmp_path / "after").exists()


def test_a_run_is_known_by_all_that_it_was_given(tmp_path: Path, dense: Path) -> None:
    """But for the rate, which may be another one when it goes on."""
    from lacewing.compress.heal import _identity

    last = "model.layers.1.mlp.down_proj.weight"
    found = weights()
    other = write_model(tmp_path / "other", found | {last: found[last] + 0.5}, "bf16")
    a, b = (write_model(tmp_path / f, weights(), f) for f in ("w4a8g32", "w4a8g32z"))

    def known(x: Path = a, y: Path = dense, length: int = 16, **more: Any) -> str:
        windows = tokens(64).view(-1, length)
        return _identity(open_source(x), open_source(y), windows, replace(SHORT, **more))

    assert known() == known(rate=1e-4)
    cases = [known(x=b), known(y=other), known(length=32), known(seed=1)]
    assert len({known(), *cases}) == 5


def test_the_work_of_others_is_left_alone(tmp_path: Path, dense: Path) -> None:
    before = write_model(tmp_path / "before", weights(), "w4a8g32")
    work = tmp_path / "after.work"
    work.mkdir()
    (work / "session.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"after\.work: needs a place of its own"):
        heal(before, dense, tmp_path / "after")
    assert [p.name for p in work.iterdir()] == ["session.json"]


def test_an_existing_target_is_left_alone(tmp_path: Path, dense: Path) -> None:
    before = write_model(tmp_path / "before", weights(), "w4a8g32")
    (tmp_path / "after").mkdir()
    (tmp_path / "after/mine").write_text("mine")
    with pytest.raises(CheckpointError, match="needs a path that is free"):
        heal(before, dense, tmp_path / "after")
    assert (tmp_path / "after/mine").read_text() == "mine"
    assert not (tmp_path / "after.work").exists()


def test_a_damaged_state_has_a_name(tmp_path: Path, dense: Path, monkeypatch: Any) -> None:
    from lacewing.compress import heal as module

    before = write_model(tmp_path / "before", weights(), "w4a8g32")
    monkeypatch.setattr(module, "_identity", lambda *_: "same")
    work = tmp_path / "after.work"
    work.mkdir()
    (work / "run").write_text("same")
    (work / "state.safetensors").write_bytes(bytes(100))
    with pytest.raises(CheckpointError, match=r"state\.safetensors"):
        heal(before, dense, tmp_path / "after")


def test_a_teacher_cut_short_has_a_name(tmp_path: Path, dense: Path, monkeypatch: Any) -> None:
    from lacewing.compress import heal as module

    before = write_model(tmp_path / "before", weights(), "w4a8g32")
    monkeypatch.setattr(module, "_identity", lambda *_: "same")
    work = tmp_path / "after.work"
    work.mkdir()
    (work / "run").write_text("same")
    (work / "teacher.0.npy").write_bytes(bytes(10))
    with pytest.raises(CheckpointError, match=r"teacher\.0\.npy"):
        heal(before, dense, tmp_path / "after")


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (tokens(64).int(), "must be int64"),
        (tokens(64)[0], "must be int64"),
        (tokens(4), "more windows than the 4 held out, got 4"),
        (tokens(8, 65), "windows of 65 tokens: the model has a context of 64"),
        (tokens(8) + 60, "token ids from 0 to 66"),
        (tokens(8) - 1, "token ids from 0 to 66, got -1"),
    ],
)
def test_windows_are_checked(
    windows: torch.Tensor, message: str, tmp_path: Path, dense: Path
) -> None:
    before = write_model(tmp_path / "before", weights(), "w4a8g32")
    with pytest.raises(RecipeError, match=message):
        heal(before, dense, tmp_path / "after", windows=windows)


def test_models_must_belong_together(
    tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = write_model(tmp_path / "before", weights(), "w4a8g32")
    config = training.CONFIG | {"intermediate_size": 64}
    monkeypatch.setattr(training, "CONFIG", config)
    other = write_model(tmp_path / "other", weights(config), "bf16")
    monkeypatch.undo()
    with pytest.raises(RecipeError, match=r"other: needs `model.layers.0.mlp.gate_proj.weight` of"):
        heal(before, other, tmp_path / "after")
    text = training.TOKENS.tokenizer_json.replace('"t5": 5', '"t5": 6').replace(
        '"t6": 6', '"t6": 5'
    )
    (dense / "tokenizer.json").write_text(text)
    with pytest.raises(RecipeError, match=r"dense: needs the vocabulary of .*'t5' is 5, got 6"):
        heal(before, dense, tmp_path / "after")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "either `steps` or `minutes`"),
        ({"minutes": 1.0}, "either `steps` or `minutes`"),
        ({"steps": 0}, "`steps` must be from 1"),
        ({"rate": 2.0}, "`rate` must be from 0 to 1, got 2.0"),
        ({"rate": float("nan")}, "`rate` must be from 0 to 1, got nan"),
        ({"mix": -0.1}, "`mix` must be from 0 to 1"),
        ({"lora_rank": 0}, "`lora_rank` must be from 1"),
        ({"held_out": 0}, "`held_out` must be from 1"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        replace(SHORT, **changes)

"""`lacewing.compress`, with a stand-in for the loop over blocks: what is written, what is kept when
it is killed, what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="lacewing.compress needs PyTorch")

import lacewing  # noqa: E402
from lacewing.checkpoint import load_packed, open_source  # noqa: E402
from lacewing.compress import Calibration, Recipe, Rule  # noqa: E402
from lacewing.compress.fingerprint import fingerprint  # noqa: E402
from lacewing.compress.module import ModuleSource  # noqa: E402
from lacewing.compress.run import Compression  # noqa: E402
from lacewing.errors import CheckpointError, RecipeError  # noqa: E402
from lacewing.formats import pack  # noqa: E402
from tests.checkpoint import build  # noqa: E402
from tests.compress import nearest  # noqa: E402

RECIPE = Recipe(
    (
        Rule("*.down_proj", "w8a8g64", "nearest"),
        Rule("model.layers.{first}.*", "w4a8g64_sp", "magnitude", 0.5),
        Rule("*", "w4a8g64"),
    ),
    Calibration(tokens=256, window=64),
    name="mixed",
)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    nearest.install(monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = build.config("llama", hidden_size=64, intermediate_size=96, num_attention_heads=2)
    tiny |= {"num_key_value_heads": 1, "head_dim": 32}
    place = tmp_path_factory.mktemp("run") / "tiny"
    return build.write_hub(place, tiny, build.random_weights(tiny))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "some.txt"
    letters = np.random.default_rng(0).choice(build.BYTES, 1000)
    path.write_text("".join(letters))
    return path


def compress(model: Any, out: Path, text: Path, **options: Any) -> Any:
    return lacewing.compress(model, out, RECIPE, text, **options)


def files_of(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir()}


def test_it_writes_a_packed_model(model: Path, text: Path, tmp_path: Path) -> None:
    told: list[Any] = []
    found = compress(model, tmp_path / "out", text, progress=lambda *said: told.append(said))
    assert isinstance(found, Compression)
    assert told == [("block 0", 1, 2), ("block 1", 2, 2)]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    packed, source = load_packed(tmp_path / "out"), open_source(model)
    assert list(packed.tensors) == list(source.spec.tensor_shapes())
    plan = RECIPE.plan(source.spec)
    for name, value in packed.tensors.items():
        dense = source.tensors[name].dequantize()
        if name not in plan:
            assert (value == dense).all()
            continue
        rule = plan[name]
        assert value.format == rule.format
        wanted = pack(dense, rule.format, rule.target or None)
        assert all((value.parts[part] == wanted.parts[part]).all() for part in wanted.parts)
    assert len(found.layers) == 14
    assert [other.name for other in found.others] == ["model.embed_tokens.weight"]
    assert found.nbytes == sum(value.nbytes for value in packed.tensors.values())


def test_the_recipe_is_kept(model: Path, text: Path, tmp_path: Path) -> None:
    found = compress(model, tmp_path / "out", text, seed=7)
    record = json.loads((tmp_path / "out" / "lacewing.json").read_text())["recipe"]
    assert record == found.record
    assert Recipe.from_dict(record["recipe"]) == replace(
        RECIPE, calibration=Calibration(256, 64, 7)
    )
    assert record["data"]["files"] == [{"name": "some.txt", "tokens": 1000, "windows": 4}]
    assert (record["data"]["tokens"], record["data"]["seed"]) == (256, 7)
    assert record["layers"][0]["name"] == "model.layers.0.self_attn.q_proj"
    assert 0.4 < record["layers"][0]["sparsity"] < 0.6
    source = open_source(tmp_path / "out")
    assert source.recipe == record  # type: ignore[attr-defined]


def test_the_same_bytes_every_time(model: Path, text: Path, tmp_path: Path) -> None:
    for name in "ab":
        compress(model, tmp_path / name, text)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("blocks_done", [0, 1, 2])
def test_it_goes_on_after_a_kill(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks_done: int
) -> None:
    def dying(*arguments: Any) -> None:
        def tell(name: str, done: int, total: int) -> None:
            if done == blocks_done:
                raise Killed

        if blocks_done == 0:
            raise Killed
        nearest.compress_blocks(*arguments[:-1], tell)

    compress(model, tmp_path / "whole", text)
    out = tmp_path / "out"
    nearest.install(monkeypatch, dying)
    with pytest.raises(Killed):
        compress(model, out, text)
    assert not out.exists()
    state = json.loads((tmp_path / "out.work" / "state.json").read_text())
    assert state["finished"] == blocks_done
    told: list[Any] = []
    nearest.install(monkeypatch)
    compress(model, out, text, progress=lambda name, done, total: told.append(done))
    assert told == list(range(blocks_done + 1, 3))
    assert files_of(out) == files_of(tmp_path / "whole")
    assert not (tmp_path / "out.work").exists()


def test_another_recipe_does_not_go_on(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(*arguments: Any) -> None:
        raise Killed

    nearest.install(monkeypatch, dying)
    with pytest.raises(Killed):
        compress(model, tmp_path / "out", text)
    nearest.install(monkeypatch)
    for options in ({"seed": 5}, {"tokens": 128}, {"threads": torch.get_num_threads() + 1}):
        with pytest.raises(RecipeError, match="another compression") as caught:
            compress(model, tmp_path / "out", text, **options)
        assert "--restart" in (caught.value.hint or "")
    compress(model, tmp_path / "out", text, seed=5, restart=True)


def test_a_full_disk_leaves_no_model(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lacewing.compress import run

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "write_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        compress(model, tmp_path / "out", text)
    assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
    monkeypatch.undo()
    nearest.install(monkeypatch, None)  # the blocks are done: nothing is asked of the loop
    compress(model, tmp_path / "out", text)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_existing_output_is_replaced_by_force(model: Path, text: Path, tmp_path: Path) -> None:
    compress(model, tmp_path / "out", text)
    before = files_of(tmp_path / "out")
    with pytest.raises(CheckpointError, match="a path that is free"):
        compress(model, tmp_path / "out", text, seed=3)
    assert files_of(tmp_path / "out") == before
    compress(model, tmp_path / "out", text, seed=3, force=True)
    assert files_of(tmp_path / "out") != before


def test_windows_fit_the_model(model: Path, text: Path, tmp_path: Path) -> None:
    """2048 tokens are more than a context of 128."""
    recipe = replace(RECIPE, calibration=Calibration())
    found = lacewing.compress(model, tmp_path / "out", recipe, text, tokens=600)
    assert found.record["recipe"]["calibration"] == {"tokens": 600, "window": 128, "seed": 0}
    assert found.record["data"]["tokens"] == 512


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"recipe": "blanced"}, "a preset or a YAML file"),
        ({"recipe": {"rules": []}}, "at least one rule"),
        ({"recipe": Recipe((Rule("*.mlp.*", "bf16"),))}, "no rule matches"),
        ({"data": ()}, "got no file"),
        ({"data": ["nowhere.txt"]}, "no such file"),
        ({"tokens": 4000}, r"some.txt: needs 3.* tokens for 62 windows of 64"),
        ({"tokens": 0}, "`tokens`"),
        ({"seed": -1}, "`seed`"),
        ({"threads": 0}, "`threads`"),
        ({"tokenizer": "x"}, "models in memory"),
        ({"model_or_path": torch.nn.Linear(2, 2)}, "a model of transformers"),
        ({"model_or_path": "nowhere"}, "an existing model"),
    ],
)
def test_what_cannot_be_done(
    model: Path, text: Path, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    given = {"model_or_path": model, "out": tmp_path / "out", "recipe": RECIPE, "data": text}
    with pytest.raises((RecipeError, CheckpointError), match=says):
        lacewing.compress(**(given | options))
    assert not list(tmp_path.iterdir())


def test_a_dry_run(model: Path, text: Path, tmp_path: Path) -> None:
    found = lacewing.compress(model, tmp_path / "out", RECIPE, dry_run=True)
    assert not list(tmp_path.iterdir())
    made = compress(model, tmp_path / "out", text)
    sparse = sum(layer.format.endswith("_sp") for layer in made.layers)
    assert sparse == 6
    assert found.nbytes == pytest.approx(made.nbytes, rel=0.02)
    assert found.bits_per_weight == pytest.approx(made.bits_per_weight, rel=0.02)
    assert (found.windows, found.window) == (4, 64)
    assert found.disk == 4 * 4 * 64 * 64 * 4 + found.nbytes
    dense = replace(RECIPE, rules=RECIPE.rules[::2])
    exact = lacewing.compress(model, tmp_path / "b", dense, dry_run=True)
    assert exact.nbytes == lacewing.compress(model, tmp_path / "b", dense, text).nbytes
    assert found.memory > 1 << 20
    assert found.seconds > 0


def test_models_are_told_apart(model: Path, tmp_path: Path) -> None:
    tiny = json.loads((model / "config.json").read_text())
    weights = build.random_weights(tiny)
    build.write_hub(tmp_path / "a", tiny, weights)
    same = fingerprint(open_source(tmp_path / "a"))
    assert same == fingerprint(open_source(tmp_path / "a"))
    (tmp_path / "a" / "README.md").write_text("not read")
    (tmp_path / "a" / "consolidated.bin").write_text("not read")
    assert same == fingerprint(open_source(tmp_path / "a"))
    weights["model.norm.weight"][-1] += 1
    build.write_hub(tmp_path / "b", tiny, weights)
    assert fingerprint(open_source(tmp_path / "b")) != same


def test_weights_that_cannot_be_read(model: Path, tmp_path: Path) -> None:
    source = open_source(shutil.copytree(model, tmp_path / "a"))
    (tmp_path / "a" / "model.safetensors").unlink()
    (tmp_path / "a" / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        fingerprint(source)


def test_every_row_in_memory_counts(model: Path) -> None:
    tiny_transformers = pytest.importorskip("tests.tiny_transformers", reason="needs transformers")
    made = tiny_transformers.tiny("llama")
    before = fingerprint(ModuleSource(made, model))
    with torch.no_grad():
        made.state_dict()["model.layers.1.mlp.up_proj.weight"][5, 1] += 1
    assert fingerprint(ModuleSource(made, model)) != before


# -- a model in memory ----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_model_of_transformers(
    model: Path, text: Path, tmp_path: Path, architecture: str
) -> None:
    tiny_transformers = pytest.importorskip("tests.tiny_transformers", reason="needs transformers")
    made = tiny_transformers.tiny(architecture)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    for tokenizer, name in ((model, "a"), (model / "tokenizer.json", "b")):
        compress(made, tmp_path / name, text, tokenizer=tokenizer)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    made.save_pretrained(tmp_path / "saved")
    for path in model.glob("tokenizer*.json"):
        (tmp_path / "saved" / path.name).write_bytes(path.read_bytes())
    compress(tmp_path / "saved", tmp_path / "c", text)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ac"]
    assert weights[0] == weights[1]
    with pytest.raises(RecipeError, match="no tokenizer"):
        compress(made, tmp_path / "d", text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        compress(made, tmp_path / "d", text, tokenizer=tmp_path / "nowhere")


# -- the package is the function ------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import lacewing, lacewing.compress.recipe as r; lacewing.compress",
        "import lacewing; lacewing.compress; import lacewing.compress.recipe as r",
        "import lacewing.compress.recipe as r, lacewing",
        "from lacewing import compress; import lacewing; r = compress.recipe",
    ],
)
def test_every_order_of_imports(code: str) -> None:
    """Called without PyTorch, which is quicker, and says that it is not there."""
    code = f"""
import sys
sys.modules["torch"] = None
{code}
assert r.Recipe is lacewing.Recipe
try:
    lacewing.compress("a", "b", "safe")
except lacewing.LacewingError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs torch, which is not installed" in run.stdout

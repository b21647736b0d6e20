"""`lacewing.compress` with the real loop: the engine opens what was written, and computes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="lacewing.compress needs PyTorch")
pytest.importorskip("lacewing._C", reason="the engine needs the compiled module")

import lacewing  # noqa: E402
from lacewing.checkpoint import open_source  # noqa: E402
from lacewing.compress import Calibration, Recipe, Reconstruct, Rule  # noqa: E402
from lacewing.compress.decoder import Decoder  # noqa: E402
from lacewing.compress.run import Compression  # noqa: E402
from tests.checkpoint import build  # noqa: E402
from tests.compress.stored import output_of  # noqa: E402
from tests.tiny import tiny_tokens  # noqa: E402

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "head_dim": 32}
CALIBRATION = Calibration(tokens=256, window=32)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = build.config(request.param, **SIZES)
    weights = build.random_weights(tiny)
    return build.write_hub(tmp_path_factory.mktemp("end") / "tiny", tiny, weights)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text("".join(np.random.default_rng(0).choice(build.BYTES, 1000)))
    return path


def twin_logits(place: Path, tokens: list[int]) -> np.ndarray:
    """Of the packed directory, by torch in f32."""
    decoder = Decoder(open_source(place))
    with torch.no_grad():
        x = output_of(decoder, torch.tensor([tokens]))
        return decoder.logits(x, *decoder.head())[0].numpy()


@pytest.mark.parametrize(
    ("format", "rule", "tolerance"),
    [
        # Weights are the same numbers; keys and values are rounded to f16, by 2^-11, and where the
        # CPU has bf16 products activations to 2^-9: two blocks of four products, in a row.
        ("bf16_sp", {"sparsity": 0.5, "solver": "admm"}, 2**-4),
        # Activations in 8 bits: 1/254 of the largest of a group, at most, in every product.
        ("w8a8g32", {"refine": 1}, 2**-3),
    ],
)
def test_the_engine_computes_what_was_written(
    model: Path, text: Path, tmp_path: Path, format: str, rule: dict[str, Any], tolerance: float
) -> None:
    rules = (Rule("model.embed_tokens", "bf16"), Rule("*", format, **rule))
    recipe = Recipe(
        rules, CALIBRATION, smooth="smoothquant", reorder=True, reconstruct=Reconstruct(2, 1e-4)
    )
    made = lacewing.compress(model, tmp_path / "out", recipe, text)
    assert isinstance(made, Compression)
    assert len(made.layers) == 14
    tokens = [2 + token % 90 for token in tiny_tokens(24)]
    wanted = twin_logits(tmp_path / "out", tokens)
    with lacewing.LLM(tmp_path / "out") as llm:
        found = np.concatenate([chunk.copy() for chunk in llm.logits(tokens)])
    off = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert off < tolerance
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.99
    record = json.loads((tmp_path / "out" / "lacewing.json").read_text())["recipe"]
    kinds = [change["kind"] for change in record["changes"]]
    block = ["smoothquant", "smoothquant", "reorder", "smoothquant", "smoothquant", "reorder"]
    assert kinds == [*block, "reconstruct"] * 2
    assert record["layers"][0]["error"] == made.layers[0].error


def test_the_same_bytes_every_time(model: Path, text: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        (Rule("*", "w4a8g64_sp", "columns", 0.4),), CALIBRATION, ratios="curves", correct=0.5
    )
    for name in "ab":
        lacewing.compress(model, tmp_path / name, recipe, text)
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab"]
    assert files[0] == files[1]

"""Hugging Face directories: one file or shards, every float type, tied or not, and damaged ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacewing.checkpoint import load_model, open_source, open_weights
from lacewing.errors import CheckpointError, LacewingError, UnsupportedModelError
from lacewing.formats import get_format
from tests.checkpoint.build import (
    TOKENS,
    VOCAB,
    config,
    random_weights,
    safetensors_bytes,
    tokenizer_document,
    write_hub,
    write_safetensors,
)
from tests.checkpoint.foreign import write_tensors
from tests.checkpoint.hostile import refused

Q = "model.layers.0.self_attn.q_proj.weight"


def rounded(array: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    if dtype == "BF16":
        return (array.view(np.uint32) >> 16 << 16).view(np.float32)
    return array.astype(np.float16).astype(np.float32) if dtype == "F16" else array


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_tensors_are_read(tmp_path: Path, dtype: str, shards: int, tied: bool) -> None:
    made = config(tie_word_embeddings=tied)
    weights = random_weights(made)
    source = open_source(write_hub(tmp_path / "model", made, weights, dtype, shards))
    assert source.kind == "huggingface"
    assert source.config == made
    assert source.tensors.keys() == weights.keys() == source.spec.tensor_shapes().keys()
    for name, array in weights.items():
        tensor = source.tensors[name]
        assert tensor.dtype == dtype
        assert np.array_equal(tensor.dequantize(), rounded(array, dtype))
        if array.ndim == 2:
            assert np.array_equal(tensor.dequantize(16, 40), rounded(array, dtype)[16:40])


def test_bf16_goes_to_bf16_without_loss(tmp_path: Path) -> None:
    weights = random_weights(config())
    model = load_model(write_hub(tmp_path / "model", config(), weights, "BF16"), "bf16")
    assert all(report.exact and report.error == 0 for report in model.reports)
    found = get_format("bf16").dequantize(model.tensors[Q])  # type: ignore[arg-type]
    assert np.array_equal(found, rounded(weights[Q], "BF16"))


def test_auto_is_eight_bits(tmp_path: Path) -> None:
    model = load_model(write_hub(tmp_path / "model", config(), random_weights(config())))
    assert {report.format for report in model.reports} == {"w8a8g32", "f32"}
    assert all(0 < r.error < 0.01 for r in model.reports if r.format != "f32")


@pytest.mark.parametrize("model_type", ["gemma3", "gemma3_text"])
def test_gemma_norms_get_their_one(tmp_path: Path, model_type: str) -> None:
    made = config(model_type)
    weights = random_weights(made)
    source = open_source(write_hub(tmp_path / "model", made, weights))
    for name, array in weights.items():
        expected = array + np.float32(1) if name.endswith("norm.weight") else array
        assert np.array_equal(source.tensors[name].dequantize(), expected), name


def test_shards_may_be_links(tmp_path: Path) -> None:
    """The hub's cache keeps files under other names, and links to them."""
    path = write_hub(tmp_path / "model", config(), random_weights(config()), shards=2)
    for file in list(path.glob("model-*")):
        target = tmp_path / f"blob-{file.name}"
        file.rename(target)
        file.symlink_to(target)
    load_model(path)


def test_a_repeated_head_of_a_tied_model_is_left_out(tmp_path: Path) -> None:
    weights = random_weights(config())
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model = load_model(write_hub(tmp_path / "model", config(), weights))
    assert "lm_head.weight" not in model.tensors


# -- tokenizer ------------------------------------------------------------------------------------


def rewrite(path: Path, name: str, change: Callable[[Any], Any]) -> None:
    document = json.loads((path / name).read_text())
    (path / name).write_text(json.dumps(change(document)))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_hub(tmp_path / "model", config(), random_weights(config()))


def test_tokenizer_files(model: Path) -> None:
    files = open_source(model).tokenizer
    assert json.loads(files.tokenizer_json) == tokenizer_document()
    assert (files.bos_token, files.bos_token_id) == ("<s>", 1)
    assert (files.eos_token, files.eos_token_ids) == ("<|endoftext|>", [0, 5])
    assert files.chat_template == "x"
    assert not files.add_bos


def test_a_template_in_a_file_of_its_own(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ newer }}")
    assert open_source(model).tokenizer.chat_template == "{{ newer }}"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "rag", "template": "r"}], "r"),
        ([], None),
        (7, None),
        ([7], None),
        ([{"name": "default"}], None),
    ],
)
def test_templates_with_names(model: Path, value: Any, expected: str | None) -> None:
    rewrite(model, "tokenizer_config.json", lambda d: d | {"chat_template": value})
    assert open_source(model).tokenizer.chat_template == expected


def test_ids_from_the_config_alone(model: Path) -> None:
    (model / "tokenizer_config.json").unlink()
    (model / "generation_config.json").unlink()
    rewrite(model, "config.json", lambda d: d | {"eos_token_id": 7, "bos_token_id": 3})
    files = open_source(model).tokenizer
    assert (files.eos_token_ids, files.bos_token_id) == ([7], 3)
    assert files.chat_template is None


@pytest.mark.parametrize("stated", [True, False, None])
@pytest.mark.parametrize("nested", [True, False])
def test_whether_a_prompt_begins_with_bos(model: Path, stated: bool | None, nested: bool) -> None:
    """The option decides; where there is none, the tokenizer's own post-processor."""
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A"}}]
    processor: Any = {"type": "TemplateProcessing", "single": single}
    if nested:
        processor = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, processor]}
    rewrite(model, "tokenizer.json", lambda d: d | {"post_processor": processor})
    if stated is not None:
        rewrite(model, "tokenizer_config.json", lambda d: d | {"add_bos_token": stated})
    assert open_source(model).tokenizer.add_bos is (stated is not False)


def test_a_unigram_vocabulary_is_a_list(model: Path) -> None:
    pairs = [[token, 0.0] for token in TOKENS]
    rewrite(model, "tokenizer.json", lambda d: d | {"model": {"type": "Unigram", "vocab": pairs}})
    assert open_source(model).tokenizer.bos_token_id == 1


# -- damaged directories --------------------------------------------------------------------------

Damage = Callable[[Path], None]


def edit(name: str, **changes: Any) -> Damage:
    def change(document: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in (document | changes).items() if value is not ...}

    return lambda path: rewrite(path, name, change)


def store(name: str, raw: bytes) -> Damage:
    return lambda path: (path / name).write_bytes(raw) and None


def drop(name: str) -> Damage:
    return lambda path: (path / name).unlink()


def retensor(**changes: Any) -> Damage:
    """Replaces tensors (None: takes them out)."""

    def damage(path: Path) -> None:
        weights = {**random_weights(config()), **changes}
        kept = {name: array for name, array in weights.items() if array is not None}
        write_safetensors(path / "model.safetensors", kept)

    return damage


def poisoned(value: float, dtype: str) -> Damage:
    def damage(path: Path) -> None:
        weights = random_weights(config())
        weights[Q][3, 5] = value
        write_safetensors(path / "model.safetensors", weights, dtype)

    return damage


def mlp(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return np.zeros(shape, np.float32)


DOWN = "model.layers.1.mlp.down_proj.weight"
LIES: dict[str, tuple[Damage, str]] = {
    "no config": (drop("config.json"), "config.json"),
    "no weights": (drop("model.safetensors"), "model.safetensors"),
    "no tokenizer": (drop("tokenizer.json"), "tokenizer.json"),
    "config is empty": (store("config.json", b""), "config.json"),
    "config is a list": (store("config.json", b"[]"), "config.json"),
    "config is no text": (store("config.json", b"\xff\xfe"), "config.json"),
    "config nested without end": (store("config.json", b'{"a":' * 99_999), "config.json"),
    "a key twice": (store("config.json", b'{"a":1,"a":2}'), "config.json"),
    "tokenizer is cut": (store("tokenizer.json", b'{"model":'), "tokenizer.json"),
    "tokenizer is a list": (store("tokenizer.json", b"[]"), "tokenizer.json"),
    "tokenizer without model": (store("tokenizer.json", b"{}"), "model.vocab"),
    "tokenizer options are cut": (store("tokenizer_config.json", b"{"), "tokenizer_config"),
    "generation options are a list": (store("generation_config.json", b"[]"), "generation_config"),
    "vocabulary of texts": (edit("tokenizer.json", model={"vocab": {"a": "b"}}), "model.vocab"),
    "vocabulary of bools": (edit("tokenizer.json", model={"vocab": {"a": True}}), "model.vocab"),
    "vocabulary beyond the embedding": (
        edit("tokenizer.json", model={"vocab": {"a": VOCAB}}),
        "model.vocab",
    ),
    "eos as text": (edit("generation_config.json", eos_token_id="</s>"), "eos_token_id"),
    "eos beyond the vocabulary": (edit("generation_config.json", eos_token_id=[VOCAB]), "eos"),
    "eos below zero": (edit("config.json", eos_token_id=-1), "eos_token_id"),
    "quantized": (edit("config.json", quantization_config={"bits": 4}), "quantization_config"),
    "no model type": (edit("config.json", model_type=...), "model_type"),
    "a model type nobody knows": (edit("config.json", model_type="mamba"), "mamba"),
    "a model type of a list": (edit("config.json", model_type=["llama"]), "model_type"),
    "hidden size as text": (edit("config.json", hidden_size="256"), "hidden_size"),
    "hidden size of zero": (edit("config.json", hidden_size=0), "hidden_size"),
    "hidden size of another model": (edit("config.json", hidden_size=128), "embed_tokens"),
    "a vocabulary of another model": (edit("config.json", vocab_size=VOCAB + 1), "embed_tokens"),
    "an absurd vocabulary": (edit("config.json", vocab_size=1 << 40), "vocab_size"),
    "a billion layers": (edit("config.json", num_hidden_layers=10**9), "num_hidden_layers"),
    "a layer too many": (edit("config.json", num_hidden_layers=3), "layers.2"),
    "a layer too few": (edit("config.json", num_hidden_layers=1), "layers.1"),
    "heads that do not divide": (edit("config.json", num_key_value_heads=3), "num_key_value"),
    "no head": (edit("config.json", tie_word_embeddings=False), "lm_head"),
    "tying as text": (edit("config.json", tie_word_embeddings="yes"), "tie_word_embeddings"),
    "epsilon NaN": (edit("config.json", rms_norm_eps=float("nan")), "rms_norm_eps"),
    "rope base infinite": (edit("config.json", rope_theta=float("inf")), "rope_theta"),
    "rope scaling nobody knows": (
        edit("config.json", rope_scaling={"rope_type": "spiral"}),
        "spiral",
    ),
    "a mapping where a number belongs": (edit("config.json", head_dim={}), "head_dim"),
    "a tensor is missing": (retensor(**{DOWN: None}), DOWN),
    "a tensor too many": (retensor(**{"model.layers.0.extra.weight": mlp((2, 2))}), "extra"),
    "a tensor of another shape": (retensor(**{DOWN: mlp((256, 255))}), DOWN),
    "a tensor turned into a vector": (retensor(**{DOWN: mlp((65536,))}), DOWN),
    "a norm turned into a matrix": (retensor(**{"model.norm.weight": mlp((256, 1))}), "model.norm"),
    "NaN in F32": (poisoned(float("nan"), "F32"), Q),
    "NaN in BF16": (poisoned(float("nan"), "BF16"), Q),
    "infinity in F16": (poisoned(float("inf"), "F16"), Q),
    "minus infinity in BF16": (poisoned(float("-inf"), "BF16"), Q),
    "weights in F64": (
        lambda path: write_safetensors(path / "model.safetensors", random_weights(config()), "F64"),
        "F64",
    ),
    "weights are cut": (
        lambda path: (
            (path / "model.safetensors").write_bytes(
                (path / "model.safetensors").read_bytes()[:9999]
            )
            and None
        ),
        "model.safetensors",
    ),
    "weights are HTML": (store("model.safetensors", b"<!DOCTYPE html><html>"), "header length"),
    "weights are a pointer": (
        store("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "model.safetensors",
    ),
}


@pytest.mark.parametrize("format", ["auto", "bf16"])
@pytest.mark.parametrize("name", LIES)
def test_damage_is_refused(model: Path, name: str, format: str) -> None:
    damage, place = LIES[name]
    damage(model)
    refused(lambda path: load_model(path, format), model, place)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/../../model.safetensors",
        "sub/model.safetensors",
        "..",
        ".",
        "",
        "..\\model.safetensors",
        "a\0b",
        "a\nb",
        7,
        None,
        ["a"],
        "absent.safetensors",
        "x" * 5000,
    ],
)
def test_an_index_stays_in_its_directory(tmp_path: Path, name: Any) -> None:
    path = write_hub(tmp_path / "model", config(), random_weights(config()), shards=2)
    write_safetensors(tmp_path / "model.safetensors", random_weights(config()))
    index = "model.safetensors.index.json"
    rewrite(path, index, lambda d: d | {"weight_map": d["weight_map"] | {Q: name}})
    refused(load_model, path, str(path))


@pytest.mark.parametrize("value", [None, [], "x", {}, ...])
def test_an_index_is_a_mapping(tmp_path: Path, value: Any) -> None:
    path = write_hub(tmp_path / "model", config(), random_weights(config()), shards=2)
    edit("model.safetensors.index.json", weight_map=value)(path)
    refused(load_model, path)


def test_an_index_names_tensors_that_are_there(tmp_path: Path) -> None:
    path = write_hub(tmp_path / "model", config(), random_weights(config()), shards=2)
    file = next(path.glob("model-00001*"))
    file.write_bytes(safetensors_bytes({}))
    refused(load_model, path, "index.json", file.name)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_one_file_of_a_model_is_no_model(model: Path, name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_source(model / name)
    assert str(model) in str(caught.value.hint)


@pytest.mark.parametrize("name", ["logit_scale", "model.layers.0.mlp.up_proj.bias"])
def test_a_tensor_without_dimensions(model: Path, name: str) -> None:
    tensors = {n: t.dequantize() for n, t in open_weights(model).items()}
    write_tensors(model / "model.safetensors", {**tensors, name: np.array(2, np.float32)})
    assert open_weights(model)[name].dequantize() == 2
    with pytest.raises(LacewingError, match=name):
        _ = open_source(model).spec


def test_other_weights_say_what_to_do(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as caught:
        open_source(model)
    assert "safetensors" in str(caught.value.hint)


def test_vision_models_are_refused(model: Path) -> None:
    edit("config.json", model_type="gemma3", text_config={})(model)
    with pytest.raises(UnsupportedModelError, match="vision"):
        load_model(model)

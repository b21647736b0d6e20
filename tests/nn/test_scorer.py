"""A model of transformers behind `lacewing.quality`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="lacewing.nn needs PyTorch")
tokenizers = pytest.importorskip("tokenizers")

from lacewing.errors import RequestError  # noqa: E402
from lacewing.nn import replace_linear  # noqa: E402
from lacewing.nn import scorer as module  # noqa: E402
from lacewing.nn.scorer import TorchScorer, open_scorer  # noqa: E402
from lacewing.quality import Against, Choice, Items, Text, evaluate  # noqa: E402
from tests.tiny_transformers import VOCABULARY, tiny, transformers, twin  # noqa: E402

IDS = [3 + 7 * i % 120 for i in range(60)]


def letters(bos: bool = False) -> Any:
    """A tokenizer of ASCII characters; `bos` puts <s> in front."""
    words = [chr(i) for i in range(VOCABULARY)]
    words[:3] = ["<pad>", "<s>", "</s>"]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    if bos:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def scorer(architecture: str = "llama", bos: bool = False, **options: Any) -> TorchScorer:
    return TorchScorer(tiny(architecture, **options), letters(bos), "tiny")


def whole(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    return logits


def rows(found: TorchScorer, ids: list[int], start: int = 0) -> np.ndarray:
    return np.concatenate(list(found.logits(ids, start)))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "gpt2", "qwen3_moe"])
def test_chunks_are_the_rows_of_one_pass(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOGITS_BYTES", 17 * 4 * VOCABULARY)
    found = scorer(architecture)
    chunks = list(found.logits(IDS))
    assert [len(chunk) for chunk in chunks] == [17, 17, 17, 9]
    expected = whole(found._model, IDS)
    # Sums of at most a few hundred floats in another order.
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.concatenate(chunks), expected, atol=1e-4 * scale)
    for ids, start in ((IDS, 40), (IDS, 40), ([*IDS[:40], 5, 6], 40), (IDS[:30], 20), (IDS, 0)):
        np.testing.assert_allclose(
            rows(found, ids, start), whole(found._model, ids)[start:], atol=1e-4 * scale
        )


def test_scores_are_those_of_log_softmax() -> None:
    found = scorer()
    logs = torch.log_softmax(torch.from_numpy(whole(found._model, IDS)), -1)
    expected = logs[range(59), IDS[1:]]
    assert found.score(IDS) == pytest.approx(expected.numpy(), abs=1e-4)


def test_words_and_limits() -> None:
    plain, wanting = scorer(), scorer(bos=True)
    assert (plain.bos, wanting.bos) == ([], [1])
    assert plain.prefix_token == wanting.prefix_token == 1
    assert (plain.max_context, plain.vocab_size) == (128, VOCABULARY)
    assert wanting.encode("ab", True) == [1, 97, 98]
    assert wanting.encode("ab", False) == [97, 98]
    assert wanting.encode("<s>ab", True) == [1, 97, 98]
    assert wanting.decode([97, 32, 98]) == "a b"


def test_a_replaced_model_is_scored_as_its_twin() -> None:
    model = tiny("llama")
    replace_linear(model, "w8a8g32")
    found, other = (TorchScorer(each, letters(), "tiny") for each in (model, twin(model)))
    text = Text("text", "the cat sat on the mat, and so on; " * 3, window=32)
    items = Items("items", (Choice("1", "the cat", (" sat", " ran"), 0),))
    one, two = (evaluate(each, [text, items]) for each in (found, other))
    assert one[0].perplexity == pytest.approx(two[0].perplexity, rel=1e-4)
    assert one[1].log_probs[0] == pytest.approx(two[1].log_probs[0], abs=1e-3)
    dense = TorchScorer(tiny("llama"), letters(), "dense")
    (far,) = evaluate(found, [Against(dense, text)])
    assert 0 < far.kl < 0.1


def test_generation_is_greedy() -> None:
    found = scorer()
    prompt = IDS[:5]
    ids = list(prompt)
    for _ in range(4):
        ids.append(int(whole(found._model, ids)[-1].argmax()))
    assert found.generate([prompt], 4) == [ids[5:]]


def test_generation_minds_no_settings_of_the_model() -> None:
    found = scorer()
    said = found.generate([IDS[:5]], 4)
    settings = found._model.generation_config
    settings.repetition_penalty, settings.forced_eos_token_id = 9.0, 7
    settings.do_sample, settings.suppress_tokens = True, said[0]
    assert found.generate([IDS[:5]], 4) == said


def test_generation_ends() -> None:
    model = tiny("llama")
    said = TorchScorer(model, letters()).generate([IDS[:5]], 4)[0]
    model.generation_config.eos_token_id = [said[2], 2]
    first = said.index(said[2])
    assert TorchScorer(model, letters()).generate([IDS[:5]], 4) == [said[: first + 1]]
    short = TorchScorer(tiny("llama"), letters(), max_context=7)
    assert short.generate([IDS[:5]], 4) == [said[:2]]
    with pytest.raises(RequestError, match="must be shorter than the context of 7 tokens, got 7"):
        short.generate([IDS[:7]], 4)


@pytest.mark.parametrize(
    ("ids", "start", "message"),
    [
        ([], 0, r"reads 1 to 128 tokens \(the context\), got 0"),
        ([5] * 129, 0, "got 129"),
        ([5, VOCABULARY], 0, rf"in \[0, {VOCABULARY}\), the vocabulary, got 5 to {VOCABULARY}"),
        ([5, -1], 0, "got -1 to 5"),
        ([5, 6], 2, r"`start` must be in \[0, 2\)"),
    ],
)
def test_what_it_refuses(ids: list[int], start: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        scorer().logits(ids, start)
    with pytest.raises(RequestError, match="at least 2 tokens"):
        scorer().score([1])


def test_a_model_without_a_cache() -> None:
    found = scorer()
    found._model.forward = lambda **options: transformers.modeling_outputs.CausalLMOutput(
        logits=torch.zeros(1, 3, VOCABULARY)
    )
    with pytest.raises(RequestError, match="needs a model with a cache"):
        list(found.logits([1, 2, 3]))


def test_a_directory_is_opened(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    letters().save_pretrained(tmp_path / "model")
    found = open_scorer(tmp_path / "model")
    assert found.name == "model"
    assert rows(found, IDS) == pytest.approx(whole(tiny("llama"), IDS), abs=1e-4)
    packed = open_scorer(tmp_path / "model", "w4a8g32")
    assert np.abs(rows(packed, IDS) - rows(found, IDS)).max() > 1e-3


def test_what_is_no_directory_of_a_model(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is a Hugging Face directory"):
        open_scorer(tmp_path / "none")
    with pytest.raises(RequestError, match="transformers cannot open it"):
        open_scorer(tmp_path)


@pytest.mark.parametrize("damage", ["weights", "tokenizer", "pickle"])
def test_damage_is_a_typed_error(tmp_path: Path, damage: str) -> None:
    tiny("llama").save_pretrained(tmp_path)
    letters().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "weights":
        weights.write_bytes(weights.read_bytes()[:200])
    elif damage == "tokenizer":
        (tmp_path / "tokenizer.json").write_text("[]")
    else:
        torch.save(tiny("llama").state_dict(), tmp_path / "pytorch_model.bin")
        weights.unlink()
    with pytest.raises(RequestError, match="transformers cannot open it"):
        open_scorer(tmp_path)

"""The same items under EleutherAI's lm-eval (extra `lm-eval`): the same figures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="lm-eval runs PyTorch")
pytest.importorskip("transformers", "5.0", reason="lm-eval runs transformers")
pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'lacewing[lm-eval]'")

import tokenizers
import torch
import transformers

from lacewing import LLM
from lacewing.engine.scorer import LLMScorer
from lacewing.nn.scorer import TorchScorer
from lacewing.quality import Accuracy, evaluate, read_items
from lacewing.quality.scorer import Scorer

pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval and what it imports

# Trailing spaces, a line end before the answer, no context at all, an answer ("only the") whose
# beginning is merged into the context.
CHOICES = [
    {"query": "Q: the cat\nA:", "choices": [" the mat", " a dog", " the"], "gold": 0},
    {"query": "Q: the dog  ", "choices": ["the dog the dog", " cat"], "gold": 1},
    {"query": "the cat sat on", "choices": [" the mat and the dog", " a mat", " it"], "gold": 1},
    {"query": "a dog\n", "choices": ["a cat", "the dog", "on the mat", "sat"], "gold": 3},
    {"query": "", "choices": ["the cat", "a dog sat"], "gold": 0},
    {"query": "on", "choices": [" it", " the", "ly the"], "gold": 2},
]
WORDS = [
    {"context": "the cat sat on the", "target": "mat"},
    {"context": "a dog and a", "target": "cat"},
    {"context": "the dog sat on the mat and", "target": "it"},
]
CORPUS = ["the cat sat on the mat and a dog sat on it", "Q: the dog\nA: the cat", "only the mat"]


def words(bos: bool) -> Any:
    """A byte-level BPE tokenizer whose tokens hold the spaces before them."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS * 3, trainer)
    if bos:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", add_bos_token=bos
    )


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "bos"])
def model(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Weights are bfloat16 numbers, which the engine holds as they are."""
    tokenizer = words(request.param)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    made = transformers.LlamaForCausalLM(config).eval()
    for parameter in made.parameters():
        parameter.data = (parameter.data * (6 if parameter.ndim > 1 else 1)).bfloat16().float()
    return made, tokenizer


@pytest.fixture(params=["torch", "engine"])
def scorer(
    request: pytest.FixtureRequest, model: tuple[Any, Any], tmp_path: Path
) -> Iterator[Scorer]:
    if request.param == "torch":
        yield TorchScorer(*model)
        return
    for part in model:
        part.save_pretrained(tmp_path / "model")
    with LLM(tmp_path / "model", format="bf16", kv="f32") as llm:
        yield LLMScorer(llm)


def harness(model: tuple[Any, Any]) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model[0], tokenizer=model[1], batch_size=1)


def write(path: Path, items: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def ours(scorer: Scorer, path: Path) -> Accuracy:
    (found,) = evaluate(scorer, [read_items(path)])
    assert isinstance(found, Accuracy)
    return found


def theirs(model: tuple[Any, Any], path: Path, **task: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    config = {
        "task": "items",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(path)},
            "cache_dir": str(path.with_suffix("")),
        },
        "test_split": "test",
        "num_fewshot": 0,
        "target_delimiter": "",
        **task,
    }
    found = simple_evaluate(
        model=harness(model), tasks=[config], bootstrap_iters=0, verbosity="ERROR"
    )
    results: dict[str, Any] = found["results"]["items"]
    return results


def test_multiple_choice(scorer: Scorer, model: tuple[Any, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "choices.jsonl", CHOICES)
    found = ours(scorer, path)
    metrics = [{"metric": name, "aggregation": "mean"} for name in ("acc", "acc_norm")]
    wanted = theirs(
        model,
        path,
        output_type="multiple_choice",
        doc_to_text="{{query}}",
        doc_to_choice="choices",
        doc_to_target="gold",
        metric_list=metrics,
    )
    assert found.acc == pytest.approx(wanted["acc,none"])
    assert found.acc_norm == pytest.approx(wanted["acc_norm,none"])


def test_last_words(scorer: Scorer, model: tuple[Any, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "words.jsonl", WORDS)
    found = ours(scorer, path)
    metrics = [
        {"metric": "perplexity", "aggregation": "perplexity"},
        {"metric": "acc", "aggregation": "mean"},
    ]
    wanted = theirs(
        model,
        path,
        output_type="loglikelihood",
        doc_to_text="{{context}}",
        doc_to_target="{{' ' + target}}",
        metric_list=metrics,
    )
    assert found.acc == pytest.approx(wanted["acc,none"])
    assert found.perplexity == pytest.approx(wanted["perplexity,none"], rel=1e-3)


def test_every_continuation(scorer: Scorer, model: tuple[Any, Any], tmp_path: Path) -> None:
    found = ours(scorer, write(tmp_path / "choices.jsonl", CHOICES))
    pairs = [(item["query"], choice) for item in CHOICES for choice in item["choices"]]
    wanted = harness(model).loglikelihood([SimpleNamespace(args=pair) for pair in pairs])
    scores = [score for scores in found.log_probs for score in scores]
    # Float32 sums in other orders: some 1e-6 of logits of size 10, over at most 20 tokens.
    assert scores == pytest.approx([score for score, _ in wanted], abs=2e-3)

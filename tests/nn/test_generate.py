"""transformers' generation with packed layers.

The same tokens, and the same scores to the bit, as the twin: the model whose packed layers are
`Format.reference_linear` in numpy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from tiny_transformers import ARCHITECTURES, logits, prompt, tiny, torch, transformers, twin

from lacewing.nn import replace_linear

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers about itself


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Two for products of this size spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def both(architecture: str, **options: Any) -> tuple[Any, Any]:
    """A model with packed layers, and its twin."""
    model = tiny(architecture, **options)
    replace_linear(model, "w4a8g32", per_layer={"lm_head": "w8a8g32"})
    return model, twin(model)


def generate(model: Any, tokens: Any, **options: Any) -> tuple[Any, Any]:
    """Tokens, and the scores of every step."""
    torch.manual_seed(5)
    made = model.generate(
        tokens,
        attention_mask=(tokens != 0).long(),
        max_new_tokens=options.pop("max_new_tokens", 6),
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    return made.sequences, torch.stack(made.scores)


def assert_same(architecture: str, tokens: Any = None, **options: Any) -> None:
    tokens = prompt(2) if tokens is None else tokens
    (ours, our_scores), (theirs, their_scores) = (
        generate(model, tokens, **options) for model in both(architecture)
    )
    assert torch.equal(ours, theirs)
    assert torch.equal(our_scores, their_scores)


def padded() -> Any:
    tokens = prompt(3, 9)
    tokens[0, :4] = tokens[2, :1] = 0
    return tokens


MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "beams": {"num_beams": 3, "do_sample": False},
}
OTHER_MODES: dict[str, dict[str, Any]] = {
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "without a cache": {"do_sample": False, "use_cache": False},
    "penalties": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation(architecture: str, mode: str) -> None:
    assert_same(architecture, padded(), **MODES[mode])


@pytest.mark.parametrize("mode", OTHER_MODES)
def test_other_generation(mode: str) -> None:
    assert_same("llama", padded(), **OTHER_MODES[mode])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prompt_lookup(architecture: str) -> None:
    if architecture == "t5":
        pytest.skip("transformers looks up prompts of decoders only")
    tokens = prompt(1, 4).repeat(1, 4)
    assert_same(architecture, tokens, do_sample=False, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize(
    ("architecture", "do_sample", "packed_assistant"),
    [
        ("llama", False, False),
        ("llama", True, True),
        ("gemma3", False, True),
        ("t5", False, True),
    ],
)
def test_an_assistant(architecture: str, do_sample: bool, packed_assistant: bool) -> None:
    assistant = tiny(architecture, seed=1)
    if packed_assistant:
        replace_linear(assistant, "w8a8g32")
    tokens = prompt(1)
    assert_same(architecture, tokens, do_sample=do_sample, assistant_model=assistant)
    if not do_sample:  # an assistant changes the speed, not the answer
        model, _ = both(architecture)
        alone = generate(model, tokens, do_sample=False)[0]
        assert torch.equal(alone, generate(model, tokens, assistant_model=assistant)[0])


# -- caches ---------------------------------------------------------------------------------------


def caches() -> dict[str, Any]:
    kinds = transformers
    return {
        "dynamic": lambda config: kinds.DynamicCache(config=config),
        "static": lambda config: kinds.StaticCache(config=config, max_cache_len=64),
        "8-bit floats": lambda config: kinds.QuantizedCache("fp8", config),
        "quanto": lambda config: kinds.QuantizedCache("quanto", config),
        "hqq": lambda config: kinds.QuantizedCache("hqq", config),
        "offloaded": lambda config: kinds.DynamicCache(config=config, offloading=True),
        "offloaded static": lambda config: kinds.StaticCache(
            config=config, max_cache_len=64, offloading=True
        ),
    }


@pytest.mark.parametrize("name", caches())
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_caches(architecture: str, name: str) -> None:
    """The prompt of gemma3 is longer than its sliding window of 8."""
    if "offloaded" in name and not torch.accelerator.is_available():
        pytest.skip("transformers offloads from another device, and there is none")
    made = []
    for model in both(architecture):
        try:
            past = caches()[name](model.config)
        except (ImportError, ValueError) as error:
            pytest.skip(f"transformers: {error}")
        made.append(generate(model, prompt(2, 11), do_sample=False, past_key_values=past))
    (ours, our_scores), (theirs, their_scores) = made
    assert torch.equal(ours, theirs)
    assert torch.equal(our_scores, their_scores)


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_caches_that_generate_makes(architecture: str, implementation: str) -> None:
    """For T5 an encoder-decoder cache of two of them; for gemma3 one with sliding windows."""
    assert_same(architecture, prompt(2, 11), cache_implementation=implementation, do_sample=False)


def test_a_cache_is_used_again() -> None:
    model, reference = both("llama")
    answers = []
    for each in (model, reference):
        past = transformers.DynamicCache(config=each.config)
        tokens = prompt(1)
        for _ in range(3):
            tokens, _ = generate(each, tokens, do_sample=False, past_key_values=past)
        answers.append(tokens)
    assert torch.equal(*answers)
    whole, _ = generate(model, prompt(1), do_sample=False, max_new_tokens=18)
    assert torch.equal(answers[0], whole)


# -- torch.compile --------------------------------------------------------------------------------


@pytest.fixture
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_is_one_graph(architecture: str, fresh: Any) -> None:
    model, _ = both(architecture)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    assert torch.equal(logits(compiled, prompt(2)), logits(model, prompt(2)))


def test_compiled_block(fresh: Any) -> None:
    """What inductor makes of what lies between rounds otherwise: by float32, which may take an
    activation to the next of its 255 steps before down_proj."""
    model, _ = both("llama")
    block = model.model.layers[0].mlp
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = torch.compile(copy.deepcopy(block), fullgraph=True)(x), block(x)
        between = (block.act_fn(block.gate_proj(x)) * block.up_proj(x)).abs().amax(-1) / 127
        step = between[..., None] * block.down_proj.weight.abs().sum(-1)
    assert ((ours - theirs).abs() <= step).all()


def test_compiled_generation(fresh: Any) -> None:
    """Attention in its plain form: of the others transformers takes another one where it traces."""
    model, _ = both("llama", num_hidden_layers=1, attn_implementation="eager")
    compiled = copy.deepcopy(model)
    compiled.forward = torch.compile(compiled.forward, fullgraph=True, backend="aot_eager")
    options = {"cache_implementation": "static", "do_sample": False}
    ours, our_scores = generate(compiled, prompt(), **options)
    theirs, their_scores = generate(model, prompt(), **options)
    assert torch.equal(ours, theirs)
    assert torch.equal(our_scores, their_scores)

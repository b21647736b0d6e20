"""The engine's KV cache in models of transformers: nearly their own attention in float64, the same
whatever stands beside a sequence, and an error for what it cannot do."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_transformers import VOCABULARY, prompt, tiny, torch, transformers

from lacewing.checkpoint import open_source
from lacewing.checkpoint.kvplan import KvPlan, Labels, Span
from lacewing.engine.engine import Engine
from lacewing.engine.runner import Runner
from lacewing.errors import CheckpointError, LacewingError, RequestError
from lacewing.formats import pack
from lacewing.kv.layout import find_plan
from tests.engine.fakes import ByteDecoder

try:
    from lacewing.nn.cache import LacewingCache, attend, describe_mask
except LacewingError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers about itself

LENGTH = 40  # of prompts: beyond the windows, and blocks of 16
MODELS = ("llama", "qwen2", "gemma3", "gpt2")
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def model_of(name: str, attention: str = "lacewing") -> Any:
    made = tiny(name)
    made.set_attn_implementation(attention)
    return made


def logits(model: Any, tokens: Any, made: Any, **options: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=tokens, past_key_values=made, use_cache=True, **options).logits


def ours(name: str, tokens: Any, kv: str = "f32", **options: Any) -> Any:
    model = model_of(name)
    return logits(model, tokens, LacewingCache(model.config, kv), **options)


def root_mean_square(x: Any) -> float:
    return float(x.double().square().mean().sqrt())


# -- What comes out -------------------------------------------------------------------------------


KVS = ("f16", "int8", "int4", "int8_sp50", "int4+topk:1/8", "int8+plan", "f16+merge:0.5")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama on disk whose weights bf16 holds, with spans beside it."""
    place = tmp_path_factory.mktemp("model")
    model = tiny("llama", max_position_embeddings=1024).to(torch.bfloat16)
    model.save_pretrained(place)
    spans().save(place / "kvplan.json")
    return place


def spans() -> KvPlan:
    """Of two layers and two heads of 16, and labels of 8 channels."""
    kinds = [[Span(16, 48), Span()], [Span(0, 32, 3, 1), Span(32, 32)]]
    channels = np.argsort(np.random.default_rng(3).random((2, 2, 16)), axis=-1)[..., :8]
    labels = Labels(channels.astype(np.int32), np.full(channels.shape, 0.05, np.float32))
    model = {"type": "llama", "layers": 2, "kv_heads": 2, "head_dim": 16}
    return KvPlan(model, labels, kinds)


@pytest.mark.parametrize("kv", KVS)
def test_the_engine_computes_the_same(saved: Path, kv: str) -> None:
    """With every way of storing and reading: the difference is a small part of what `kv` changes,
    which is what rounding otherwise adds up differently before it."""
    kv = kv.replace("plan", f"plan:{saved / 'kvplan.json'}")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        saved, dtype=torch.float32, attn_implementation="lacewing"
    )
    ids = prompt(1, 620 if "topk" in kv else 200, seed=5)[0].tolist()
    behind = 20

    def theirs(kv: str) -> Any:
        made = LacewingCache(model.config, kv)
        logits(model, torch.tensor([ids[:-behind]]), made)
        steps = [logits(model, torch.tensor([[t]]), made)[0, -1] for t in ids[-behind:]]
        return torch.stack(steps).double()

    source = open_source(saved)
    arrays = {name: tensor.dequantize() for name, tensor in source.tensors.items()}
    tensors = {name: pack(a, "bf16") if a.ndim == 2 else a for name, a in arrays.items()}
    runner = Runner.load(source.spec, tensors, 1024, 1, None, kv, find_plan(kv, saved))
    chunks = Engine(runner, ByteDecoder, ()).logits(ids, len(ids) - behind)
    engine = np.concatenate(list(chunks))
    found, plain = theirs(kv), theirs("f32")
    effect = root_mean_square(found - plain)
    assert root_mean_square(found - torch.from_numpy(engine).double()) < 0.25 * effect


@every_model
def test_as_near_to_float64_as_pytorch(name: str) -> None:
    """At most twice PyTorch's own error in float32, in which the other layers have their part."""
    tokens = prompt(2, LENGTH)
    model, reference = tiny(name), tiny(name).double()
    reference.set_attn_implementation("eager")
    truth = logits(reference, tokens, None)
    theirs = root_mean_square(logits(model, tokens, None) - truth)
    assert root_mean_square(ours(name, tokens, "f32") - truth) <= 2 * theirs


@pytest.mark.parametrize(("kv", "step"), [("f16", 2.0**-11), ("bf16", 2.0**-8), ("int8", 1 / 127)])
@every_model
def test_narrow_codecs_are_near(name: str, kv: str, step: float) -> None:
    """A stored number is off by half a step of the largest of its token at most, and the logits by
    no more than a few of them."""
    tokens = prompt(2, LENGTH)
    full = ours(name, tokens, "f32")
    error = root_mean_square(ours(name, tokens, kv) - full) / root_mean_square(full)
    assert 0 < error < 4 * step


@every_model
def test_token_by_token_is_the_prompt_at_once(name: str) -> None:
    """To float accuracy: PyTorch's products of one row have other bits than those of many."""
    tokens, model = prompt(1, LENGTH), model_of(name)
    whole = ours(name, tokens, "f32")
    made = LacewingCache(model.config, "f32")
    for i in range(LENGTH):
        found = logits(model, tokens[:, i : i + 1], made)
        assert made.get_seq_length() == i + 1
        assert torch.allclose(
            found[:, 0], whole[:, i], rtol=0, atol=1e-4 * float(whole.abs().max())
        )


def test_attention_itself_has_the_same_bits_in_steps() -> None:
    module = torch.nn.Module()
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, LENGTH, 16) for heads in (4, 2, 2))
    config = model_of("llama").config

    def run(cuts: list[int]) -> Any:
        made, found, done = LacewingCache(config, "int8"), [], 0
        for count in cuts:
            span = slice(done, done + count)
            mask = describe_mask(2, count, done + count, q_offset=done, local_size=9,
                                 mask_function=sliding(9))  # fmt: skip
            keys, values = made.update(k[:, :, span], v[:, :, span], 0)
            found.append(attend(module, q[:, :, span], keys, values, mask)[0])
            done += count
        return torch.cat(found, 1)

    assert torch.equal(run([LENGTH]), run([1] * LENGTH))
    assert torch.equal(run([LENGTH]), run([17, 1, LENGTH - 18]))


def sliding(window: int) -> Any:
    return transformers.masking_utils.sliding_window_causal_mask_function(window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_floats(dtype: Any) -> None:
    tokens = prompt(1, LENGTH)
    model = tiny("llama").to(dtype)
    model.set_attn_implementation("lacewing")
    found = logits(model, tokens, LacewingCache(model.config))
    assert found.dtype == dtype
    full = ours("llama", tokens)
    near = 10 * torch.finfo(dtype).eps
    assert root_mean_square(found - full) < near * root_mean_square(full)


@every_model
def test_left_padding_changes_nothing(name: str) -> None:
    model = model_of(name)
    long, short = prompt(1, LENGTH), prompt(1, LENGTH - 11, seed=8)
    tokens = torch.cat([long, torch.nn.functional.pad(short, (11, 0))])
    mask = torch.ones_like(tokens)
    mask[1, :11] = 0
    options = {"max_new_tokens": 12, "do_sample": False}
    together = model.generate(
        tokens, attention_mask=mask, past_key_values=LacewingCache(model.config, "int8"), **options
    )
    for row, one in zip(together, (long, short), strict=True):
        alone = model.generate(
            one,
            attention_mask=torch.ones_like(one),
            past_key_values=LacewingCache(model.config, "int8"),
            **options,
        )
        assert torch.equal(row[-12:], alone[0, -12:])


@every_model
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.5},
        {"prompt_lookup_num_tokens": 3, "eos_token_id": 2},
        {"num_return_sequences": 3, "do_sample": True},
    ],
    ids=["beams", "two-beams", "lookup", "samples"],
)
def test_generate_as_pytorch_does(name: str, options: dict[str, Any]) -> None:
    tokens = prompt(1, 24).repeat(1, 2)  # repeats: there is something to look up
    tokens = tokens[:, :LENGTH]

    def generated(attention: str) -> Any:
        torch.manual_seed(1)
        model = tiny(name)
        model.set_attn_implementation(attention)
        return model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            past_key_values=LacewingCache(model.config, "f32") if attention == "lacewing" else None,
            max_new_tokens=14,
            **{"do_sample": False, **options},
        )

    ours = generated("lacewing")
    try:
        theirs = generated("sdpa")
    except ValueError as error:
        if "Cannot `crop`" not in str(error):
            raise
        pytest.skip("this version of transformers cannot crop its own windows")
    assert torch.equal(ours, theirs)


# -- The cache ------------------------------------------------------------------------------------


def test_crop_and_reset() -> None:
    model, tokens = model_of("gemma3"), prompt(1, LENGTH)
    made = LacewingCache(model.config, "f16")
    first = logits(model, tokens, made)
    again = logits(model, tokens[:, -1:], _cropped(made, -1))
    assert torch.allclose(again[:, 0], first[:, -1], atol=1e-4 * float(first.abs().max()))
    assert made.get_seq_length() == LENGTH
    made.crop(0)
    assert made.get_seq_length() == LENGTH
    made.crop(3)
    assert made.get_seq_length() == 3
    made.crop(-5)
    assert made.get_seq_length() == 0
    assert made.bytes > 0
    made.reset()
    assert (made.get_seq_length(), made.bytes) == (0, 0)
    assert torch.equal(logits(model, tokens, made), first)


def _cropped(made: Any, tokens: int) -> Any:
    made.crop(tokens)
    return made


def test_batch_verbs() -> None:
    model, tokens = model_of("llama"), prompt(2, LENGTH)
    whole = ours("llama", tokens)

    def after(change: Any) -> Any:
        made = LacewingCache(model.config, "f32")
        logits(model, tokens[:, :-1], made)
        change(made)
        return made

    for change, rows in (
        (lambda made: made.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda made: made.batch_select_indices(torch.tensor([1])), [1]),
        (lambda made: made.batch_select_indices(torch.tensor([False, True])), [1]),
        (lambda made: made.reorder_cache(torch.tensor([1, 1])), [1, 1]),
    ):
        found = logits(model, tokens[rows, -1:], after(change))
        expected = whole[rows, -1]
        assert torch.allclose(found[:, 0], expected, atol=1e-4 * float(whole.abs().max()))


def test_layers_that_share_keys_store_them_once() -> None:
    made = LacewingCache(model_of("llama").config, "f32")
    states = torch.randn(1, 2, 3, 16, generator=torch.Generator().manual_seed(0))
    keys, values = made.update(states, states, 0)
    module, mask = torch.nn.Module(), describe_mask(1, 3, 3)
    first, again = (attend(module, states, keys, values, mask)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert made.get_seq_length() == 3


def test_layers_that_share_keys_behind_a_window() -> None:
    """Longer than the pieces in which others compute a prompt."""
    config = transformers.LlamaConfig(num_hidden_layers=2)
    config.num_kv_shared_layers = 1
    with pytest.raises(RequestError, match="`merge` needs layers that have keys of their own"):
        LacewingCache(config, "merge:0.5")
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 2, 700, 16, generator=generator)
    mask = describe_mask(1, 700, 700, local_size=9, mask_function=sliding(9))
    module, found = torch.nn.Module(), []
    for shared in (1, 0):
        config.num_kv_shared_layers = shared
        keys, values = LacewingCache(config, "int8").update(states, states, 0)
        found.append(attend(module, states, keys, values, mask)[0])
        if shared:
            found.append(attend(module, states, keys, values, mask)[0])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    with pytest.raises(RequestError, match="let go of keys that another layer still attends"):
        attend(module, states, keys, values, mask)


def test_a_layer_keeps_its_window() -> None:
    made = LacewingCache(model_of("llama").config)
    states, module = torch.zeros(1, 2, 3, 16), torch.nn.Module()
    keys, values = made.update(states, states, 0)
    attend(module, states, keys, values, describe_mask(1, 3, 3))
    keys, values = made.update(states, states, 0)
    mask = describe_mask(1, 3, 6, q_offset=3, local_size=4, mask_function=sliding(4))
    with pytest.raises(RequestError, match="keeps its sliding window of 0 tokens, got one of 4"):
        attend(module, states, keys, values, mask)


@pytest.mark.parametrize("kv", ["int4", "int8_sp70", "int8"])
def test_looking_ahead_goes_back_with_every_cache(kv: str) -> None:
    """Tokens that were guessed wrong are taken back out of what is sealed."""
    model = model_of("llama")
    tokens = prompt(1, 40).repeat(1, 2)
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 40}
    options |= {"do_sample": False, "eos_token_id": 2}
    plain, ahead = (
        model.generate(tokens, past_key_values=LacewingCache(model.config, kv), **options, **more)
        for more in ({}, {"prompt_lookup_num_tokens": 3})
    )
    assert torch.equal(plain, ahead)


def test_no_mask_of_the_context_is_made() -> None:
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    assert describe_mask(2, 3, 9, q_offset=6, attention_mask=mask).tolist() == [
        [0, 0, 9],
        [4, 0, 9],
    ]
    found = describe_mask(1, 9, 9, local_size=4, mask_function=sliding(4))
    assert found.tolist() == [[0, 4, 9]]


# -- Wrong use ------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_another_attention_gets_no_keys(attention: str) -> None:
    model = tiny("llama")
    model.set_attn_implementation(attention)
    with pytest.raises(RequestError, match="read by its own attention") as error:
        logits(model, prompt(), LacewingCache(model.config))
    assert error.value.hint == 'model.set_attn_implementation("lacewing")'


@pytest.mark.parametrize("made", [None, transformers.DynamicCache()])
def test_another_cache_gets_no_attention(made: Any) -> None:
    with pytest.raises(RequestError, match="attends in a LacewingCache alone"):
        logits(model_of("llama"), prompt(), made)


@pytest.mark.parametrize(
    "mask",
    [
        [[1, 1, 1, 0]],
        [[1, 0, 1, 1]],
        [[0, 1, 0, 1]],
        torch.ones(1, 1, 4, 4).tril().bool().tolist(),
    ],
    ids=["right", "hole", "two", "four-dimensional"],
)
def test_masks_that_are_not_there(mask: list[Any]) -> None:
    tokens = prompt(1, 4)
    with pytest.raises(RequestError, match="attention in a LacewingCache"):
        ours("llama", tokens, attention_mask=torch.tensor(mask))


@pytest.mark.parametrize("length", [4, 7, 8, 11, 12])
def test_patterns_that_are_not_there(length: int) -> None:
    functions = transformers.masking_utils
    chunked = functions.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64))
    both = functions.bidirectional_mask_function
    for function, size in ((chunked, 4), (both, None)):
        if length == 4 and function is chunked:
            continue  # the first chunk: nothing tells it from causal, and nothing has to
        with pytest.raises(RequestError, match="causal, with or without a sliding window"):
            describe_mask(1, length, length, mask_function=function, local_size=size)
    with pytest.raises(RequestError, match="packed sequences"):
        describe_mask(1, length, length, allow_is_causal_skip=False)


@pytest.mark.parametrize("option", ["softcap", "s_aux", "position_bias"])
def test_attention_that_is_not_there(option: str) -> None:
    made = LacewingCache(model_of("llama").config)
    states = torch.zeros(1, 2, 3, 16)
    keys, values = made.update(states, states, 0)
    with pytest.raises(RequestError, match=f"has no {option}"):
        attend(torch.nn.Module(), states, keys, values, describe_mask(1, 3, 3), **{option: 30.0})
    for options in ({"dropout": 0.1}, {"is_causal": False}):
        with pytest.raises(RequestError, match="is causal and without dropout"):
            attend(torch.nn.Module(), states, keys, values, describe_mask(1, 3, 3), **options)
    assert made.get_seq_length() == 0


def test_gemma2_and_gpt_oss_say_what_is_missing() -> None:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32,
             "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
             "head_dim": 16, "pad_token_id": 0}  # fmt: skip
    gemma = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes)).eval()
    gemma.set_attn_implementation("lacewing")
    with pytest.raises(RequestError, match="has no softcap"):
        logits(gemma, prompt(), LacewingCache(gemma.config))


def test_no_gradient() -> None:
    model = model_of("llama")
    with pytest.raises(RequestError, match="has no gradient"):
        model(input_ids=prompt(), past_key_values=LacewingCache(model.config))


@pytest.mark.parametrize("kv", ["int7", "int8+", "topk:2", "merge:1.5", ""])
def test_a_kv_that_is_not_there(kv: str) -> None:
    with pytest.raises(RequestError, match=r"`(kv|topk|merge)` (must|needs|takes)"):
        LacewingCache(model_of("llama").config, kv)


def test_a_plan_for_a_model_that_the_engine_does_not_read(tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="lacewing"
    )
    file = tmp_path / "plan.json"
    KvPlan(spans=[[Span(16, 32)] * 4] * 2).save(file)
    found = logits(model, prompt(1, LENGTH), LacewingCache(model.config, f"f32+plan:{file}"))
    assert torch.isfinite(found).all()
    KvPlan(spans=[[Span(16, 32)] * 3] * 2).save(file, force=True)
    with pytest.raises(CheckpointError, match="a plan of another"):
        logits(model, prompt(), LacewingCache(model.config, f"plan:{file}"))


def mixed() -> Any:
    """A gemma whose first layer reads everything."""
    types = ["full_attention", "sliding_attention"]
    model = tiny("gemma3", layer_types=types, max_position_embeddings=1024)
    model.set_attn_implementation("lacewing")
    return model


def test_labels_beside_windows(tmp_path: Path) -> None:
    """Layers with a window read it, whatever labels there are."""
    KvPlan(labels=spans().labels).save(tmp_path / "plan.json")
    model, tokens = mixed(), prompt(1, 600)
    found, plain = (
        logits(model, tokens, LacewingCache(model.config, kv))
        for kv in (f"f16+topk:1/2@{tmp_path / 'plan.json'}", "f16")
    )
    assert torch.equal(found[:, :512], plain[:, :512])
    assert not torch.equal(found, plain)


def test_a_crop_that_is_refused_crops_no_layer() -> None:
    model, tokens = mixed(), prompt(1, 100)
    made = LacewingCache(model.config)
    logits(model, tokens[:, :90], made)
    first = logits(model, tokens[:, 90:], made)
    with pytest.raises(RequestError, match="of 100 tokens cannot go back to 60"):
        made.crop(60)
    made.crop(90)
    again = logits(model, tokens[:, 90:], made)
    assert torch.equal(again, first)


def test_a_copy_goes_on_from_one_prompt() -> None:
    model, tokens = mixed(), prompt(1, LENGTH)
    made = LacewingCache(model.config, "int8")
    logits(model, tokens[:, :-2], made)
    found = [logits(model, tokens[:, -2:], copy.deepcopy(made)) for _ in range(2)]
    assert torch.equal(*found)
    assert made.get_seq_length() == LENGTH - 2
    assert torch.equal(logits(model, tokens[:, -2:], made), found[0])


def test_guesses_are_not_merged() -> None:
    """Prompt lookup puts them into the first call, which is what is merged."""
    model = model_of("llama")
    tokens = prompt(1, 40).repeat(1, 2)
    with pytest.raises(RequestError, match="let go of or merged"):
        model.generate(
            tokens,
            past_key_values=LacewingCache(model.config, "merge:0.6"),
            prompt_lookup_num_tokens=3,
            max_new_tokens=30,
            do_sample=False,
            eos_token_id=2,
        )


def test_what_cannot_be_merged() -> None:
    with pytest.raises(RequestError, match="everything, 1 of 2 have a sliding window"):
        LacewingCache(mixed().config, "merge:0.3")
    with pytest.raises(RequestError, match="`merge` needs a codec that stores tokens as they come"):
        LacewingCache(model_of("llama").config, "int4+merge:0.3")


def test_labels_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="`topk` needs the labels of this model"):
        LacewingCache(model_of("llama").config, "topk:1/16")
    with pytest.raises(CheckpointError, match=r"nothing\.json"):
        LacewingCache(model_of("llama").config, f"topk:1/16@{tmp_path / 'nothing.json'}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 3}, "a plan of another: 3"),
        ({"type": "qwen2"}, "a plan of another: qwen2"),
        ({"fingerprint": "0" * 16}, "`model.fingerprint`: needs .* as this model has"),
    ],
)
def test_a_plan_of_another_model(
    saved: Path, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    every = [[Span(16, 32)] * 2] * change.get("layers", 2)
    KvPlan({**spans().model, **change}, spans=every).save(file)
    config = transformers.AutoConfig.from_pretrained(saved)
    with pytest.raises(CheckpointError, match=message):
        LacewingCache(config, f"plan:{file}")
    config._name_or_path = ""  # a model whose files are elsewhere: only its weights are not checked
    if "fingerprint" not in change:
        model = tiny("llama")
        model.set_attn_implementation("lacewing")
        with pytest.raises(CheckpointError, match="a plan of another"):
            logits(model, prompt(), LacewingCache(config, f"plan:{file}"))


def test_layers_that_are_not_there() -> None:
    config = transformers.LlamaConfig(num_hidden_layers=2)
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(RequestError, match=r"full_attention or sliding_attention, got .'linear"):
        LacewingCache(config)


def test_layers_of_different_lengths() -> None:
    model, tokens = model_of("llama"), prompt(1, 6)
    made = LacewingCache(model.config)
    logits(model, tokens, made)
    made.layers[1].crop(-2)
    with pytest.raises(RequestError, match="must have the same length, got 5 and 7 tokens"):
        logits(model, tokens[:, :1], made)


def test_another_batch() -> None:
    model = model_of("llama")
    made = LacewingCache(model.config)
    logits(model, prompt(2), made)
    with pytest.raises(RequestError, match=r"keys must be \[2, 2, tokens, 16\] as before"):
        logits(model, prompt(3), made)


def test_numbers_that_are_not_float() -> None:
    made = LacewingCache(model_of("llama").config)
    states = torch.zeros(1, 2, 3, 16)
    for keys, values in ((states.int(), states.int()), (states.double(), states.double())):
        with pytest.raises(RequestError, match="of float32, bfloat16 or float16"):
            made.update(keys, values, 0)
    with pytest.raises(RequestError, match="must have the same shape"):
        made.update(states, states[..., :8], 0)


def test_a_hole_in_the_numbers_is_kept_out() -> None:
    """NaN in one sequence stays there."""
    made = LacewingCache(model_of("llama").config, "f32")
    states = torch.ones(2, 2, 3, 16)
    broken = states.clone()
    broken[0] = np.nan
    keys, values = made.update(broken, states, 0)
    found, _ = attend(torch.nn.Module(), states, keys, values, describe_mask(2, 3, 3))
    assert torch.isfinite(found[1]).all()

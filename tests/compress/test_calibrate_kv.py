"""Labels and spans found on text: planted channels, local and global heads, budgets."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

torch = pytest.importorskip("torch")

from lacewing.checkpoint.kvplan import EVERYTHING, KvPlan, Span  # noqa: E402
from lacewing.compress import influence  # noqa: E402
from lacewing.compress.calibrate_kv import calibrate_kv  # noqa: E402
from lacewing.compress.decoder import Decoder, rms_norm  # noqa: E402
from lacewing.compress.influence import restricted, span_losses  # noqa: E402
from lacewing.compress.labels import channel_scores, find_labels  # noqa: E402
from lacewing.compress.spans import choose  # noqa: E402
from lacewing.errors import CheckpointError, RecipeError  # noqa: E402
from tests.checkpoint import build  # noqa: E402
from tests.compress.stored import decoder_of, noise, windows_of  # noqa: E402
from tests.tiny import tiny_weights  # noqa: E402


def quiet(text: str, work: float) -> None:
    return None


# -- labels ---------------------------------------------------------------------------------------


def test_planted_channels_are_found():
    q, k = noise(2, 6, 50, 16), noise(2, 2, 50, 16, seed=1)
    k[:, 0, :, [3, 9]] *= 20
    q[:, 3:, :, 14] *= 20  # of the second head's group
    k[:, 1, :, 5] *= 20
    scores = channel_scores(q, k)
    assert scores.shape == (2, 16)
    assert sorted(scores[0].topk(2).indices.tolist()) == [3, 9]
    assert sorted(scores[1].topk(2).indices.tolist()) == [5, 14]


def test_a_score_is_a_mean_over_the_group():
    q, k = noise(3, 4, 7, 8).double(), noise(3, 2, 7, 8, seed=1).double()
    expected = torch.zeros(2, 8).double()
    for w, head, t in product(range(3), range(4), range(7)):
        expected[head // 2] += (q[w, head, t] * k[w, head // 2, t]).abs() / (3 * 2 * 7)
    torch.testing.assert_close(channel_scores(q, k), expected)


def test_labels_of_a_model_with_planted_rows():
    """RoPE mixes channel i with i + 8 (head_dim / 2): a pair that is large stays so."""
    name = "model.layers.1.self_attn.k_proj.weight"
    keys = tiny_weights("llama")[name].copy()
    keys[[2, 10]] *= 30  # head 0
    keys[[16 + 5, 16 + 13, 16 + 0, 16 + 8]] *= 30  # head 1
    labels = find_labels(decoder_of("llama", {name: keys}), windows_of(), 4, quiet)
    assert labels.channels.shape == labels.scales.shape == (3, 2, 4)
    assert {2, 10} < set(labels.channels[1, 0])
    assert labels.channels[1, 1].tolist() == [0, 5, 8, 13]
    assert (np.diff(labels.channels) > 0).all()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_no_label_is_clipped_on_the_text(name):
    decoder, ids = decoder_of(name), windows_of(3)
    labels = find_labels(decoder, ids, 8, quiet)
    x = decoder.embed(ids, decoder.embedding())
    with torch.no_grad():
        for index in range(decoder.spec.n_layers):
            block = decoder.block(index)
            _, k, _ = block.project(block.attention_input(x))
            for head, channels in enumerate(labels.channels[index]):
                codes = k[:, head, :, torch.from_numpy(channels).long()].abs().amax((0, 1))
                codes /= torch.from_numpy(labels.scales[index, head])
                torch.testing.assert_close(codes, torch.full((8,), 127.0))
            x = block(x)


def test_a_channel_that_is_always_zero_has_a_scale_too():
    zero = {"model.layers.0.self_attn.k_proj.weight": np.zeros((32, 96), np.float32)}
    labels = find_labels(decoder_of("llama", zero), windows_of(1), 16, quiet)
    KvPlan(labels=labels)
    assert (labels.scales > 0).all()


# -- influence ------------------------------------------------------------------------------------


def naive(q: Any, k: Any, v: Any, span: Span) -> Any:
    """`[kv_heads, group, tokens, head_dim]`, by the definition of a span."""
    n = q.shape[1]
    seen = [[j <= i and span.reads(i // 16, j // 16) for j in range(n)] for i in range(n)]
    scores = q.unflatten(0, (len(k), -1)) @ k[:, None].transpose(2, 3)
    scores = scores.masked_fill(~torch.tensor(seen), -torch.inf)
    return scores.softmax(3) @ v[:, None]


@pytest.mark.parametrize("lengths", [(16, 32, 64), (48,), (80, 96, 160), (256,), ()])
@pytest.mark.parametrize("size", [1.0, 200.0], ids=["near", "far"])
def test_attention_over_spans(lengths, size):
    """size 200: scores differ by more than exp can hold."""
    q, k, v = noise(6, 128, 16).double(), noise(2, 128, 16, seed=1).double(), noise(2, 128, 16)
    q, v = q * size, v.double()
    dense = naive(q, k, v, EVERYTHING)
    by_length = [naive(q, k, v, Span(16, length)) for length in lengths]
    blocks = list(restricted(q, k, v, lengths))
    assert len(blocks) == 8
    for i, (outs, whole) in enumerate(blocks):
        rows = slice(16 * i, 16 * i + 16)
        torch.testing.assert_close(whole, dense[:, :, rows])
        for out, expected in zip(outs, by_length, strict=False):
            torch.testing.assert_close(out, expected[:, :, rows])
        for expected in by_length[len(outs) :]:  # those that reach all
            torch.testing.assert_close(whole, expected[:, :, rows])


def local_and_global(local: int) -> tuple[Any, Any, Any]:
    """One layer of two KV heads over 512 tokens, a query head each: head `local` looks at the last
    tokens, the other one at tokens of its own kind, wherever they are."""
    n = 512
    angle = torch.arange(n) * (torch.pi / n)
    near = torch.stack([angle.cos(), angle.sin()], 1)
    kinds = torch.eye(8)[torch.randint(8, (n,), generator=torch.Generator().manual_seed(0))]
    near, kinds = (torch.nn.functional.pad(x, (0, 8 - x.shape[1])) for x in (near, kinds))
    pair = (near * 120, kinds * 6) if local == 0 else (kinds * 6, near * 120)
    looks = (near, kinds) if local == 0 else (kinds, near)
    return torch.stack(pair), torch.stack(looks), noise(2, n, 8)


@pytest.mark.parametrize("local", [0, 1])
def test_a_local_head_gets_a_short_span_and_a_global_one_all(local):
    lengths = [64, 128, 256]
    q, k, v = local_and_global(local)
    losses = influence._squares(q, k, v, noise(2, 512, 8, seed=1), lengths)
    assert (losses[local] < 1e-3 * losses[1 - local]).all()
    costs = [5, 9, 17, 32]
    chosen = choose(np.pad(losses, ((0, 0), (0, 1))), costs, 37)
    assert chosen[local] == 0
    assert chosen[1 - local] == 3


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_the_gradient_is_that_of_autograd(name, monkeypatch):
    """Of the same drawn tokens, by what o reads in each layer, in one backward pass."""
    decoder, ids = decoder_of(name), windows_of(1, 64)
    found: dict[int, Any] = {}

    def squares(q, k, v, slope, lengths):
        found[len(found)] = slope
        return np.zeros((len(k), len(lengths)))

    monkeypatch.setattr(influence, "_squares", squares)
    span_losses(decoder, ids, (16,), 3, quiet)

    x = decoder.embed(ids, decoder.embedding())
    inputs = []
    for index in range(decoder.spec.n_layers):
        block = decoder.block(index)
        a = block.attend(block.attention_input(x))
        inputs.append(a)
        x = block.add_attention(x, a)
        x = block.add_mlp(x, block.gate(block.mlp_input(x)))
    norm, head = decoder.head()
    logits = decoder.logits(x, norm, head)[0]
    generator = torch.Generator().manual_seed(3)
    drawn = logits.detach().softmax(1).multinomial(1, generator=generator)[:, 0]
    loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
    gradients = torch.autograd.grad(loss, inputs)
    layers = [i for i, layer in enumerate(decoder.spec.layers) if layer.window == 0]
    assert len(found) == len(layers)
    for slope, layer in zip(found.values(), reversed(layers), strict=True):
        expected = gradients[layer][0].unflatten(1, (decoder.spec.n_heads, -1)).transpose(0, 1)
        scale = float(expected.abs().max())
        assert float((slope - expected).abs().max()) < 1e-3 * scale


def test_losses_are_a_mean_of_halves_of_squares():
    """Of one layer: both windows as one by one, and a gradient that is known."""
    decoder, ids = decoder_of("llama"), windows_of(2, 128)
    both = span_losses(decoder, ids, (16, 64), 0, quiet)
    q, k, v = noise(6, 128, 16), noise(2, 128, 16, seed=1), noise(2, 128, 16, seed=2)
    g = noise(6, 128, 16, seed=3)
    squares = influence._squares(q, k, v, g, [16, 64])
    change = naive(q, k, v, Span(16, 16)) - naive(q, k, v, EVERYTHING)
    expected = (change * g.unflatten(0, (2, -1))).sum((1, 3)).square().sum(1)
    np.testing.assert_allclose(squares[:, 0], expected, rtol=1e-4)
    assert both.shape == (3, 2, 2)
    assert (both > 0).all()
    assert (both[:, :, 0] > both[:, :, 1]).all()
    first = span_losses(decoder, ids[:1], (16, 64), 0, quiet)
    assert 0.2 < (first / both).mean() < 5


def test_the_loss_predicts_the_divergence():
    """A layer's head restricted alone: the estimate is of the right size."""
    decoder, ids = decoder_of("llama"), windows_of(4, 128)
    estimate = span_losses(decoder, ids, (16,), 0, quiet)[0, 0, 0]
    with torch.no_grad():
        x = decoder.embed(ids, decoder.embedding())
        block = decoder.block(0)
        q, k, v = block.project(block.attention_input(x))
        dense = block.mix(q, k, v)
        heads = dense.unflatten(-1, (6, 16)).clone()
        for window in range(4):
            scaled = q[window] * decoder.spec.attention_scale
            out = naive(scaled, k[window], v[window], Span(16, 16))
            heads[window, :, :3] = out[0].transpose(0, 1)
        p, s = (_logits(decoder, x, block, a).log_softmax(-1) for a in (dense, heads.flatten(2)))
        divergence = float((p.exp() * (p - s)).sum(-1).mean())
    assert 0.25 < estimate / divergence < 4


def _logits(decoder: Decoder, x: Any, block: Any, a: Any) -> Any:
    x = block.add_attention(x, a)
    x = block.add_mlp(x, block.gate(block.mlp_input(x)))
    for index in range(1, decoder.spec.n_layers):
        x = decoder.block(index)(x)
    norm, head = decoder.head()
    return torch.nn.functional.linear(rms_norm(x, norm, decoder.spec.norm_eps), head)


def infinite(name: str) -> Decoder:
    bad = tiny_weights("llama")[name].copy()
    bad[3, 4] = np.inf
    return decoder_of("llama", {name: bad})


def test_a_model_that_overflows_is_named():
    values = infinite("model.layers.1.self_attn.v_proj.weight")
    with pytest.raises(RecipeError, match=r"`model\.layers\.1\.self_attn`: needs finite"):
        find_labels(values, windows_of(2), 4, quiet)
    last = infinite("model.layers.2.mlp.down_proj.weight")  # no key of the cache is after it
    find_labels(last, windows_of(2), 4, quiet)
    with pytest.raises(RecipeError, match=r"`model\.norm`: needs finite"):
        span_losses(last, windows_of(1, 64), (16,), 0, quiet)


# -- the choice -----------------------------------------------------------------------------------

_losses = hnp.arrays(
    np.float64, st.tuples(st.integers(1, 4), st.just(3)), elements=st.integers(0, 50).map(float)
)


@given(
    _losses, st.lists(st.integers(1, 9), min_size=3, max_size=3, unique=True), st.integers(0, 30)
)
def test_no_choice_is_better(losses, costs, spare):
    costs = sorted(costs)
    budget = costs[0] * len(losses) + spare
    chosen = choose(losses, costs, budget)

    def judged(choice: Any) -> tuple[float, int]:
        return (
            sum(row[c] for row, c in zip(losses, choice, strict=True)),
            sum(costs[c] for c in choice),
        )

    every = [judged(c) for c in product(range(3), repeat=len(losses))]
    loss, cost = judged(chosen)
    assert cost <= budget
    assert loss == min(found for found, spent in every if spent <= budget)


def test_of_equals_the_cheapest():
    assert choose(np.zeros((3, 4)), [2, 3, 5, 9], 27).tolist() == [0, 0, 0]


def test_a_budget_for_nobody():
    with pytest.raises(RecipeError, match="at least 6 blocks for 3 heads, got a budget of 5"):
        choose(np.zeros((3, 2)), [2, 3], 5)


# -- all of it ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = build.config("llama", max_position_embeddings=512)
    weights = build.random_weights(config)
    for values in weights.values():
        if values.ndim == 2:
            values *= 6  # so that heads look at something
    return build.write_hub(tmp_path_factory.mktemp("kv") / "hub", config, weights)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    letters = np.random.default_rng(0).choice(list("abcdefgh "), 4000)
    path = tmp_path_factory.mktemp("kv") / "text.txt"
    path.write_text("".join(letters))
    return path


SHORT = {"tokens": 1024, "window": 512}


def test_the_same_bytes_twice(model, text, tmp_path):
    told = []
    for name in ("one", "two"):
        found = calibrate_kv(
            model,
            [text],
            tmp_path / name,
            budget=0.4,
            threads=1,
            progress=lambda what, done, total: told.append((what, done / total)),
            **SHORT,
        )
        assert found.path == tmp_path / name
        assert 0.3 < found.share <= 0.4
        assert found.share == found.plan.bytes_share(512)
        assert found.loss > 0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert told[-1][1] == 1
    assert len(told) == 2 * (2 + 2 * (2 + 2))  # layers; windows times layers, both ways
    shares = [share for _, share in told[: len(told) // 2]]
    assert shares == sorted(shares)
    seeded = calibrate_kv(model, [text], tmp_path / "three", budget=0.4, seed=1, **SHORT)
    assert seeded.path.read_bytes() != (tmp_path / "one").read_bytes()


def test_more_budget_costs_less(model, text, tmp_path):
    losses = []
    for budget in (0.2, 0.5, 1.0):
        out = tmp_path / str(budget)
        losses.append(calibrate_kv(model, [text], out, budget=budget, **SHORT).loss)
    assert losses[0] > losses[1] > losses[2] == 0


def test_labels_alone(model, text, tmp_path):
    found = calibrate_kv(model, [text], tmp_path / "plan", labels=8, **SHORT)
    plan = KvPlan.load(tmp_path / "plan")
    assert plan.spans is None
    assert plan.labels.channels.shape[2] == 8
    assert (found.share, found.loss) == (1, 0)
    assert plan.notes["tokens"] == 1024
    assert plan.model["fingerprint"]


@pytest.mark.parametrize(
    ("options", "says", "hint"),
    [
        ({"budget": 0.05}, "budget: needs at least 0.1562 at 512 tokens", "longer --window"),
        ({"budget": 0.0}, "above 0 and at most 1", None),
        ({"budget": 1.5}, "above 0 and at most 1", None),
        ({"budget": float("nan")}, "above 0 and at most 1", None),
        ({"labels": 6}, "labels: needs a multiple of 4", None),
        ({"labels": 0}, "labels: needs a multiple of 4", None),
        ({"labels": 4096}, "labels: needs a multiple of 4", None),
        ({"tokens": 100}, "tokens: needs at least 256", None),
        ({"window": 100}, "window: needs at least 256", None),
        ({"tokens": 8192}, "needs 8192 tokens for 16 windows", "ask for less"),
    ],
)
def test_what_is_refused(model, text, tmp_path, options, says, hint):
    with pytest.raises(RecipeError) as caught:
        calibrate_kv(model, [text], tmp_path / "plan", **{**SHORT, **options})
    assert says in str(caught.value)
    assert hint is None or hint in caught.value.hint
    assert not any(tmp_path.iterdir())


def test_a_short_context(text, tmp_path):
    config = build.config("llama", max_position_embeddings=128)
    hub = build.write_hub(tmp_path / "hub", config, build.random_weights(config))
    with pytest.raises(RecipeError, match="reads 256 tokens at once, got 128"):
        calibrate_kv(hub, [text], tmp_path / "plan", **SHORT)


def test_a_model_in_the_way_stays(model, text, tmp_path):
    with pytest.raises(RecipeError, match="needs a file to write"):
        calibrate_kv(model, [text], **SHORT)
    with pytest.raises(CheckpointError, match="something else"):
        calibrate_kv(model, [text], model / "config.json", force=True, **SHORT)

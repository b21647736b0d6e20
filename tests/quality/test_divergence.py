"""KL against a reference: every figure the long way round."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from lacewing.errors import RequestError
from lacewing.quality import Against, Divergence, Text, evaluate, windows
from tests.engine.fakes import logits_after
from tests.quality.fakes import FakeScorer, louder

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom."


def divergence(
    scorer: FakeScorer, reference: FakeScorer | None = None, text: Text | None = None, seed: int = 0
) -> Divergence:
    reference = reference or FakeScorer(name="reference")
    (found,) = evaluate(scorer, [Against(reference, text or Text("text", TEXT, 26))], seed)
    assert isinstance(found, Divergence)
    return found


def slow_row(tokens: list[int]) -> tuple[float, bool, np.ndarray, np.ndarray]:
    p, q = (np.exp(rule(tokens).astype(np.float64)) for rule in (logits_after, louder))
    p, q = p / p.sum(), q / q.sum()
    return float((p * np.log(p / q)).sum()), p.argmax() == q.argmax(), p, q


def test_every_figure_is_that_of_the_formula() -> None:
    found = divergence(FakeScorer(louder, bos=[1]), FakeScorer(bos=[1], name="reference"))
    pieces = windows(FakeScorer(bos=[1]), TEXT, 26, None)
    rows = [(slow_row(piece[:i]), piece[i]) for piece in pieces for i in range(1, len(piece))]
    kl = np.array([row[0] for row, _ in rows])
    assert found.scored_tokens == 75 == len(rows)
    assert found.kl == pytest.approx(kl.mean(), rel=1e-9)
    assert found.kl_median == pytest.approx(np.median(kl), rel=1e-9)
    assert found.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-9)
    assert found.kl_max == pytest.approx(kl.max(), rel=1e-9)
    assert found.agreement == np.mean([row[1] for row, _ in rows])
    losses = [[-math.log(row[at][target]) for row, target in rows] for at in (2, 3)]
    before, after = (math.exp(np.mean(each)) for each in losses)
    assert found.reference_perplexity == pytest.approx(before)
    assert found.perplexity == pytest.approx(after)
    assert found.perplexity_ratio == pytest.approx(after / before)
    for figure in ("kl", "agreement", "perplexity_ratio"):
        interval = getattr(found, f"{figure}_interval")
        assert interval.low < getattr(found, figure) < interval.high
    assert (found.reference, found.windows, found.window, found.seed) == ("reference", 3, 26, 0)


def test_the_ratio_is_paired() -> None:
    """Both models find the same tokens hard: their ratio is known better than either."""
    found = divergence(FakeScorer(louder))
    alone = evaluate(FakeScorer(louder), [Text("text", TEXT, 26)])[0]
    ratio = found.perplexity_ratio_interval
    assert ratio is not None
    assert ratio.high / ratio.low < alone.interval.high / alone.interval.low


def test_the_same_model_does_not_diverge() -> None:
    found = divergence(FakeScorer())
    assert found.kl == found.kl_max == 0
    assert found.agreement == found.perplexity_ratio == 1
    assert found.kl_interval is not None and found.kl_interval.high == 0


def test_it_is_not_symmetric() -> None:
    one = divergence(FakeScorer(louder))
    other = divergence(FakeScorer(), FakeScorer(louder))
    assert one.kl != other.kl
    assert one.perplexity_ratio == pytest.approx(1 / other.perplexity_ratio)


def test_a_token_that_cannot_be_has_no_share() -> None:
    def masked(tokens: list[int]) -> np.ndarray:
        row = logits_after(tokens)
        row[200:] = -np.inf
        return row

    def left(tokens: list[int]) -> float:
        """-log of what the model gives the tokens that can be."""
        odds = np.exp(logits_after(tokens).astype(np.float64))
        return -math.log(odds[:200].sum() / odds.sum())

    found = divergence(FakeScorer(), FakeScorer(masked))
    pieces = windows(FakeScorer(), TEXT, 26, None)
    expected = np.mean([left(piece[:i]) for piece in pieces for i in range(1, 26)])
    assert found.kl == pytest.approx(expected)


def test_ranges_by_the_tokens_before() -> None:
    found = divergence(FakeScorer(louder), text=Text("text", TEXT, 70))
    assert [(each.first, each.last, each.scored_tokens) for each in found.ranges] == [
        (1, 16, 16),
        (17, 64, 48),
        (65, 69, 5),
    ]
    kl = np.array([slow_row(list(TEXT.encode()[:i]))[0] for i in range(1, 70)])
    assert found.ranges[1].kl == pytest.approx(kl[16:64].mean())
    assert found.ranges[1].kl_max == pytest.approx(kl[16:64].max())


def test_the_largest_places() -> None:
    found = divergence(FakeScorer(louder))
    pieces = [TEXT[i : i + 26] for i in (0, 26, 52)]
    slow = [
        (*slow_row(list(piece.encode()[:i])), w, i)
        for w, piece in enumerate(pieces)
        for i in range(1, 26)
    ]
    slow.sort(key=lambda row: -row[0])
    assert [(each.window, each.position) for each in found.places] == [row[4:] for row in slow[:10]]
    first, (_, _, p, q, window, at) = found.places[0], slow[0]
    assert first.kl == found.kl_max
    assert first.context == pieces[window][max(0, at - 24) : at]
    assert first.token == pieces[window][at]
    assert first.reference_probability == pytest.approx(p.max())
    assert first.probability_by_model == pytest.approx(q.max())
    assert first.reference_token == FakeScorer().decode([int(p.argmax())])
    assert first.token_by_model == FakeScorer().decode([int(q.argmax())])


@pytest.mark.parametrize(("most", "windows"), [(1, 1), (25, 1), (26, 2), (60, 3), (99, 3)])
def test_max_tokens(most: int, windows: int) -> None:
    found = divergence(FakeScorer(louder), text=Text("text", TEXT, 26, most))
    assert (found.scored_tokens, found.windows) == (min(most, 75), windows)


def test_chunks_of_other_sizes_are_matched() -> None:
    class Whole(FakeScorer):
        def logits(self, ids, start=0):  # type: ignore[no-untyped-def]
            yield np.concatenate(list(super().logits(ids, start)))

    assert divergence(FakeScorer(louder), Whole()) == divergence(FakeScorer(louder), FakeScorer())


def test_it_says_its_conditions_in_json() -> None:
    told = divergence(FakeScorer(louder), seed=4).to_dict()
    assert json.loads(json.dumps(told)) == told
    assert (told["seed"], told["scored_tokens"], told["resamples"]) == (4, 75, 1000)
    assert len(told["places"]) == 10


# -- Models that cannot be compared ---------------------------------------------------------------


class Backwards(FakeScorer):
    def encode(self, text: str, add_special: bool) -> list[int]:
        return [255 - byte for byte in super().encode(text, add_special)]


class Longer(FakeScorer):
    def encode(self, text: str, add_special: bool) -> list[int]:
        return [*super().encode(text, add_special), 5]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (FakeScorer(vocab=300, name="R"), "R and fake need the same vocabulary .*got 300 and 256"),
        (FakeScorer(bos=[1], name="R"), r"begin a text alike, got the tokens \[1\] and \[\]"),
        (Backwards(name="R"), "R and fake need the same tokenizer, got token 182 and token 73 at "),
        (Longer(name="R"), f"same tokenizer, got token 5 and the end at place {len(TEXT)}"),
        (FakeScorer(max_context=25, name="R"), "fit into the context of R, 25 tokens, got 26"),
    ],
)
def test_models_that_do_not_share_their_tokens(reference: FakeScorer, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        divergence(FakeScorer(), reference)


def test_logits_that_are_not_finite() -> None:
    bad = FakeScorer(lambda tokens: np.full(256, np.nan if len(tokens) > 2 else 0, np.float32))
    with pytest.raises(RequestError, match=r"text: both models need finite .* token 3 of window 0"):
        divergence(bad)


def test_progress_within_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lacewing.quality.divergence._TOLD", 10)
    told: list[float] = []
    text = Text("text", TEXT, 26)
    (found,) = evaluate(
        FakeScorer(louder),
        [Against(FakeScorer(), text)],
        0,
        lambda done, total, _: told.append(done),
    )
    assert told == sorted(told) and told[-1] == found.windows
    assert len(told) == 3 * found.windows

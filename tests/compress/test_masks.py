"""Scores and masks against their definitions, one weight at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from lacewing.compress.masks import choose_mask, magnitude, obs, wanda  # noqa: E402
from lacewing.errors import RecipeError  # noqa: E402
from lacewing.formats import FORMATS, get_format  # noqa: E402

UNSTRUCTURED = ["bf16", "w8a8", "w4a8g32", "w3a8g64", "w1.6a8", "bf16_sp", "w8a8g64_sp"]


def scores(n, k, seed=0, levels=None):
    rng = np.random.default_rng(seed)
    values = rng.random((n, k)) if levels is None else rng.integers(0, levels, (n, k))
    return torch.from_numpy(values.astype(np.float32))


def naive_lowest(values, drop):
    """The places of the `drop` least values, the earlier first."""
    return sorted(range(len(values)), key=lambda j: (values[j], j))[:drop]


@pytest.mark.parametrize("name", UNSTRUCTURED)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77])
@pytest.mark.parametrize("levels", [None, 3])
def test_every_row_loses_its_lowest_scores(name, sparsity, levels):
    score = scores(7, 45, levels=levels)
    mask = choose_mask(score, get_format(name), sparsity)
    drop = math.floor(45 * sparsity + 0.5)
    for row, kept in zip(score.tolist(), mask.tolist(), strict=True):
        assert [j for j in range(45) if not kept[j]] == sorted(naive_lowest(row, drop))


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77])
@pytest.mark.parametrize("levels", [None, 3])
def test_a_layer_loses_its_lowest_scores(sparsity, levels):
    score = scores(7, 45, levels=levels)
    mask = choose_mask(score, get_format("w4a8g64_sp"), sparsity, per="layer")
    lowest = naive_lowest(score.flatten().tolist(), math.floor(7 * 45 * sparsity + 0.5))
    assert (~mask).flatten().nonzero().flatten().tolist() == sorted(lowest)


@pytest.mark.parametrize("name", ["w8a8g64_24", "w4a8g64_24"])
@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_two_of_four_stay(name, levels, sparsity):
    score = scores(5, 44, levels=levels)
    mask = choose_mask(score, get_format(name), sparsity)
    for row, kept in zip(score.tolist(), mask.tolist(), strict=True):
        for at in range(0, 44, 4):
            gone = naive_lowest(row[at : at + 4], 2)
            assert kept[at : at + 4] == [j not in gone for j in range(4)]


@pytest.mark.parametrize("n", [16, 48, 40])  # 40: the last strip is short
def test_blocks_go_whole_and_as_many_in_every_strip(n):
    score = scores(n, 45)
    mask = choose_mask(score, get_format("w8a8_b16x1"), 0.3)
    for at in range(0, n, 16):
        total = score[at : at + 16].double().sum(0).tolist()
        gone = naive_lowest(total, math.floor(45 * 0.3 + 0.5))
        expected = [j not in gone for j in range(45)]
        assert all(row == expected for row in mask[at : at + 16].tolist())


@pytest.mark.parametrize("name", ["w4a8g64_sp", "w8a8_b16x1", "w4a8g64_24", "w8a8"])
def test_magnitude_agrees_with_the_format(name):
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(1))
    format = get_format(name)
    sparsity = format.fixed_sparsity or 0.4
    expected = format.mask(weight.numpy(), sparsity)
    assert (choose_mask(magnitude(weight), format, sparsity).numpy() == expected).all()


def test_scores_are_the_papers():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(50, 12, generator=generator, dtype=torch.float64)
    w = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    h = x.T @ x / 50
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    norm = x.norm(dim=0) / math.sqrt(50)  # Wanda: |W_ij| * ||X_j||
    torch.testing.assert_close(wanda(w, h.diagonal()).sqrt(), w.abs() * norm)
    for j in range(12):  # OBS: the least error over all weights of inputs j+1.. if w_j goes
        rest = h[j:, j:]
        cost = w[:, j].square() / torch.linalg.inv(rest)[0, 0]
        torch.testing.assert_close(obs(w, upper)[:, j], cost)


def test_bad_sparsities_are_refused():
    score = scores(16, 64)
    for name in FORMATS:
        for sparsity in (-0.1, 1.0, math.nan):
            with pytest.raises(RecipeError, match="sparsity must be"):
                choose_mask(score, get_format(name), sparsity)
    for name in ("w2a8g64", "w4a8g32z", "w5a8g32z"):
        with pytest.raises(RecipeError, match="zero is not on its grid"):
            choose_mask(score, get_format(name), 0.5)
    with pytest.raises(RecipeError, match=r"a share of 0\.5, got sparsity 0\.3"):
        choose_mask(score, get_format("w4a8g64_24"), 0.3)

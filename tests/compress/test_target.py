"""Corrected weights against least squares on the inputs themselves, in float64."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from lacewing.compress import problem as problem_module  # noqa: E402
from lacewing.compress import target  # noqa: E402
from lacewing.compress.problem import Problem  # noqa: E402
from lacewing.errors import RecipeError  # noqa: E402
from tests.compress import naive  # noqa: E402

N, K, TOKENS = 7, 30, 200


class Drift:
    """What a layer read and has to read: x' = x turned a little and blurred, and a stream that has
    lost something that x' knows of."""

    def __init__(self, blur=0.1):
        rng = np.random.default_rng(4)
        self.x = naive.inputs(TOKENS, K)
        turn = np.eye(K) + 0.1 * rng.standard_normal((K, K))
        self.seen = self.x @ turn + blur * rng.standard_normal((TOKENS, K))
        self.w = rng.standard_normal((N, K)).astype(np.float32).astype(np.float64)
        self.stream = self.x @ rng.standard_normal((K, N)) * 0.2

    def problem(self):
        hessian = self.seen.T @ self.seen / TOKENS
        return Problem("layer", *(torch.from_numpy(a).float() for a in (self.w, hessian)), TOKENS)

    def lost(self):
        return torch.from_numpy((self.x - self.seen).T @ self.seen / TOKENS).float()

    def stream_lost(self):
        return torch.from_numpy(self.stream.T @ self.seen / TOKENS).float()

    def goal(self, with_stream):
        return self.x @ self.w.T + (self.stream if with_stream else 0)


def least_squares(drift, with_stream, damping):
    """Weights whose outputs of x' are nearest the goal, and which are near the old ones: every
    input has a row of its own for that, `damping` as heavy as all tokens together."""
    pull = np.sqrt(damping * TOKENS) * np.eye(K)
    inputs = np.concatenate([drift.seen, pull])
    outputs = np.concatenate([drift.goal(with_stream), pull @ drift.w.T])
    return np.linalg.lstsq(inputs, outputs, rcond=None)[0].T


@pytest.mark.parametrize("with_stream", [False, True], ids=["within", "stream"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_least_squares(share, with_stream):
    drift = Drift()
    p = drift.problem()
    found = target.corrected(p, drift.lost(), drift.stream_lost() if with_stream else None, share)
    mean = p.hessian.diagonal().mean().item()
    ridge = target._RIDGE * mean * (1 + problem_module.DAMPING)
    best = least_squares(drift, with_stream, problem_module.DAMPING * mean + ridge)
    wanted = drift.w + share * (best - drift.w)
    assert found.name == p.name
    assert found.hessian is p.hessian
    # H, C and R are rounded to f32, by 6e-8 of values near 10, and meet the inverse of a Hessian
    # whose eigenvalues are 0.3 and more.
    np.testing.assert_allclose(found.weight, wanted, atol=2e-5)
    if share == 0:
        assert (found.weight == p.weight).all()
    else:
        assert np.abs(found.weight.numpy() - drift.w).max() > 0.05


def test_all_of_it_without_damping_gives_the_dense_outputs(monkeypatch):
    """Where x' has lost nothing but its directions."""
    monkeypatch.setattr(target, "_RIDGE", 1e-9)
    monkeypatch.setattr(problem_module, "DAMPING", 1e-9)
    drift = Drift(blur=0.0)
    found = target.corrected(drift.problem(), drift.lost(), drift.stream_lost(), 1.0)
    outputs, goal = drift.seen @ found.weight.double().numpy().T, drift.goal(True)
    off = np.linalg.norm(outputs - goal) / np.linalg.norm(goal)
    before = np.linalg.norm(drift.seen @ drift.w.T - goal) / np.linalg.norm(goal)
    assert off < 1e-3 < 0.1 < before


def test_it_fits_the_goal_better_the_more_of_it(monkeypatch):
    drift = Drift()
    errors = []
    for share in (0.0, 0.3, 0.6, 1.0):
        found = target.corrected(drift.problem(), drift.lost(), drift.stream_lost(), share)
        outputs = drift.seen @ found.weight.double().numpy().T
        errors.append(np.square(outputs - drift.goal(True)).mean())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]


def test_nothing_lost_nothing_corrected():
    p = Drift().problem()
    assert (target.corrected(p, torch.zeros(K, K), torch.zeros(N, K)).weight == p.weight).all()


def test_a_hessian_that_is_not_positive_is_refused():
    p = Drift().problem()
    p.hessian[4, 9] = p.hessian[9, 4] = 1e6
    with pytest.raises(RecipeError, match="`layer`: needs a positive definite Hessian"):
        target.corrected(p, torch.zeros(K, K))

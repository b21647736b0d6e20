"""The loss of distillation: equal to the plain one, in value and gradient, without its memory."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from lacewing.compress import divergence as module  # noqa: E402
from lacewing.compress.divergence import Head, divergence  # noqa: E402

M, H, V = 13, 8, 31


def plain(
    hidden: torch.Tensor,
    student: Head,
    target: torch.Tensor,
    teacher: Head,
    following: torch.Tensor,
    mix: float,
) -> torch.Tensor:
    """Every logit at once, by autograd, in float64."""

    def logits(x: torch.Tensor, head: Head) -> torch.Tensor:
        y = x @ head.weight.double().T
        return torch.tanh(y / head.cap) * head.cap if head.cap else y

    s = logits(hidden, student).log_softmax(1)
    t = logits(target.double(), teacher).log_softmax(1)
    kl = (t.exp() * (t - s)).sum(1)
    share = torch.where(following >= 0, mix, 0.0)
    entropy = -s.gather(1, following.clamp(min=0)[:, None])[:, 0]
    return ((1 - share) * kl + share * entropy).mean()


@pytest.mark.parametrize("cap", [0.0, 5.0])
@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("logits", [6_000_000, 4 * V, 1])
def test_it_is_the_plain_loss(
    logits: int, mix: float, cap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOGITS", logits)
    generator = torch.Generator().manual_seed(0)
    hidden, target = (torch.randn(M, H, generator=generator) for _ in range(2))
    heads = [Head(torch.randn(V, H, generator=generator), cap) for _ in range(2)]
    following = torch.randint(V, (M,), generator=generator)
    following[[2, 9]] = -1
    exact = hidden.double().requires_grad_()
    expected = plain(exact, heads[0], target, heads[1], following, mix)
    (2 * expected).backward()
    hidden.requires_grad_()
    found = divergence(hidden, heads[0], target, heads[1], following, mix)
    (2 * found).backward()
    # f32 sums of 31 terms near 1, and differences of logits near 10.
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_a_model_does_not_diverge_from_itself() -> None:
    hidden = torch.randn(M, H, generator=torch.Generator().manual_seed(0)).requires_grad_()
    head = Head(torch.randn(V, H, generator=torch.Generator().manual_seed(1)))
    loss = divergence(hidden, head, hidden.detach(), head)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert not hidden.grad.any()


def test_bf16_heads_are_near() -> None:
    """Logits are rounded to 8 bits: relative errors of 2^-8 in logits of up to about 10."""
    generator = torch.Generator().manual_seed(0)
    hidden, target = (torch.randn(M, H, generator=generator) for _ in range(2))
    weights = [torch.randn(V, H, generator=generator) for _ in range(2)]
    exact = divergence(hidden, Head(weights[0]), target, Head(weights[1]))
    half = [Head(w.bfloat16()) for w in weights]
    rough = divergence(hidden, half[0], target, half[1])
    assert rough.item() == pytest.approx(exact.item(), abs=4 * 10 * 2**-8)

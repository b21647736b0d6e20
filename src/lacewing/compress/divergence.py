"""The loss of distillation, of what two decoders read before their heads, without their logits.

    loss = mean over tokens of  (1 - mix) * KL(teacher || student) + mix * -log student(next token)

(arXiv:1503.02531 at temperature 1.) Logits of a whole batch would be gigabytes; here a few million
of them live at a time, and the gradient by the student's hidden states is computed in the same
pass. Matrix products run in the type of the heads, f32 or bf16, all else in f32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Head", "divergence"]

_LOGITS = 6_000_000
"""Logits of each of the two decoders that live at once: 24 MB."""


@dataclass(frozen=True, eq=False)
class Head:
    """weight: `[vocab_size, hidden_size]`, f32 or bf16. cap: of logits, 0 for none."""

    weight: Tensor
    cap: float = 0.0

    def logits(self, hidden: Tensor) -> Tensor:
        """f32 `[m, vocab_size]` of what the last norm returns."""
        y: Tensor = F.linear(hidden.to(self.weight.dtype), self.weight).float()
        return torch.tanh(y / self.cap) * self.cap if self.cap else y

    def pull(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient by `hidden`, given that by `logits`, which it overwrites."""
        if self.cap:
            gradient *= 1 - (logits / self.cap).square()
        return (gradient.to(self.weight.dtype) @ self.weight).float()


def divergence(
    hidden: Tensor,
    student: Head,
    target: Tensor,
    teacher: Head,
    following: Tensor | None = None,
    mix: float = 0.0,
) -> Tensor:
    """The loss above, a scalar that `backward` goes through to `hidden`.

    hidden, target: `[m, hidden_size]` of student and teacher, after their last norms. following:
    int64 `[m]`, the next tokens; negative: none, these tokens have their KL alone. Needed for
    mix > 0.
    """
    if mix == 0:
        following = None
    out: Tensor = _Divergence.apply(hidden, student, target, teacher, following, mix)
    return out


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        student: Head,
        target: Tensor,
        teacher: Head,
        following: Tensor | None,
        mix: float,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        gradient = torch.empty_like(hidden, dtype=torch.float32)
        for part in _parts(len(hidden), len(student.weight)):
            s, t = student.logits(hidden[part]), teacher.logits(target[part])
            loss, slope = _divergences(s, t)
            if following is not None:
                loss, slope = _mixed(loss, slope, s, t, following[part], mix)
            total += loss.sum()
            if ctx.needs_input_grad[0]:
                gradient[part] = student.pull(slope, s)
        ctx.save_for_backward(gradient.div_(len(hidden)).to(hidden.dtype))
        return (total / len(hidden)).float()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return slope * gradient, None, None, None, None, None


def _parts(rows: int, vocab_size: int) -> list[slice]:
    step = max(1, _LOGITS // vocab_size)
    return [slice(begin, begin + step) for begin in range(0, rows, step)]


def _divergences(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """KL(t || s) of every row of logits, and its gradient by s."""
    p, q = t.softmax(1), s.softmax(1)
    loss = torch.linalg.vecdot(p, t - s) - _normaliser(t, p) + _normaliser(s, q)
    return loss, q.sub_(p)


def _mixed(
    loss: Tensor, slope: Tensor, s: Tensor, t: Tensor, following: Tensor, mix: float
) -> tuple[Tensor, Tensor]:
    """Loss and gradient with a share `mix` of cross-entropy where the next token is known."""
    share = torch.where(following >= 0, mix, 0.0)
    label = following.clamp(min=0)[:, None]
    p = t.softmax(1)
    entropy = s.logsumexp(1) - s.gather(1, label)[:, 0]
    slope += share[:, None] * p
    slope.scatter_add_(1, label, -share[:, None])
    return loss + share * (entropy - loss), slope


def _normaliser(logits: Tensor, softmax: Tensor) -> Tensor:
    """log sum exp of every row, without another pass of exponentials."""
    return logits.amax(1) - softmax.amax(1).log()

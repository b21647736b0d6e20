"""Which modules an entry of a quantization config speaks of: names, or regular expressions.

The expressions come from strangers. Python's matcher may take time exponential in the length of a
name. It tries at most as many ways as the product of the choices: about a hundred for a
repeat, as many as a group has alternatives, two for a `?`, and where the match may begin anywhere,
one more repeat. There is no choice where a repeat ends the expression, where it
lies between characters that it does not take (`\\.\\d+\\.`), or where the count is given. An
expression with more than 2^27 ways is refused, and so are a repeat of what has a choice in it,
backreferences, conditions, comments and flags other than `(?i)`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import lru_cache

from lacewing.checkpoint.files import fail, shown
from lacewing.errors import UnsupportedModelError

__all__ = ["matches"]

_LONGEST_PATTERN = 400
_LONGEST_NAME = 200
_REPEAT = 6.6
"""Base 2 logarithm of the ways that one of four repeats adds: 200 characters can be shared out
among them in binomial(204, 4) = 2^26 ways."""
_MOST_WAYS = 27.0
_TOKEN = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?(?:P<\w+>|<?[=!]|:)|\{\d+(?:,\d*)?\}|\{,\d*\}|.", re.S
)
_QUANTIFIER = re.compile(r"[*+?]|\{[\d,]+\}")
_LITERAL = re.compile(r"\\[^\w\s]|[^.^$*+?{}\[\]|()\\\s]")


def matches(pattern: str, name: str, where: str, anywhere: bool = False) -> bool:
    """Whether the expression matches `name` from its beginning, or `anywhere`.

    where: place of the pattern, for errors. Raises CheckpointError for a pattern that is none, and
    UnsupportedModelError for one that could take too long.
    """
    compiled = _compiled(pattern, where, anywhere)
    if len(name) > _LONGEST_NAME:
        fail(where, f"names of at most {_LONGEST_NAME} characters", f"`{shown(name)}`")
    return (compiled.search(name) if anywhere else compiled.match(name)) is not None


@lru_cache(maxsize=1024)
def _compiled(pattern: str, where: str, anywhere: bool) -> re.Pattern[str]:
    if len(pattern) > _LONGEST_PATTERN or not _is_harmless(pattern, anywhere):
        raise UnsupportedModelError(
            f"{where}: needs an expression that cannot take long to match (few repeats, none inside"
            f" a repeat), got `{shown(pattern)}`",
            hint="write the names out in the config",
        )
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        fail(where, "a regular expression", f"`{shown(pattern)}`: {shown(str(error))}")


@dataclass
class _Group:
    """What is known of a group, or of the whole expression, while it is read."""

    ways: list[float] = field(default_factory=lambda: [0.0])
    """Base 2 logarithm of the ways to match, of every alternative."""
    varies: bool = False

    @property
    def all_ways(self) -> float:
        return max(self.ways) + math.log2(len(self.ways))


def _is_harmless(pattern: str, anywhere: bool) -> bool:
    tokens = _TOKEN.findall(pattern.removeprefix("(?i)"))
    groups = [_Group()]
    repeatable = False
    for i, token in enumerate(tokens):
        if _is_quantifier(token):
            lazy = token == "?" and i > 0 and _is_quantifier(tokens[i - 1])
            if not lazy and not repeatable:
                return False
            repeatable = False
            if not lazy:
                groups[-1].ways[-1] += _choices(tokens, i, len(groups) == 1)
                groups[-1].varies = True
            continue
        repeatable = True
        if token.startswith("("):
            groups.append(_Group())
            repeatable = False
        elif token == "|":
            groups[-1].ways.append(0.0)
            groups[-1].varies = True
            repeatable = False
        elif token == ")" and len(groups) > 1:
            inner = groups.pop()
            groups[-1].ways[-1] += inner.all_ways
            groups[-1].varies |= inner.varies
            repeatable = not inner.varies or tokens[i + 1 : i + 2] == ["?"]
        elif re.fullmatch(r"\\[1-9]", token):
            return False
    return groups[0].all_ways + (_REPEAT if anywhere else 0) <= _MOST_WAYS


def _is_quantifier(token: str) -> bool:
    return _QUANTIFIER.fullmatch(token) is not None


def _choices(tokens: list[str], i: int, outermost: bool) -> float:
    """Base 2 logarithm of the numbers of times that the quantifier `i` may repeat what is before
    it, where the others fail only later."""
    rest = tokens[i + 1 :]
    if rest[:1] == ["?"]:
        rest = rest[1:]
    if re.fullmatch(r"\{\d+\}", tokens[i]) or (outermost and rest[:1] in ([], ["|"])):
        return 0.0
    while rest[:1] == [")"]:
        rest = rest[1:]
    before = tokens[: i - 1]
    while before and before[-1].startswith("("):
        before.pop()
    repeated = tokens[i - 1]
    free = [any(_is_quantifier(token) for token in rest[1:2]), repeated == ")"]
    if not any(free) and _excludes(repeated, before[-1:]) and _excludes(repeated, rest[:1]):
        return 0.0
    return 1.0 if tokens[i] == "?" else _REPEAT


def _excludes(repeated: str, beside: list[str]) -> bool:
    """Whether what is beside it is a character that `repeated` does not match."""
    if not beside or _LITERAL.fullmatch(beside[0]) is None:
        return False
    try:
        return re.fullmatch(repeated, beside[0][-1], re.IGNORECASE | re.DOTALL) is None
    except re.error:
        return False

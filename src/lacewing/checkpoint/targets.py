"""Which modules an entry of a quantization config speaks of: names, or regular expressions.

The expressions come from strangers. Python's matcher may take time exponential in the length of a
name, or worse than quadratic; what could is refused: a repeat inside a repeat, a backreference, and
more than four repeats without a bound.
"""

from __future__ import annotations

import re
from functools import lru_cache

from lacewing.checkpoint.files import fail, shown
from lacewing.errors import UnsupportedModelError

__all__ = ["matches"]

_LONGEST_PATTERN = 400
_LONGEST_NAME = 200
_MOST_REPEATS = 4
_ATOM = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", re.S)
_REPEATS = re.compile(r"[*+]|\{\d*,\d*\}")


def matches(pattern: str, name: str, where: str, anywhere: bool = False) -> bool:
    """Whether the expression matches `name` from its beginning, or `anywhere`.

    where: place of the pattern, for errors. Raises CheckpointError for a pattern that is none, and
    UnsupportedModelError for one that could take too long.
    """
    compiled = _compiled(pattern, where)
    if len(name) > _LONGEST_NAME:
        fail(where, f"names of at most {_LONGEST_NAME} characters", f"`{shown(name)}`")
    return (compiled.search(name) if anywhere else compiled.match(name)) is not None


@lru_cache(maxsize=1024)
def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    if len(pattern) > _LONGEST_PATTERN or not _is_harmless(pattern):
        raise UnsupportedModelError(
            f"{where}: needs an expression without nested repeats and with at most"
            f" {_MOST_REPEATS} of them, got `{shown(pattern)}`",
            hint="write the names out in the config",
        )
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        fail(where, "a regular expression", f"`{shown(pattern)}`: {shown(str(error))}")


def _is_harmless(pattern: str) -> bool:
    """No repeat of a group that has a repeat or a choice in it, no backreference."""
    repeats = 0
    open_groups: list[bool] = []
    closed = False
    for atom in _ATOM.finditer(_REPEATS.sub("*", pattern)):
        text = atom.group()
        if text == "*":
            repeats += 1
            if closed or repeats > _MOST_REPEATS:
                return False
            open_groups = [True for _ in open_groups]
        elif text == "|":
            open_groups = [True for _ in open_groups]
        elif re.fullmatch(r"\\[1-9]", text) or (text == "P" and "(?P=" in pattern):
            return False
        closed = text == ")" and bool(open_groups) and open_groups[-1]
        if text == "(":
            open_groups.append(False)
        elif text == ")" and open_groups:
            open_groups.pop()
    return True

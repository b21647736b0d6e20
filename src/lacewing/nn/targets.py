"""Which layers a pattern names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch.nn import Module

from lacewing.errors import RequestError

__all__ = ["Pattern", "check_used", "patterns"]

_GLOB = frozenset("*?[")


@dataclass
class Pattern:
    """One of:

    - a name: the layer of that dotted name, and every layer inside a module of that name;
    - a glob, if it has one of `*?[`: matched with the whole name, `*` crosses dots;
    - `re:` and a regular expression: matched with the whole name (`re.fullmatch`);
    - a class: layers of it or of a subclass, and every layer inside such a module.
    """

    where: str
    """The argument it was given in: `include`."""
    value: Any
    used: bool = field(default=False, init=False)
    """Whether it has matched a layer."""

    def __post_init__(self) -> None:
        if not isinstance(self.value, (str, type)) or self.value == "":
            raise RequestError(
                f"`{self.where}`: a pattern is a name, a glob, `re:...` or a class,"
                f" got {self.value!r}"
            )
        self._expression = None
        if isinstance(self.value, str) and self.value.startswith("re:"):
            self._expression = self._compile(self.value[3:])

    def __str__(self) -> str:
        return repr(self.value) if isinstance(self.value, str) else self.value.__name__

    def matches(self, names: Iterable[str], lineage: Sequence[Module]) -> bool:
        """names: all that the layer is called. lineage: its module and those it lies in."""
        if isinstance(self.value, type):
            found = any(isinstance(module, self.value) for module in lineage)
        else:
            found = any(self._matches_name(name) for name in names)
        self.used |= found
        return found

    def _matches_name(self, name: str) -> bool:
        if self._expression is not None:
            return self._expression.fullmatch(name) is not None
        if _GLOB & set(self.value):
            return fnmatchcase(name, self.value)
        return name == self.value or name.startswith(self.value + ".")

    def _compile(self, text: str) -> re.Pattern[str]:
        try:
            return re.compile(text)
        except re.error as error:
            raise RequestError(
                f"`{self.where}`: {self.value!r} is not a regular expression: {error}"
            ) from error


def patterns(where: str, given: Any) -> list[Pattern]:
    """One pattern or an iterable of them. Raises RequestError for what is none."""
    single = isinstance(given, (str, type)) or not isinstance(given, Iterable)
    return [Pattern(where, value) for value in ([given] if single else given)]


def check_used(given: Iterable[Pattern], names: Sequence[str]) -> None:
    """Raises RequestError for a pattern that has matched none of the layers, called `names`."""
    for pattern in given:
        if not pattern.used:
            raise RequestError(
                f"`{pattern.where}`: {pattern} matches no layer of this model",
                _near(pattern, names),
            )


def _near(pattern: Pattern, names: Sequence[str]) -> str:
    if not names:
        return "the model has no layer that could be replaced"
    if isinstance(pattern.value, str):
        near = difflib.get_close_matches(pattern.value.removeprefix("re:"), names, 3, cutoff=0.4)
        if near:
            return f"near matches: {', '.join(near)}"
    return f"its layers are called like {', '.join(names[:3])}"

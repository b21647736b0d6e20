"""Values that a recipe is given, one at a time."""

from __future__ import annotations

import difflib
import math
from typing import NoReturn

from lacewing.checkpoint.files import shown
from lacewing.errors import RecipeError

__all__ = ["check_choice", "check_count", "check_flag", "check_number", "check_text", "fail"]


def fail(where: str, requirement: str, actual: object, hint: str | None = None) -> NoReturn:
    """Raises the RecipeError `where: needs requirement, got actual`."""
    raise RecipeError(f"{where}: needs {requirement}, got {actual}", hint=hint)


def check_text(where: str, key: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        fail(where, f"text as `{key}`", shown(value))


def check_choice(where: str, key: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1)
        hint = f"did you mean `{near[0]}`?" if near else None
        fail(where, f"a `{key}` of {', '.join(choices)}", shown(value), hint)


def check_flag(where: str, key: str, value: object) -> None:
    if not isinstance(value, bool):
        fail(where, f"true or false as `{key}`", shown(value))


def check_count(where: str, key: str, value: object, least: int) -> None:
    if type(value) is not int or not least <= value < 1 << 40:
        fail(where, f"a whole number from {least} on as `{key}`", shown(value))


def check_number(where: str, key: str, value: object, wanted: str, below: float) -> float:
    """YAML 1.1 takes 1e-4 for text: it needs a dot. So text that is a number is one."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) else math.nan
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or not 0 <= number < below:
        fail(where, f"{wanted} as `{key}`", shown(value))
    return number

"""Recipes as YAML. Files may be a stranger's: no tags, no anchors, no key twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from lacewing.checkpoint.files import read_text, shown
from lacewing.errors import CheckpointError, LacewingError, RecipeError

__all__ = ["parse_yaml", "read_recipe_text"]

_LONGEST = 1 << 16
"""Characters of a recipe."""
_DEEPEST = 16


def read_recipe_text(path: Path) -> str:
    """Raises RecipeError for a file that cannot be read or is no UTF-8 text."""
    try:
        return read_text(path)
    except CheckpointError as error:
        raise RecipeError(str(error), hint=error.hint) from None


def parse_yaml(text: str, where: str) -> Any:
    """Raises RecipeError for what is no plain YAML."""
    yaml = _yaml()
    if len(text) > _LONGEST:
        raise RecipeError(f"{where}: needs at most {_LONGEST} characters, got {len(text)}")
    try:
        _check_plain(yaml, text, where)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        place = where if line is None else f"{where}: line {line + 1}"
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{place}: needs YAML, got what is none: {problem}") from None
    except ValueError as error:  # a date that is none
        raise RecipeError(f"{where}: cannot be read as YAML: {shown(str(error))}") from None


def _check_plain(yaml: Any, text: str, where: str) -> None:
    """Refuses anchors, of which a small file can make a huge document, deep nesting, which PyYAML
    reads in quadratic time, and keys said twice, of which it would keep the last."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            _refuse(where, event, f"recipes are nested at most {_DEEPEST} deep")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            _refuse(where, event, "anchors and aliases are not for recipes")
    waiting = [yaml.compose(text, Loader=yaml.SafeLoader)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            waiting += [value for _, value in node.value]
            _check_keys([key for key, _ in node.value], where)


def _check_keys(keys: list[Any], where: str) -> None:
    seen: set[str] = set()
    for key in keys:
        if not isinstance(key.value, str):
            _refuse(where, key, "needs a word as key")
        if key.value in seen:
            _refuse(where, key, f"`{shown(key.value)}` is there twice")
        seen.add(key.value)


def _refuse(where: str, found: Any, problem: str) -> NoReturn:
    raise RecipeError(f"{where}: line {found.start_mark.line + 1}: {problem}")


def _yaml() -> Any:
    try:
        import yaml
    except ModuleNotFoundError:
        raise LacewingError(
            "recipes in YAML need PyYAML, which is not installed",
            hint="pip install 'lacewing[compress]', or build the recipe in Python",
        ) from None
    return yaml

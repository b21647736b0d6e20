"""What else in a model of transformers speaks of the weights that are gone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from typing import Any

from torch.nn import Module

__all__ = ["Change", "apply", "changes_of"]

Change = tuple[Any, str, Any, str]
"""An object, an attribute of it, its new value, and the words for the report."""


def changes_of(model: Module, gone: Set[str], stacks: Iterable[Module]) -> list[Change]:
    """gone: names of parameters. stacks: modules whose experts are packed."""
    return [*_tie_changes(model, gone), *_experts_changes(stacks)]


def apply(changes: Iterable[Change]) -> None:
    """Into the dictionaries themselves: nothing that a model may have overridden is called."""
    for owner, attribute, value, _ in changes:
        owner.__dict__[attribute] = value


def _tie_changes(model: Module, gone: Set[str]) -> Iterator[Change]:
    """`tie_weights` would put a dense weight where a packed one is: what is `gone` is tied no
    more. The config stays as it is: T5, for one, scales by it."""
    for prefix, module in model.named_modules():
        expand = getattr(module, "get_expanded_tied_weights_keys", None)
        if expand is None:
            continue
        own = expand(all_submodels=False)
        kept = _without(own, prefix, gone)
        if len(kept) < len(own):
            lost = ", ".join(sorted(own.keys() - kept.keys()))
            note = f"{type(module).__name__}.tie_weights ties {lost} no more: it is packed"
            yield module, "_tied_weights_keys", kept, note
        every = getattr(module, "all_tied_weights_keys", None) or {}
        kept = _without(every, prefix, gone)
        if len(kept) < len(every):
            yield module, "all_tied_weights_keys", kept, ""


def _without(ties: dict[str, str], prefix: str, gone: Set[str]) -> dict[str, str]:
    before = f"{prefix}." if prefix else ""
    return {a: b for a, b in ties.items() if before + a not in gone and before + b not in gone}


def _experts_changes(modules: Iterable[Module]) -> Iterator[Change]:
    """Of the ways in which transformers runs experts, `eager` takes one weight at a time; the
    others read all of them, which would dequantize them each time."""
    name = "_experts_implementation_internal"
    for config in {id(c): c for c in (getattr(m, "config", None) for m in modules)}.values():
        now = getattr(config, name, None)
        if now not in (None, "eager"):
            note = f"experts_implementation is `eager` instead of `{now}`, for packed experts"
            yield config, name, "eager", note

"""Whether two model files are one model, before and after compression."""

from __future__ import annotations

from lacewing.checkpoint import Source
from lacewing.checkpoint.files import parse_json, shown
from lacewing.checkpoint.manifest import PackedSource
from lacewing.errors import RecipeError

__all__ = ["check_pair"]


def check_pair(compressed: Source, dense: Source) -> None:
    """Raises RecipeError unless the two have the same tensors, and tokens with the same ids."""
    if not isinstance(compressed, PackedSource):
        raise RecipeError(
            f"{compressed.path}: healing needs a packed directory, got a {compressed.kind} model",
            hint="compress it first: `lacewing compress`",
        )
    ours, theirs = compressed.spec.tensor_shapes(), dense.spec.tensor_shapes()
    if ours != theirs:
        name = next(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
        raise RecipeError(
            f"{dense.path}: needs `{name}` of shape {_listed(ours.get(name))} as in"
            f" {compressed.path}, got {_listed(theirs.get(name))}",
            hint="name the model that was compressed as the dense one",
        )
    known = _vocabulary(dense)
    for token, number in _vocabulary(compressed).items():
        if known.get(token, number) != number:
            raise RecipeError(
                f"{dense.path}: needs the vocabulary of {compressed.path}, where {shown(token)!r}"
                f" is {number}, got {known[token]}",
                hint="name the model that was compressed as the dense one",
            )


def _listed(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


def _vocabulary(source: Source) -> dict[str, int]:
    """Tokens and their ids. Files of one model may differ in the tokens they add to it."""
    document = parse_json(source.tokenizer.tokenizer_json, str(source.path))
    model = document.get("model")
    found = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(found, list):  # of pairs of a token and its score
        return {str(pair[0]): number for number, pair in enumerate(found)}
    return found if isinstance(found, dict) else {}

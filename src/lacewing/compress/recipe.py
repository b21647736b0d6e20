"""What a compression is asked to do: rules for weights, and how to calibrate.

    name: mixed
    rules:                                  # the first rule that matches a weight wins
      - {match: "*.down_proj", format: w8a8g64}
      - {match: "*", format: w4a8g64_sp, solver: columns, sparsity: 0.5}
    calibration: {tokens: 32768, window: 512, seed: 0}
    ratios: owl
    reconstruct: {steps: 50, rate: 1e-4}

A recipe is checked when it is made, and against a model by `plan`.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from lacewing.checkpoint.files import shown
from lacewing.compress.checks import (
    check_choice,
    check_count,
    check_flag,
    check_number,
    check_text,
    fail,
)
from lacewing.errors import FormatError, RecipeError
from lacewing.formats import Format, get_format
from lacewing.models import DecoderSpec

__all__ = [
    "JOINT",
    "PRESETS",
    "RATIOS",
    "SMOOTH",
    "SOLVERS",
    "WITHOUT_DATA",
    "Calibration",
    "Recipe",
    "Reconstruct",
    "Rule",
]

SOLVERS = ("nearest", "magnitude", "wanda", "columns", "admm", "blocks")
"""`nearest` rounds; `magnitude` and `wanda` prune, then round to nearest, the first without data as
`nearest`; `columns` prunes and rounds jointly (SparseGPT, GPTQ); `admm` chooses what stays for the
whole layer (ALPS), `blocks` chooses whole blocks by second order, and both then go by columns."""
RATIOS = ("uniform", "owl", "curves")
SMOOTH = ("none", "awq", "smoothquant")
PRESETS = ("safe", "balanced", "small", "sparse50")

JOINT = ("columns", "admm", "blocks")
"""Solvers that go column by column, and make up for errors in the columns after."""
WITHOUT_DATA = ("nearest", "magnitude")
"""Solvers that look at the weights alone."""
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Rule:
    """How the weights that `match` names are compressed.

    match: a glob over tensor names without `.weight` (`*` crosses dots), or `re:` and a regular
    expression for the whole name. `{first}` and `{last}` in it stand for the numbers of the first
    and the last block. Embedding and head (`model.embed_tokens`, `lm_head`) are meant only where
    the text of the pattern has `embed_tokens` or `lm_head` in it; they are rounded to nearest,
    whatever the solver. sparsity: share of the weights that go; 0 in a format with a pattern of its
    own stands for that pattern's. act_order: columns of large inputs first. refine: sweeps of
    coordinate descent over the codes.
    """

    match: str
    format: str
    solver: str = "columns"
    sparsity: float = 0.0
    act_order: bool = False
    refine: int = 0

    def __post_init__(self) -> None:
        check_text("rule", "match", self.match)
        where = f"rule `{shown(self.match)}`"
        _compile(where, self.match)
        check_text(where, "format", self.format)
        check_choice(where, "solver", self.solver, SOLVERS)
        share = check_number(where, "sparsity", self.sparsity, "a number in [0, 1)", below=1)
        object.__setattr__(self, "sparsity", share)
        check_flag(where, "act_order", self.act_order)
        check_count(where, "refine", self.refine, least=0)
        _check_sparsity(where, self, _known_format(where, self.format))
        _check_solver(where, self)

    @property
    def target(self) -> float:
        """The share of weights that goes: `sparsity`, or what the format's pattern prescribes."""
        fixed = get_format(self.format).fixed_sparsity
        return self.sparsity if fixed is None else fixed

    @property
    def prunes(self) -> bool:
        return self.target > 0

    @property
    def names_tables(self) -> bool:
        """Whether embedding and head may be meant."""
        return "embed_tokens" in self.match or "lm_head" in self.match

    def matches(self, layer: str, n_layers: int) -> bool:
        """layer: the name of a tensor without `.weight`, in a model of `n_layers` blocks."""
        pattern = self.match.replace("{first}", "0").replace("{last}", str(n_layers - 1))
        return _compile("rule", pattern).fullmatch(layer) is not None


@dataclass(frozen=True)
class Calibration:
    """tokens: in all. window: tokens that are read in one piece, at most the model's context.
    seed: which windows are drawn."""

    tokens: int = 32768
    window: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        where = "`calibration`"
        check_count(where, "window", self.window, least=8)
        check_count(where, "tokens", self.tokens, least=1)
        check_count(where, "seed", self.seed, least=0)
        if self.tokens < self.window:
            fail(where, f"tokens for one window of {self.window}", self.tokens)

    @property
    def windows(self) -> int:
        """Whole windows; what is left of `tokens` is not used."""
        return self.tokens // self.window


@dataclass(frozen=True)
class Reconstruct:
    """Gradient descent on the output of every block after it was compressed.

    steps: of one batch each. rate: the learning rate."""

    steps: int
    rate: float

    def __post_init__(self) -> None:
        check_count("`reconstruct`", "steps", self.steps, least=1)
        rate = check_number("`reconstruct`", "rate", self.rate, "a number in (0, 1]", below=1.001)
        if not 0 < rate <= 1:
            fail("`reconstruct`", "a `rate` in (0, 1]", shown(self.rate))
        object.__setattr__(self, "rate", rate)


@dataclass(frozen=True)
class Recipe:
    """rules: the first that matches a weight wins. ratios: how the sparsity of the rules is spread
    over the layers of a model under the same total. smooth: activation scales that are folded into
    the weights before. reorder: inputs with outliers first. correct: in [0, 1], how far layers aim
    at the outputs of the dense model instead of at their own. reconstruct: None is none.

    Raises RecipeError for rules that cannot be meant, naming the rule.
    """

    rules: tuple[Rule, ...]
    calibration: Calibration = Calibration()
    ratios: str = "uniform"
    smooth: str = "none"
    reorder: bool = False
    correct: float = 0.5
    reconstruct: Reconstruct | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.rules, (list, tuple)):
            fail("`rules`", "a list", shown(self.rules))
        object.__setattr__(self, "rules", tuple(self.rules))
        if not self.rules or not all(isinstance(rule, Rule) for rule in self.rules):
            fail("`rules`", "at least one rule", shown(self.rules))
        if not isinstance(self.calibration, Calibration):
            fail("`calibration`", "a Calibration", shown(self.calibration))
        check_choice("recipe", "ratios", self.ratios, RATIOS)
        check_choice("recipe", "smooth", self.smooth, SMOOTH)
        check_flag("recipe", "reorder", self.reorder)
        share = check_number("recipe", "correct", self.correct, "a number in [0, 1]", below=1.001)
        object.__setattr__(self, "correct", min(share, 1.0))
        if not isinstance(self.reconstruct, (Reconstruct, type(None))):
            fail("`reconstruct`", "steps and rate, or nothing", shown(self.reconstruct))
        if not isinstance(self.name, str):
            fail("`name`", "text", shown(self.name))
        _check_reachable(self.rules)
        if self.ratios != "uniform" and not any(_spreads(rule) for rule in self.rules):
            raise RecipeError(
                f"recipe: `ratios: {self.ratios}` needs a rule with a sparsity to spread, got none",
                hint="leave `ratios` out, or give a rule `sparsity: 0.5`",
            )

    @property
    def needs_data(self) -> bool:
        """Whether anything depends on what layers read."""
        plain = all(rule.solver in WITHOUT_DATA for rule in self.rules)
        changes = self.reorder or self.smooth != "none" or self.ratios != "uniform"
        return not plain or changes or self.reconstruct is not None

    # -- as documents -----------------------------------------------------------------------------

    @staticmethod
    def from_dict(value: Any) -> Recipe:
        """The recipe that `to_dict`, JSON or YAML says. Raises RecipeError, naming the place, for
        keys that are unknown or missing and for values that do not fit."""
        given = _keys(Recipe, value, "recipe")
        rules = given.get("rules")
        if not isinstance(rules, (list, tuple)):
            fail("`rules`", "a list", shown(rules))
        given["rules"] = tuple(_make(Rule, r, f"rules[{i}]") for i, r in enumerate(rules))
        if "calibration" in given:
            given["calibration"] = _make(Calibration, given["calibration"], "calibration")
        if given.get("reconstruct") is not None:
            given["reconstruct"] = _make(Reconstruct, given["reconstruct"], "reconstruct")
        return Recipe(**given)

    @staticmethod
    def from_yaml(text: str) -> Recipe:
        """Raises RecipeError for text that is no YAML, and as `from_dict` does; LacewingError
        where PyYAML is not installed."""
        from lacewing.compress.document import parse_yaml

        return Recipe.from_dict(parse_yaml(text, "recipe"))

    @staticmethod
    def from_file(path: str | os.PathLike[str]) -> Recipe:
        """The recipe in a YAML file; its errors begin with the path."""
        from lacewing.compress.document import read_recipe_text

        text = read_recipe_text(Path(path))
        try:
            return Recipe.from_yaml(text)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}", hint=error.hint) from None

    @staticmethod
    def preset(name: str) -> Recipe:
        """One of PRESETS."""
        check_choice("recipe", "preset", name, PRESETS)
        return Recipe.from_file(Path(__file__).parent / "presets" / f"{name}.yaml")

    @staticmethod
    def open(name: str | os.PathLike[str]) -> Recipe:
        """A preset by its name, or the recipe in a file."""
        if name in PRESETS:
            return Recipe.preset(str(name))
        if not _exists(name):
            near = difflib.get_close_matches(str(name), PRESETS, 1)
            means = f"did you mean {near[0]}?" if near else f"presets: {', '.join(PRESETS)}"
            fail("recipe", "a preset or a YAML file", f"`{shown(str(name), 400)}`, neither", means)
        return Recipe.from_file(name)

    def to_dict(self) -> dict[str, Any]:
        """In JSON's own types; `from_dict` makes an equal recipe of it."""
        found = asdict(self)
        found["rules"] = list(found["rules"])
        return found

    def digest(self) -> str:
        """sha256 of the canonical JSON, as hexadecimal."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def plan(self, model: DecoderSpec | Mapping[str, tuple[int, ...]]) -> dict[str, Rule]:
        """The rule of every matrix, by its tensor's name (`model.layers.0.mlp.up_proj.weight`).

        model: a spec, or name -> shape of every tensor. Embedding and head have a rule of solver
        `nearest`, in 8 bits where no rule names them.

        Raises RecipeError for a matrix that no rule matches, a rule that matches none, and a format
        that cannot hold the weight.
        """
        from lacewing.compress.plan import make_plan

        shapes = model.tensor_shapes() if isinstance(model, DecoderSpec) else model
        return make_plan(self.rules, shapes)


# -- documents ------------------------------------------------------------------------------------


def _keys(kind: type, value: Any, where: str) -> dict[str, Any]:
    """`value` as arguments for the dataclass `kind`."""
    if not isinstance(value, Mapping):
        fail(f"`{where}`", "a mapping", shown(value))
    names = [field.name for field in fields(kind)]
    for key in value:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            hint = f"did you mean `{near[0]}`?" if near else f"keys: {', '.join(names)}"
            raise RecipeError(f"`{where}`: there is no key {shown(repr(key))}", hint=hint)
    for field in fields(kind):
        if field.default is MISSING and field.name not in value:
            fail(f"`{where}`", f"`{field.name}`", f"only {', '.join(map(str, value)) or 'nothing'}")
    return dict(value)


def _exists(name: str | os.PathLike[str]) -> bool:
    try:
        return Path(name).exists()
    except OSError:  # longer than a name can be: the text of a recipe, say
        return False


def _make(kind: type[_Made], value: Any, where: str) -> _Made:
    arguments = _keys(kind, value, where)
    try:
        return kind(**arguments)
    except RecipeError as error:
        raise RecipeError(f"`{where}`: {error}", hint=error.hint) from None


# -- checks ---------------------------------------------------------------------------------------


def _known_format(where: str, name: str) -> Format:
    try:
        return get_format(name)
    except FormatError as error:
        raise RecipeError(f"{where}: {error}", hint=error.hint) from None


def _check_sparsity(where: str, rule: Rule, kind: Format) -> None:
    if rule.sparsity and not kind.holds_zero:
        raise RecipeError(
            f"{where}: {kind.name} cannot hold pruned weights: zero is not on its grid",
            hint="use a symmetric or a sparse format, such as `w4a8g64_sp`",
        )
    fixed = kind.fixed_sparsity
    if fixed is not None and rule.sparsity not in (0, fixed):
        hint = f"leave the sparsity out, or use `{kind.name.rsplit('_', 1)[0]}_sp`"
        fail(where, f"sparsity {fixed:g}, the one {kind.name} has", f"{rule.sparsity:g}", hint)
    if kind.sparse and rule.target == 0 and rule.solver != "nearest":
        hint = f"give `sparsity`, or use `{kind.name.rsplit('_', 1)[0]}`"
        fail(where, f"a sparsity for the sparse format {kind.name}", "0", hint)


def _check_solver(where: str, rule: Rule) -> None:
    if rule.solver == "nearest" and rule.prunes:
        raise RecipeError(
            f"{where}: solver `nearest` prunes nothing, and sparsity {rule.target:g} is asked for",
            hint="use `magnitude`, which needs no data, or `columns`",
        )
    if rule.solver in ("magnitude", "wanda") and not rule.prunes:
        hint = "use `nearest`, or give `sparsity`"
        fail(where, f"a sparsity for solver `{rule.solver}`, which prunes", "0", hint)
    if rule.solver == "blocks" and not _in_blocks(rule.format):
        hint = "use `w8a8_b16x1`, or solver `columns`"
        fail(where, "a format of blocks for solver `blocks`", rule.format, hint)
    if rule.act_order and rule.solver not in JOINT:
        fail(where, f"solver {' or '.join(JOINT)} for `act_order`", rule.solver)
    if rule.refine and rule.solver in WITHOUT_DATA:
        fail(where, "a solver that uses data for `refine`", rule.solver, "use `columns`")


def _in_blocks(format: str) -> bool:
    return re.search(r"_b\d+x\d+$", format) is not None


def _spreads(rule: Rule) -> bool:
    return rule.prunes and get_format(rule.format).fixed_sparsity is None


def _check_reachable(rules: tuple[Rule, ...]) -> None:
    for i, later in enumerate(rules):
        for earlier in rules[:i]:
            if _covers(earlier, later):
                raise RecipeError(
                    f"rules[{i}] `{shown(later.match)}` can never match: `{shown(earlier.match)}`"
                    " before it takes the same weights",
                    hint="the first rule that matches wins: put the general one last",
                )


def _covers(earlier: Rule, later: Rule) -> bool:
    """Whether `earlier` surely takes all that `later` names. A glob of stars that matches the text
    of another glob matches all that this one does: its stars swallow the other's."""
    if later.names_tables and not earlier.names_tables:
        return False
    if earlier.match == later.match:
        return True
    plain = not earlier.match.startswith("re:") and not set("?[{") & set(earlier.match)
    if later.match.startswith("re:"):
        return earlier.match == "*"
    return plain and _compile("rule", earlier.match).fullmatch(later.match) is not None


def _compile(where: str, pattern: str) -> re.Pattern[str]:
    """A pattern of a rule as a regular expression for whole names."""
    text = pattern[3:].replace("{first}", "0").replace("{last}", "0")
    try:
        if not pattern.startswith("re:"):
            return re.compile(fnmatch.translate(pattern))
        return re.compile(text)
    except re.error as error:
        fail(where, "a regular expression after `re:`", f"one that is none: {error}")
    except (RecursionError, OverflowError) as error:
        fail(where, "a pattern that can be compiled", f"one that is too large: {error}")

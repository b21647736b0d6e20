"""Chat templates: Jinja programs out of a model file, so code of strangers.

They run in Jinja's immutable sandbox with the conventions of Hugging Face, and every way to grow
without end is metered: lines run, seconds, characters of any text and nodes of any list made.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import wraps
from types import FrameType
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lacewing.errors import CheckpointError, RequestError

__all__ = ["ChatTemplate"]

_MAX_SOURCE = 1 << 18  # characters of a template
_MAX_SIZE = 1 << 23  # characters of a text, or of all texts in a list; a node counts as 8
_MAX_LINES = 1_000_000  # of Python and template code in one rendering
_MAX_SECONDS = 0.8  # of this thread's processor time: waiting for others does not count

_FILTERS = """
abs capitalize count d default dictsort e escape first float format forceescape groupby indent int
items join last length list lower map max min reject rejectattr replace reverse round safe select
selectattr sort string sum title trim unique upper wordcount"""
_TEXT_METHODS = """
capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier
islower isnumeric isprintable isspace istitle isupper join lower lstrip partition removeprefix
removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip
swapcase title upper"""
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\*|\d{4})")


class _LimitError(Exception):
    """The template took more than its share."""


class _RefusedError(Exception):
    """The template itself refused the messages, by `raise_exception`."""


class ChatTemplate:
    """A compiled chat template. `bos_token` and `eos_token` are variables of every template."""

    def __init__(self, source: str, bos_token: str | None, eos_token: str | None) -> None:
        """Raises `CheckpointError` if `source` is not a Jinja template."""
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        if len(source) > _MAX_SOURCE:
            raise CheckpointError(
                f"chat template: needs at most {_MAX_SOURCE} characters, got {len(source)}"
            )
        try:
            self._template = _Environment().from_string(source)
        except (TemplateError, SyntaxError, RecursionError, MemoryError, _LimitError) as error:
            raise CheckpointError(
                f"chat template: needs a Jinja template, got {_reason(error)}",
                hint="`--raw` goes without the template",
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation; `messages` are mappings with `role` and `content`.

        `variables` (`tools`, `enable_thinking`, ...) are what the template understands.
        Raises `RequestError` where the messages do not suit the template, `CheckpointError` where
        the template breaks its limits.
        """
        _check_messages(messages)
        given = {"tools": None, "documents": None, **self._tokens, **variables}
        try:
            with _Meter():
                return self._template.render(
                    messages=messages, add_generation_prompt=add_generation_prompt, **given
                )
        except _RefusedError as error:
            raise RequestError(f"the chat template refuses the messages: {error}") from error
        except (_LimitError, SecurityError, RecursionError, MemoryError) as error:
            raise CheckpointError(
                f"chat template: {_reason(error)}", hint="`--raw` goes without the template"
            ) from error
        except Exception as error:  # Jinja lets any error of the template's own code through
            raise RequestError(
                f"the chat template fails on these messages: {_reason(error)}",
                hint="messages need `role` and `content`; `--raw` goes without the template",
            ) from error


def _reason(error: BaseException) -> str:
    where = f" in line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
    return f"{type(error).__name__.strip('_')}{where}: {str(error)[:200]}"


def _check_messages(messages: object) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise RequestError("`messages`: needs a non-empty list of {role, content} mappings")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(
                f"`messages[{i}]`: needs a mapping with a text `role`, got {str(message)[:80]}"
            )


# Limits --------------------------------------------------------------------------------------


class _Meter:
    """Counts every line that Python runs in this thread, the template's compiled ones included,
    and stops at a limit: a loop inside a template passes no other place that could stop it."""

    def __init__(self) -> None:
        self._lines = 0
        self._deadline = time.thread_time() + _MAX_SECONDS

    def __enter__(self) -> None:
        self._previous = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._previous)

    def _trace(self, frame: FrameType, event: str, arg: object) -> Any:
        self._lines += 1
        late = self._lines % 16 == 0 and time.thread_time() > self._deadline
        if late or self._lines > _MAX_LINES:
            raise _LimitError(f"needs at most {_MAX_LINES} lines and {_MAX_SECONDS:g} s")
        return self._trace


def _checked(value: Any) -> Any:
    """`value`, if what it would take to write it out is within the limit.

    Lists are walked, the same list again for every time it is held: doubling a list by nesting
    costs the template nothing, and comparing or printing it costs 2^depth.
    """
    room = _MAX_SIZE
    rest = [value]
    while rest:
        item = rest.pop()
        room -= len(item) if isinstance(item, (str, bytes)) else 8
        if isinstance(item, Mapping):
            room -= 8 * len(item)
            rest.extend(item.keys() if room > 0 else ())
            rest.extend(item.values() if room > 0 else ())
        elif isinstance(item, (list, tuple, set, frozenset)):
            room -= 8 * len(item)
            rest.extend(item if room > 0 else ())
        if room < 0:
            raise _LimitError(f"needs values of at most {_MAX_SIZE} characters")
    return value


def _check_product(size: int) -> None:
    if size > _MAX_SIZE:
        raise _LimitError(f"needs values of at most {_MAX_SIZE} characters, got {size}")


# Jinja ---------------------------------------------------------------------------------------


class _Generator(CodeGenerator):
    """Compiles `~`, lists, tuples and dicts to calls that check what they make."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat(str(part) for part in (")
        for child in node.nodes:
            self.visit(child, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._check(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._check(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._check(super().visit_Tuple, node, frame)
        else:  # the left side of an assignment
            super().visit_Tuple(node, frame)

    def _check(self, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.checked(")
        visit(node, frame)
        self.write(")")


class _Generation(Extension):
    """`{% generation %}` marks an answer for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with the conventions of `transformers`, and limits on what values grow to."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(("+", "*", "**", "%"))
    checked = staticmethod(_checked)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self.filters = {name: _checked_call(self.filters[name]) for name in _FILTERS.split()}
        self.filters["tojson"] = _checked_call(_tojson)
        kept = ("range", "dict", "namespace", "joiner", "cycler")
        self.globals = {name: self.globals[name] for name in kept}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def concat(self, parts: Iterable[str]) -> str:
        """Joins output, in place of `"".join`; all output passes here."""
        kept, size = [], 0
        for part in parts:
            size += len(part)
            _check_product(size)
            kept.append(part)
        return "".join(kept)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _check_times(left, right)
        elif operator == "**":
            _check_power(left, right)
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        return _checked(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        _checked((args, kwargs))
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            args = (*_check_method(owner, function.__name__, args),)
        return _checked(super().call(context, function, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr not in _TEXT_METHODS.split():
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        """No `str.format`: its widths may be computed, so they cannot be checked before."""
        return None


def _checked_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that checks its result, and beforehand what could not be checked in time."""
    before = _BEFORE.get(function.__name__)

    @wraps(function)  # keeps the marks by which Jinja passes contexts
    def checked(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            positional, named = before(*args, **kwargs) or (args, kwargs)
            return _checked(function(*positional, **named))
        return _checked(function(*args, **kwargs))

    return checked


def _check_method(text: str, name: str, args: Sequence[Any]) -> Sequence[Any]:
    if name == "replace":
        _check_replace(None, text, *args)
    elif name == "join":
        return _check_join(None, args[0] if args else (), text)[0][1:]
    return args


def _check_replace(context: Any, s: Any, old: Any, new: Any, *count: Any, **more: Any) -> None:
    _check_product(len(str(s)) + str(s).count(str(old)) * len(str(new)))


def _check_join(
    context: Any, value: Iterable[Any], d: Any = "", attribute: Any = None
) -> tuple[Sequence[Any], dict[str, Any]]:
    kept = _checked(list(value))
    _check_product(len(kept) * len(str(d)))
    return (context, kept), {"d": d, "attribute": attribute}


def _check_indent(s: Any, width: int | str = 4, *flags: Any, **more: Any) -> None:
    each = len(width) if isinstance(width, str) else int(width)
    _check_product(len(str(s)) + (str(s).count("\n") + 1) * each)


def _check_times(left: Any, right: Any) -> None:
    for value, times in ((left, right), (right, left)):
        if isinstance(times, int) and hasattr(value, "__len__"):
            _check_product(max(len(value), 1) * abs(times))
    if isinstance(left, int) and isinstance(right, int):
        _check_product(left.bit_length() + right.bit_length())


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_product(left.bit_length() * max(right, 1) * 1024)


def _check_format(text: Any, *values: Any) -> None:
    if _WIDE_FORMAT.search(str(text)):
        raise _LimitError(f"needs formats of constant width below 1000, got {str(text)[:40]!r}")


_BEFORE: dict[str, Callable[..., tuple[Sequence[Any], dict[str, Any]] | None]] = {
    "do_format": _check_format,
    "do_indent": _check_indent,
    "do_replace": _check_replace,
    "do_join": _check_join,
}


def _raise_exception(message: Any) -> None:
    raise _RefusedError(str(message)[:500])


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(str(form)[:100])


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML's escapes, which Jinja's own filter would put in."""
    _checked(value)
    if indent is not None and not 0 <= int(indent) <= 16:
        raise _LimitError(f"needs an indent of tojson from 0 to 16, got {indent}")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )

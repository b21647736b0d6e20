"""`lacewing diff`: two models side by side."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lacewing.cli import screen
from lacewing.cli.evaluate import (
    CONTEXT_HELP,
    WINDOW_HELP,
    ItemsOption,
    figure,
    intervals,
    room_for,
    run_tasks,
    share,
)
from lacewing.cli.screen import KV_HELP
from lacewing.errors import RequestError

if TYPE_CHECKING:
    from lacewing.cli.opening import Opened
    from lacewing.quality import Answers, Divergence, Flips, Items, Text

_PROMPTS = 8
_SPEED_PROMPT, _SPEED_TOKENS, _SPEED_ROUNDS = 16, 64, 5


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A model; the reference of KL.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other model.")],
    text: Annotated[
        Path | None, typer.Option(help="Text file (UTF-8) to compare on.", show_default=False)
    ] = None,
    items: ItemsOption = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="N|FILE",
            help="Continue so many pieces of the text, or the prompts of a file, one a line "
            f"(JSONL: `prompt` or `turns`). Default: {_PROMPTS} of the text.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of each answer to a prompt.")] = 64,
    speed: Annotated[bool, typer.Option("--speed", help="Time decoding, in turn.")] = False,
    window: Annotated[int | None, typer.Option(min=2, help=WINDOW_HELP, show_default=False)] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop the text after this many scored tokens.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first items of each file.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the confidence intervals.")] = 0,
    format_a: Annotated[str, typer.Option(help="Weight format of A.")] = "auto",
    format_b: Annotated[str, typer.Option(help="Weight format of B.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Default: all usable cores.")] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help=CONTEXT_HELP, show_default=False)
    ] = None,
    kv: Annotated[str, typer.Option(help=KV_HELP)] = "f16",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Two models side by side: bytes, and what is asked for.

    --text: KL(A || B) token by token, where in a window it lies, and the places where it is
    largest; and how far greedy answers stay the same. --items: the items that flipped. --speed:
    tokens per second, both in turn.
    """
    from lacewing.cli.opening import open_llm
    from lacewing.engine.scorer import LLMScorer
    from lacewing.quality import Text, read_items

    read = None if text is None else Text.read(text, window, max_tokens)
    files = [read_items(path, limit) for path in items or ()]
    source = _prompt_source(prompts, read)
    room = context or room_for(read, True)
    opened = [
        open_llm(m, f, threads, kv, max_context=room) for m, f in ((a, format_a), (b, format_b))
    ]
    scorers = [LLMScorer(each.llm, n) for each, n in zip(opened, _names(opened), strict=True)]
    found: dict[str, Any] = {"models": [_size(each) for each in opened]}
    if read is not None:
        found["divergence"] = _divergence(scorers, read, seed)
    if source is not None:
        found["answers"] = _answers(scorers, source, read, tokens)
    if files:
        found["items"] = _flips(scorers, files, seed)
    if speed:
        found["speed"] = _speed(opened)
    if as_json:
        screen.print_json(screen.to_plain(_plain(found)))
        return
    _show(found, seed)


def _prompt_source(prompts: str | None, text: Text | None) -> int | Path | None:
    """How many prompts of the text, or a file of prompts."""
    if prompts is None:
        return None if text is None else _PROMPTS
    if not prompts.isdecimal():
        return Path(prompts)
    if text is None:
        raise RequestError(
            f"--prompts {prompts} are cut from a text", hint="add --text FILE, or name a file"
        )
    if int(prompts) < 1:
        raise RequestError(f"--prompts must be at least 1 or a file, got {prompts}")
    return int(prompts)


def _names(opened: list[Opened]) -> list[str]:
    return [f"{letter} ({each.path.name})" for letter, each in zip("AB", opened, strict=True)]


def _size(opened: Opened) -> dict[str, Any]:
    return {"model": str(opened.path), **opened.size()}


def _divergence(scorers: list[Any], text: Text, seed: int) -> Divergence:
    from lacewing.quality import Against

    a, b = scorers
    found: Divergence = run_tasks(b, [Against(a, text)], seed, "comparing")[0]
    return found


def _answers(scorers: list[Any], source: int | Path, text: Text | None, tokens: int) -> Answers:
    from lacewing.quality import compare_answers, cut_prompts, read_prompts

    a, b = scorers
    if isinstance(source, Path):
        prompts = read_prompts(source)
    else:
        assert text is not None
        prompts = cut_prompts(a, text, source)
    with screen.progress("answering") as advance:
        return compare_answers(a, b, prompts, tokens, advance)


def _flips(scorers: list[Any], files: list[Items], seed: int) -> list[Flips]:
    from lacewing.quality import compare_items

    results = [run_tasks(each, list(files), seed, f"items: {each.name}") for each in scorers]
    return [compare_items(*pair) for pair in zip(*results, strict=True)]


def _speed(opened: list[Opened]) -> dict[str, Any]:
    """Decoding rates; each round takes both, the first one warms up."""
    rates: list[list[float]] = [[], []]
    with screen.progress("decoding") as advance:
        for turn in range(_SPEED_ROUNDS + 1):
            for index in ((0, 1), (1, 0))[turn % 2]:
                rates[index].append(_rate(opened[index]))
            advance(turn + 1, _SPEED_ROUNDS + 1)
    return {
        "tokens": _SPEED_TOKENS,
        "prompt_tokens": _SPEED_PROMPT,
        "threads": opened[0].threads,
        "isa": opened[0].isa,
        "tokens_per_s": [statistics.median(each[1:]) for each in rates],
        "tokens_per_s_runs": [each[1:] for each in rates],
    }


def _rate(opened: Opened) -> float:
    from lacewing import SamplingParams

    params = SamplingParams(max_tokens=_SPEED_TOKENS, temperature=0.0, ignore_eos=True)
    vocabulary = opened.llm.spec.vocab_size
    prompt = [(100 + 7 * position) % vocabulary for position in range(_SPEED_PROMPT)]
    return opened.llm.generate(prompt, params)[0].timings.tokens_per_second


# -- What is printed ------------------------------------------------------------------------------


def _plain(found: dict[str, Any]) -> dict[str, Any]:
    told = dict(found)
    for key in ("divergence", "answers"):
        if key in told:
            told[key] = told[key].to_dict()
    if "items" in told:
        told["items"] = [each.to_dict() for each in told["items"]]
    return told


def _show(found: dict[str, Any], seed: int) -> None:
    screen.print_table(("", "A", "B", "B / A"), list(_sides(found)))
    if "divergence" in found or "items" in found:
        print()
        screen.print_pairs([("intervals", intervals(seed))])
    if "divergence" in found:
        _show_divergence(found["divergence"])
    if "answers" in found:
        _show_answers(found["answers"])
    if "items" in found:
        _show_items(found["items"])


def _sides(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    a, b = found["models"]
    yield "model", Path(a["model"]).name, Path(b["model"]).name, ""
    yield "format", a["format"], b["format"], ""
    yield (
        "bytes",
        screen.bytes_text(a["bytes"]),
        screen.bytes_text(b["bytes"]),
        f"{b['bytes'] / a['bytes']:.3f}",
    )
    yield "bits per weight", f"{a['bits_per_weight']:.2f}", f"{b['bits_per_weight']:.2f}", ""
    if "divergence" in found:
        each: Divergence = found["divergence"]
        before, after = f"{each.reference_perplexity:.4f}", f"{each.perplexity:.4f}"
        ratio = figure(each.perplexity_ratio, each.perplexity_ratio_interval)
        yield f"perplexity of {each.scored_tokens:,} tokens", before, after, ratio
    if "speed" in found:
        speed = found["speed"]
        a, b = speed["tokens_per_s"]
        conditions = f"decoding {speed['tokens']} tokens, {speed['threads']} threads"
        yield f"tokens/s {conditions}", f"{a:.1f}", f"{b:.1f}", f"{b / a:.3f}"


def _show_divergence(found: Divergence) -> None:
    rows = [
        (
            f"{each.first}-{each.last}",
            f"{each.scored_tokens:,}",
            f"{each.kl:.6f}",
            f"{each.kl_p99:.5f}",
            f"{each.kl_max:.4f}",
            f"{each.agreement:.1%}",
        )
        for each in found.ranges
    ]
    whole = (
        "all",
        f"{found.scored_tokens:,}",
        figure(found.kl, found.kl_interval, 6),
        f"{found.kl_p99:.5f}",
        f"{found.kl_max:.4f}",
        share(found.agreement, found.agreement_interval),
    )
    columns = ("tokens before", "tokens", "KL(A || B)", "99th", "largest", "same top token")
    screen.print_table(columns, [*rows, whole], gap=True)
    places = [
        (
            f"{each.kl:.3f}",
            f"{each.window}:{each.position}",
            one_line(each.context[-50:]),
            one_line(each.token),
            f"{one_line(each.reference_token)} {each.reference_probability:.0%}",
            f"{one_line(each.token_by_model)} {each.probability_by_model:.0%}",
        )
        for each in found.places
    ]
    screen.print_table(
        ("KL", "window:place", "after", "text", "A expects", "B expects"), places, gap=True
    )


def _show_answers(found: Answers) -> None:
    rows = [
        (
            str(index + 1),
            f"{each.tokens}" if each.at is None else f"{each.at}",
            "the same to the end" if each.at is None else one_line(each.before[-40:]),
            "" if each.at is None else one_line(each.a),
            "" if each.at is None else one_line(each.b),
        )
        for index, each in enumerate(found.partings)
    ]
    screen.print_table(("prompt", "same tokens", "after", "A says", "B says"), rows, gap=True)
    median = "" if found.median_at is None else f"; the median parts after {found.median_at:.0f}"
    screen.note(
        f"{found.same} of {found.prompts} greedy answers, of at most {found.asked_tokens} tokens, "
        f"are the same{median}"
    )


def _show_items(found: list[Flips]) -> None:
    rows = [
        (
            each.file,
            f"{each.items:,}",
            share(each.a.acc, each.a.acc_interval),
            share(each.b.acc, each.b.acc_interval),
            share(each.difference, each.difference_interval),
            f"{len(each.lost)} / {len(each.gained)}",
        )
        for each in found
    ]
    columns = ("items", "count", "acc of A", "acc of B", "B - A, paired", "lost / gained")
    screen.print_table(columns, rows, gap=True)


def one_line(text: str) -> str:
    """`text` with its line ends visible."""
    return text.replace("\n", "⏎").replace("\t", " ")

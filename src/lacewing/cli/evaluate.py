"""`lacewing eval`: how well a model predicts a text, answers items, and keeps to a reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lacewing.cli import screen
from lacewing.cli.screen import KV_HELP
from lacewing.errors import LacewingError, RequestError

if TYPE_CHECKING:
    from lacewing.quality import (
        Accuracy,
        Divergence,
        Interval,
        Needles,
        Perplexity,
        Retrieval,
        Scorer,
        Text,
    )

WINDOW_HELP = "Tokens predicted from nothing. Default: 2048, or the model's context."
CONTEXT_HELP = "Tokens read at once. Default: as window and needles need, 4096 for items."
LONG = 4096  # tokens that the engine's context has without being asked, where the model has them
ItemsOption = Annotated[
    list[Path] | None,
    typer.Option(
        help="JSONL file of multiple choice or LAMBADA items; repeat it.", show_default=False
    ),
]


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(help="Default: the demo model, where installed.", show_default=False),
    ] = None,
    perplexity: Annotated[
        Path | None, typer.Option(help="Text file (UTF-8) to predict.", show_default=False)
    ] = None,
    items: ItemsOption = None,
    needles: Annotated[
        Path | None,
        typer.Option(
            metavar="BOOK",
            help="Text file (UTF-8) to hide facts in, which are asked for at its end.",
            show_default=False,
        ),
    ] = None,
    needle_context: Annotated[
        int, typer.Option(min=2, help="Tokens of each item of --needles, the answer included.")
    ] = LONG,
    needle_count: Annotated[
        int, typer.Option(min=1, help="Needles; 10 at ten depths read a haystack once.")
    ] = 10,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Model to measure the divergence from, on the text of --perplexity.",
            show_default=False,
        ),
    ] = None,
    window: Annotated[int | None, typer.Option(min=2, help=WINDOW_HELP, show_default=False)] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many scored tokens.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first items of each file.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the confidence intervals and the needles.")
    ] = 0,
    format: Annotated[
        str, typer.Option(help="Weight format; auto: the file's own grid, where it has one.")
    ] = "auto",
    reference_format: Annotated[str, typer.Option(help="Of the reference.")] = "auto",
    torch: Annotated[
        bool,
        typer.Option(
            "--torch",
            help="Run a Hugging Face directory in PyTorch, in float32; --format packs its layers.",
        ),
    ] = False,
    threads: Annotated[int | None, typer.Option(help="Default: all usable cores.")] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help=CONTEXT_HELP, show_default=False)
    ] = None,
    kv: Annotated[
        str | None, typer.Option(help=f"{KV_HELP} Default: f16.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Perplexity of a text, accuracy on items, divergence from a reference.

    The text is cut into windows that do not overlap, each read from an empty context: a window of
    2048 tokens scores its last 2047. Where the model wants a beginning-of-sequence token, every
    window begins with it (2047 tokens of text, all of them scored). A last window that is not full
    is left out, unless it is the only one.

    Items are {"id", "query", "choices", "gold"} or {"id", "context", "target"}, one JSON object a
    line. A needle is found where each token of the right number is the most likely one; lp is the
    mean log-probability of a right number. Intervals hold 95 % of 1000 resampled figures.
    """
    from lacewing.kv.choice import DEFAULT_KV
    from lacewing.quality import Against, Needles, Text, read_items

    text = None if perplexity is None else Text.read(perplexity, window, max_tokens)
    files = [read_items(path, limit) for path in items or ()]
    book = None if needles is None else Needles.read(needles, needle_context, needle_count)
    if text is None and not files and book is None:
        raise typer.BadParameter("missing option: --perplexity, --items or --needles FILE")
    if reference is not None and text is None:
        raise RequestError("--reference needs a text to compare on", hint="add --perplexity FILE")
    if torch and kv is not None:
        raise RequestError("--kv is of the engine's cache, with --torch there is none")
    way = Way(torch, threads, kv or DEFAULT_KV, context or room_for(text, bool(files), book))
    subject = way.open(model, format)
    tasks: list[Any] = [*files, *([] if book is None else [book])]
    if text is not None and reference is not None:
        beside = way.open(reference, reference_format).scorer
        text = text.fitting(subject.scorer, beside)
        tasks.append(Against(beside, text))
    if text is not None:
        tasks.insert(0, text)
    results = run_tasks(subject.scorer, tasks, seed)
    if as_json:
        screen.print_json(screen.to_plain({**subject.told, **_as_dict(results)}))
        return
    _show(subject, results)


@dataclass(frozen=True)
class Subject:
    """A model that is judged, and what the output says of it."""

    scorer: Scorer
    told: dict[str, Any]


@dataclass(frozen=True)
class Way:
    """How models are opened: by the engine, or in PyTorch."""

    torch: bool = False
    threads: int | None = None
    kv: str = "f16"
    max_context: int | None = None

    def open(self, model: str | None, format: str) -> Subject:
        return self._in_torch(model, format) if self.torch else self._in_engine(model, format)

    def _in_engine(self, model: str | None, format: str) -> Subject:
        from lacewing.cli.opening import open_llm
        from lacewing.engine.scorer import LLMScorer

        opened = open_llm(model, format, self.threads, self.kv, max_context=self.max_context)
        told = {"model": str(opened.path), **opened.size(), "kv": self.kv}
        return Subject(LLMScorer(opened.llm, opened.path.name), told)

    def _in_torch(self, model: str | None, format: str) -> Subject:
        try:
            from lacewing.nn.opening import set_threads
            from lacewing.nn.scorer import open_scorer
        except ImportError as error:
            raise LacewingError(
                f"`lacewing eval --torch` needs PyTorch: {error}",
                hint="pip install 'lacewing[torch]'",
            ) from error
        if model is None:
            raise RequestError("--torch needs a model", hint="name a Hugging Face directory")
        set_threads(self.threads)
        own = format == "auto"
        with screen.progress(f"opening {model}"):
            scorer = open_scorer(Path(model), None if own else format, self.max_context)
        return Subject(scorer, {"model": model, "format": "torch float32" if own else format})


def run_tasks(scorer: Scorer, tasks: list[Any], seed: int, title: str = "scoring") -> list[Any]:
    """Behind a bar."""
    from lacewing import quality

    with screen.progress(title) as advance:
        return quality.evaluate(scorer, tasks, seed, advance)


def room_for(text: Text | None, others: bool, needles: Needles | None = None) -> int | None:
    """Tokens of a sequence: what text and needles need; as many as usual, where the text does not
    say or the needs of others (items, prompts) are not known yet."""
    needs = [] if needles is None else [needles.context]
    if text is not None and text.window is not None:
        needs.append(text.window)
    known = not others and (text is None or text.window is not None)
    room = max(needs, default=0)
    return room if room and (known or room > LONG) else None


# -- What is printed ------------------------------------------------------------------------------


def _as_dict(results: list[Any]) -> dict[str, Any]:
    """The perplexity's figures at the top, as ever; the rest below names of their own."""
    from lacewing.quality import Accuracy, Divergence, Perplexity, Retrieval

    found: dict[str, Any] = {}
    for result in results:
        if isinstance(result, Perplexity):
            found = {**result.to_dict(), **found}
        elif isinstance(result, Accuracy):
            found.setdefault("items", []).append(result.to_dict())
        elif isinstance(result, Divergence):
            found["divergence"] = result.to_dict()
        elif isinstance(result, Retrieval):
            found["needles"] = result.to_dict()
    return found


def _show(subject: Subject, results: list[Any]) -> None:
    from lacewing.quality import Accuracy, Divergence, Perplexity, Retrieval

    told = subject.told
    bits = f", {told['bits_per_weight']:.2f} bits per weight" if "bits_per_weight" in told else ""
    pairs = [("model", Path(told["model"]).name), ("format", told["format"] + bits)]
    if "kv" in told:
        pairs.append(("KV cache", told["kv"]))
    for result in results:
        if isinstance(result, Perplexity):
            pairs += _perplexity_lines(result)
        elif isinstance(result, Divergence):
            pairs += _divergence_lines(result)
        elif isinstance(result, Retrieval):
            pairs += _needle_lines(result)
    screen.print_pairs([*pairs, ("intervals", intervals(results[0].seed))])
    files = [result for result in results if isinstance(result, Accuracy)]
    if files:
        screen.print_table(_ACCURACY_COLUMNS, [_accuracy_row(each) for each in files], gap=True)
    for result in results:
        if isinstance(result, Retrieval):
            rows = [
                (f"{each.depth:.0%}", str(each.needles), str(each.found), f"{each.log_prob:.3f}")
                for each in result.depths
            ]
            screen.print_table(("depth", "needles", "found", "lp"), rows, gap=True)


def intervals(seed: int) -> str:
    """What the brackets hold."""
    from lacewing.quality.bootstrap import CONFIDENCE, RESAMPLES

    return f"[{CONFIDENCE:.0%} of {RESAMPLES} resampled figures], seed {seed}"


_ACCURACY_COLUMNS = ("items", "count", "scored tokens", "acc", "acc_norm", "target perplexity")


def _accuracy_row(found: Accuracy) -> tuple[str, ...]:
    return (
        found.file,
        f"{found.items:,}",
        f"{found.scored_tokens:,}",
        share(found.acc, found.acc_interval),
        "-" if found.acc_norm is None else share(found.acc_norm, found.acc_norm_interval),
        "-" if found.perplexity is None else figure(found.perplexity, found.perplexity_interval),
    )


def _perplexity_lines(found: Perplexity) -> Iterator[tuple[str, str]]:
    yield "perplexity", figure(found.perplexity, found.interval)
    yield "total", f"{found.nll:,.2f} nats"
    yield (
        "scored tokens",
        f"{found.scored_tokens:,} in {found.windows} windows of {found.window}; "
        f"resampled: {found.resampled}",
    )


def _needle_lines(found: Retrieval) -> Iterator[tuple[str, str]]:
    share_found = share(found.found / found.needles, found.found_interval)
    yield "needles", f"found {found.found} of {found.needles}, {share_found}"
    yield "lp of needles", f"{figure(found.log_prob, found.log_prob_interval)} nats"
    yield "haystacks", f"{found.context:,} tokens of {found.text}"


def _divergence_lines(found: Divergence) -> Iterator[tuple[str, str]]:
    yield "reference", f"{found.reference}, perplexity {found.reference_perplexity:.4f}"
    ratio = figure(found.perplexity_ratio, found.perplexity_ratio_interval, 5)
    yield "perplexity ratio", f"{ratio}, paired"
    yield "KL(reference || model)", f"{figure(found.kl, found.kl_interval, 6)} nats"
    yield (
        "KL of tokens",
        f"median {found.kl_median:.6f}, 99th percentile {found.kl_p99:.5f}, "
        f"largest {found.kl_max:.4f}",
    )
    yield "same top token", share(found.agreement, found.agreement_interval)
    yield "compared tokens", f"{found.scored_tokens:,} in {found.windows} windows of {found.window}"


def figure(value: float, interval: Interval | None, digits: int = 4) -> str:
    """`12.3456 [12.1, 12.6]`."""
    spread = "" if interval is None else f" [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"
    return f"{value:.{digits}f}{spread}"


def share(value: float, interval: Interval | None) -> str:
    """`52.4% [48.0, 56.6]`."""
    spread = "" if interval is None else f" [{interval.low:.1%}, {interval.high:.1%}]"
    return f"{value:.1%}{spread}"

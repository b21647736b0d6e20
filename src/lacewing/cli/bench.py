"""`lacewing bench`: decode and prefill rates of a model, and the kernels one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lacewing.cli import screen
from lacewing.cli.screen import KV_HELP
from lacewing.errors import RequestError

if TYPE_CHECKING:
    from lacewing import LLM
    from lacewing.cli.kernels import KernelTime

app = typer.Typer(
    help="Measure decode, prefill or the kernels on this machine.", no_args_is_help=True
)

Model = Annotated[str | None, typer.Argument(help="Default: the demo model, where installed.")]
Format = Annotated[str, typer.Option("--format", help="Format to run in.")]
Threads = Annotated[int | None, typer.Option(max=1024, help="Default: all usable cores.")]
Repeats = Annotated[int, typer.Option(min=1, help="Runs; the median counts.")]
Batch = Annotated[int, typer.Option(min=1, help="Prompts decoded together.")]
Kv = Annotated[str, typer.Option("--kv", help=KV_HELP)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def decode(
    model: Model = None,
    format: Format = "auto",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 128,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 16,
    batch: Batch = 1,
    repeats: Repeats = 5,
    threads: Threads = None,
    kv: Kv = "f16",
    as_json: Json = False,
) -> None:
    """Tokens per second while generating, after the first token."""
    _bench_model(
        "decode", model, format, threads, kv, repeats, as_json, prompt_tokens, tokens, batch
    )


@app.command()
def prefill(
    model: Model = None,
    format: Format = "auto",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    batch: Batch = 1,
    repeats: Repeats = 5,
    threads: Threads = None,
    kv: Kv = "f16",
    as_json: Json = False,
) -> None:
    """Prompt tokens per second, up to the first token."""
    _bench_model("prefill", model, format, threads, kv, repeats, as_json, tokens, 1, batch)


@app.command()
def kernels(
    format: Annotated[
        list[str] | None, typer.Option("--format", help="A format; repeat it. Default: all.")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="NxK, outputs by inputs; repeat it.")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", "-m", min=1, help="Tokens at once.")] = 1,
    threads: Threads = None,
    isa: Annotated[str | None, typer.Option(help="Instruction set; default: the best.")] = None,
    sparsity: Annotated[float, typer.Option(min=0, max=0.99, help="Zeros in _sp formats.")] = 0.5,
    seconds: Annotated[float, typer.Option(min=0.01, help="Seconds per row.")] = 0.5,
    as_json: Json = False,
) -> None:
    """Every format's linear layer, read from memory: GB/s and share of the read bandwidth."""
    from lacewing import formats
    from lacewing.cli import kernels as timing
    from lacewing.cli.doctor import measure_bandwidth
    from lacewing.native import check_isa, check_threads, compiled

    check_isa(isa)
    check_threads(threads)
    shapes = [_parse_shape(text) for text in shape or ["4096x4096"]]
    names = [formats.get_format(name).name for name in format or formats.FORMATS]
    used = threads or compiled().threads()
    roof = measure_bandwidth(seconds, used)[used]
    at = timing.Conditions(rows, used, isa or compiled().default_isa(), seconds, sparsity)
    found = []
    with screen.progress("kernels") as advance:
        for row in timing.measure(names, shapes, at):
            found.append(row)
            advance(len(found), len(names) * len(shapes), row.format)
    roof = max(roof, measure_bandwidth(seconds, used)[used])  # a busy moment only lowers it
    if as_json:
        measured = [{**row.as_dict(), "bandwidth_share": row.gb_s / roof} for row in found]
        conditions = {**vars(at), "read_bandwidth_gb_s": roof}
        screen.print_json({"conditions": conditions, "kernels": measured})
    else:
        _show_kernels(found, at.isa, used, roof)


def _parse_shape(text: str) -> tuple[int, int]:
    n, _, k = text.lower().partition("x")
    if not (n.isdecimal() and k.isdecimal() and int(n) and int(k)):
        raise typer.BadParameter(f"--shape: needs NxK such as 4096x11008, got `{text}`")
    return int(n), int(k)


def _show_kernels(found: list[KernelTime], isa: str, threads: int, roof: float) -> None:
    screen.note(f"{isa}, {threads} threads, memory reads {roof:.1f} GB/s")
    dense = {(row.n, row.k): row.seconds for row in found if row.format == "bf16"}
    rows = [
        (
            row.format,
            f"{row.n}x{row.k}",
            row.m,
            f"{row.bits_per_weight:.2f}",
            f"{row.seconds * 1e6:.0f}",
            f"{row.gb_s:.1f}",
            f"{row.gb_s / roof:.0%}",
            f"{dense[row.n, row.k] / row.seconds:.2f}" if (row.n, row.k) in dense else "-",
        )
        for row in found
    ]
    columns = ("format", "shape", "m", "bits/weight", "us", "GB/s", "of memory", "x bf16")
    screen.print_table(columns, rows)


def _bench_model(
    what: str,
    model: str | None,
    format: str,
    threads: int | None,
    kv: str,
    repeats: int,
    as_json: bool,
    prompt_tokens: int,
    tokens: int,
    batch: int,
) -> None:
    from lacewing.cli.opening import open_llm

    opened = open_llm(model, format, threads, kv)
    room = opened.llm.max_context
    if prompt_tokens + tokens > room:
        raise RequestError(
            f"prompt and answer must fit into the context of {room} tokens, "
            f"got {prompt_tokens} + {tokens}"
        )
    rates = []
    with screen.progress(what) as advance:
        for turn in range(repeats + 1):  # the first run warms up and is not counted
            rates.append(_rate(opened.llm, what, prompt_tokens, tokens, batch))
            advance(turn + 1, repeats + 1)
    counted = sorted(rates[1:])
    median = counted[len(counted) // 2]
    roof = opened.read_bandwidth
    found: dict[str, Any] = {
        "bench": what,
        "model": str(opened.path),
        **opened.size(),
        "threads": opened.threads,
        "isa": opened.isa,
        "kv": kv,
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "tokens_per_s": median,
        "tokens_per_s_runs": rates[1:],
        "read_bandwidth_gb_s": roof,
    }
    if what == "decode":
        found["bandwidth_share"] = opened.share(median / batch)
    if as_json:
        screen.print_json(screen.to_plain(found))
    else:
        _show_rate(found, counted)


def _rate(llm: LLM, what: str, prompt_tokens: int, tokens: int, batch: int) -> float:
    """Tokens per second of one run: over the whole batch."""
    from lacewing import SamplingParams

    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    vocabulary = llm.spec.vocab_size  # any tokens will do; other ones for each prompt
    prompts = [
        [(100 + 7 * position + 13 * row) % vocabulary for position in range(prompt_tokens)]
        for row in range(batch)
    ]
    results = llm.generate(prompts, params)
    timings = [result.timings for result in results]
    if what == "prefill":
        return batch * prompt_tokens / max(timing.ttft for timing in timings)
    return sum(timing.tokens_per_second for timing in timings)


def _show_rate(found: dict[str, Any], counted: list[float]) -> None:
    pairs = [
        ("model", found["model"]),
        ("format", f"{found['format']}, {found['bits_per_weight']:.2f} bits per weight"),
        ("bytes", screen.bytes_text(found["bytes"])),
        ("on", f"{found['isa']}, {found['threads']} threads"),
        ("rate", f"{found['tokens_per_s']:.1f} tokens/s (runs {counted[0]:.1f}-{counted[-1]:.1f})"),
    ]
    if "bandwidth_share" in found:
        share, roof = found["bandwidth_share"], found["read_bandwidth_gb_s"]
        pairs.append(("memory", f"{share:.0%} of the {roof:.1f} GB/s that this machine reads"))
    screen.print_pairs(pairs)

"""`lacewing bench`: rates of a model, the kernels one by one, a PyTorch model beside itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lacewing.cli import screen
from lacewing.cli.screen import KV_HELP
from lacewing.errors import RequestError

if TYPE_CHECKING:
    from lacewing import LLM
    from lacewing.cli.kernelreport import Roofs
    from lacewing.cli.kernels import KernelTime, Plan
    from lacewing.cli.tune import Crossing

app = typer.Typer(
    help="Measure decode, prefill, the kernels or a PyTorch model on this machine.",
    no_args_is_help=True,
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
    rows: Annotated[
        list[int] | None, typer.Option("--rows", "-m", min=1, help="Tokens at once; repeat it.")
    ] = None,
    threads: Threads = None,
    isa: Annotated[
        list[str] | None, typer.Option(help="Instruction set; repeat it. Default: the best.")
    ] = None,
    sparsity: Annotated[
        list[float] | None,
        typer.Option(min=0, max=0.99, help="Share of zeros in sparse formats; repeat it."),
    ] = None,
    hot: Annotated[bool, typer.Option("--hot", help="Leave the weights in the caches.")] = False,
    rivals: Annotated[
        bool, typer.Option(help="PyTorch beside ours, where it is installed.")
    ] = True,
    seconds: Annotated[float, typer.Option(min=0.01, help="Seconds per row.")] = 0.5,
    svg: Annotated[Path | None, typer.Option(help="Draw a roofline plot into this file.")] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure which kernel suits which m here; keep it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Every format's linear layer, read from memory, against this machine's roofs."""
    from lacewing import formats
    from lacewing.cli import kernels as timing
    from lacewing.cli import memory
    from lacewing.native import check_isa, check_threads, compiled

    for each in isa or (None,):
        check_isa(each)
    check_threads(threads)
    used = threads or compiled().threads()
    names = tuple(
        dict.fromkeys(formats.get_format(name).name for name in format or formats.FORMATS)
    )
    if tune:
        _tune(names, tuple(isa or ()), used, as_json)
        return
    plan = timing.Plan(
        names,
        tuple(dict.fromkeys(_parse_shape(text) for text in shape or ["4096x4096"])),
        tuple(dict.fromkeys(rows or [1])),
        tuple(dict.fromkeys(isa or [compiled().default_isa()])),
        tuple(dict.fromkeys(sparsity or [0.5])),
        used,
        seconds,
        hot,
        memory.cold_bytes(),
    )
    _measure_kernels(plan, rivals, svg, as_json)


@app.command(name="torch")
def pytorch(
    model: Annotated[
        str, typer.Argument(help="A Hugging Face directory, or `module:function` of your own.")
    ],
    format: Annotated[str, typer.Option("--format", help="Format of the layers.")] = "w8a8g64",
    sparsity: Annotated[
        float | None, typer.Option(min=0, max=0.99, help="Share of weights to drop first.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Only layers of this pattern; repeat it.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="No layers of this pattern; repeat it.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the dense model: bf16, f32 or f16.")] = "bf16",
    batch: Annotated[int, typer.Option(min=1, help="Sequences, or images.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Of the input, per sequence.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=0, help="To generate.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the median counts.")] = 5,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """A PyTorch model against itself with its linear layers replaced, in turn."""
    from lacewing.cli import dropin

    options = {"include": include, "exclude": exclude or ()}
    work = {"batch": batch, "tokens": tokens, "new_tokens": new_tokens}
    dropin.measure(model, format, sparsity, options, dtype, work, rounds, threads, as_json)


def _measure_kernels(plan: Plan, wanted: bool, svg: Path | None, as_json: bool) -> None:
    from lacewing.cli import kernels as timing
    from lacewing.cli import rivals
    from lacewing.cli.kernelreport import Roofs

    there = wanted and rivals.installed()
    without = "torch is not installed here: no rivals beside ours" if wanted else "no rivals: asked"
    timing.check_memory(plan, len(rivals.Torch.kinds) if there else 0)
    _check_writable(svg)
    with ExitStack() as stack:
        others = [stack.enter_context(rivals.Torch(plan.threads))] if there else []
        roofs = Roofs.measure(plan.isas, plan.threads, plan.seconds)
        with screen.progress("kernels") as advance:
            found = list(timing.measure(plan, others, advance))
        roofs = roofs.raised(Roofs.measure(plan.isas, plan.threads, plan.seconds))
        _report(plan, found, roofs, others, without, as_json)
    if svg:
        from lacewing.cli.roofline import draw
        from lacewing.native import compiled

        state = "hot" if plan.hot else "weights from memory"
        threads = "1 thread" if plan.threads == 1 else f"{plan.threads} threads"
        title = f"{compiled().cpu_info()['model']}, {threads}, {state}"
        svg.write_text(draw(found, roofs, title), encoding="utf-8")
        screen.note(f"roofline: {svg}")


def _report(
    plan: Plan,
    found: list[KernelTime],
    roofs: Roofs,
    others: Sequence[Any],
    without: str,
    as_json: bool,
) -> None:
    from lacewing.cli import kernelreport

    if as_json:
        conditions = kernelreport.conditions(plan, roofs, others)
        rows = kernelreport.as_json(found, roofs)
        screen.print_json({"conditions": conditions, "kernels": rows})
        return
    for line in kernelreport.notes(plan, roofs, others, without):
        screen.note(line)
    if not plan.hot and kernelreport.roof_is_doubtful(found, roofs):
        screen.note("products read faster than the roof: the machine was busy, measure again")
    kernelreport.show(found, roofs)


def _check_writable(path: Path | None) -> None:
    """Before minutes of measuring, not after."""
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"--svg: {path.absolute().parent} is no directory")


def _prefetching(row: Crossing) -> tuple[str, str, str]:
    if row.unprefetched is None:
        return "-", "-", f"{row.gemv[0] * 1e6:.0f}"
    by = ("software", "CPU")
    times = f"{row.gemv[0] * 1e6:.0f} / {row.unprefetched * 1e6:.0f}"
    return by[row.cpu_prefetch_rows], by[row.default_prefetch], times


def _tune(names: tuple[str, ...], isas: tuple[str, ...], threads: int, as_json: bool) -> None:
    from lacewing import tuning
    from lacewing.cli import memory, tune
    from lacewing.native import compiled

    tuning.own_path()  # an error before the work, not after
    # The scalar kernels are for checking: nobody waits for them. `amx` has the switches of `avx512`
    # and would measure tiles against themselves.
    usable = [each["name"] for each in compiled().isas() if each["usable"]]
    chosen = isas or tuple(n for n in usable if n not in ("scalar", "amx_emulated", "amx"))
    with screen.progress("tuning") as advance:
        found = tune.measure(names, chosen, threads, memory.cold_bytes(), 3, advance)
    table = tune.as_tuning(found)
    place = tuning.write(table, compiled())
    tuning.apply(table, compiled())
    if as_json:
        screen.print_json({"file": str(place), **table, "measured": [vars(row) for row in found]})
        return
    screen.print_table(
        (
            "format",
            "isa",
            "gemv up to m",
            "default",
            "m=8: gemv / gemm us",
            "m=1 prefetched by",
            "default",
            "software / CPU us",
        ),
        [
            (
                row.format,
                row.isa,
                row.rows,
                row.default,
                f"{row.gemv[-1] * 1e6:.0f} / {row.gemm[-1] * 1e6:.0f}",
                *_prefetching(row),
            )
            for row in found
        ],
    )
    screen.note(f"kept in {place}")


def _parse_shape(text: str) -> tuple[int, int]:
    n, _, k = text.lower().partition("x")
    if not (n.isdecimal() and k.isdecimal() and int(n) and int(k)):
        raise typer.BadParameter(f"--shape: needs NxK such as 4096x11008, got `{text}`")
    return int(n), int(k)


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

"""`lacewing doctor`: what this CPU and container really offer, by trying it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Annotated, Any

import typer

from lacewing.cli import screen
from lacewing.errors import UnsupportedCpuError

PYTHON = (sys.executable,)

# What a model reads per token (weights of every layer and the head), for the last table.
USUAL_MODELS = (
    ("SmolLM2-135M, w4a8g32z", 98_000_000),
    ("Llama-3.2-1B, w4a8g32", 780_000_000),
    ("Llama-3.2-1B, w8a8g64", 1_280_000_000),
    ("Llama-3.2-1B, bf16", 2_470_000_000),
    ("Llama-3.1-8B, w4a8g32", 4_700_000_000),
)


def doctor(
    model_bytes: Annotated[
        str | None,
        typer.Option(help="Bytes that a model reads per token (98M, 1.2G): the rate it can reach."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Seconds per bandwidth figure.")] = 0.5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what this CPU and container really offer: ISAs, threads, memory bandwidth."""
    wanted = _parse(model_bytes)
    found = examine(seconds, wanted)
    if as_json:
        screen.print_json(screen.to_plain(found))
    else:
        _show(found)


def _parse(model_bytes: str | None) -> int | None:
    if model_bytes is None:
        return None
    try:
        return screen.parse_bytes(model_bytes)
    except ValueError:
        raise typer.BadParameter(
            f"--model-bytes: needs a positive size such as 98M or 1.2G, got `{model_bytes}`"
        ) from None


def examine(seconds: float, model_bytes: int | None = None) -> dict[str, Any]:
    """Everything that `doctor` knows, as plain values; bandwidth in GB/s."""
    from lacewing.native import compiled

    native = compiled()
    problem = forced_isa_problem()
    bandwidth = measure_bandwidth(seconds)
    best = max(bandwidth.values())
    models = [("this model", model_bytes)] if model_bytes else list(USUAL_MODELS)
    return {
        "cpu": native.cpu_info(),
        "isas": [isa_state(isa) for isa in native.isas()],
        "default_isa": None if problem else native.default_isa(),
        "problem": problem,
        "threads": native.threads(),
        "read_bandwidth_gb_s": {str(threads): rate for threads, rate in bandwidth.items()},
        "reach": [
            {"model": name, "bytes": count, "tokens_per_s": best * 1e9 / count}
            for name, count in models
        ],
    }


def forced_isa_problem() -> str | None:
    """What is wrong with LACEWING_ISA, if anything; the rest is still worth telling."""
    from lacewing.native import check_isa

    try:
        check_isa()
    except UnsupportedCpuError as error:
        return str(error)
    return None


def probe_command(isa: str) -> list[str]:
    return [*PYTHON, "-m", "lacewing.cli.probe", isa]


def isa_state(isa: dict[str, Any]) -> dict[str, Any]:
    """The CPU's word for an ISA, and what happened when its kernels ran."""
    if not isa["usable"]:
        return {"name": isa["name"], "runs": False, "why": f"lacks {isa['missing']}"}
    try:
        probe = subprocess.run(
            probe_command(isa["name"]), capture_output=True, text=True, timeout=60, check=False
        )
    except subprocess.TimeoutExpired:
        return {"name": isa["name"], "runs": False, "why": "the kernels did not end in 60 s"}
    if probe.returncode < 0:
        name = signal.Signals(-probe.returncode).name
        return {"name": isa["name"], "runs": False, "why": f"the CPU names it, running it: {name}"}
    if probe.returncode:
        last = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        return {"name": isa["name"], "runs": False, "why": last}
    formats = json.loads(probe.stdout)["formats"]
    wrong = [name for name, state in formats.items() if state != "ok"]
    why = f"wrong results: {', '.join(wrong)}" if wrong else f"{len(formats)} formats checked"
    if isa.get("emulated"):
        why += "; for tests, slow"
    return {"name": isa["name"], "runs": not wrong, "why": why}


def measure_bandwidth(seconds: float, threads: int | None = None) -> dict[int, float]:
    """GB/s read from memory with 1..N threads (or with `threads` alone), fastest ISA."""
    from lacewing.cli import memory
    from lacewing.native import compiled

    native = compiled()
    size = memory.cold_bytes()
    fastest = [isa["name"] for isa in native.isas() if isa["usable"]][-1]
    counts = [threads] if threads else range(1, native.threads() + 1)
    return {count: native.read_bandwidth(size, count, fastest, seconds) for count in _steps(counts)}


def _steps(counts: Any) -> list[int]:
    """Every count up to 4, then powers of two and the last: enough to see the knee."""
    known = list(counts)
    return [c for c in known if c <= 4 or c == known[-1] or c & (c - 1) == 0]


def _show(found: dict[str, Any]) -> None:
    screen.print_pairs(_cpu_lines(found))
    screen.print_table(
        ("instruction set", "runs", ""),
        [
            (
                isa["name"] + (" (default)" if isa["name"] == found["default_isa"] else ""),
                "yes" if isa["runs"] else "no",
                isa["why"],
            )
            for isa in found["isas"]
        ],
        gap=True,
    )
    screen.print_table(
        ("threads", "reads GB/s"),
        [(count, f"{rate:.1f}") for count, rate in found["read_bandwidth_gb_s"].items()],
        gap=True,
    )
    screen.print_table(
        ("a model that reads per token", "bytes", "reaches at most, tokens/s"),
        [
            (row["model"], screen.bytes_text(row["bytes"]), f"{row['tokens_per_s']:.1f}")
            for row in found["reach"]
        ],
        gap=True,
    )


def _cpu_lines(found: dict[str, Any]) -> list[tuple[str, object]]:
    cpu = found["cpu"]
    names = [name for name, present in cpu["features"].items() if present]
    caches = [f"{level.upper()} {_binary(size)}" for level, size in cpu["caches"].items() if size]
    lines: list[tuple[str, object]] = [
        ("cpu", cpu["model"]),
        ("features", " ".join(names)),
        ("AMX", amx_state(cpu)),
        ("caches", ", ".join(caches) or "unknown"),
        ("threads", f"{found['threads']} by default ({_limits(cpu)})"),
        ("huge pages", f"transparent huge pages: {cpu['transparent_huge_pages']}"),
    ]
    if found["problem"]:
        lines.append(("LACEWING_ISA", found["problem"]))
    return lines


def amx_state(cpu: dict[str, Any]) -> str:
    """Why AMX can or cannot be used, as far as this process may know."""
    if not cpu["features"]["amx_tile"]:
        return "no: not in this CPU"
    if not cpu["os_state"]["amx"]:
        return "no: the operating system does not save tile registers (XCR0)"
    return "permitted" if cpu["amx_permitted"] else "no: the kernel refuses permission (arch_prctl)"


def _limits(cpu: dict[str, Any]) -> str:
    affinity, quota = cpu["affinity"], cpu["quota"]
    limit = f"{quota:.3g} CPUs" if quota else "none"
    return f"{cpu['cores']} cores; affinity: {_ranges(affinity)}; cgroup quota: {limit}"


def _ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2,5`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _binary(size: int) -> str:
    return f"{size >> 20} MiB" if size >> 20 else f"{size >> 10} KiB"

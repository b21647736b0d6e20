"""What `lacewing bench kernels` shows: shares of this machine's roofs, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lacewing.cli import screen
from lacewing.cli.kernels import LEAST_COLD, KernelTime, Plan
from lacewing.cli.memory import last_level_cache
from lacewing.native import compiled

KINDS = ("int8", "float")


@dataclass
class Roofs:
    """What this machine can do with `threads` threads, measured by the same module."""

    threads: int
    bandwidth: float  # GB/s read from memory
    peaks: dict[str, dict[str, float]]  # GOP/s by ISA, then kind

    @classmethod
    def measure(cls, isas: Sequence[str], threads: int, seconds: float) -> Roofs:
        from lacewing.cli.doctor import measure_bandwidth

        native = compiled()
        peaks = {
            isa: {kind: native.compute_peak(kind, isa, threads, seconds / 4) for kind in KINDS}
            for isa in isas
        }
        return cls(threads, measure_bandwidth(seconds, threads)[threads], peaks)

    def raised(self, other: Roofs) -> Roofs:
        """The higher of two measurements: a busy moment only lowers one."""
        peaks = {
            isa: {kind: max(rate, other.peaks[isa][kind]) for kind, rate in rates.items()}
            for isa, rates in self.peaks.items()
        }
        return Roofs(self.threads, max(self.bandwidth, other.bandwidth), peaks)

    def bandwidth_share(self, row: KernelTime) -> float:
        return row.gb_s / self.bandwidth

    def peak_share(self, row: KernelTime) -> float | None:
        """Of its ISA's peak for such products; None for rivals, whose instructions are theirs."""
        return None if row.isa is None else row.gop_s / self.peaks[row.isa][row.peak]


def conditions(plan: Plan, roofs: Roofs, rivals: Sequence[Any]) -> dict[str, Any]:
    return {
        "cpu": compiled().cpu_info()["model"],
        "threads": plan.threads,
        "isas": list(plan.isas),
        "seconds_per_row": plan.seconds,
        "hot": plan.hot,
        "working_set_bytes": 0 if plan.hot else plan.working_set,
        "last_level_cache_bytes": last_level_cache(),
        "read_bandwidth_gb_s": roofs.bandwidth,
        "peak_gop_s": roofs.peaks,
        "torch": rivals[0].version if rivals else None,
    }


def notes(plan: Plan, roofs: Roofs, rivals: Sequence[Any], no_rivals: str) -> list[str]:
    """What must be said beside the table, a line each."""
    cache = last_level_cache()
    lines = [f"{plan.threads} threads; memory reads {roofs.bandwidth:.1f} GB/s"]
    for isa, rates in roofs.peaks.items():
        lines.append(f"{isa}: int8 {rates['int8']:.0f} GOP/s, float {rates['float']:.0f} GOP/s")
    if plan.hot:
        lines.append("hot: one copy of each weight, in the caches as far as it fits")
    else:
        times = plan.working_set / cache
        lines.append(
            f"cold: weights rotated through {screen.bytes_text(plan.working_set)},"
            f" {times:.1f} x the last-level cache of {screen.bytes_text(cache)}"
        )
        if times < LEAST_COLD:
            lines.append("more does not fit into the free memory: figures may hold cache hits")
    lines.append(rivals[0].note if rivals else no_rivals)
    return lines


def roof_is_doubtful(found: Sequence[KernelTime], roofs: Roofs) -> bool:
    """Whether a product with cold weights read clearly faster than the roof."""
    return any(roofs.bandwidth_share(row) > 1.1 for row in found)


def as_json(found: Sequence[KernelTime], roofs: Roofs) -> list[dict[str, Any]]:
    return [
        {
            **row.as_dict(),
            "bandwidth_share": roofs.bandwidth_share(row),
            "peak_share": roofs.peak_share(row),
        }
        for row in found
    ]


def show(found: Sequence[KernelTime], roofs: Roofs) -> None:
    """The table. A ratio is to PyTorch's bf16 where that was measured, else to our own."""
    rival = any(row.format == "torch bf16" for row in found)
    base = {
        (row.n, row.k, row.m, None if rival else row.isa): row.seconds
        for row in found
        if row.format == ("torch bf16" if rival else "bf16")
    }
    columns = (
        "format", "isa", "shape", "m", "bits", "us", "spread", "GB/s", "of memory", "GOP/s",
        "of peak", "x torch bf16" if rival else "x bf16",
    )  # fmt: skip
    screen.print_table(columns, [_cells(row, roofs, base, rival) for row in found])


def _cells(row: KernelTime, roofs: Roofs, base: dict[Any, float], rival: bool) -> list[object]:
    share = roofs.peak_share(row)
    other = base.get((row.n, row.k, row.m, None if rival else row.isa))
    return [
        row.name,
        row.isa or "",
        f"{row.n}x{row.k}",
        row.m,
        f"{row.bits_per_weight:.2f}",
        f"{row.seconds * 1e6:.0f}",
        f"{row.spread:.0%}",
        f"{row.gb_s:.1f}",
        f"{roofs.bandwidth_share(row):.0%}",
        f"{row.gop_s:.0f}",
        "-" if share is None else f"{share:.0%}",
        f"{other / row.seconds:.2f}" if other else "-",
    ]

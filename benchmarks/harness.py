"""What the benchmarks share: workers, machine facts, statistics, result files, tables.

Every engine runs in a process of its own and blocks on a pipe while another is measured, so that
two thread pools never spin at the same time. Rounds go through all candidates in turn: a slow
minute of the machine hits each of them alike.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from lacewing.cli import worker
from lacewing.errors import LacewingError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


class Worker(worker.Worker):
    """One engine, run by `python`. What goes wrong with it ends the benchmark."""

    def __init__(self, python: Path | str, script: str) -> None:
        env = {**os.environ, "PYTHONPATH": str(ROOT / "src")} if script == OURS else None
        self.name = f"{python} {script}"
        super().__init__([str(python), str(HERE / script)], environment=env, quiet=True)

    @classmethod
    def lacewing(cls) -> Worker:
        return cls(sys.executable, OURS)

    @classmethod
    def llama(cls, python: Path | str) -> Worker:
        return cls(python, "worker_llama.py")

    def ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        try:
            return super().ask(verb, **arguments)
        except LacewingError as error:
            raise SystemExit(f"error: {self.name} at `{verb}`: {error}") from error


OURS = "worker_lacewing.py"


@dataclass
class Candidate:
    """One engine with one model file in one format, and what it measured."""

    engine: str  # "lacewing", or one of models.RIVALS
    format: str
    path: str
    worker: Worker
    weight_bytes: int = 0  # read once per decoded token
    load_seconds: float = 0.0
    values: list[float] = field(default_factory=list)  # tokens per second, a round each

    @property
    def name(self) -> str:
        return f"{self.engine} {self.format}"

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """(maximum - minimum) / median."""
        return (max(self.values) - min(self.values)) / self.median

    def row(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "format": self.format,
            "model": Path(self.path).name,
            "weight_bytes": self.weight_bytes,
            "load_seconds": round(self.load_seconds, 3),
            "median": round(self.median, 2),
            "min": round(min(self.values), 2),
            "max": round(max(self.values), 2),
            "spread": round(self.spread, 3),
            "rounds": [round(v, 2) for v in self.values],
        }


def lacewing(*arguments: str) -> dict[str, Any]:
    """What a verb of the command line prints with `--json`."""
    command = [sys.executable, "-m", "lacewing.cli", *arguments]
    path = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, check=False)
    if run.returncode:
        raise SystemExit(f"error: {' '.join(command)} ended with code {run.returncode}")
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def data(name: str) -> Path:
    """A file of the shared data."""
    folder = Path(os.environ.get("LACEWING_DATA", ROOT.parent / "shared" / "data"))
    path = folder / name
    if not path.exists():
        raise SystemExit(f"error: {path} is missing\nhint: set LACEWING_DATA")
    return path


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def token_ids(count: int, seed: int) -> list[int]:
    """A prompt of ordinary tokens; speed does not depend on what they say."""
    rng = random.Random(seed)
    return [rng.randrange(300, 40_000) for _ in range(count)]


def without_folders(kv: str) -> str:
    """`--kv` as records name it: a plan by its file, wherever that lies."""
    found = re.fullmatch(r"(.*[@:])(.+[.]json)", kv)
    return found[1] + Path(found[2]).name if found else kv


def machine(threads: int) -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "affinity": len(os.sched_getaffinity(0)),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


def cpu_model() -> str:
    """The model's name; family, model and stepping tell machines of one name apart."""
    facts: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        facts[key.strip()] = value.strip()
    numbers = [facts.get(key, "?") for key in ("cpu family", "model", "stepping")]
    return f"{facts.get('model name', platform.machine())} (family {'/'.join(numbers)})"


def slug(cpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-")


def commit() -> str:
    """The commit that was measured, with `+` when tracked files differ from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True,
                              text=True, check=True).stdout.strip()  # fmt: skip
        diff = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if diff else "")


def save(kind: str, record: dict[str, Any], threads: int) -> Path:
    """Adds the record under `kind.label` to results/<cpu>/<date>.json; other records stay."""
    facts = machine(threads)
    folder = HERE / "results" / slug(facts["cpu"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.date.today().isoformat()}.json"
    document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    stamp = time.strftime("%H:%M:%SZ", time.gmtime())
    key = f"{kind} {record['label']}" if "label" in record else kind
    document[key] = {"time": stamp, "commit": commit(), "machine": facts, **record}
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """Plain text on stdout, figures to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print(f"\n{title}")
    for row in [head, *rows]:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--label", default="", help="names the record in the results file")
    parser.add_argument("--no-save", action="store_true", help="only print")

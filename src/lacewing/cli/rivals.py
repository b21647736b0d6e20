"""PyTorch beside our kernels: bf16 `F.linear` and dynamic int8, in a process that sleeps on a pipe
while ours are measured, and the other way round."""

from __future__ import annotations

import importlib.util
import sys
import time
from dataclasses import dataclass

from lacewing.cli import screen
from lacewing.cli.kernels import Plan
from lacewing.cli.worker import Worker
from lacewing.errors import LacewingError

COMMAND = (sys.executable, "-m", "lacewing.cli.torch_worker")
# After a turn both pools spin before they sleep: OpenMP for some milliseconds, ours for less.
_PAUSE = 0.02


def installed() -> bool:
    """Whether torch can be imported here, without importing it."""
    return importlib.util.find_spec("torch") is not None


@dataclass
class TorchWeight:
    worker: Torch
    kind: str
    k: int
    bytes: int
    sparsity: float | None = None

    @property
    def engine(self) -> str:
        return "torch"

    @property
    def format(self) -> str:
        return f"torch {self.kind}"

    def isas(self, plan: Plan) -> tuple[str | None, ...]:
        return (None,)

    def time(self, m: int, isa: str | None, calls: int) -> list[float]:
        time.sleep(_PAUSE)
        found = self.worker.ask("measure", kind=self.kind, m=m, k=self.k, calls=calls)
        time.sleep(_PAUSE)
        times: list[float] = found["times"]
        return times


class Torch(Worker):
    """PyTorch's process."""

    kinds = ("bf16", "int8")

    def __init__(self, threads: int) -> None:
        super().__init__(COMMAND, hint="run without torch: --no-rivals")
        try:
            facts = self.ask("start", threads=threads)
        except BaseException:
            self.close()
            raise
        self.version = facts["version"]
        self.note = f"torch {self.version}: bf16 F.linear; dynamic int8 by {facts['engine']}"

    def weights(self, n: int, k: int, share: int) -> list[TorchWeight]:
        found = []
        for kind, size in (("bf16", 2 * n * k), ("int8", n * k)):
            try:
                self.ask("load", kind=kind, n=n, k=k, copies=max(1, -(-share // size)))
                self.ask("measure", kind=kind, m=1, k=k, calls=0)
            except LacewingError as error:
                screen.note(f"torch {kind} {n}x{k} is left out: {error}")
            else:
                found.append(TorchWeight(self, kind, k, size))
        return found

    def drop(self) -> None:
        self.ask("drop")

"""Healing: the compressed model learns from the dense one, with masks and grids as they are.

Every step makes W' of all masters, runs a few windows of text through the student, compares its
next-token distributions with those of the dense model (`divergence.py`), and moves the masters
along the straight-through gradient (`master.py`). The dense model reads every window once; its
hidden states wait on disk. Embedding and head stay as they are.

The directory `OUT.work` holds the state of an unfinished run, and goes away when OUT is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lacewing.checkpoint import Source, open_source
from lacewing.checkpoint.files import fail, new_directory
from lacewing.checkpoint.interrupts import uninterrupted
from lacewing.checkpoint.manifest import MANIFEST, PackedSource
from lacewing.compress import savepoint
from lacewing.compress.columns import Solution
from lacewing.compress.data import Windows, read_windows
from lacewing.compress.divergence import divergence
from lacewing.compress.fingerprint import fingerprint
from lacewing.compress.master import LowRank, Master, Trainer
from lacewing.compress.pair import check_pair
from lacewing.compress.recipe import Calibration
from lacewing.compress.rewrite import Packed, rewrite
from lacewing.compress.student import Student
from lacewing.compress.teacher import Teacher
from lacewing.compress.threads import torch_threads
from lacewing.errors import RecipeError

__all__ = ["Healed", "Healing", "Progress", "heal", "heal_windows"]

Progress = Callable[[float, str], None]
"""Called with every step: the share of the work that is done, and a line that says how it goes."""

_LOOKS = 2
"""How often the held-out windows are looked at, after the first time."""
_SAVE_EVERY = 180.0, 50.0
"""Seconds, and times as long as a save takes: at most two parts in a hundred."""
_BATCH = 1 << 10
"""Tokens that go through the student at once; a step adds up the gradients of several such."""
_WARM_UP = 20, 0.1
"""Steps, or share of the work if that is over earlier, in which the rate rises: the means of Adam
are of few gradients then, and its steps all of full length, in directions that are mostly noise."""
_RUN, _STATE = "run", "state.safetensors"
"""Files of `OUT.work`, beside those of the teacher and the best looks."""


@dataclass(frozen=True)
class Healing:
    """How to heal. steps: as many, bit-reproducible for one number of threads; or minutes: as long,
    all but the packing included, and no two runs are alike.

    rate: of Adam, in shares of the root mean square of each weight and norm (of what scales were
    multiplied by, of A and B where changes have a low rank: `Master.rates`); rises over the first
    steps, then falls to zero along a cosine. tokens: of one step. lora_rank: None trains every
    weight. learn_scales: scales, rounded to f16, are trained with the weights. mix: share of cross-
    entropy on the text in the loss. held_out: windows that are not trained on, and judge. bf16:
    whether matrix products run in bf16, twice as fast and more where the CPU has instructions for
    it; masters are f32 either way.
    """

    steps: int | None = None
    minutes: float | None = None
    rate: float = 5e-4
    tokens: int = 1024
    lora_rank: int | None = None
    learn_scales: bool = True
    mix: float = 0.0
    seed: int = 0
    held_out: int = 8
    bf16: bool = True

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise RecipeError("healing needs either `steps` or `minutes`, got both or neither")
        for name, low, high in (
            ("steps", 1, 10**9),
            ("minutes", 0, 10**6),
            ("rate", 0, 1),
            ("tokens", 1, 10**9),
            ("lora_rank", 1, 10**5),
            ("mix", 0, 1),
            ("held_out", 1, 10**6),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise RecipeError(f"`{name}` must be from {low} to {high}, got {value}")


@dataclass(frozen=True)
class Healed:
    """What healing did. before, after: KL to the dense model on held-out windows, nats per token;
    equal, with the model as it was, where healing did not help. steps_done: 0 where the minutes
    were over before. history: (step, seconds, KL) of every look at the held-out windows."""

    before: float
    after: float
    steps_done: int
    tokens_seen: int
    seconds: float
    history: tuple[tuple[int, float, float], ...]

    @property
    def helped(self) -> bool:
        return self.after < self.before


def heal(
    compressed: str | os.PathLike[str],
    dense: str | os.PathLike[str],
    out: str | os.PathLike[str],
    data: Sequence[str | os.PathLike[str]],
    healing: Healing,
    *,
    window: int = 512,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Healed:
    """`heal_windows` on all the text of the files `data` (`data.py` says which kinds), cut into
    windows of `window` tokens. dense: any model file. threads: of PyTorch; None leaves them."""
    student = open_source(compressed)
    if progress is not None:
        progress(0.0, "reading the text")
    found = _windows(student, data, window, healing.seed)
    teacher = open_source(dense)
    with torch_threads(threads):
        return heal_windows(
            student, teacher, Path(out), found, healing, force=force, progress=progress
        )


def _windows(
    source: Source, data: Sequence[str | os.PathLike[str]], window: int, seed: int
) -> Tensor:
    """Every whole window of every file."""

    def read(file: str | os.PathLike[str], count: int) -> Windows:
        wanted = Calibration(count * window, window, seed)
        return read_windows([file], source.tokenizer, source.spec.vocab_size, wanted)

    counts = {file: read(file, 1).files[0].tokens // window for file in data}
    found = [torch.from_numpy(read(file, max(1, n)).ids) for file, n in counts.items()]
    if not found:
        raise RecipeError("healing needs data, got no file", hint="name a text file: --data")
    return torch.cat(found)


def heal_windows(
    compressed: Source,
    dense: Source,
    out: Path,
    windows: Tensor,
    healing: Healing,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Healed:
    """Distils `dense` into `compressed` on `windows` of tokens, int64 `[count, T]`, into the new
    packed directory `out`, which appears complete or not at all.

    A run that was interrupted or killed goes on from what it saved in `OUT.work`, if it is started
    again with the same arguments; the rate alone may be another one. With steps the result is then
    the same, bit for bit.

    Raises RecipeError (models that do not belong together, data of another tokenizer or too little
    of it, divergence), CheckpointError (out exists or cannot be written, a damaged file).
    """
    out = Path(os.path.realpath(out))
    check_pair(compressed, dense)
    assert isinstance(compressed, PackedSource)
    _check_windows(windows, compressed, healing)
    work = out.with_name(f"{out.name}.work")
    identity = _identity(compressed, dense, windows, healing)
    with new_directory(out, MANIFEST, force) as place, _workplace(work, identity):
        run = _Run(compressed, dense, windows, healing, work, progress)
        run.train()
        found = run.best()
        replaced = run.packed() if found.helped else {}
        rewrite(compressed, place, replaced, {"healed": _notes(dense, windows, healing, found)})
    shutil.rmtree(work, ignore_errors=True)
    return found


def _notes(dense: Source, windows: Tensor, healing: Healing, found: Healed) -> dict[str, Any]:
    """What the manifest says of it. No times: the same healing writes the same bytes."""
    text = {"windows": len(windows), "window": windows.shape[1]}
    told = asdict(found) | {"history": [(step, loss) for step, _, loss in found.history]}
    del told["seconds"]
    return {"dense": dense.path.name, **text, **asdict(healing), **told}


class _Run:
    def __init__(
        self,
        compressed: PackedSource,
        dense: Source,
        windows: Tensor,
        healing: Healing,
        work: Path,
        progress: Progress | None,
    ) -> None:
        self.began = time.monotonic()
        self.healing, self.work, self.progress = healing, work, progress
        dtype = torch.bfloat16 if healing.bf16 else torch.float32
        self.source = compressed
        self.windows = windows[_shuffled(len(windows), healing.seed)]
        self.held_out = healing.held_out  # the first ones
        self.trained = len(windows) - self.held_out
        self.teacher = Teacher(dense, self.windows, work, dtype)
        self.student = Student(compressed, dense, self._master, dtype)
        self.trainer = Trainer(self.student.masters, self.student.norms().values())
        self.per_step = max(1, healing.tokens // windows.shape[1])
        self.order = (0, torch.arange(self.trained))
        self.step, self.spent = 0, 0.0
        self.started: float | None = None  # seconds before the first step
        self.looking = self.pace = 0.0  # seconds of a look, of a step
        self.history: list[tuple[int, float, float]] = []
        self._resume()
        self.student.write()
        self.saved, self.saving = time.monotonic(), 0.0

    def _master(
        self, solution: Solution, mask: Tensor | None, near: Tensor | None, index: int
    ) -> Master:
        rank, scales = self.healing.lora_rank, self.healing.learn_scales
        if rank is None:
            return Master(solution, mask, near, scales)
        return LowRank(solution, rank, self.healing.seed + index, mask, near, scales)

    # -- the loop ---------------------------------------------------------------------------------

    def train(self) -> None:
        try:
            while True:
                if self._due():
                    self._look()
                if self._over():
                    break
                self._advance()
                least, times = _SAVE_EVERY
                if time.monotonic() - self.saved > max(least, times * self.saving):
                    self._save()
            if self.history[-1][0] != self.step:
                self._look()
        except KeyboardInterrupt:
            self._save()
            raise

    def _due(self) -> bool:
        """Whether it is time for a look; follows from what a state holds, so that a run that was
        stopped in a look has the same ones."""
        if self.history and self.history[-1][0] == self.step:
            return False
        return self._share() * _LOOKS >= len(self.history)

    def _share(self) -> float:
        """How much of the work is done, from the first step on."""
        if self.healing.steps is not None:
            return self.step / self.healing.steps
        if self.started is None:
            return 0.0
        return min(1.0, (self._seconds() - self.started) / max(1e-9, self._limit() - self.started))

    def _over(self) -> bool:
        if self.healing.steps is not None:
            return self.step >= self.healing.steps
        return self._seconds() + self.pace > self._limit()

    def _limit(self) -> float:
        """Seconds: the minutes, less a last look at the held-out windows."""
        assert self.healing.minutes is not None
        return 60 * self.healing.minutes - self.looking

    def _seconds(self) -> float:
        return self.spent + time.monotonic() - self.began

    def _advance(self) -> None:
        """A step, unless time is up before the dense model has read what it needs."""
        picked = self._picked()
        self._read(picked)
        if self._over():
            return
        began = self._seconds()
        if self.started is None:
            self.started = began
        loss = self._gradients(picked)
        if not math.isfinite(loss):
            raise self._diverged()
        with uninterrupted():
            norm = self.trainer.step(self.healing.rate * _schedule(self.step, self._share()))
            if not math.isfinite(norm):
                raise self._diverged()
            self.student.write()
            self.step += 1
        self.pace = self._seconds() - began
        self._tell(f": KL {loss:.4f}")

    def _read(self, picked: Tensor, whatever_the_time: bool = False) -> None:
        """Has the dense model read the windows `picked`, as long as there is time."""
        for chunk in self.teacher.unread(picked):
            if self._over() and not whatever_the_time:
                return
            self._tell(": the dense model reads")
            self.teacher.read(chunk)

    def _gradients(self, picked: Tensor) -> float:
        """Adds up the gradients of a step on the windows `picked`; returns its loss."""
        total = 0.0
        for part in picked.split(max(1, _BATCH // self.windows.shape[1])):
            loss = self._loss(part, self.healing.mix) * (len(part) / len(picked))
            loss.backward()
            total += loss.item()
        return total

    def _loss(self, picked: Tensor, mix: float) -> Tensor:
        ids = self.windows[picked]
        target = self.teacher.hidden(picked).flatten(0, 1)
        hidden = self.student.hidden(ids).flatten(0, 1)
        following = F.pad(ids[:, 1:], (0, 1), value=-1).flatten()
        heads = self.student.head, self.teacher.head
        return divergence(hidden, heads[0], target, heads[1], following, mix)

    def _picked(self) -> Tensor:
        """The windows of this step: every one once, then every one again in another order."""
        first = self.step * self.per_step
        places = [divmod(first + j, self.trained) for j in range(self.per_step)]
        return torch.stack([self._order_of(epoch)[i] for epoch, i in places]) + self.held_out

    def _order_of(self, epoch: int) -> Tensor:
        if self.order[0] != epoch:
            self.order = (epoch, _shuffled(self.trained, self.healing.seed + epoch))
        return self.order[1]

    def _look(self) -> None:
        """KL on the held-out windows, and what is trained put aside if it is the best so far."""
        held = torch.arange(self.held_out)
        self._read(held, whatever_the_time=True)
        begin = time.monotonic()
        found = 0.0
        for part in held.split(max(1, _BATCH // self.windows.shape[1])):
            with torch.no_grad():
                found += self._loss(part, 0.0).item() * len(part) / len(held)
        if not math.isfinite(found):
            raise self._diverged()
        better = self.history and found < min(loss for _, _, loss in self.history)
        if better and not self._over():  # else it is what is in memory
            savepoint.save(self._kept(self.step), self.trainer.parameters, {})
        self.history.append((self.step, round(self._seconds(), 1), found))
        self.looking = self.looking or time.monotonic() - begin
        self._tell("")

    def _tell(self, text: str) -> None:
        if self.progress is not None:
            spent = self._seconds() - (self.started or 0.0)
            speed = f", {self.tokens() / max(1e-9, spent):.0f} tokens/s" if self.step else ""
            held = f", held out {self.history[-1][2]:.4f}" if self.history else ""
            self.progress(min(1.0, self._share()), f"step {self.step}{text}{held}{speed}")

    def tokens(self) -> int:
        """Tokens trained on, those of windows met again included."""
        return self.step * self.per_step * self.windows.shape[1]

    def _diverged(self) -> RecipeError:
        rate, state = self.healing.rate, self.work / _STATE
        hint = f"run it again with a rate of {rate / 3:.1g}"
        if state.exists():
            saved = savepoint.read_facts(state)["step"]
            hint += f": it goes on from step {saved}, or from none if you delete {self.work}"
        return RecipeError(
            f"healing diverged: needs a finite loss, got none in step {self.step} at rate {rate:g}",
            hint=hint,
        )

    # -- results and state ------------------------------------------------------------------------

    def best(self) -> Healed:
        """What was reached, with the best of all looks in the masters and norms."""
        step, _, after = min(self.history, key=lambda look: look[2])
        if step not in (0, self.step):
            savepoint.load(self._kept(step), self.trainer.parameters)
        seconds, history = round(self._seconds(), 1), tuple(self.history)
        return Healed(self.history[0][2], after, self.step, self.tokens(), seconds, history)

    def _kept(self, step: int) -> Path:
        """What was trained at a look that was the best until then. One file for each: a run that
        goes on from an earlier state may need an earlier one."""
        return self.work / f"best.{step}.safetensors"

    def packed(self) -> dict[str, Callable[[], Packed]]:
        """What replaces tensors of the compressed model."""

        def weight(master: Master) -> Packed:
            solution = master.solution()
            codes = solution.grid.codes(solution.levels, solution.scales)
            return solution.grid.format.pack(codes)

        def vector(norm: Tensor) -> Packed:
            values: Packed = norm.detach().numpy()
            return values

        made: dict[str, Callable[[], Packed]] = {}
        made.update({n: partial(weight, master) for n, master in self.student.masters.items()})
        made.update({n: partial(vector, norm) for n, norm in self.student.norms().items()})
        return made

    def _save(self) -> None:
        tensors = [*self.trainer.parameters, *self.trainer.moments()]
        facts = {
            "step": self.step,
            "seconds": self._seconds(),
            "started": self.started,
            "looking": self.looking,
            "pace": self.pace,
            "history": self.history,
        }
        began = time.monotonic()
        savepoint.save(self.work / _STATE, tensors, facts)
        self.saved = time.monotonic()
        self.saving = self.saved - began

    def _resume(self) -> None:
        path = self.work / _STATE
        if not path.exists():
            return
        tensors = [*self.trainer.parameters, *self.trainer.moments()]
        facts = savepoint.load(path, tensors)
        self.step, self.spent, self.started = facts["step"], facts["seconds"], facts["started"]
        self.looking, self.pace = facts["looking"], facts["pace"]
        self.history = [(step, seconds, loss) for step, seconds, loss in facts["history"]]
        self.trainer.count(self.step)


def _schedule(step: int, share: float) -> float:
    """The rate, as a share of the largest: up along a line, down to zero along a cosine."""
    steps, work = _WARM_UP
    return min(1.0, max((step + 1) / steps, share / work)) * 0.5 * (1 + math.cos(math.pi * share))


def _shuffled(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


# -- what is checked before ---------------------------------------------------------------------


def _check_windows(windows: Tensor, source: Source, healing: Healing) -> None:
    if windows.dim() != 2 or windows.dtype != torch.int64 or windows.shape[1] < 2:
        raise RecipeError(
            f"windows must be int64 [count, tokens >= 2], got {windows.dtype} {list(windows.shape)}"
        )
    if len(windows) <= healing.held_out:
        raise RecipeError(
            f"healing needs more windows than the {healing.held_out} held out, got {len(windows)}",
            hint="give more text, or shorter windows",
        )
    if windows.shape[1] > source.spec.max_context:
        raise RecipeError(
            f"windows of {windows.shape[1]} tokens: the model has a context of"
            f" {source.spec.max_context}"
        )
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= source.spec.vocab_size:
        raise RecipeError(
            f"windows need token ids from 0 to {source.spec.vocab_size - 1}, got"
            f" {low if low < 0 else high}",
            hint="the text was cut by the tokenizer of another model",
        )


@contextmanager
def _workplace(work: Path, identity: str) -> Iterator[None]:
    """The directory of an unfinished run, for one process at a time, and for one run."""
    work.mkdir(exist_ok=True)
    if any(work.iterdir()) and not (work / _RUN).exists():
        fail(str(work), "a place of its own to work in", "a directory of something else")
    with (work / _RUN).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(f"{work}: another process is healing there") from None
        file.seek(0)
        found = file.read()
        if found not in ("", identity):
            raise RecipeError(
                f"{work}: needs the arguments of the run that was interrupted there, got others",
                hint="repeat that run, or delete the directory to begin anew",
            )
        if not found:
            file.write(identity)
            file.flush()
        yield


def _identity(compressed: PackedSource, dense: Source, windows: Tensor, healing: Healing) -> str:
    """What an interrupted run must have been given to go on: all but the rate."""
    told = {key: value for key, value in asdict(healing).items() if key != "rate"}
    facts = [told, list(windows.shape), fingerprint(compressed), fingerprint(dense)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(windows.contiguous().numpy())
    return digest.hexdigest()

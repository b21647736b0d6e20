"""What a KV cache costs in quality: `python benchmarks/kvquality.py --kv f16 int8 int4 topk:1/16`.

Every `--kv` of one model on the same tokens: perplexity in long windows, LAMBADA, needles in a
haystack, and the bytes of the cache; each against the first that can be measured, the dense one,
with intervals of the paired difference. What is measured is kept in benchmarks/.cache as it comes
and not measured again, unless the model, a text or a number asked for is another; `--again` forgets
it, which is for other code. A `--kv` that the engine does not know gets a row with its error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import harness
import models
import numpy as np
from numpy.typing import NDArray

from lacewing.checkpoint import PackedModel, load_model, open_source
from lacewing.engine import LLM
from lacewing.engine.scorer import LLMScorer
from lacewing.errors import LacewingError
from lacewing.kv.choice import parse_kv
from lacewing.kv.layout import find_plan, lay_out
from lacewing.models import DecoderSpec
from lacewing.quality import Needles, Text, evaluate, read_items, windows
from lacewing.quality.bootstrap import Interval, Units, as_list, interval
from lacewing.quality.likelihood import power

KVS = ("f16", "bf16", "f32", "int8")
LONGEST_ITEM = 2048  # tokens

Numbers = NDArray[np.float64]


def main() -> None:
    args = arguments()
    job = Job(args)
    for kv in args.kv:
        job.measure(kv)
    record = job.record()
    show(record)
    if not args.no_save:
        print("saved", harness.save("kvquality", record, args.threads))


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What a KV cache costs in quality.")
    parser.add_argument("model", nargs="?", type=Path, help="default: SmolLM2-135M")
    parser.add_argument("--kv", nargs="+", default=list(KVS), help="the first one is dense")
    parser.add_argument("--format", default="auto", help="of the weights")
    parser.add_argument("--text", type=Path, help="default: WikiText-2's test text")
    parser.add_argument("--windows", nargs="*", type=int, default=[4096, 8192])
    parser.add_argument("--max-tokens", type=int, default=65_520, help="scored, of each window")
    parser.add_argument("--lambada", type=Path, help="default: 1000 items of LAMBADA")
    parser.add_argument("--items", type=int, default=300, help="of LAMBADA; 0: none")
    parser.add_argument("--book", type=Path, help="default: Pride and Prejudice")
    parser.add_argument("--haystacks", nargs="*", type=int, default=[4096], help="tokens")
    parser.add_argument("--needles", type=int, default=20, help="in each length of haystacks")
    parser.add_argument("--seed", type=int, default=0, help="of needles and bootstrap")
    parser.add_argument("--again", action="store_true", help="forget what was found")
    harness.add_common_arguments(parser)
    args = parser.parse_args(given)
    args.model = (args.model or models.demo_model()).resolve()
    args.text = args.text or harness.data("text/wikitext2/wiki.test.raw")
    args.lambada = args.lambada or harness.data("eval/lambada_1000.jsonl")
    args.book = args.book or harness.data("text/books/pride_and_prejudice.txt")
    return args


class Job:
    """One model's caches; `found` of each is a dictionary from a task's name to its figures."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder = models.CACHE / "kvquality" / f"{args.model.stem}-{self.digest()}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.errors: dict[str, str] = {}

    def digest(self) -> str:
        """Of everything but the caches and the tasks' sizes, which are in the tasks' names."""
        args = self.args
        files = [(path.name, _digest(path)) for path in (args.text, args.lambada, args.book)]
        facts = [args.model.name, args.model.stat().st_mtime_ns, args.format, args.seed, files]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]

    @property
    def context(self) -> int:
        items = [LONGEST_ITEM] if self.args.items else []
        return max([*self.args.windows, *self.args.haystacks, *items])

    # -- Measuring --------------------------------------------------------------------------------

    def tasks(self) -> dict[str, Any]:
        """Name -> what `run` takes."""
        args = self.args
        found: dict[str, Any] = {
            f"text {size} {args.max_tokens}": Text.read(args.text, size, args.max_tokens)
            for size in args.windows
        }
        if args.items:
            found[f"lambada {args.items}"] = read_items(args.lambada, args.items)
        for size in args.haystacks if args.needles else ():
            found[f"needles {size} {args.needles}"] = Needles.read(args.book, size, args.needles)
        return found

    def path(self, kv: str) -> Path:
        """One for every `kv` and content of its plan."""
        plans = [kv.rpartition("@")[2], kv.rpartition(":")[2], self.args.model / "kvplan.json"]
        facts = [kv, *(_digest(Path(each)) for each in plans if Path(each).is_file())]
        readable = re.sub(r"[^a-z0-9]+", "-", kv.lower())
        code = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:6]
        return self.folder / f"{readable}-{code}.json"

    def found(self, kv: str) -> dict[str, Any]:
        path = self.path(kv)
        return json.loads(path.read_text()) if path.exists() else {}

    def measure(self, kv: str) -> None:
        """What is missing of one cache. An error is told in its row, and tried again next time."""
        if self.args.again:
            self.path(kv).unlink(missing_ok=True)
        found = self.found(kv)
        missing = {name: task for name, task in self.tasks().items() if name not in found}
        if not missing:
            return
        harness.progress(f"measuring kv={kv}: {', '.join(missing)}")
        try:
            with self.open(kv) as llm:
                for name, task in missing.items():
                    found[name] = {"commit": harness.commit(), **self.run(llm, task)}
                    self.keep(kv, found)
        except LacewingError as error:
            harness.progress(f"kv={kv}: {error}")
            self.errors[kv] = f"{type(error).__name__}: {error}"

    def keep(self, kv: str, found: dict[str, Any]) -> None:
        part = self.path(kv).with_suffix(".part")
        part.write_text(json.dumps(found))
        part.rename(self.path(kv))

    def open(self, kv: str) -> LLM:
        args, plan = self.args, find_plan(kv, self.args.model)
        model = packed(args.model, args.format)
        return LLM.from_model(model, args.threads, self.context, kv=kv, plan=plan)

    def run(self, llm: LLM, task: Any) -> dict[str, Any]:
        scorer = LLMScorer(llm, self.args.model.name)
        if isinstance(task, Text):
            pieces = windows(scorer, task.text, task.window_for(scorer), task.max_tokens)
            scores = [scorer.score(piece) for piece in pieces]
            losses = -np.concatenate(scores)[: task.max_tokens].astype(np.float64)
            lengths = np.diff(np.minimum(np.cumsum([0, *map(len, scores)]), len(losses)))
            return {
                "perplexity": power(float(losses.mean())),
                "scored_tokens": len(losses),
                "lengths": lengths.tolist(),
                "losses": np.round(losses, 6).tolist(),
            }
        (result,) = evaluate(scorer, [task], self.args.seed)
        if isinstance(task, Needles):
            return dict(result.to_dict())
        return {
            "items": result.items,
            "acc": result.acc,
            "acc_interval": as_list(result.acc_interval),
            "perplexity": result.perplexity,
            "right": [bool(each) for each in result.right],
            "log_probs": [each[0] for each in result.log_probs],
        }

    # -- Comparing --------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        args, names = self.args, list(self.tasks())
        complete = [kv for kv in args.kv if all(name in self.found(kv) for name in names)]
        dense = complete[0] if complete else None
        return {
            "label": args.label or args.model.stem,
            "model": args.model.name,
            "format": args.format,
            "context": self.context,
            "seed": args.seed,
            "compared_with": dense,
            "texts": [args.text.name, args.lambada.name, args.book.name],
            "rows": [self.row(kv, dense, names) for kv in args.kv],
        }

    def row(self, kv: str, dense: str | None, names: list[str]) -> dict[str, Any]:
        row: dict[str, Any] = {"kv": harness.without_folders(kv)}
        if kv in self.errors:
            row["error"] = self.errors[kv]
        found = self.found(kv)
        if found:  # not kept: where layers have windows, it depends on the context
            spec = _spec(self.args.model)
            row["bytes_per_token"] = bytes_per_token(spec, kv, self.args.model, self.context)
        base = {} if dense is None or dense == kv else self.found(dense)
        for name in names:
            if name in found:
                row[name] = self.compared(found[name], base.get(name))
        return row

    def compared(self, ours: dict[str, Any], theirs: dict[str, Any] | None) -> dict[str, Any]:
        """A task's figures without the single tokens and items, and the paired difference."""
        single = ("losses", "lengths", "right", "log_probs")
        told = {key: value for key, value in ours.items() if key not in single}
        if theirs is None:
            return told
        for figure, (value, spread) in self.differences(ours, theirs):
            told[figure], told[f"{figure}_interval"] = value, as_list(spread)
        return told

    def differences(
        self, ours: dict[str, Any], theirs: dict[str, Any]
    ) -> Iterator[tuple[str, tuple[float, Interval | None]]]:
        seed = self.args.seed
        if "losses" in ours:
            change = _difference(ours["losses"], theirs["losses"])
            units = Units.of(ours["lengths"])
            ratio = power(float(change.mean()))
            yield "perplexity_ratio", (ratio, units.interval(change, seed, power))
            return
        for figure, key in (("difference", "right"), ("log_prob_difference", "log_probs")):
            change = _difference(ours[key], theirs[key])
            spread = interval(change, np.ones(len(change)), seed)
            yield figure, (float(change.mean()), spread)


def _difference(ours: list[float], theirs: list[float]) -> Numbers:
    return np.array(ours, np.float64) - np.array(theirs, np.float64)


def bytes_per_token(spec: DecoderSpec, kv: str, model: Path, context: int) -> float:
    """Of the cache of one sequence of `context` tokens while it is continued, all layers."""
    layout = lay_out(spec, parse_kv(kv), find_plan(kv, model), context)
    return layout.bytes(layout.sizes(1, context, 1)) / context


@cache
def packed(path: Path, format: str) -> PackedModel:
    return load_model(path, format)


@cache
def _spec(path: Path) -> DecoderSpec:
    return open_source(path).spec


@cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def show(record: dict[str, Any]) -> None:
    names = list(dict.fromkeys(
        name for row in record["rows"] for name in row if isinstance(row[name], dict)
    ))  # fmt: skip
    head = ["kv", "bytes/token"]
    for name in names:
        head += [name, "against dense"]
    rows = []
    for row in record["rows"]:
        size = row.get("bytes_per_token")
        cells = [row["kv"], "-" if size is None else f"{size:,.0f}"]
        for name in names:
            cells += figures(row[name]) if name in row else ["-", row.get("error", "-")[:60]]
        rows.append(cells if names else [*cells, row.get("error", "")])
    harness.table(f"{record['model']}, KV caches", head if names else [*head, ""], rows)


def figures(found: dict[str, Any]) -> list[str]:
    """A task's figure, and its change with an interval."""
    if "perplexity_ratio" in found:
        low, high = found["perplexity_ratio_interval"] or [found["perplexity_ratio"]] * 2
        change = f"{found['perplexity_ratio'] - 1:+.2%} [{low - 1:+.2%}, {high - 1:+.2%}]"
    elif "difference" in found:
        low, high = found["difference_interval"] or [found["difference"]] * 2
        change = f"{found['difference']:+.1%} [{low:+.1%}, {high:+.1%}]"
        change += f", lp {found['log_prob_difference']:+.3f}"
    else:
        change = ""
    if "found" in found:
        return [f"{found['found']} of {found['needles']}, lp {found['log_prob']:.3f}", change]
    if "acc" in found:
        return [f"{found['acc']:.1%}", change]
    return [f"{found['perplexity']:.4f}", change]


if __name__ == "__main__":
    main()

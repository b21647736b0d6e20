"""Quality against bytes and speed, llama.cpp beside: the picture that decides.

    python benchmarks/quality.py all --llama-python VENV/bin/python
    python benchmarks/quality.py make quality --only "w4a8g32 calibrated" "Q4_0"
    python benchmarks/quality.py speed report --healed "w4a8g32 healed=/data/healed"

Stages, in this order whatever the order given: `make` compresses, `quality` evaluates with
`lacewing eval`'s own code (llama.cpp's files too, on the same tokens), `speed` decodes,
interleaved, and `report` saves the record, draws the pictures and fills in the tables of
docs/concepts/quality.md. What is done is kept in benchmarks/.cache as it comes and not done again;
`--again` forgets it. Configurations are in configurations.py; a healed directory is one only while
`--healed` names it. A report shows the speeds of one run, the last.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import configurations
import harness
import judges
import models
import page
import speed
from configurations import Configuration
from harness import Candidate, Worker

from lacewing.checkpoint import open_source

STAGES = ("make", "quality", "speed", "report")
PROMPT, TOKENS = 16, 128  # as decode.py has them


def main() -> None:
    args = arguments()
    job = Job(args)
    stages = STAGES if "all" in args.stages else [s for s in STAGES if s in args.stages]
    for stage in stages:
        getattr(job, stage)()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Quality against bytes and speed.")
    parser.add_argument("stages", nargs="+", choices=[*STAGES, "all"])
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M")
    parser.add_argument("--text", type=Path, help="default: WikiText-2's test text")
    parser.add_argument("--calibration", type=Path, help="default: 200 documents of C4")
    parser.add_argument("--max-tokens", type=int, default=61_410, help="scored, of the text")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--items", type=int, default=500, help="of each task")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--healed", nargs="+", default=[], metavar="NAME=DIRECTORY")
    parser.add_argument("--directory", nargs="+", default=[], metavar="NAME=DIRECTORY")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the configurations")
    parser.add_argument("--again", action="store_true", help="forget what these stages found")
    parser.add_argument("--llama-python", type=Path, help="interpreter that has llama-cpp-python")
    parser.add_argument("--rival-files", type=Path, help="has TYPE.gguf: not quantized again")
    parser.add_argument("--context", type=int, default=1024, help="of the speed's measurement")
    harness.add_common_arguments(parser)
    args = parser.parse_args()
    args.model = (args.model or models.demo_model()).resolve()
    args.text = args.text or harness.data("text/wikitext2/wiki.test.raw")
    args.calibration = args.calibration or harness.data("text/calib/c4_200.jsonl")
    return args


class Store:
    """What is known of each configuration: a JSON file each, with a part per stage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, one: Configuration) -> dict[str, Any]:
        path = self.folder / f"{one.slug}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def write(self, one: Configuration, found: dict[str, Any]) -> None:
        path = self.folder / f"{one.slug}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1) + "\n")
        part.rename(path)


class Job:
    """One model's configurations on their way through the stages."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder = models.CACHE / "quality" / args.model.stem
        self.store = Store(self.folder)
        self.all = self.wanted()
        slugs = [one.slug for one in self.all]
        if twice := {one.name for one in self.all if slugs.count(one.slug) > 1}:
            raise SystemExit(f"error: names must differ in letters or figures, got {sorted(twice)}")
        names = args.only or [one.name for one in self.all]
        if unknown := set(names) - {one.name for one in self.all}:
            known = ", ".join(one.name for one in self.all)
            raise SystemExit(f"error: no configuration {sorted(unknown)}\nhint: {known}")
        self.chosen = [one for one in self.all if one.name in names]

    def wanted(self) -> list[Configuration]:
        found = configurations.for_model(self.args.model.stem)
        for family, given in (("healed", self.args.healed), ("", self.args.directory)):
            found += [configurations.made_elsewhere(text, family) for text in given]
        if not self.args.llama_python:
            harness.progress("no --llama-python: llama.cpp is not beside ours")
            found = [one for one in found if not one.kind]
        return found

    def made(self, one: Configuration) -> dict[str, Any]:
        """What is known of a configuration, if it was made as the table says now."""
        found = self.store.read(one)
        return found if found.get("digest") == self.digest(one) else {}

    def digest(self, one: Configuration) -> str:
        if one.directory:  # the same name may be another model by now
            manifest = Path(one.directory) / "lacewing.json"
            return one.digest(str(manifest.stat().st_mtime_ns if manifest.exists() else None))
        if ready := self.rival_file(one):
            return one.digest(str(ready), str(ready.stat().st_mtime_ns))
        return one.digest(self.args.model.name, self.args.calibration.name * one.calibrated)

    def judged(self, one: Configuration) -> dict[str, Any]:
        """What is known of a configuration that was evaluated as the arguments say now."""
        found = self.made(one)
        return found if self.scope().items() <= found.get("quality", {}).items() else {}

    # -- make -------------------------------------------------------------------------------------

    def make(self) -> None:
        for one in self.chosen:
            found = {} if self.args.again else self.made(one)
            if found and Path(found["path"]).exists():
                continue
            harness.progress(f"making {one.name}")
            start = time.perf_counter()
            try:
                path, told = self.build(one)
            except SystemExit as error:  # the others are wanted all the same
                harness.progress(f"{one.name} cannot be made: {error}")
                continue
            made = {"commit": harness.commit(), "seconds": round(time.perf_counter() - start, 1)}
            if instead := told.get("dense_instead"):
                made["dense_instead"] = instead
            made |= manifest_notes(path)
            facts = {"name": one.name, "digest": self.digest(one), "path": str(path), "made": made}
            self.store.write(one, facts | {"bytes": file_bytes(path)})

    def build(self, one: Configuration) -> tuple[Path, dict[str, Any]]:
        """Where it is, and what `lacewing compress` says of it."""
        if one.directory:
            return Path(one.directory).resolve(), {}
        if one.kind:
            ready = self.rival_file(one)
            return ready or models.gguf(self.args.model, one.kind, self.args), {}
        out = self.folder / one.slug
        options = [*self.how(one), "--force", "--json"]
        return out, harness.lacewing("compress", str(self.args.model), str(out), *options)

    def rival_file(self, one: Configuration) -> Path | None:
        """llama.cpp's file that `--rival-files` has; that of the file's own grid is the model."""
        folder = self.args.rival_files
        path = folder.resolve() / f"{one.kind}.gguf" if folder and one.kind else None
        return path if path and path.exists() and not one.own_grid else None

    def how(self, one: Configuration) -> list[str]:
        """The options of `lacewing compress`."""
        if one.format:
            sparsity = [] if one.sparsity is None else ["--sparsity", str(one.sparsity)]
            return ["--format", one.format, *sparsity]
        recipe = one.preset
        if one.recipe:
            path = self.folder / f"{one.slug}.recipe.yaml"
            path.write_text(json.dumps({"name": one.name, **one.recipe}, indent=1) + "\n")
            recipe = str(path)
        return ["--recipe", recipe, "--data", str(self.args.calibration)]

    # -- quality ----------------------------------------------------------------------------------

    def quality(self) -> None:
        for one in self.chosen:
            found = self.made(one)
            if not found or (self.judged(one) and not self.args.again):
                continue
            harness.progress(f"evaluating {one.name}")
            judge = judges.llama if one.kind else judges.ours
            try:
                judged = judge(Path(found["path"]), self.args)
            except SystemExit as error:  # the others are wanted all the same
                harness.progress(f"{one.name} cannot be evaluated: {error}")
                continue
            self.store.write(one, self.made(one) | {"quality": judged | self.scope()})
            harness.progress(f"{one.name}: perplexity {judged['perplexity']:.4f}")

    def scope(self) -> dict[str, Any]:
        """What must be the same for figures to be compared."""
        names = ("max_tokens", "window", "items", "seed")
        return {"text": self.args.text.name, **{name: getattr(self.args, name) for name in names}}

    # -- speed ------------------------------------------------------------------------------------

    def speed(self) -> None:
        """All that are made and whose quality is known, in one run: figures of two runs on a
        shared machine do not compare."""
        ready = [one for one in self.chosen if self.judged(one)]
        if not ready:
            raise SystemExit("error: nothing to measure\nhint: the stages make and quality first")
        with ExitStack() as stack:
            found = [self.open(one, stack) for one in ready]
            bandwidth = speed.interleave(
                found, self.args, lambda c, turn: speed.decode(c, turn, PROMPT, TOKENS)
            )
            engines = {c.engine: c.worker.ask("version") for c in found}
        run = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "read_bandwidth_gb_s": [round(value, 2) for value in bandwidth],
            "engines": engines,
            "machine": harness.machine(self.args.threads),
        }
        for one, candidate in zip(ready, found, strict=True):
            self.store.write(one, self.made(one) | {"speed": candidate.row() | {"run": run}})
        rows = [[c.name, f"{c.median:.1f}", f"{c.spread:.0%}"] for c in found]
        harness.table("decode", ["", "tokens/s", "spread"], rows)

    def open(self, one: Configuration, stack: ExitStack) -> Candidate:
        engine = "llama.cpp" if one.kind else "lacewing"
        worker = Worker.llama(self.args.llama_python) if one.kind else Worker.lacewing()
        path = Path(self.made(one)["path"])
        candidate = models.load(engine, one.name, path, worker, self.args, stack)
        bytes = models.gguf_bytes(path) if one.kind else worker.ask("weight_bytes")["bytes"]
        candidate.weight_bytes = bytes
        return candidate

    # -- report -----------------------------------------------------------------------------------

    def report(self) -> None:
        rows = [self.row(one, self.judged(one)) for one in self.all if self.judged(one)]
        run = last_run(rows)
        dense = next((row for row in rows if row["dense"]), None)
        if dense is None:
            raise SystemExit(
                f"error: no dense model among {len(rows)} that are evaluated\n"
                f"hint: make quality --only {configurations.DENSE[-1].name}"
            )
        for row in rows:
            row["loss"] = row["perplexity"] / dense["perplexity"] - 1
        record = {
            "label": self.args.label or self.args.model.stem,
            "model": self.args.model.name,
            "compared_with": dense["name"],
            **self.scope(),
            **({"run": run} if run else {}),
            "rows": rows,
        }
        show(record)
        if not self.args.no_save:
            page.write(record, harness.ROOT / "docs" / "concepts")
            print("saved", harness.save("quality", record, self.args.threads))

    def row(self, one: Configuration, found: dict[str, Any]) -> dict[str, Any]:
        """What the record keeps of a configuration."""
        judged = found["quality"]
        row = {
            "name": one.name,
            "family": one.family,
            "engine": "llama.cpp" if one.kind else "lacewing",
            "dense": one in configurations.DENSE,
            "own_grid": one.own_grid,
            "bytes": found["bytes"],
            "bits_per_weight": round(8 * found["bytes"] / self.weights, 3),
            "made": found["made"],
            **{name: judged[name] for name in (*judges.PERPLEXITY, "tasks")},
        }
        return row | ({"speed": found["speed"]} if "speed" in found else {})

    @cached_property
    def weights(self) -> int:
        """Of all matrices of the model; a head that is the embedding is counted once."""
        shapes = open_source(self.args.model).spec.tensor_shapes().values()
        return sum(math.prod(shape) for shape in shapes if len(shape) == 2)


def manifest_notes(path: Path) -> dict[str, Any]:
    """What a packed directory says of how it was made: the recipe, its data, how it was healed."""
    file = path / "lacewing.json"
    if not file.exists():
        return {}
    manifest = json.loads(file.read_text(encoding="utf-8"))
    notes = dict(manifest.get("recipe") or {})
    notes.pop("layers", None)  # a row of figures per matrix
    return notes | ({"healed": manifest["healed"]} if "healed" in manifest else {})


def last_run(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The facts of the last run of the stage `speed`; takes them out of the rows, and speeds of
    earlier runs with them, which do not compare."""
    runs = {row["name"]: row["speed"].pop("run") for row in rows if "speed" in row}
    last = max(runs.values(), key=lambda run: str(run["time"]), default={})
    for row in rows:
        if runs.get(row["name"], last) != last:
            del row["speed"]
    return last


def file_bytes(path: Path) -> int:
    """Of everything that the model needs to run, tokenizer included."""
    if path.is_file():
        return path.stat().st_size
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())


def show(record: dict[str, Any]) -> None:
    rows = [
        [row["name"], f"{row['bytes'] / 1e6:.1f}", f"{row['perplexity']:.3f}",
         f"{row['loss']:+.2%}",
         *(f"{row['tasks'][task]['acc']:.1%}" for task in row["tasks"]),
         f"{row['speed']['median']:.1f}" if "speed" in row else "-"]
        for row in sorted(record["rows"], key=lambda row: row["bytes"])
    ]  # fmt: skip
    tasks = list(record["rows"][0]["tasks"])
    head = ["", "MB", "perplexity", "over dense", *tasks, "tokens/s"]
    harness.table(f"quality, dense: {record['compared_with']}", head, rows)


if __name__ == "__main__":
    main()

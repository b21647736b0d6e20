"""The tables and pictures of docs/concepts/quality.md, from the records of quality.py.

    python benchmarks/page.py RECORD.json      a results file: all its records of quality once more

A page has a region per record, between two comments; what is around it is written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import axes
import picture
import verdict
from picture import Point

PAGE = "quality.md"
FAST = (True, False)  # much of x is wanted, little of y
# What a task's figure is called, by the stem of its file.
TASKS = {"lambada": "LAMBADA", "arc_easy": "ARC-easy", "piqa": "PIQA", "hellaswag": "HellaSwag"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables and pictures from a results file.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--docs", type=Path, default=Path(__file__).parents[1] / "docs/concepts")
    args = parser.parse_args()
    for key, record in json.loads(args.results.read_text()).items():
        if key.startswith("quality "):
            write(record, args.docs)
        elif key.startswith("embeddings"):
            fill(args.docs / PAGE, "embeddings", embeddings(record))


def write(record: dict[str, Any], docs: Path) -> None:
    """The pictures of a record beside the page, and its region in it."""
    name = slug(record["label"])
    docs.mkdir(parents=True, exist_ok=True)
    shown = []
    for kind, svg in pictures(record).items():
        path = docs / f"quality-{name}-{kind}.svg"
        path.write_text(svg, encoding="utf-8")
        shown.append(f"![{record['label']}: {WORDS[kind]}]({path.name})")
    parts = [*shown, findings(record), table(record), conditions(record)]
    fill(docs / PAGE, name, "\n\n".join(filter(None, parts)))


def slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")


def fill(page: Path, name: str, text: str) -> None:
    """Puts the text into the region `name` of a page, which gets one at its end if it has none."""
    begin, end = f"<!-- begin {name}: written by benchmarks/page.py -->", f"<!-- end {name} -->"
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    before, found, rest = old.partition(begin)
    _, closed, after = rest.partition(end)
    if found and not closed:
        raise SystemExit(f"error: {page}: `{begin}` has no `{end}`")
    if not found:
        before, after = (old.rstrip("\n") + "\n\n").lstrip("\n"), "\n"
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


# -- pictures -------------------------------------------------------------------------------------

WORDS = {
    "bytes": "perplexity against bytes",
    "speed": "perplexity against tokens per second",
    "tasks": "accuracy against bytes",
}


def pictures(record: dict[str, Any]) -> dict[str, str]:
    """By kind, the SVG of what the record can show."""
    rows, label = record["rows"], record["label"]
    if not any(shown(row) for row in rows):
        return {}
    tokens = f"{record['text']}, {rows[0]['scored_tokens']:,} tokens"
    dense = dense_perplexity(rows)
    sized = points(rows, "bytes", "loss")
    losses = axes.loss_axis((p.y for p in sized), dense)
    found = {
        "bytes": picture.draw(
            f"{label}: perplexity and bytes",
            f"{tokens}; the whole file. Down and left is better.",
            sized,
            size_axis(rows),
            losses,
        )
    }
    if timed := points(rows, "tokens_s", "loss"):
        machine = record["run"]["machine"]
        axis = axes.linear_axis("tokens/s, one sequence", [p.x for p in timed], "{:.0f}".format)
        note = f"{tokens}; {machine['cpu']}, {machine['threads']} threads"
        found["speed"] = picture.draw(
            f"{label}: perplexity and speed",
            f"{note}. Down and right is better.",
            timed,
            axis,
            losses,
            FAST,
        )
    task = next((name for name in TASKS if value(rows[0], name) is not None), None)
    if task:
        count = rows[0]["tasks"][task]["items"]
        judged = points(rows, "bytes", task)
        axis = axes.share_axis(f"{TASKS[task]}, accuracy", [p.y for p in judged])
        note = f"{count} items; the whole file. Up and left is better."
        found["tasks"] = picture.draw(
            f"{label}: {TASKS[task]} and bytes", note, judged, size_axis(rows), axis, (False, True)
        )
    return found


def size_axis(rows: list[dict[str, Any]]) -> axes.Axis:
    """Bytes, with the bits per weight below."""
    weights = 8 * rows[0]["bytes"] / rows[0]["bits_per_weight"]

    def words(megabytes: float) -> str:
        return f"{megabytes:.0f}|{megabytes * 8e6 / weights:.2f}"

    return axes.linear_axis(
        "MB of the whole file (below: bits per weight)",
        [row["bytes"] / 1e6 for row in rows if shown(row)],
        words,
        "MB",
    )


def shown(row: dict[str, Any]) -> bool:
    """The dense model is what the others are compared with; its size would squeeze the axis."""
    return not row.get("dense")


def points(rows: list[dict[str, Any]], x: str, y: str) -> list[Point]:
    """Of the rows that have both figures."""
    found = []
    for row in rows:
        across, up = value(row, x), value(row, y)
        if shown(row) and across is not None and up is not None:
            found.append(
                Point(
                    row["name"], row["family"], across, up, row["own_grid"], label(row), hint(row)
                )
            )
    return found


def value(row: dict[str, Any], name: str) -> float | None:
    if name == "bytes":
        return float(row["bytes"] / 1e6)
    if name == "tokens_s":
        return float(row["speed"]["median"]) if "speed" in row else None
    if name in TASKS:
        task = row["tasks"].get(name)
        return float(task["acc"]) if task else None
    return float(row[name])


def label(row: dict[str, Any]) -> str:
    """The name without what the mark's family says already."""
    return re.sub(r" (calibrated|healed|joint)\b,?", "", str(row["name"]))


def hint(row: dict[str, Any]) -> str:
    parts = [f"{row['name']}: perplexity {row['perplexity']:.3f} ({row['loss']:+.2%})"]
    parts.append(f"{row['bytes'] / 1e6:.1f} MB, {row['bits_per_weight']:.2f} bits per weight")
    if "speed" in row:
        parts.append(f"{row['speed']['median']:.1f} tokens/s")
    return "; ".join(parts)


def dense_perplexity(rows: list[dict[str, Any]]) -> float:
    return float(next(row["perplexity"] for row in rows if row.get("dense")))


# -- tables ---------------------------------------------------------------------------------------


def table(record: dict[str, Any]) -> str:
    """Markdown, by size; on which frontiers a row is."""
    rows = sorted(record["rows"], key=lambda row: row["bytes"])
    tasks = [name for name in TASKS if any(value(row, name) is not None for row in rows)]
    timed = any("speed" in row for row in rows)
    head = ["", "MB", "bits/weight", "perplexity", "over dense", *(TASKS[t] for t in tasks)]
    head += ["tokens/s"] * timed + ["frontier"]
    edges = {
        "bytes": {p.name for p in picture.frontier(points(rows, "bytes", "loss"))},
        "speed": {p.name for p in picture.frontier(points(rows, "tokens_s", "loss"), FAST)},
    }
    lines = [head, ["---", *["--:"] * (len(head) - 2), "---"]]
    for row in rows:
        cells = [
            cell(title(row)),
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['bits_per_weight']:.2f}",
            f"{row['perplexity']:.2f}",
            "" if row.get("dense") else f"{row['loss']:+.1%}",
            *(percent(value(row, task)) for task in tasks),
        ]
        if timed:
            speed = value(row, "tokens_s")
            cells.append("" if speed is None else f"{speed:.0f}")
        lines.append([*cells, standing(row, edges)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def title(row: dict[str, Any]) -> str:
    """The name, the engine where it is not ours, and what became dense although it was not meant
    to: a sparse format that does not pay is left out by `lacewing compress`."""
    name = verdict.called(row)
    dense = sum(each["tensors"] for each in row["made"].get("dense_instead", ()))
    return f"{name} ({dense} matrices dense instead)" if dense else name


def findings(record: dict[str, Any]) -> str:
    """Markdown: what the figures say."""
    return "\n".join(f"- {cell(sentence)}" for sentence in verdict.sentences(record))


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def standing(row: dict[str, Any], edges: dict[str, set[str]]) -> str:
    if row.get("dense"):
        return "what the others are compared with"
    if row["own_grid"]:
        return "left out: " + picture.OWN_GRID
    return ", ".join(kind for kind, names in edges.items() if row["name"] in names)


def cell(text: str) -> str:
    """Text that neither ends a table's cell nor is taken for HTML."""
    plain = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return plain.replace("<", "&lt;").replace("`", "\\`")


def conditions(record: dict[str, Any]) -> str:
    """What must be said with the figures: tokens, items, seeds, machine."""
    rows = record["rows"]
    words = [
        f"{record['text']}: {rows[0]['scored_tokens']:,} scored tokens in windows of "
        f"{record['window']}."
    ]
    for name, task in rows[0]["tasks"].items():
        words.append(f"{TASKS.get(name, name)}: {task['items']} items.")
    words += sorted({calibration(row["made"]["data"]) for row in rows if "data" in row["made"]})
    words += [healing(row) for row in rows if "healed" in row["made"]]
    words.append(f"Intervals are drawn with seed {record['seed']}.")
    if run := record.get("run"):
        words.append(
            f"Speed: {run['machine']['cpu']}, {run['machine']['threads']} threads, all interleaved"
            f" in one run of {run['time'][:10]}."
        )
    return " ".join(words)


def calibration(data: dict[str, Any]) -> str:
    names = ", ".join(str(file["name"]) for file in data["files"])
    return f"Calibrated on {data['tokens']:,} tokens of {names}, seed {data['seed']}."


def healing(row: dict[str, Any]) -> str:
    notes = row["made"]["healed"]
    budget = notes.get("minutes")
    limit = f" ({budget:g} minutes allowed)" if budget else ""
    return (
        f"{cell(row['name'])}: healed on {notes['tokens_seen']:,} tokens in "
        f"{notes['steps_done']:,} steps{limit}, seed {notes['seed']}."
    )


def embeddings(record: dict[str, Any]) -> str:
    """Markdown, by bits per weight."""
    head = ["", "bits/weight", "mean cosine", "least cosine", "same nearest", "of nearest ten"]
    lines = [head, ["---", *["--:"] * (len(head) - 1)]]
    for row in sorted(record["rows"], key=lambda row: -row["bits_per_weight"]):
        lines.append(
            [
                cell(row["name"]),
                f"{row['bits_per_weight']:.2f}",
                f"{row['cosine_mean']:.5f}",
                f"{row['cosine_min']:.5f}",
                f"{row['top1']:.1%}",
                f"{row['top10']:.1%}",
            ]
        )
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    words = f"{record['sentences']} sentences of {record['text']} against each other."
    if share := next((row["sparsity"] for row in record["rows"] if "sparsity" in row), None):
        words += f" Sparse formats are pruned by magnitude, {share:.0%} where they leave a choice."
    return f"{rows}\n\n{words}"


if __name__ == "__main__":
    main()

"""What a record of quality.py says, in sentences: who is on the frontier, who beats whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
EQUAL = 1.01  # times the bytes that still count as equal: formats' headers and scales differ
DENSE = ("nearest", "calibrated")


def sentences(record: dict[str, Any]) -> list[str]:
    """Plain text, a point each. The dense model and the file's own grid take no part."""
    rows = [row for row in record["rows"] if not (row.get("dense") or row["own_grid"])]
    rows.sort(key=lambda row: float(row["bytes"]))
    timed = [row for row in rows if "speed" in row]
    found = standing(rows, "bytes") + (standing(timed, "speed") if timed else [])
    found += [against_dense(row, rows) for row in rows if row["family"] in ("sparse", "healed")]
    found += [against_llama(row, rows) for row in rows if row["family"] == "llama.cpp"]
    return found


def standing(rows: Sequence[Row], cost: str) -> list[str]:
    """Who is on the frontier, and who is not and by whom it is beaten."""
    beaten = {row["name"]: best(row, rows, cost) for row in rows}
    words = {"bytes": "bytes", "speed": "speed"}[cost]
    on = [called(row) for row in rows if beaten[row["name"]] is None]
    off = [
        f"{called(row)} (by {called(other)})"
        for row in rows
        if (other := beaten[row["name"]]) is not None
    ]
    found = [f"On the frontier of perplexity and {words}: {listed(on)}."] if on else []
    return found + ([f"Beaten in perplexity and {words}: {listed(off)}."] if off else [])


def best(row: Row, rows: Sequence[Row], cost: str) -> Row | None:
    """The one of least perplexity that is no worse in both and better in one."""
    found = [
        other
        for other in rows
        if costs(other, cost) <= costs(row, cost)
        and other["perplexity"] <= row["perplexity"]
        and (costs(other, cost), other["perplexity"]) != (costs(row, cost), row["perplexity"])
    ]
    return min(found, key=lambda other: float(other["perplexity"]), default=None)


def costs(row: Row, cost: str) -> float:
    return -float(row["speed"]["median"]) if cost == "speed" else float(row["bytes"])


def against_dense(row: Row, rows: Sequence[Row]) -> str:
    """Whether a sparse or a healed model pays: against the best dense one of ours in as many bytes
    that was not healed."""
    as_large = [
        other
        for other in rows
        if other["family"] in DENSE and other["bytes"] <= EQUAL * row["bytes"]
    ]
    if not as_large:
        return f"No dense model of ours is as small as {figures(row)}."
    other = min(as_large, key=lambda each: float(each["perplexity"]))
    verb = "loses to" if other["perplexity"] < row["perplexity"] else "beats"
    one = "one that was not healed" if row["family"] == "healed" else "one"
    return (
        f"{row['family'].title()} {figures(row)} {verb} the best dense {one} in as many bytes, "
        f"{figures(other)}."
    )


def against_llama(row: Row, rows: Sequence[Row]) -> str:
    """Who of ours is better in no more bytes."""
    ours = [
        other
        for other in rows
        if other["family"] != "llama.cpp"
        and other["bytes"] <= row["bytes"]
        and other["perplexity"] < row["perplexity"]
    ]
    if not ours:
        return f"Nothing of ours is better than {figures(row)} in no more bytes."
    ours.sort(key=lambda other: float(other["perplexity"]))
    return f"Better than {figures(row)} in no more bytes: {listed([figures(o) for o in ours])}."


def called(row: Row) -> str:
    """The name, with the engine where it is not ours."""
    return f"llama.cpp {row['name']}" if row["family"] == "llama.cpp" else str(row["name"])


def figures(row: Row) -> str:
    return f"{called(row)} ({row['bytes'] / 1e6:.1f} MB, {row['loss']:+.1%})"


def listed(names: Sequence[str]) -> str:
    return ", ".join(names)

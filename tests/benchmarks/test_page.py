"""The tables of the quality benchmark's page, and its regions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import page
import pytest


def row(name: str, bytes: int, perplexity: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "family": "nearest",
        "dense": False,
        "own_grid": False,
        "bytes": bytes,
        "bits_per_weight": bytes / 1e7,
        "made": {},
        "perplexity": perplexity,
        "loss": perplexity / 20 - 1,
        "scored_tokens": 61410,
        "tasks": {"lambada": {"acc": 0.5, "items": 200}},
        **more,
    }


RECORD: dict[str, Any] = {
    "label": "Some-Model.Q4_1",
    "text": "wiki.test.raw",
    "window": 2048,
    "seed": 7,
    "run": {"machine": {"cpu": "a CPU", "threads": 2}, "time": "2026-01-01T00:00:00Z"},
    "rows": [
        row("bf16", 270_000_000, 20.0, dense=True, speed={"median": 40}),
        row("w4a8g32", 91_000_000, 25.0, speed={"median": 100}),
        row("w4a8g32 calibrated", 91_000_000, 22.0, family="calibrated", speed={"median": 100},
            made={"data": {"files": [{"name": "c4_200.jsonl"}], "tokens": 65536, "seed": 3}}),
        row("w4a8g32z", 80_000_000, 20.0, own_grid=True, speed={"median": 120}),
        row("Q8_0", 145_000_000, 20.1, family="llama.cpp", speed={"median": 60}),
        row("w8a8g64_sp 50%", 95_000_000, 30.0, family="sparse",
            made={"dense_instead": [{"tensors": 3}, {"tensors": 4}]}),
        row("w3 healed", 75_000_000, 23.0, family="healed",
            made={"healed": {"tokens_seen": 123_456, "steps_done": 60, "minutes": 20, "seed": 5}}),
    ],
}  # fmt: skip


def cells(table: str) -> dict[str, list[str]]:
    """Rows by their first cell."""
    lines = [line.strip("|").split(" | ") for line in table.splitlines()]
    assert len({len(line) for line in lines}) == 1
    return {line[0].strip(): [each.strip() for each in line[1:]] for line in lines}


def test_the_table_says_who_is_on_which_frontier() -> None:
    found = cells(page.table(RECORD))
    assert found["w4a8g32 calibrated"] == [
        "91.0", "9.10", "22.00", "+10.0%", "50.0%", "100", "bytes, speed",
    ]  # fmt: skip
    assert found["llama.cpp Q8_0"][-1] == "bytes, speed"
    assert found["w4a8g32"][-1] == ""
    assert found["bf16"][-1] == "what the others are compared with"
    assert found["w4a8g32z"][-1] == "left out: the file's own grid: lossless here, not a merit"
    assert found["w8a8g64_sp 50% (7 matrices dense instead)"][-2:] == ["", ""]


def test_rows_come_by_size() -> None:
    sizes = [float(line[0]) for line in list(cells(page.table(RECORD)).values())[2:]]
    assert sizes == sorted(sizes) and len(sizes) == len(RECORD["rows"])


def test_names_cannot_break_a_table() -> None:
    hostile = "a | b\n| <b>c</b> `d` \\"
    record = {**RECORD, "rows": [*RECORD["rows"], row(hostile, 1_000_000, 21.0)]}
    assert len(page.table(record).splitlines()) == 2 + len(record["rows"])
    text = page.cell(hostile)
    assert "\n" not in text and "<" not in text
    assert text.replace("\\\\", "").count("|") == text.count("\\|") == 2


def test_conditions_give_tokens_items_seed_and_machine() -> None:
    text = page.conditions(RECORD)
    for words in ("61,410", "2048", "LAMBADA: 200 items", "seed 7", "a CPU"):
        assert words in text
    assert "Calibrated on 65,536 tokens of c4_200.jsonl, seed 3." in text
    assert "w3 healed: healed on 123,456 tokens in 60 steps (20 minutes allowed), seed 5." in text


def test_a_region_is_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    path = tmp_path / "quality.md"
    page.fill(path, "one", "first")
    path.write_text("# Title\n\n" + path.read_text() + "\nafter\n")
    page.fill(path, "two", "another")
    before = path.read_text()
    page.fill(path, "one", "second")
    assert path.read_text() == before.replace("first", "second")
    page.fill(path, "one", "second")
    assert path.read_text() == before.replace("first", "second")


def test_an_open_region_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "quality.md"
    page.fill(path, "one", "first")
    path.write_text(path.read_text().replace("<!-- end one -->", ""))
    with pytest.raises(SystemExit, match="has no `<!-- end one -->`"):
        page.fill(path, "one", "second")


def test_the_pictures_are_beside_the_page(tmp_path: Path) -> None:
    page.write(RECORD, tmp_path)
    text = (tmp_path / page.PAGE).read_text()
    names = sorted(path.name for path in tmp_path.glob("*.svg"))
    assert names == [f"quality-some-model-q4-1-{kind}.svg" for kind in ("bytes", "speed", "tasks")]
    assert all(f"({name})" in text for name in names)


def test_without_speed_or_tasks_there_is_one_picture() -> None:
    rows = [{**each, "tasks": {}} for each in RECORD["rows"]]
    for each in rows:
        each.pop("speed", None)
    record = {key: value for key, value in RECORD.items() if key != "run"} | {"rows": rows}
    assert list(page.pictures(record)) == ["bytes"]
    assert "tokens/s" not in page.table(record)


def test_a_results_file_makes_the_page_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"decode": {}, "quality Some-Model.Q4_1": RECORD}))
    monkeypatch.setattr("sys.argv", ["page.py", str(results), "--docs", str(tmp_path / "docs")])
    page.main()
    assert page.table(RECORD) in (tmp_path / "docs" / page.PAGE).read_text()


def test_embeddings_by_bits() -> None:
    figures = {"cosine_mean": 0.99, "cosine_min": 0.9, "top1": 0.95, "top10": 0.9}
    rows = [
        {"name": "w4a8g32", "bits_per_weight": 4.5, **figures},
        {"name": "bf16_sp", "bits_per_weight": 9.0, "sparsity": 0.5, **figures},
    ]
    text = page.embeddings({"rows": rows, "sentences": 512, "text": "alice.txt"})
    assert text.index("bf16_sp") < text.index("w4a8g32")
    assert "512 sentences of alice.txt" in text and "50%" in text

"""The stages of the quality benchmark, without a model: what is kept, and what is done again."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import harness
import judges
import models
import page
import pytest
import quality

JUDGED = {
    "perplexity": 20.0,
    "interval": [19.0, 21.0],
    "scored_tokens": 100,
    "windows": 1,
    "resampled": "8 blocks",
    "tasks": {"lambada": {"items": 5, "acc": 0.5}},
}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> quality.Job:
    """Four packed directories that were made elsewhere, and a judge that counts."""
    monkeypatch.setattr(models, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(judges, "ours", lambda path, args: dict(JUDGED))
    monkeypatch.setattr(quality.Job, "weights", 1000)
    monkeypatch.setattr(quality.configurations, "for_model", lambda stem: [])
    given = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lacewing.json").write_text("{}")
        given.append(f"{name}={tmp_path / name}")
    return quality.Job(arguments(tmp_path, healed=given))


def arguments(folder: Path, **more: Any) -> argparse.Namespace:
    found = {
        "model": folder / "model.gguf",
        "text": folder / "text.txt",
        "calibration": folder / "c4.jsonl",
        "max_tokens": 100,
        "window": 64,
        "items": 5,
        "seed": 0,
        "healed": [],
        "directory": [],
        "only": None,
        "again": False,
        "llama_python": None,
        "rival_files": None,
        "threads": 1,
        "label": "",
        "no_save": True,
    }
    return argparse.Namespace(**found | more)


def judge_counts(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    seen: list[Path] = []
    monkeypatch.setattr(judges, "ours", lambda path, args: seen.append(path) or dict(JUDGED))
    return seen


def test_what_is_evaluated_is_not_evaluated_again(
    job: quality.Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = judge_counts(monkeypatch)
    job.make()
    job.quality()
    assert [path.name for path in seen] == ["one", "two"]
    job.quality()
    assert len(seen) == 2
    job.args.again = True
    job.quality()
    assert len(seen) == 4


def test_other_settings_are_evaluated_anew(
    job: quality.Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = judge_counts(monkeypatch)
    job.make()
    job.quality()
    job.args.max_tokens = 200
    assert not any(job.judged(one) for one in job.all)
    job.quality()
    assert len(seen) == 4


def test_another_model_under_the_same_name_is_noticed(
    job: quality.Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = judge_counts(monkeypatch)
    job.make()
    job.quality()
    manifest = Path(job.all[0].directory) / "lacewing.json"
    os.utime(manifest, ns=(1, 1))
    assert not job.made(job.all[0])
    job.make()
    job.quality()
    assert [path.name for path in seen] == ["one", "two", "one"]


def test_one_that_fails_does_not_stop_the_others(
    job: quality.Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(path: Path, args: Any) -> dict[str, Any]:
        if path.name == "one":
            raise SystemExit("error: no")
        return dict(JUDGED)

    monkeypatch.setattr(judges, "ours", judge)
    job.make()
    job.quality()
    assert [bool(job.judged(one)) for one in job.all] == [False, True]


def test_names_that_make_one_file_are_refused(tmp_path: Path, job: quality.Job) -> None:
    with pytest.raises(SystemExit, match="names must differ"):
        quality.Job(arguments(tmp_path, healed=["a b=/x", "A-B=/y"]))


def test_an_unknown_name_says_the_known_ones(tmp_path: Path, job: quality.Job) -> None:
    with pytest.raises(SystemExit, match="hint: a"):
        quality.Job(arguments(tmp_path, healed=["a=/x"], only=["b"]))


def test_the_report_needs_a_dense_model(job: quality.Job) -> None:
    job.make()
    job.quality()
    with pytest.raises(SystemExit, match="no dense model among 2"):
        job.report()


def test_the_report_has_the_page_and_the_loss(
    job: quality.Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quality.configurations, "DENSE", (job.all[0],))
    monkeypatch.setattr(harness, "save", lambda kind, record, threads: "a file")
    job.args.no_save = False
    job.make()
    job.quality()
    (job.folder / "two.json").write_text(
        json.dumps(job.store.read(job.all[1]) | {"quality": {**JUDGED, **job.scope(),
                                                             "perplexity": 25.0}})
    )  # fmt: skip
    job.report()
    assert "+25.00%" in capsys.readouterr().out
    assert "+25.0%" in (harness.ROOT / "docs" / "concepts" / page.PAGE).read_text()


def test_dense_models_alone_make_a_report(
    job: quality.Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(quality.configurations, "DENSE", tuple(job.all))
    monkeypatch.setattr(harness, "save", lambda kind, record, threads: "a file")
    job.args.no_save = False
    job.make()
    job.quality()
    job.report()
    assert (
        "what the others are compared with" in (tmp_path / "docs/concepts/quality.md").read_text()
    )
    assert not list(tmp_path.rglob("*.svg"))


def test_speeds_of_an_earlier_run_are_left_out() -> None:
    rows = [
        {"name": "a", "speed": {"median": 1.0, "run": {"time": "2026-01-01"}}},
        {"name": "b", "speed": {"median": 2.0, "run": {"time": "2026-01-02"}}},
        {"name": "c"},
    ]
    assert quality.last_run(rows) == {"time": "2026-01-02"}
    assert rows == [{"name": "a"}, {"name": "b", "speed": {"median": 2.0}}, {"name": "c"}]
    assert quality.last_run([{"name": "c"}]) == {}


def test_a_manifest_says_how_it_was_made(tmp_path: Path) -> None:
    assert quality.manifest_notes(tmp_path) == {}
    data = {"files": [{"name": "c4.jsonl"}], "tokens": 65536, "seed": 0}
    manifest = {"recipe": {"recipe": {"name": "small"}, "data": data, "layers": [{"name": "q"}]}}
    (tmp_path / "lacewing.json").write_text(json.dumps(manifest))
    assert quality.manifest_notes(tmp_path) == {"recipe": {"name": "small"}, "data": data}
    (tmp_path / "lacewing.json").write_text(json.dumps({"recipe": None, "healed": {"seed": 1}}))
    assert quality.manifest_notes(tmp_path) == {"healed": {"seed": 1}}


def test_files_of_a_rival_that_are_there_are_taken(
    tmp_path: Path, job: quality.Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = [quality.configurations.llama("Q8_0"), quality.configurations.llama("Q4_0")]
    monkeypatch.setattr(quality.configurations, "for_model", lambda stem: list(kinds))
    monkeypatch.setattr(models, "gguf", lambda *_: pytest.fail("quantized"))
    for one in kinds:
        (tmp_path / f"{one.kind}.gguf").write_bytes(b"1234")
    job = quality.Job(arguments(tmp_path, llama_python=Path("python"), rival_files=tmp_path))
    job.make()
    assert [job.made(one)["bytes"] for one in kinds] == [4, 4]
    os.utime(tmp_path / "Q4_0.gguf", ns=(1, 1))
    assert [bool(job.made(one)) for one in kinds] == [True, False]


def test_tasks_are_called_by_their_files() -> None:
    assert judges.task_name("arc_easy_500") == "arc_easy"
    assert judges.task_name("mine") == "mine"

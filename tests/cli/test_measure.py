"""`lacewing doctor` and `lacewing bench`: that they measure what they say, not how fast."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lacewing.checkpoint import Report
from lacewing.cli import doctor, kernels, probe
from lacewing.cli.opening import roundings
from lacewing.formats import FORMATS
from tests.cli.conftest import Call

SMALL = 8 << 20


@pytest.fixture(autouse=True)
def small_working_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches may hold these: the figures mean nothing, and come at once."""
    monkeypatch.setattr(doctor, "working_set", lambda: SMALL)
    monkeypatch.setattr(kernels, "WORKING_SET", SMALL)


def test_doctor(call: Call, isas: list[str]) -> None:
    status, out, err = call("doctor", "--seconds", "0.01", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert [isa["name"] for isa in found["isas"] if isa["runs"]] == isas
    assert all(isa["why"] for isa in found["isas"])
    assert found["default_isa"] in isas
    assert 1 <= found["threads"] <= len(os.sched_getaffinity(0))
    assert str(found["threads"]) in found["read_bandwidth_gb_s"]
    assert all(rate > 0 for rate in found["read_bandwidth_gb_s"].values())
    assert all(row["tokens_per_s"] > 0 for row in found["reach"])


def test_doctor_for_people(call: Call) -> None:
    status, out, _ = call("doctor", "--seconds", "0.01", "--model-bytes", "1G")
    assert status == 0
    for word in ("scalar", "AMX", "affinity", "quota", "huge pages", "GB/s", "1 GB", "tokens/s"):
        assert word in out


def test_a_forced_isa_that_is_not_there_is_told(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "forced_isa_problem", lambda: "LACEWING_ISA=mmx: no such ISA")
    status, out, _ = call("doctor", "--seconds", "0.01")
    assert status == 0
    assert "no such ISA" in out


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import os; os.kill(os.getpid(), 4)", "SIGILL"),
        ("raise SystemExit('it broke')", "it broke"),
        ('print(\'{"formats": {"bf16": "differs"}}\')', "wrong results: bf16"),
    ],
)
def test_an_isa_is_believed_only_when_it_ran(
    monkeypatch: pytest.MonkeyPatch, code: str, says: str
) -> None:
    monkeypatch.setattr(doctor, "probe_command", lambda isa: [*doctor.PYTHON, "-c", code])
    state = doctor.isa_state({"name": "fast", "usable": True, "missing": None})
    assert not state["runs"]
    assert says in state["why"]


def test_the_probe_runs_every_format(capsys: pytest.CaptureFixture[str], isa: str) -> None:
    probe.main(isa)
    assert json.loads(capsys.readouterr().out)["formats"] == dict.fromkeys(FORMATS, "ok")


@pytest.mark.parametrize("verb", ["decode", "prefill"])
def test_bench_of_a_model(call: Call, tiny_gguf: Path, verb: str) -> None:
    options = ("--tokens", "4", "--repeats", "2", "--batch", "2", "--threads", "1")
    status, out, err = call("bench", verb, tiny_gguf, *options, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["bench"] == verb
    assert found["threads"] == 1
    assert len(found["tokens_per_s_runs"]) == 2
    assert found["tokens_per_s"] in found["tokens_per_s_runs"]
    assert found["format"] == "w4a8g32z"
    assert ("bandwidth_share" in found) == (verb == "decode")
    status, out, _ = call("bench", verb, tiny_gguf, *options)
    assert status == 0
    assert "tokens/s" in out


def test_bench_kernels(call: Call) -> None:
    options = ("--seconds", "0.01", "--shape", "64x128", "--shape", "33x65", "--threads", "1")
    status, out, err = call("bench", "kernels", *options, "--json")
    assert status == 0, err
    found = json.loads(out)
    rows = found["kernels"]
    assert [row["format"] for row in rows] == [*FORMATS, *FORMATS]
    assert all(row["gb_s"] > 0 for row in rows)
    assert found["conditions"]["threads"] == 1
    status, out, _ = call("bench", "kernels", *options, "--format", "bf16", "--format", "w8a8g32")
    assert status == 0
    assert "w8a8g32" in out
    assert "w4a8g32" not in out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--format", "w4a8g33"), "did you mean"),
        (("--isa", "mmx"), "must be one of"),
        (("--threads", "0"), "threads"),
    ],
)
def test_bench_of_what_is_not(call: Call, options: tuple[str, ...], says: str) -> None:
    status, out, err = call("bench", "kernels", *options)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert says in err


def test_bench_beyond_the_context(call: Call, tiny_gguf: Path) -> None:
    status, out, err = call("bench", "decode", tiny_gguf, "--tokens", "100000")
    assert (status, out) == (1, "")
    assert "context of 4096 tokens" in err


def test_reports_add_up() -> None:
    def report(name: str, format: str, weights: int, error: float) -> Report:
        return Report(name, (weights, 1), "BF16", format, weights, error, error == 0)

    rows = roundings(
        [report("a", "w8a8g32", 3, 0.1), report("b", "w8a8g32", 1, 0.3), report("c", "f32", 9, 0.0)]
    )
    assert [(row.format, row.tensors, row.weights) for row in rows] == [
        ("f32", 1, 9),
        ("w8a8g32", 2, 4),
    ]
    assert rows[1].error == pytest.approx(((3 * 0.01 + 0.09) / 4) ** 0.5)
    assert (rows[1].worst, rows[1].worst_name) == (0.3, "b")
    assert rows[0].exact
    assert not rows[1].exact

"""`lacewing doctor` and `lacewing bench`: that they measure what they say, not how fast."""

from __future__ import annotations

import json
import os
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lacewing import tuning
from lacewing.checkpoint import Report
from lacewing.cli import doctor, kernels, memory, probe, rivals, roofline, tune
from lacewing.cli.kernelreport import Roofs, roof_is_doubtful
from lacewing.cli.opening import roundings
from lacewing.formats import FORMATS
from lacewing.native import compiled
from tests.cli.conftest import Call

SMALL = 1 << 20


@pytest.fixture(autouse=True)
def small_working_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches may hold these: the figures mean nothing, and come at once."""
    monkeypatch.setattr(memory, "cold_bytes", lambda: SMALL)
    monkeypatch.setattr(rivals, "installed", lambda: False)


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


QUICK = ("bench", "kernels", "--seconds", "0.01", "--threads", "1")


def test_bench_kernels(call: Call) -> None:
    shapes = ("--shape", "64x128", "--shape", "33x65")
    status, out, err = call(*QUICK, *shapes, "--json")
    assert status == 0, err
    found = json.loads(out)
    rows = found["kernels"]
    assert [row["format"] for row in rows] == [*FORMATS, *FORMATS]
    for row in rows:
        assert row["engine"] == "lacewing"
        assert row["gop_s"] == pytest.approx(2 * row["n"] * row["k"] / row["seconds"] / 1e9)
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
        assert row["samples"] >= 5
        peak = found["conditions"]["peak_gop_s"][row["isa"]]
        kind = "float" if FORMATS[row["format"]].group_size == 0 else "int8"
        assert row["peak_share"] == pytest.approx(row["gop_s"] / peak[kind])
        roof = found["conditions"]["read_bandwidth_gb_s"]
        assert row["bandwidth_share"] == pytest.approx(row["gb_s"] / roof)
    assert found["conditions"]["threads"] == 1
    assert found["conditions"]["torch"] is None
    status, out, err = call(*QUICK, *shapes, "--format", "bf16", "--format", "w8a8g32")
    assert status == 0
    assert "w8a8g32" in out
    assert "w4a8g32" not in out
    assert "torch is not installed" in err
    assert "cache hits" in err  # 64 KB are not cold


def test_bench_kernels_over_every_axis(call: Call, isas: list[str]) -> None:
    options = [text for isa in isas for text in ("--isa", isa)]
    options += ["--rows", "1", "-m", "3", "--sparsity", "0.2", "--sparsity", "0.8", "--hot"]
    options += ["--format", "bf16", "--format", "w8a8g64_sp", "--shape", "32x64"]
    status, out, err = call(*QUICK, *options, "--json")
    assert status == 0, err
    rows = json.loads(out)["kernels"]
    kinds = [("bf16", None), ("w8a8g64_sp", 0.2), ("w8a8g64_sp", 0.8)]
    assert {(row["format"], row["sparsity"], row["m"], row["isa"]) for row in rows} == {
        (*kind, m, isa) for kind in kinds for m in (1, 3) for isa in isas
    }
    thin, thick = (
        next(row["bytes"] for row in rows if row["sparsity"] == share) for share in (0.8, 0.2)
    )
    assert thin < thick
    assert "hot" in call(*QUICK, *options).err


def test_copies_fill_the_share() -> None:
    weight = kernels.Packed.random("w8a8g32", None, 32, 64, 10_000, 1)
    assert len(weight.weights) == -(-10_000 // weight.bytes)
    assert len(weight.time(1, "scalar", 0)) == len(weight.weights)
    alone = kernels.Packed.random("w8a8g32", None, 32, 64, 0, 1)
    assert len(alone.weights) == 1
    assert len(alone.time(1, "scalar", 8)) == 8


FAKE_TORCH = """
import json, sys
answers = {"start": {"version": "9", "engine": "x"}, "measure": {"times": [0.5] * 3}}
for line in sys.stdin:
    command = json.loads(line)
    answer = answers.get(command["verb"], {})
    if command["verb"] == "measure" and command["kind"] == "int8":
        answer = {"error": "no such kernel"}
    print(json.dumps(answer), flush=True)
"""


def test_rivals_stand_beside_ours(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "installed", lambda: True)
    monkeypatch.setattr(rivals, "COMMAND", (*doctor.PYTHON, "-c", FAKE_TORCH))
    options = ("--shape", "32x64", "--format", "w8a8g32")
    status, out, err = call(*QUICK, *options, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["conditions"]["torch"] == "9"
    assert [(row["engine"], row["format"]) for row in found["kernels"]] == [
        ("lacewing", "w8a8g32"),
        ("torch", "torch bf16"),
    ]
    assert found["kernels"][1]["seconds"] == 0.5
    assert found["kernels"][1]["peak_share"] is None
    assert "torch int8 32x64 is left out: no such kernel" in err
    monkeypatch.setattr(rivals, "COMMAND", (*doctor.PYTHON, "-c", "raise SystemExit(3)"))
    status, _, err = call(*QUICK, *options)
    assert status == 1
    assert "ended with code 3" in err
    assert "--no-rivals" in err
    assert call(*QUICK, *options, "--no-rivals").status == 0


def row(format: str, m: int, seconds: float, isa: str | None = "avx2") -> kernels.KernelTime:
    return kernels.KernelTime("lacewing", format, None, isa, 64, 64, m, 4096, seconds, 0.1, 9)


def test_a_roof_below_the_marks_is_doubted() -> None:
    roofs = Roofs(2, 20.0, {"avx2": {"int8": 400.0, "float": 90.0}})
    assert not roof_is_doubtful([row("bf16", 1, 4096 / 21e9)], roofs)
    assert roof_is_doubtful([row("bf16", 1, 4096 / 23e9)], roofs)


def test_roofline() -> None:
    found = [row("bf16", 1, 1e-6), row("bf16", 1, 4e-6), row("bf16", 8, 3e-6), row("a<b", 1, 1e-6)]
    roofs = Roofs(2, 20.0, {"avx2": {"int8": 400.0, "float": 90.0}})
    marks = roofline.marks(found)
    assert [(mark.series, mark.m) for mark in marks] == [("bf16", 1), ("a<b", 1), ("bf16", 8)]
    both = marks[0]
    assert both.x == pytest.approx(2.0)  # 8192 operations, 4096 bytes
    assert (both.low, both.high) == pytest.approx((8192e-9 / 4e-6, 8192e-9 / 1e-6))
    root = ElementTree.fromstring(roofline.draw(found, roofs, "a & b"))
    text = " ".join(element.text or "" for element in root.iter() if element.text)
    for word in ("a & b", "a<b", "bf16", "avx2 int8 400", "20.0 GB/s", "m=8", "m = 1, 8"):
        assert word in text
    for element in root.iter():  # nothing is drawn outside of the picture
        for name in ("x", "x1", "x2", "cx"):
            assert 0 <= float(element.get(name, 0)) <= roofline.WIDTH
        for name in ("y", "y1", "y2", "cy"):
            assert 0 <= float(element.get(name, 0)) <= roofline.HEIGHT


def test_bench_kernels_draws(call: Call, tmp_path: Path) -> None:
    status, _, err = call(*QUICK, "--shape", "32x64", "--format", "bf16", "--svg", tmp_path / "a")
    assert status == 0, err
    assert ElementTree.parse(tmp_path / "a").getroot().tag.endswith("svg")
    status, _, err = call(*QUICK, "--svg", tmp_path / "none" / "a")
    assert status != 0
    assert "is no directory" in err


def test_tune(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tune, "SHAPE", (32, 64))
    monkeypatch.setenv("LACEWING_TUNING", str(tmp_path / "t.json"))
    isas = [isa["name"] for isa in compiled().isas() if isa["usable"]]
    fast = [isa for isa in isas if isa not in ("scalar", "amx_emulated")] or ["scalar"]
    options = [text for isa in fast for text in ("--isa", isa)]
    before = {isa: compiled().gemv_rows(isa) for isa in isas}
    try:
        status, out, err = call("bench", "kernels", "--tune", "--threads", "1", *options, "--json")
        assert status == 0, err
        written = json.loads((tmp_path / "t.json").read_text())
        for switch, (tell, _) in tuning.SWITCHES.items():
            kept = written[switch]
            assert kept == json.loads(out)[switch]
            for isa in fast:
                now = getattr(compiled(), tell)(isa)
                assert kept[isa] == {name: now[name]["rows"] for name in FORMATS}
        assert call("bench", "kernels", "--tune", "--threads", "1", *options).status == 0
    finally:
        tuning.reset(compiled())
    assert {isa: compiled().gemv_rows(isa) for isa in isas} == before


def test_the_switch_follows_the_times() -> None:
    def rows(default: int, gemv: list[float], gemm: list[float]) -> int:
        return tune.Crossing("avx2", "bf16", default, gemv, gemm).rows

    assert rows(0, [1, 1, 1, 9], [2, 2, 2, 2]) == 3
    assert rows(4, [3, 3, 3, 3], [2, 2, 2, 2]) == 0
    assert rows(1, [1, 1, 1, 1], [2, 2, 2, 2]) == 4
    assert rows(2, [1, 1, 1, 1], [1.01, 1.01, 1, 1]) == 2  # noise is not an opinion

    def by_cpu(default: int, prefetched: float, unprefetched: float | None) -> int:
        each = tune.Crossing("avx2", "bf16", 1, [prefetched], [9.0], unprefetched, default)
        return each.cpu_prefetch_rows

    assert by_cpu(0, 2, 1) == 1
    assert by_cpu(1, 1, 2) == 0
    assert by_cpu(1, 1, 1.01) == 1
    assert by_cpu(0, 1, 0.99) == 0
    assert by_cpu(0, 1, None) == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--format", "w4a8g33"), "did you mean"),
        (("--isa", "mmx"), "must be one of"),
        (("--threads", "0"), "threads"),
        (("--shape", "9000000x9000000"), "of memory to be packed"),
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

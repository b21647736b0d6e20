"""The tuned table: it changes no bit, and its file may be anything."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacewing import _C, formats, tuning
from lacewing.cli.probe import random_codes
from lacewing.errors import LacewingError
from lacewing.native import tensor

Array = np.ndarray[Any, Any]


@pytest.fixture(autouse=True)
def defaults() -> Any:
    tuning.reset(_C)
    yield
    tuning.reset(_C)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LACEWING_TUNING", str(tmp_path / "tuning.json"))
    return tmp_path / "tuning.json"


def table(isa: str, rows: Any = 1) -> tuning.Tuning:
    return {"gemv_rows": {isa: {"w8a8g32": rows}}}


@pytest.mark.parametrize("name", formats.FORMATS)
def test_results_do_not_depend_on_it(name: str, isa: str) -> None:
    weight = tensor(formats.get_format(name).pack(random_codes(name, 40, 136)))
    most = _C.gemv_rows(isa)[name]["most"]
    for m in (1, 2, most, most + 1):
        x = np.random.default_rng(m).standard_normal((m, 136), dtype=np.float32)
        expected = _C.linear(x, weight, isa=isa, threads=1)
        for rows in range(most + 1):
            _C.set_gemv_rows(name, rows, isa)
            assert _C.gemv_rows(isa)[name]["rows"] == rows
            assert (_C.linear(x, weight, isa=isa, threads=2) == expected).all()
        _C.set_gemv_rows(name, None, isa)
    x = np.random.default_rng(1).standard_normal((1, 136), dtype=np.float32)
    seen = []
    for rows in range(_C.cpu_prefetch_rows(isa)[name]["most"] + 1):
        _C.set_cpu_prefetch_rows(name, rows, isa)
        assert _C.cpu_prefetch_rows(isa)[name]["rows"] == rows
        seen.append(_C.linear(x, weight, isa=isa, threads=2))
    assert all((each == seen[0]).all() for each in seen)


def test_arguments_are_checked(isa: str) -> None:
    most = _C.gemv_rows(isa)["bf16"]["most"]
    for rows in (-1, most + 1):
        with pytest.raises(ValueError, match="set_gemv_rows: rows must be in 0"):
            _C.set_gemv_rows("bf16", rows, isa)
        with pytest.raises(ValueError, match="set_cpu_prefetch_rows: rows must be in 0"):
            _C.set_cpu_prefetch_rows("bf16", rows, isa)
    with pytest.raises(ValueError, match="format must be one of"):
        _C.set_gemv_rows("w0", 1, isa)
    with pytest.raises(ValueError, match="isa must be"):
        _C.gemv_rows("mmx")
    for kind in ("int8", "float"):
        assert _C.compute_peak(kind, isa, 1, 1e-3) > 0
    with pytest.raises(ValueError, match="kind must be"):
        _C.compute_peak("f64", isa)


def test_it_is_kept(place: Path, isa: str, caplog: pytest.LogCaptureFixture) -> None:
    assert tuning.write(table(isa), _C) == place
    tuning.load(_C)
    assert _C.gemv_rows(isa)["w8a8g32"]["rows"] == 1
    assert _C.gemv_rows(isa)["bf16"]["rows"] == _C.gemv_rows(isa)["bf16"]["default"]
    assert not caplog.records


def test_every_switch_is_kept(place: Path, isa: str) -> None:
    most = _C.cpu_prefetch_rows(isa)["w8a8"]["most"]
    for rows in range(most + 1):
        tuning.write({"gemv_rows": {}, "cpu_prefetch_rows": {isa: {"w8a8": rows}}}, _C)
        tuning.load(_C)
        assert _C.cpu_prefetch_rows(isa)["w8a8"]["rows"] == rows
    tuning.reset(_C)
    now = _C.cpu_prefetch_rows(isa)
    assert all(switch["rows"] == switch["default"] for switch in now.values())


def test_it_is_loaded_with_the_module(place: Path) -> None:
    tuning.write(table("scalar", 0), _C)
    code = "from lacewing.native import compiled as c; print(c().gemv_rows('scalar')['w8a8g32'])"
    environment = {"LACEWING_TUNING": str(place), "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True
    )
    assert "'rows': 0" in run.stdout, run.stderr
    place.write_text("{")
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0
    assert len(run.stderr.splitlines()) == 1
    assert "is ignored" in run.stderr


def changed(**fields: Any) -> str:
    content = {"version": tuning.__version__, "cpu": tuning.cpu_identity(_C), **table("scalar")}
    return json.dumps(content | fields)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("\xff\x00", "not JSON"),
        (" " * ((1 << 20) + 1), "too large"),
        ("[]", "must hold an object"),
        ("{}", "of version None"),
        ({"version": "0.0.0"}, "of version '0.0.0'"),
        ({"cpu": {"model": "Z80"}}, "another CPU"),
        ({"cpu": None}, "another CPU"),
        ({"gemv_rows": []}, "must be an object"),
        ({"gemv_rows": {"mmx": {}}}, "does not run here"),
        ({"gemv_rows": {"scalar": 3}}, "must be an object"),
        ({"gemv_rows": {"scalar": {"w9": 1}}}, "unknown format"),
        *(
            ({"gemv_rows": {"scalar": {"bf16": 1, "w8a8g32": value}}}, "integer in 0..")
            for value in (-1, 3, 10**30, 1.5, True, "1", None, [1], float("nan"))
        ),
    ],
)
def test_what_does_not_fit_is_ignored_with_a_note(
    place: Path, content: str | dict[str, Any], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    text = content if isinstance(content, str) else changed(**content)
    place.write_text(text, encoding="latin-1")
    tuning.load(_C)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert says in record.getMessage()
    assert str(place) in record.getMessage()
    assert all(each["rows"] == each["default"] for each in _C.gemv_rows("scalar").values())


def test_none_is_no_fault(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    tuning.load(_C)
    place.mkdir()
    tuning.load(_C)
    assert ["is ignored" in record.getMessage() for record in caplog.records] == [True]


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LACEWING_TUNING", "off")
    assert tuning.path() is None
    with pytest.raises(LacewingError, match="switched off"):
        tuning.write(table("scalar"), _C)
    monkeypatch.delenv("LACEWING_TUNING")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert tuning.path() == Path("/somewhere/lacewing/tuning.json")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/ada")
    assert tuning.path() == Path("/home/ada/.cache/lacewing/tuning.json")


def test_a_directory_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LACEWING_TUNING", str(tmp_path / "file" / "tuning.json"))
    with pytest.raises(LacewingError, match="cannot be written") as raised:
        tuning.write(table("scalar"), _C)
    assert "LACEWING_TUNING" in str(raised.value.hint)


def test_a_failed_write_leaves_the_old_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.write(table("scalar"), _C)
    before = place.read_text()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tuning.os, "fsync", fail)
    with pytest.raises(LacewingError, match="disk full"):
        tuning.write(table("scalar", 2), _C)
    assert place.read_text() == before
    assert list(place.parent.iterdir()) == [place]


def test_writers_and_readers_race(place: Path) -> None:
    tuning.write(table("scalar", 0), _C)
    wrong: list[Exception] = []

    def write(rows: int) -> None:
        for _ in range(20):
            tuning.write(table("scalar", rows), _C)

    def read() -> None:
        for _ in range(100):
            try:
                tuning.read(place, _C)
            except (OSError, ValueError) as error:
                wrong.append(error)

    racers = [threading.Thread(target=write, args=(rows,)) for rows in (0, 1, 2)]
    racers.append(threading.Thread(target=read))
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert not wrong
    assert list(place.parent.iterdir()) == [place]

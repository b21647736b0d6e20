"""A packed directory appears complete or not at all, whatever happens to the writer."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacewing.checkpoint import Source, load_packed, open_source, write_packed
from lacewing.checkpoint import files as files_module
from lacewing.checkpoint.files import new_directory
from lacewing.errors import CheckpointError, FormatError
from tests.checkpoint.build import tiny_gguf

FILES = ["lacewing.json", "model.safetensors", "tokenizer.json"]


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return tiny_gguf("Q4_1").write(tmp_path / "model.gguf")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    path = tmp_path / "place"
    path.mkdir()
    return path


def names(path: Path) -> list[str]:
    return sorted(child.name for child in path.iterdir())


def content(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in FILES}


def test_a_free_target(gguf: Path, place: Path) -> None:
    write_packed(gguf, place / "out")
    assert names(place) == ["out"]
    assert names(place / "out") == FILES


def test_an_open_source_is_taken_too(gguf: Path, place: Path) -> None:
    source: Source = open_source(gguf)
    write_packed(source, str(place / "out"))
    load_packed(place / "out")


def test_an_existing_target_is_refused(gguf: Path, place: Path) -> None:
    write_packed(gguf, place / "out")
    before = content(place / "out")
    with pytest.raises(CheckpointError) as caught:
        write_packed(gguf, place / "out", "w8a8g64")
    assert "--force" in str(caught.value.hint)
    assert content(place / "out") == before
    assert names(place) == ["out"]


def test_force_replaces_a_packed_directory(gguf: Path, place: Path) -> None:
    write_packed(gguf, place / "out")
    write_packed(gguf, place / "out", "w8a8g64", force=True)
    up = load_packed(place / "out").tensors["model.layers.0.mlp.up_proj.weight"]
    assert getattr(up, "format", None) == "w8a8g64"
    assert names(place) == ["out"]


def test_force_replaces_an_empty_directory(gguf: Path, place: Path) -> None:
    (place / "out").mkdir()
    write_packed(gguf, place / "out", force=True)
    assert names(place / "out") == FILES


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_force_deletes_nothing_of_others(gguf: Path, place: Path, kind: str) -> None:
    if kind == "directory":
        (place / "out").mkdir()
        (place / "out" / "thesis.txt").write_text("years of work")
    elif kind == "file":
        (place / "out").write_text("years of work")
    else:
        (place / "out").symlink_to(place / "nowhere" / "else")
    with pytest.raises(CheckpointError):
        write_packed(gguf, place / "out", force=True)
    assert names(place) == ["out"]
    if kind == "directory":
        assert (place / "out" / "thesis.txt").read_text() == "years of work"


def test_a_model_may_replace_itself(gguf: Path, place: Path) -> None:
    write_packed(gguf, place / "out", "w8a8g32")
    write_packed(place / "out", place / "out", "w8a8g64", force=True)
    load_packed(place / "out")
    assert names(place) == ["out"]


def test_a_link_to_a_directory_stays_a_link(gguf: Path, place: Path) -> None:
    write_packed(gguf, place / "out")
    (place / "link").symlink_to(place / "out")
    write_packed(gguf, place / "link", "w8a8g64", force=True)
    assert (place / "link").is_symlink()
    assert names(place) == ["link", "out"]


def test_a_mapped_model_outlives_its_directory(gguf: Path, place: Path) -> None:
    write_packed(gguf, place / "out")
    model = load_packed(place / "out")
    before = {n: v.nbytes for n, v in model.tensors.items()}
    write_packed(gguf, place / "out", "w8a8g64", force=True)
    vector = model.tensors["model.norm.weight"]
    assert isinstance(vector, np.ndarray)
    assert np.isfinite(vector).all()
    assert {n: v.nbytes for n, v in model.tensors.items()} == before


@pytest.mark.parametrize(
    "target", ["absent/out", "model.gguf/out", "/proc/lacewing-test", "/dev/null/out", "x" * 300]
)
def test_places_that_cannot_be_written(gguf: Path, tmp_path: Path, target: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        write_packed(gguf, tmp_path / target)
    assert target.split("/")[-1] in str(caught.value)
    assert names(tmp_path) == ["model.gguf"]


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, Stop, MemoryError])
@pytest.mark.parametrize("force", [False, True])
def test_an_interruption_leaves_nothing(
    gguf: Path, place: Path, error: type[BaseException], force: bool
) -> None:
    if force:
        write_packed(gguf, place / "out")
    before = content(place / "out") if force else None
    calls = []

    def progress(*call: Any) -> None:
        calls.append(call)
        if len(calls) == 5:
            raise error

    expected = CheckpointError if error is MemoryError else error
    with pytest.raises(expected):
        write_packed(gguf, place / "out", force=force, progress=progress)
    assert names(place) == (["out"] if force else [])
    assert before is None or content(place / "out") == before


def test_a_bad_tensor_leaves_nothing(tmp_path: Path, place: Path) -> None:
    file = tiny_gguf("Q4_1")
    begin = file.infos["blk.1.ffn_down.weight"].offset
    file.data = file.data[:begin] + b"\xff" * 20 + file.data[begin + 20 :]
    with pytest.raises(FormatError, match="layers"):
        write_packed(file.write(tmp_path / "bad.gguf"), place / "out")
    assert names(place) == []


@pytest.mark.parametrize("step", [1, 2])
def test_a_failing_rename_restores_the_old(
    gguf: Path, place: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Renames: the old one aside, the new one in place."""
    write_packed(gguf, place / "out")
    before = content(place / "out")
    real, calls = Path.rename, []

    def rename(self: Path, target: Any) -> Path:
        calls.append(self)
        if len(calls) == step:
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(CheckpointError, match="Input/output error"):
        write_packed(gguf, place / "out", "w8a8g64", force=True)
    assert content(place / "out") == before
    assert names(place) == ["out"]


def test_someone_else_takes_the_target_meanwhile(gguf: Path, place: Path) -> None:
    def progress(*call: Any) -> None:
        (place / "out").mkdir(exist_ok=True)

    with pytest.raises(CheckpointError):
        write_packed(gguf, place / "out", progress=progress)
    assert names(place) == ["out"]
    assert names(place / "out") == []


def test_all_is_on_disk_before_it_appears(
    gguf: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    monkeypatch.setattr(files_module.os, "fsync", fsync)
    write_packed(gguf, place / "out")
    assert sorted(synced[:3]) == FILES
    assert synced[3].endswith(".partial")
    assert synced[4] == "place"


# -- other processes ------------------------------------------------------------------------------

WRITE = """
import sys, time
from lacewing.checkpoint import write_packed
source, target, force = sys.argv[1], sys.argv[2], sys.argv[3] == "force"
seen = []
def progress(*call):
    seen.append(call)
    if len(seen) == 7:
        print("half way", flush=True)
        time.sleep(60)
write_packed(source, target, force=force, progress=progress)
"""


def start(gguf: Path, target: Path, force: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITE, str(gguf), str(target), force],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop(process: subprocess.Popen[str], number: int) -> str:
    assert process.stdout is not None
    assert process.stdout.readline() == "half way\n"
    process.send_signal(number)
    return process.communicate()[1]


@pytest.mark.parametrize("force", ["force", "free"])
def test_killed_half_way(gguf: Path, place: Path, force: str) -> None:
    """No target appears, an old one stays, and the next call clears what was left."""
    old = None
    if force == "force":
        write_packed(gguf, place / "out")
        old = content(place / "out")
    stop(start(gguf, place / "out", force), signal.SIGKILL)
    assert (place / "out").exists() == (old is not None)
    assert old is None or content(place / "out") == old
    partial = [name for name in names(place) if name.endswith(".partial")]
    assert len(partial) == 1
    write_packed(gguf, place / "out", force=force == "force")
    assert names(place) == ["out"]


def test_interrupted_by_the_keyboard(gguf: Path, place: Path) -> None:
    said = stop(start(gguf, place / "out", "free"), signal.SIGINT)
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert names(place) == []


def test_a_living_writer_is_left_alone(gguf: Path, place: Path) -> None:
    """Two writers of one target: the second finds no half-written directory to clear away."""
    process = start(gguf, place / "out", "free")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "half way\n"
        write_packed(gguf, place / "out")
        partial = [name for name in names(place) if name.endswith(".partial")]
        assert len(partial) == 1
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert names(place) == ["out"]
    load_packed(place / "out")


FULL = """
import resource, signal, sys
from lacewing.checkpoint import write_packed
from lacewing.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_packed(sys.argv[1], sys.argv[2])
except CheckpointError as error:
    print(error)
    print(error.hint)
"""


def test_a_full_disk(gguf: Path, place: Path) -> None:
    """A limit on the size of a file stands in for it: the same failing write."""
    run = subprocess.run(
        [sys.executable, "-c", FULL, str(gguf), str(place / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cannot be written" in run.stdout
    assert "space" in run.stdout
    assert names(place) == []


def test_stale_directories_of_other_targets_stay(place: Path) -> None:
    for name in (".other.1.partial", ".out.x.partial.kept", "out.1.partial"):
        (place / name).mkdir()
    before = names(place)
    with new_directory(place / "out", "marker") as partial:
        (partial / "marker").touch()
    assert names(place) == sorted([*before, "out"])


@pytest.mark.parametrize("name", ["a[b]", "a*", "a?", "ä ö", "-f"])
def test_odd_names(place: Path, name: str) -> None:
    (place / f".{name}.1.partial").mkdir()
    with new_directory(place / name, "marker") as partial:
        (partial / "marker").touch()
    assert names(place) == [name]

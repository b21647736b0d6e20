"""The work directory: blocks that are finished stay finished, whenever a process dies."""

from __future__ import annotations

import errno
import os
import signal
import warnings
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="lacewing.compress needs PyTorch")

from lacewing.compress import session as module  # noqa: E402
from lacewing.compress.session import LayerReport, Session  # noqa: E402
from lacewing.errors import CheckpointError, RecipeError  # noqa: E402
from lacewing.formats import PackedTensor, pack  # noqa: E402

SHAPE = (3, 5, 8)
BLOCKS = 4


def open_session(place: Path, digest: str = "d", **options: Any) -> Session:
    return Session.open(place, digest, BLOCKS, SHAPE, **options)


def run_block(session: Session, index: int) -> None:
    """As a driver does: what a block writes depends on what it reads, element by element."""
    for path in ("dense", "compressed"):
        current, following = session.activations(path)
        if index == 0:
            current.copy_(torch.arange(120.0).view(SHAPE) * (1 + len(path)))
        for window in range(SHAPE[0]):
            following[window] = torch.sin(current[window]) * 3 + index
            step(f"{path} {index} {window}")
    current, following = session.activations("compressed")
    weight = following.reshape(-1, 8).numpy()
    packed = pack(weight, "w8a8g32")
    norm = weight[0].copy()
    name = f"model.layers.{index}.mlp.up_proj"
    error = float(weight.std())
    layer = LayerReport(name, "w8a8g32", "columns", 0.0, 0.0, error, packed.bits_per_weight, 1.5)
    session.finish_block(index, {f"{name}.weight": packed, f"{name}_norm.weight": norm}, [layer])
    step(f"finished {index}")


def step(where: str) -> None:
    """A process that is to die here dies here."""
    if os.environ.get("DIE_AT") == where:
        os.kill(os.getpid(), signal.SIGKILL)


def run_all(place: Path) -> None:
    with open_session(place) as session:
        for index in range(session.finished, BLOCKS):
            run_block(session, index)


def state_of(place: Path) -> Any:
    """All that a session holds, to compare."""
    with open_session(place) as session:
        assert session.finished == BLOCKS
        found = []
        for index in range(BLOCKS):
            for name, value in session.tensors(index).items():
                parts = value.parts if isinstance(value, PackedTensor) else {"": value}
                found += [(name, part, array.tobytes()) for part, array in parts.items()]
        ends = [session.activations(path)[0].numpy().tobytes() for path in ("dense", "compressed")]
        return found, session.reports(), ends


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("session") / "out.work"
    run_all(place)
    return state_of(place)


def test_what_is_kept(tmp_path: Path) -> None:
    with open_session(tmp_path / "w") as session:
        assert session.finished == 0
        run_block(session, 0)
        assert session.finished == 1
        output = session.activations("compressed")[0].clone()
    with open_session(tmp_path / "w") as session:
        assert session.finished == 1
        assert torch.equal(session.activations("compressed")[0], output)
        found = session.tensors(0)
        (layer,) = session.reports()
    assert layer.name == "model.layers.0.mlp.up_proj"
    assert layer.error == float(output.numpy().std())
    wanted = pack(output.reshape(-1, 8).numpy(), "w8a8g32")
    packed = found[f"{layer.name}.weight"]
    assert isinstance(packed, PackedTensor)
    assert (packed.format, packed.shape) == ("w8a8g32", (15, 8))
    assert all((packed.parts[part] == wanted.parts[part]).all() for part in wanted.parts)
    norm = found[f"{layer.name}_norm.weight"]
    assert isinstance(norm, np.ndarray)
    assert (norm == output.numpy().reshape(-1, 8)[0]).all()


@pytest.mark.parametrize(
    "where",
    [
        "compressed 0 1",
        "dense 2 0",
        "compressed 2 2",
        "block 2",
        "reports 2",
        "before the state 1",
        "new state 2",
        "finished 1",
        "finished 3",
    ],
)
def test_killed_at_any_instant(tmp_path: Path, whole: Any, where: str) -> None:
    place = tmp_path / "out.work"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking beside threads: the child starts none
        child = os.fork()
    if child == 0:
        die_at(where, place)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    run_all(place)
    assert state_of(place) == whole


def die_at(where: str, place: Path) -> NoReturn:
    """What the child does; nothing of it may come back into pytest."""
    try:
        os.environ["DIE_AT"] = where
        plant()
        run_all(place)
    finally:
        os._exit(1)


def plant() -> None:
    """More places to die at, within `finish_block`."""
    writer, write_file, sync = module.SafetensorsWriter, module.write_file, module._replace_state

    class Writer(writer):  # type: ignore[valid-type, misc]
        def add(self, name: str, array: Any) -> None:
            super().add(name, array)
            self._file.flush()
            step(f"block {name.split('.')[2]}")

    def write(path: Path, data: bytes) -> None:
        if path.name.startswith("block-"):
            path.write_bytes(data[:10])
            step(f"reports {int(path.name[6:11])}")
            path.unlink()
        write_file(path, data)

    def replace(place: Path, state: Any) -> None:
        index = state["finished"] - 1
        step(f"before the state {index}")
        if os.environ["DIE_AT"] == f"new state {index}":
            (place / "state.json.new").write_bytes(b"{")
            step(f"new state {index}")
        sync(place, state)

    module.SafetensorsWriter = Writer  # type: ignore[misc]
    module.write_file = write
    module._replace_state = replace


def test_another_compression(tmp_path: Path) -> None:
    place = tmp_path / "w"
    with open_session(place) as session:
        run_block(session, 0)
    with pytest.raises(RecipeError, match="another compression") as caught:
        open_session(place, "e")
    assert "--restart" in (caught.value.hint or "")
    with open_session(place) as session:  # and nothing is lost
        assert session.finished == 1
    with open_session(place, "e", restart=True) as session:
        assert session.finished == 0
        assert sorted(path.name for path in place.iterdir()) == ["state.json"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with open_session(tmp_path / "w"):
        for restart in (False, True):
            with pytest.raises(RecipeError, match="another process"):
                open_session(tmp_path / "w", restart=restart)
    open_session(tmp_path / "w").close()


def test_a_restart_that_was_killed(tmp_path: Path) -> None:
    with open_session(tmp_path / "w") as session:
        run_block(session, 0)
        session.remember("shares", lambda: {"a": 1.0})
    (tmp_path / "w" / "state.json").unlink()
    with open_session(tmp_path / "w", "e") as session:
        assert session.finished == 0
        assert session.remember("shares", lambda: {"a": 2.0}) == {"a": 2.0}
        assert session.remember("shares", lambda: {"a": 3.0}) == {"a": 2.0}


def test_removal(tmp_path: Path) -> None:
    with open_session(tmp_path / "w") as session:
        run_block(session, 0)
        session.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("restart", [False, True])
def test_what_is_not_ours_is_left(tmp_path: Path, restart: bool) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"thesis\.txt"):
        open_session(tmp_path / "w", restart=restart)
    assert (tmp_path / "w" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "content", ["", "{", '{"session": 1}', '{"finished": 99}', '{"finished": true}']
)
def test_a_damaged_state(tmp_path: Path, content: str) -> None:
    place = tmp_path / "w"
    open_session(place).close()
    state = (place / "state.json").read_text()
    if "finished" in content:
        content = state[: state.rindex(",")] + "," + content[1:]
    (place / "state.json").write_text(content)
    with pytest.raises((CheckpointError, RecipeError)):
        open_session(place)
    open_session(place, restart=True).close()


def test_activations_that_are_gone(tmp_path: Path) -> None:
    place = tmp_path / "w"
    with open_session(place) as session:
        run_block(session, 0)
    (place / "dense.1.f32").write_bytes(b"")
    with open_session(place) as session:
        session.activations("compressed")
        with pytest.raises(CheckpointError, match=r"dense\.1\.f32: needs 480 bytes of block 0"):
            session.activations("dense")
        assert session.finished == 1


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_session(tmp_path / "w") as session:
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(CheckpointError, match="No space left") as caught:
            session.activations("dense")
        assert "goes on" in (caught.value.hint or "")
        monkeypatch.undo()
        run_block(session, 0)
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left"):
            run_block(session, 1)
        monkeypatch.undo()
        assert session.finished == 1
        run_block(session, 1)


def test_a_parent_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="existing parent"):
        open_session(tmp_path / "a" / "w")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        open_session(tmp_path / "file")

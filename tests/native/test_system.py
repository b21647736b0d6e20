"""The thread pool, the machine's description, bandwidth."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

from lacewing import _C, formats
from lacewing.native import tensor

Array = np.ndarray[Any, Any]
MIB = 1 << 20


@pytest.fixture(scope="module")
def work() -> tuple[Array, Any, Array]:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((160, 128)).astype(np.float32)
    x = rng.standard_normal((5, 128)).astype(np.float32)
    packed = tensor(formats.pack(weight, "w8a8g32"))
    return x, packed, _C.linear(x, packed, threads=1)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_default_is_within_the_affinity_mask() -> None:
    _C.set_threads(0)
    assert 1 <= _C.threads() <= len(os.sched_getaffinity(0))
    _C.set_threads(3)
    assert _C.threads() == 3
    _C.set_threads(0)
    with pytest.raises(ValueError, match=r"set_threads: n must be in 0\.\.1024, got -1"):
        _C.set_threads(-1)


def test_affinity_is_obeyed() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from lacewing import _C; print(_C.threads(), len(_C.cpu_info()['affinity']))"
    )
    assert run(code).stdout.split() == ["1", "1"]


def test_the_callers_affinity_is_left_alone(work: tuple[Array, Any, Array]) -> None:
    x, weight, expected = work
    before = os.sched_getaffinity(0)
    for threads in (1, 2, 3, 8):
        assert (_C.linear(x, weight, threads=threads) == expected).all()
        assert os.sched_getaffinity(0) == before


def test_many_callers(work: tuple[Array, Any, Array]) -> None:
    x, weight, expected = work
    wrong: list[int] = []

    def call(threads: int) -> None:
        for _ in range(50):
            if not (_C.linear(x, weight, threads=threads) == expected).all():
                wrong.append(threads)

    callers = [threading.Thread(target=call, args=(1 + i % 3,)) for i in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_child_has_its_own_threads(work: tuple[Array, Any, Array]) -> None:
    code = """
import os, numpy as np
from lacewing import _C, formats
from lacewing.native import tensor
w = tensor(formats.pack(np.eye(64, dtype=np.float32), "w8a8g32"))
x = np.ones((3, 64), np.float32)
y = _C.linear(x, w, threads=2)
if os.fork() == 0:
    os._exit(0 if (_C.linear(x, w, threads=2) == y).all() else 1)
print(os.waitstatus_to_exitcode(os.wait()[1]), (_C.linear(x, w, threads=2) == y).all())
"""
    assert run(code).stdout.split() == ["0", "True"]


def test_ctrl_c_reaches_python() -> None:
    code = """
import os, signal, threading, time
from lacewing import _C
_C.read_bandwidth(64 << 20, 2, None, 0.01)
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    while True:
        _C.read_bandwidth(64 << 20, 2, None, 0.05)
except KeyboardInterrupt:
    print("interrupted")
"""
    assert run(code).stdout.split() == ["interrupted"]


def test_it_ends_on_a_signal() -> None:
    code = """
import os, signal
from lacewing import _C
_C.read_bandwidth(64 << 20, 2, None, 0.01)
os.kill(os.getpid(), signal.SIGTERM)
"""
    assert run(code).returncode == -signal.SIGTERM


def test_bandwidth() -> None:
    assert 0.1 < _C.read_bandwidth(MIB, 1, None, 0.05) < 10_000
    for arguments, message in [
        ((MIB - 1, 1, None, 0.1), "bytes must be in"),
        ((MIB, -1, None, 0.1), "threads must be in"),
        ((MIB, 1, None, 0.0), "seconds must be in"),
        ((MIB, 1, None, float("nan")), "seconds must be in"),
        ((MIB, 1, "neon", 0.1), "isa must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            _C.read_bandwidth(*arguments)


def test_cpu_info() -> None:
    info = _C.cpu_info()
    assert info["affinity"] == sorted(os.sched_getaffinity(0))
    assert 1 <= info["cores"] <= len(info["affinity"])
    assert info["quota"] is None or info["quota"] > 0
    assert info["transparent_huge_pages"] in {"always", "madvise", "never", "unavailable"}
    assert set(info["os_state"]) == {"avx", "avx512", "amx"}
    usable = {isa["name"]: isa["usable"] for isa in _C.isas()}
    assert usable["scalar"]
    if usable["avx2"]:
        assert info["features"]["avx2"] and info["os_state"]["avx"]
    if usable["avx512"]:
        assert info["features"]["avx512_vnni"] and info["os_state"]["avx512"]
    if not info["features"]["amx_tile"]:
        assert not info["amx_permitted"]

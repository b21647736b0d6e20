"""Builds the compiled module with sanitizers and runs tests on it.

    python tools/sanitize.py                      AddressSanitizer and UBSan, the kernels' tests
    python tools/sanitize.py --thread             ThreadSanitizer, the same
    python tools/sanitize.py -- tests/engine -x   other tests, options for pytest

The build lies in .cache/sanitize (the first one takes some minutes) and touches neither the module
that is installed nor build/, whose objects other tools check. A finding ends the run with its
report. Needs GCC's libasan, libubsan, libtsan.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "lacewing"
# qemu-user cannot run a sanitized process.
TESTS = ["tests/kernels", "tests/native", "--ignore=tests/native/test_other_cpus.py"]

# An editable install puts a finder of its own before sys.path: this run must not find that module.
START = """\
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__]
sys.path.insert(0, sys.argv[1])
from lacewing import _C
assert _C.__file__.startswith(sys.argv[1]), f"not the sanitized module: {_C.__file__}"
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


def build(folder: Path, sanitizers: str) -> None:
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), f"-DLACEWING_SANITIZE={sanitizers}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    if shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(len(os.sched_getaffinity(0))))
    subprocess.run(["cmake", "--build", str(folder), "-j", jobs], check=True)


def assemble(folder: Path) -> Path:
    """A directory for sys.path: the package's sources beside the sanitized module, all links."""
    site = folder / "site"
    shutil.rmtree(site, ignore_errors=True)
    (site / "lacewing").mkdir(parents=True)
    modules = list(folder.glob("_C*.so"))
    sources = [path for path in PACKAGE.iterdir() if not path.name.startswith("_C.cpython")]
    for path in [*sources, *modules]:
        (site / "lacewing" / path.name).symlink_to(path)
    return site


def runtime(sanitizers: str) -> str:
    """What must be loaded before Python, which is not sanitized itself. libstdc++ too, or the
    runtime finds no `__cxa_throw` to wrap."""
    name = "libtsan.so" if sanitizers == "thread" else "libasan.so"
    compiler = os.environ.get("CXX", "g++")
    ask = [[compiler, f"-print-file-name={each}"] for each in (name, "libstdc++.so")]
    return " ".join(subprocess.check_output(each, text=True).strip() for each in ask)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--thread", action="store_true", help="ThreadSanitizer")
    parser.add_argument("pytest", nargs="*", help="tests and options for pytest")
    args = parser.parse_args()
    sanitizers = "thread" if args.thread else "address,undefined"
    base = Path(os.environ.get("LACEWING_SANITIZE_DIR", ROOT / ".cache" / "sanitize"))
    folder = base / ("thread" if args.thread else "address")
    build(folder, sanitizers)
    site = assemble(folder)
    options = {
        "LD_PRELOAD": runtime(sanitizers),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python leaks at its end
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    wanted = args.pytest or TESTS
    command = [sys.executable, "-c", START, str(site), "-q", "-p", "no:cacheprovider"]
    command += ["--capture=sys", *wanted]  # or a report would end in the file that replaces stderr
    return subprocess.run(command, cwd=ROOT, env=os.environ | options, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

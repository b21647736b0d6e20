"""Checks that an ISA's object file exports its kernel table and nothing else.

A weak symbol (an inline or template function of the standard library, say) compiled with an ISA's
flags could be the one that the linker keeps for the whole module: it would then run, and crash, on
a machine without that ISA. Usage: check_symbols.py BUILD_DIR...
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TABLE = re.compile(r"^lacewing::k\w+Table$")


def exported(path: Path) -> list[tuple[str, str]]:
    """(type, demangled name) of every symbol that the object defines for others."""
    command = ["nm", "--demangle", "--defined-only", "--extern-only", "--format=posix", str(path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = []
    for line in lines:
        match = re.match(r"^(.*?) ([A-Za-z])(?: [0-9a-f]+)*\s*$", line)
        if match:
            found.append((match[2], match[1]))
    return found


def complaints(symbols: list[tuple[str, str]]) -> list[str]:
    wrong = [
        f"{'weak' if kind in 'WVwvu' else 'exported'} symbol `{name}`: put it into the anonymous "
        "namespace, or do without the template"
        for kind, name in symbols
        if kind in "WVwvu" or not TABLE.match(name)
    ]
    if not any(TABLE.match(name) for _, name in symbols):
        wrong.append("no kernel table: expected one symbol like `lacewing::kAvx2Table`")
    return wrong


def isa_objects(directory: Path) -> list[Path]:
    return sorted(directory.rglob("isa/*.o"))


def main(directories: list[str]) -> int:
    objects = [path for name in directories for path in isa_objects(Path(name))]
    if not objects:
        print(f"error: no object file `isa/*.o` under {' '.join(directories)}", file=sys.stderr)
        print("hint: build first: make demo", file=sys.stderr)
        return 1
    failed = False
    for path in objects:
        for complaint in complaints(exported(path)):
            failed = True
            print(f"error: {path}: {complaint}", file=sys.stderr)
    if not failed:
        names = ", ".join(path.name.removesuffix(".o") for path in objects)
        print(f"symbols: {names}: one kernel table each, nothing weak")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["build"]))

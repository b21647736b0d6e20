"""Where products switch from one kernel to another on this machine: the tuned table and its file.

`lacewing bench kernels --tune` measures it; the compiled module gets it when it is loaded. It is
advice about speed: whatever it says, results have the same bits.

The file is JSON, `$LACEWING_TUNING` or `$XDG_CACHE_HOME/lacewing/tuning.json` (`~/.cache` without);
`LACEWING_TUNING=off` does without one:

    {"version": "0.1.0",              the version of Lacewing that measured
     "cpu": {"model": .., "features": [..], "caches": {..}},
     "gemv_rows": {"avx512": {"w4a8g32": 8, ..}, ..},
     "cpu_prefetch_rows": {"avx512": {"w4a8g32": 1, ..}, ..}}

`gemv_rows` says up to how many rows gemv takes a product, `cpu_prefetch_rows` up to how many it
leaves prefetching to the CPU. A switch of another kind is another key beside them, and one more
line in `SWITCHES`.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from lacewing.errors import LacewingError
from lacewing.version import __version__

__all__ = ["Tuning", "apply", "cpu_identity", "load", "own_path", "path", "read", "reset", "write"]

Tuning = dict[str, dict[str, dict[str, int]]]
"""Switch, ISA, format: rows."""

# Kind of switch: the functions of `_C` that tell and set it.
SWITCHES = {
    "gemv_rows": ("gemv_rows", "set_gemv_rows"),
    "cpu_prefetch_rows": ("cpu_prefetch_rows", "set_cpu_prefetch_rows"),
}
_LARGEST = 1 << 20  # bytes; a table of every format is a few KB

_log = logging.getLogger("lacewing")


def path() -> Path | None:
    """The file of this user; None if switched off."""
    wanted = os.environ.get("LACEWING_TUNING", "")
    if wanted == "off":
        return None
    if wanted:
        return Path(wanted)
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The specification: a relative path is to be ignored.
    base = Path(cache) if os.path.isabs(cache) else Path(os.path.expanduser("~/.cache"))
    return base / "lacewing" / "tuning.json"


def own_path() -> Path:
    """The same, for writing. Raises LacewingError if switched off."""
    place = path()
    if place is None:
        raise LacewingError(
            "tuning is switched off", hint="unset LACEWING_TUNING, or let it name a file"
        )
    return place


def cpu_identity(native: Any) -> dict[str, Any]:
    """What tells machines apart whose kernels switch at other places."""
    cpu = native.cpu_info()
    features = sorted(name for name, present in cpu["features"].items() if present)
    return {"model": cpu["model"], "features": features, "caches": dict(cpu["caches"])}


def load(native: Any) -> None:
    """Applies the user's file to `native`. One that does not fit is left alone with one note."""
    place = path()
    if place is None:
        return
    try:
        tuning = read(place, native)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        _log.warning(
            "%s is ignored: %s (run `lacewing bench kernels --tune`, or set LACEWING_TUNING=off)",
            place,
            error,
        )
        return
    apply(tuning, native)


def read(place: Path, native: Any) -> Tuning:
    """The checked content of a file. Raises OSError, or ValueError saying what is wrong with it."""
    with place.open("rb") as file:
        raw = file.read(_LARGEST + 1)
    if len(raw) > _LARGEST:
        raise ValueError("it is too large for a tuning file")
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError("it must hold an object")
    if content.get("version") != __version__:
        raise ValueError(f"it is of version {content.get('version')!r:.40}, this is {__version__}")
    if content.get("cpu") != cpu_identity(native):
        raise ValueError("it was measured on another CPU")
    return {switch: _checked(switch, content.get(switch, {}), native) for switch in SWITCHES}


def _checked(switch: str, table: Any, native: Any) -> dict[str, dict[str, int]]:
    """What of `table` this build knows; raises ValueError where a value is out of range."""
    known = {isa["name"]: isa["usable"] for isa in native.isas()}
    tell = getattr(native, SWITCHES[switch][0])
    if not isinstance(table, dict):
        raise ValueError(f"{switch} must be an object")
    found: dict[str, dict[str, int]] = {}
    for isa, rows in table.items():
        if not known.get(isa):
            raise ValueError(f"{switch} names an ISA that does not run here: {isa!r:.40}")
        if not isinstance(rows, dict):
            raise ValueError(f"{switch} of {isa} must be an object")
        limits = tell(isa)
        for format, value in rows.items():
            if format not in limits:
                raise ValueError(f"{switch} names an unknown format: {format!r:.40}")
            most = limits[format]["most"]
            if type(value) is not int or not 0 <= value <= most:
                raise ValueError(
                    f"{switch} of {format} on {isa} must be an integer in 0..{most}, "
                    f"got {value!r:.40}"
                )
        found[isa] = dict(rows)
    return found


def apply(tuning: Tuning, native: Any) -> None:
    """Sets the switches that a checked `tuning` names, and no other."""
    for switch, table in tuning.items():
        for isa, rows in table.items():
            for format, value in rows.items():
                getattr(native, SWITCHES[switch][1])(format, value, isa)


def reset(native: Any) -> None:
    """Sets every switch to its default."""
    for tell, set_rows in SWITCHES.values():
        for isa in native.isas():
            if isa["usable"]:
                for format in getattr(native, tell)(isa["name"]):
                    getattr(native, set_rows)(format, None, isa["name"])


def write(tuning: Tuning, native: Any) -> Path:
    """Writes the user's file whole or not at all. Raises LacewingError if it cannot be written."""
    place = own_path()
    content = {"version": __version__, "cpu": cpu_identity(native), **tuning}
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _replace(place, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise LacewingError(
            f"the tuning file cannot be written: {error}",
            hint="let LACEWING_TUNING name a file in a directory that can be written",
        ) from error
    return place


def _replace(place: Path, text: str) -> None:
    """Through a file of its own, so that writers never mix and a reader sees one or the other."""
    handle, name = tempfile.mkstemp(dir=place.parent, prefix=place.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, place)
    except BaseException:
        os.unlink(name)
        raise

"""What the picture of quality.py compares: a table of configurations, one mark each.

A configuration is made by `lacewing compress` in a format (rounded to nearest, no data) or by a
recipe (calibrated), by llama.cpp's quantizer, or is a packed directory that was made elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness  # noqa: F401 - finds lacewing

from lacewing.formats import FORMATS

CALIBRATION = {"tokens": 32768, "window": 512, "seed": 0}


@dataclass(frozen=True)
class Configuration:
    """How one model file is made; just one of `format`, `recipe`, `preset`, `kind`, `directory`.

    family: one of picture.FAMILIES. format: rounded to nearest by `lacewing compress`, pruned by
    magnitude where `sparsity` says so. recipe: a document for `--recipe`. kind: llama.cpp's type.
    own_grid: the file's weights were on this grid already.
    """

    name: str
    family: str
    format: str = ""
    sparsity: float | None = None
    recipe: dict[str, Any] | None = None
    preset: str = ""
    kind: str = ""
    directory: str = ""
    own_grid: bool = False

    @property
    def slug(self) -> str:
        """The name as a file may be called."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-.") or "unnamed"

    @property
    def calibrated(self) -> bool:
        return bool(self.recipe or self.preset)

    def digest(self, *more: str) -> str:
        """Of all that decides what is made; `more`: of what else."""
        text = json.dumps([asdict(self), *more], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def nearest(format: str, own_grid: bool = False) -> Configuration:
    return Configuration(format, "nearest", format=format, own_grid=own_grid)


def calibrated(format: str, words: str = "calibrated", **more: Any) -> Configuration:
    """Every layer's columns in turn against its Hessian."""
    rule = {"match": "*", "format": format, "solver": "columns", **more.pop("rule", {})}
    return Configuration(f"{format} {words}", "calibrated", recipe=recipe(rule, **more))


def sparse(format: str, sparsity: float, solver: str = "columns", **more: Any) -> Configuration:
    """Pruned and rounded jointly; by `wanda` and `magnitude` pruned, then rounded."""
    rule = {"match": "*", "format": format, "solver": solver, "sparsity": sparsity}
    words = {"admm": "joint", "columns": "joint", "blocks": "joint"}.get(solver, solver)
    name = f"{format} {sparsity:.0%} {words}"
    return Configuration(name, "sparse", recipe=recipe(rule, **more))


def recipe(rule: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"rules": [rule], "calibration": CALIBRATION, **more}


def llama(kind: str, own_grid: bool = False) -> Configuration:
    return Configuration(kind, "llama.cpp", kind=kind, own_grid=own_grid)


# What everything else is compared with, the first that there is: the file's weights as they are.
DENSE = (llama("F32"), Configuration("bf16", "nearest", format="bf16"))

EIGHT = ("w8a8", "w8a8g32", "w8a8g64")
FEWER = ("w4a8g32", "w4a8g64", "w4a8g128", "w3a8g64", "w2a8g64", "w1.6a8")
LLAMA = ("Q8_0", "Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K")


def table(own_grid: tuple[str, ...] = (), own_kind: str = "") -> list[Configuration]:
    """All of them. `own_grid`: formats that hold the file's weights without loss; `own_kind`:
    llama.cpp's type that the file is in."""
    found = [*DENSE, *(nearest(format) for format in (*EIGHT, *FEWER))]
    found += [nearest(format, own_grid=True) for format in own_grid]
    if not own_grid:
        found += [nearest("w5a8g32z"), nearest("w4a8g32z")]
    found += [
        calibrated(format, rule={"refine": 2})
        for format in ("w4a8g64", "w4a8g128", "w3a8g64", "w2a8g64")
    ]
    found.append(calibrated("w4a8g32", "GPTQ", correct=0.0))
    found.append(calibrated("w8a8", "smoothed", smooth="smoothquant"))
    for format in ("w8a8g64_sp", "w4a8g64_sp"):
        found.append(sparse(format, 0.5, "wanda"))
    found += [
        sparse("w8a8g64_sp", 0.3, "admm"),
        sparse("w4a8g64_sp", 0.5, "admm"),
        sparse("w4a8g64_24", 0.5, "admm"),
        sparse("w8a8_b16x1", 0.5, "blocks"),
    ]
    found += [
        Configuration(f"preset {name}", family, preset=name)
        for name, family in (
            ("safe", "calibrated"),
            ("balanced", "calibrated"),
            ("small", "calibrated"),
            ("sparse50", "sparse"),
        )
    ]
    found += [llama(kind) for kind in LLAMA]
    return found + ([llama(own_kind, own_grid=True)] if own_kind else [])


# By the beginning of a model file's name.
OWN = {"SmolLM2-135M-Instruct.Q4_1": (("w4a8g32z", "w5a8g32z", "auto"), "Q4_1")}


def for_model(stem: str) -> list[Configuration]:
    return table(*OWN.get(stem, ((), "")))


def made_elsewhere(text: str, family: str = "") -> Configuration:
    """`NAME=DIRECTORY`, as the command line gives it; without a family, what its manifest says."""
    name, equals, directory = text.partition("=")
    if not (name and equals and directory):
        raise SystemExit(f"error: needs NAME=DIRECTORY, got {text!r}")
    return Configuration(name, family or family_of(Path(directory)), directory=directory)


def family_of(directory: Path) -> str:
    """Of a packed directory. One sparse matrix makes a sparse model, for a sparse format is left
    out where it does not pay."""
    file = directory / "lacewing.json"
    manifest = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    formats = {each["format"] for each in manifest.get("tensors", {}).values()}
    if manifest.get("healed"):
        return "healed"
    if any(FORMATS[name].sparse for name in formats & FORMATS.keys()):
        return "sparse"
    return "calibrated" if manifest.get("recipe") else "nearest"

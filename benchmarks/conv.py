"""1x1 convolutions: PyTorch, ours in its place, and XNNPACK's way with sparse ones.

python benchmarks/conv.py network --litert-python PYTHON    MobileNetV1, one picture of 224x224
python benchmarks/conv.py layers                            some of its shapes by themselves

PyTorch's models run in this process in turn, a pause between them, since its threads spin for a
while after their work. LiteRT (XNNPACK) and the CHW kernels of spmm.c have processes of their own.
The error is that of the features against PyTorch's float32 network with the same pruned weights.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import harness
import mobilenet
import numpy as np
import torch
from torch import nn

from lacewing.nn import replace_linear

SEED = 0
PAUSE = 0.03  # seconds: longer than OpenMP's and XNNPACK's threads spin
SPARSITIES = (0.8, 0.9)
# What spmm.c is compiled for, the fastest of them for each layer. XNNPACK's own for x86 is SSE.
TARGETS = {"CHW spmm f32": ["native", "x86-64-v3"], "CHW spmm f32 SSE": ["x86-64"]}
# Height and width, inputs, outputs.
SHAPES = [(56, 128, 128), (28, 256, 256), (14, 512, 512), (7, 1024, 1024)]
# Formats of ours: the sparsities, and how many outputs are pruned together.
FORMATS = {
    "w8a8": ((0.0,), 1),
    "w8a8g64": ((0.0,), 1),
    "w8a8_b16x1": (SPARSITIES, 16),
    "bf16_sp": (SPARSITIES, 1),
}


@dataclass
class Candidate:
    name: str
    sparsity: float
    block: int
    run: Callable[[], dict[str, float]]
    """Seconds of a call: `whole`, `pointwise` (the 1x1 convolutions), or both."""
    features: Any = None
    more: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, float]] = field(default_factory=list)

    def seconds(self, part: str) -> list[float]:
        return [sample[part] for sample in self.samples if part in sample]

    def median(self, part: str) -> float:
        return statistics.median(self.seconds(part) or [float("nan")])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    verbs = parser.add_subparsers(required=True)
    for verb in (network, layers):
        one = verbs.add_parser(verb.__name__)
        one.set_defaults(verb=verb)
        one.add_argument("--calls", type=int, default=15, help="in a round; their median counts")
        harness.add_common_arguments(one)
        if verb is network:
            one.add_argument("--litert-python", help="an interpreter that has ai-edge-litert")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with ExitStack() as stack, torch.inference_mode():
        record = args.verb(args, stack)
    if not args.no_save:
        label = {"label": args.label} if args.label else {}
        record = {"torch": torch.__version__, **label, **record}
        print("saved", harness.save(f"conv {args.verb.__name__}", record, args.threads))


def in_turn(candidates: list[Candidate], rounds: int) -> None:
    """`rounds` samples of each, after one that warms up."""
    for turn in range(-1, rounds):
        first = turn % len(candidates)
        for each in candidates[first:] + candidates[:first]:
            time.sleep(PAUSE)
            sample = each.run()
            if turn >= 0:
                each.samples.append(sample)
        harness.progress(f"round {turn + 1} of {rounds}")


# -- network --------------------------------------------------------------------------------------


def network(args: argparse.Namespace, stack: ExitStack) -> dict[str, Any]:
    """MobileNetV1 by all of them."""
    found = list(pytorch(args))
    if args.litert_python:
        found += litert(args, stack)
    found += chw(args, stack)
    in_turn(found, args.rounds)
    references = {(each.sparsity, each.block) for each in found}
    wanted = {key: features(dense(mobilenet.network(SEED, *key))) for key in references}
    for each in found:
        if each.features is not None:
            want = wanted[each.sparsity, each.block]
            error = np.linalg.norm(each.features - want) / np.linalg.norm(want)
            each.more["error"] = float(f"{error:.2e}")
    record = show("MobileNetV1, 224x224", found, "whole")
    for each in found:
        if "sparse_kernels" in each.more and each.sparsity:
            taken = "ran" if each.more["sparse_kernels"] else "did not run"
            print(f"{each.name}: XNNPACK's sparse kernels {taken}")
    return record


def pytorch(args: argparse.Namespace) -> Iterator[Candidate]:
    """PyTorch's own, and with ours in them."""
    plain = dense(mobilenet.network(SEED))
    yield of_model("PyTorch f32", 0.0, 1, plain, args.calls)
    half = dense(mobilenet.network(SEED)).bfloat16()
    yield of_model("PyTorch bf16", 0.0, 1, half, args.calls)
    for format, (sparsities, block) in FORMATS.items():
        for sparsity in sparsities:
            model = dense(mobilenet.network(SEED, sparsity, block))
            formats = packed_as(model, format)
            made = of_model(named(format, sparsity), sparsity, block, model, args.calls)
            made.more["formats"] = formats
            yield made


def packed_as(model: nn.Module, format: str) -> dict[str, int]:
    """Layers by the format that they are in now."""
    replaced = [layer.format for layer in replace_linear(model, format).replaced]
    return {str(format): replaced.count(format) for format in dict.fromkeys(replaced)}


def named(what: str, sparsity: float) -> str:
    return f"{what} {sparsity:.0%}" if sparsity else what


def dense(layers: list[mobilenet.Layer]) -> nn.Module:
    steps: list[nn.Module] = []
    for each in layers:
        steps += [convolution(each), nn.ReLU(inplace=True)]
    model = nn.Sequential(*steps, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return model.eval().to(memory_format=torch.channels_last)


def convolution(layer: mobilenet.Layer) -> nn.Conv2d:
    made = nn.utils.skip_init(
        nn.Conv2d,
        layer.inputs,
        layer.outputs,
        layer.kernel,
        layer.stride,
        padding=layer.kernel // 2,
        groups=layer.groups,
    )
    with torch.no_grad():
        made.weight.copy_(torch.from_numpy(layer.weight))
        made.bias.copy_(torch.from_numpy(layer.bias))
    return made


def of_model(name: str, sparsity: float, block: int, model: nn.Module, calls: int) -> Candidate:
    x = picture(model)

    def run() -> dict[str, float]:
        whole = seconds(lambda: model(x), calls)
        inside = []
        for _ in range(calls):
            with in_pointwise(model) as spent:
                model(x)
            inside.append(spent[0])
        return {"whole": whole, "pointwise": statistics.median(inside)}

    return Candidate(name, sparsity, block, run, features(model))


def picture(model: nn.Module) -> torch.Tensor:
    x = torch.from_numpy(mobilenet.picture(SEED)).contiguous(memory_format=torch.channels_last)
    return x.to(next(model.parameters()).dtype)


def features(model: nn.Module) -> Any:
    return model(picture(model))[0].float().numpy()


def seconds(call: Callable[[], Any], calls: int) -> float:
    """The median."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@contextmanager
def in_pointwise(model: nn.Module) -> Iterator[list[float]]:
    """Adds up the seconds spent in 1x1 convolutions."""
    spent, begun = [0.0], [0.0]

    def begin(*_: Any) -> None:
        begun[0] = time.perf_counter()

    def end(*_: Any) -> None:
        spent[0] += time.perf_counter() - begun[0]

    found = [each for each in model.modules() if isinstance(each, nn.Conv2d)]
    found = [each for each in found if each.kernel_size == (1, 1)]
    handles = [layer.register_forward_pre_hook(begin) for layer in found]
    handles += [layer.register_forward_hook(end) for layer in found]
    yield spent
    for handle in handles:
        handle.remove()


def litert(args: argparse.Namespace, stack: ExitStack) -> Iterator[Candidate]:
    """A dense network, and pruned ones in files with sparse weights. Whether sparse kernels ran is
    told by the bits: those of the same weights in a dense file, or others."""
    for sparsity in (0.0, *SPARSITIES):
        worker = stack.enter_context(harness.Worker(args.litert_python, "worker_litert.py"))
        model = {"seed": SEED, "sparsity": sparsity, "block": 1, "threads": args.threads}
        engine = worker.ask("version")["engine"]
        worker.ask("load", **model, sparse=False)
        by_dense = worker.ask("run", calls=1)["features"]
        if sparsity:
            worker.ask("load", **model, sparse=True)
        got = worker.ask("run", calls=1)["features"]
        name = named("LiteRT f32", sparsity)
        made = Candidate(name, sparsity, 1, of_worker(worker, "whole", args.calls), np.array(got))
        made.more = {"engine": engine, "sparse_kernels": got != by_dense}
        yield made


def chw(
    args: argparse.Namespace, stack: ExitStack, shape: tuple[int, int, int] | None = None
) -> Iterator[Candidate]:
    """XNNPACK's kernel written anew, the 1x1 convolutions alone."""
    kinds = TARGETS if platform.machine() == "x86_64" else {"CHW spmm f32": ["native"]}
    for name, targets in kinds.items():
        for sparsity in SPARSITIES:
            worker = stack.enter_context(harness.Worker(sys.executable, "worker_spmm.py"))
            layers = {"seed": SEED, "sparsity": sparsity, "shape": shape}
            worker.ask("load", **layers, threads=args.threads, targets=targets)
            run = of_worker(worker, "pointwise", args.calls)
            yield Candidate(named(name, sparsity), sparsity, 1, run)


def of_worker(worker: harness.Worker, part: str, calls: int) -> Callable[[], dict[str, float]]:
    return lambda: {part: statistics.median(worker.ask("run", calls=calls)["seconds"])}


# -- layers ---------------------------------------------------------------------------------------


def layers(args: argparse.Namespace, stack: ExitStack) -> dict[str, Any]:
    """Single 1x1 convolutions, channels-last in and out; CHW spmm in its own layout."""
    return {
        "shapes": {
            f"{size}x{size} {inputs} -> {outputs}": one_layer((size, inputs, outputs), args, stack)
            for size, inputs, outputs in SHAPES
        }
    }


def one_layer(
    shape: tuple[int, int, int], args: argparse.Namespace, stack: ExitStack
) -> dict[str, Any]:
    size, inputs, outputs = shape
    shown = torch.rand(1, inputs, size, size).contiguous(memory_format=torch.channels_last)
    found = []

    def add(name: str, sparsity: float, block: int, model: nn.Module, x: torch.Tensor) -> None:
        run = lambda: {"pointwise": seconds(lambda: model(x), args.calls)}  # noqa: E731
        found.append(Candidate(name, sparsity, block, run))

    plain = nn.Sequential(convolution(mobilenet.pointwise(SEED, shape, 0.0)))
    plain = plain.to(memory_format=torch.channels_last)
    add("PyTorch f32", 0.0, 1, plain, shown)
    half = nn.Sequential(convolution(mobilenet.pointwise(SEED, shape, 0.0))).bfloat16()
    add("PyTorch bf16", 0.0, 1, half.to(memory_format=torch.channels_last), shown.bfloat16())
    for format, (sparsities, block) in FORMATS.items():
        for sparsity in sparsities:
            model = nn.Sequential(convolution(mobilenet.pointwise(SEED, shape, sparsity, block)))
            packed_as(model, format)
            add(named(format, sparsity), sparsity, block, model, shown)
    found += chw(args, stack, shape)
    in_turn(found, args.rounds)
    return show(f"1x1 convolution, {size}x{size}, {inputs} -> {outputs}", found, "pointwise")


# -- results --------------------------------------------------------------------------------------


def show(title: str, found: list[Candidate], part: str) -> dict[str, Any]:
    """Prints and returns a row each; `x` is the speed over PyTorch's float32."""
    base = found[0]
    rows, cells = {}, []
    for each in found:
        row: dict[str, Any] = {"sparsity": each.sparsity, "block": each.block}
        for name in ("whole", "pointwise"):
            times = each.seconds(name)
            if times:
                middle = each.median(name)
                row[name] = {
                    "ms": round(middle * 1e3, 3),
                    "spread": round((max(times) - min(times)) / middle, 3),
                    "x": round(base.median(name) / middle, 3),
                    "rounds": [round(time * 1e3, 3) for time in times],
                }
        rows[each.name] = row | each.more
        columns = ("whole", "pointwise") if part == "whole" else ("pointwise",)
        texts = [text for name in columns for text in figures(row.get(name))]
        errors = [f"{each.more['error']:.1e}" if "error" in each.more else ""]
        cells.append([each.name, *texts, *(errors if part == "whole" else [])])
    head = ["", "ms", "spread", "x f32", "1x1: ms", "spread", "x f32", "error"]
    harness.table(title, head if part == "whole" else head[:4], cells)
    return {"rows": rows}


def figures(row: dict[str, Any] | None) -> list[str]:
    if row is None:
        return ["", "", ""]
    return [f"{row['ms']:.2f}", f"{row['spread']:.0%}", f"{row['x']:.2f}"]


if __name__ == "__main__":
    main()

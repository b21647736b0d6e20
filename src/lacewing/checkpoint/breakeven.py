"""Where a sparse format is faster than the dense one of the same width, by class of machine.

Share of the weights that are there (not zero), below which the sparse format takes less time for
one row (decode) on weights that come from memory. Measured at 4096 x 4096 on 2 cores of an Emerald
Rapids guest (33 GB/s), the AVX2 kernels forced on the same machine; figures and method in
`docs/adr/0005-break-even.md`. `bytes` is the share at which the sparse format takes as many bytes,
the limit on a machine with so many cores that only memory counts.

                  bytes   avx512   avx2    scalar
    bf16_sp       0.94    0.90     0.60    never
    w8a8g64_sp    0.87    0.77     0.40    never
    w4a8g64_sp    0.75    0.68     never   never
    w8a8g64_24    0.87    always   always  never      (the share is 0.5 by construction)
    w4a8g64_24    0.75    always   never   never
    w8a8_b16x1    0.99    0.88     0.65    never      (2 cores of a Zen 4; twin w8a8)
"""

from __future__ import annotations

from lacewing.formats import FORMATS, Format, PackedTensor, get_format

__all__ = ["MACHINES", "break_even", "dense_twin", "pays"]

MACHINES = ("avx512", "avx2", "scalar")
"""Classes of machines, named after the kernels that they run."""

_BREAK_EVEN: dict[str, dict[str, float]] = {
    "bf16_sp": {"avx512": 0.90, "avx2": 0.60},
    "w8a8g64_sp": {"avx512": 0.77, "avx2": 0.40},
    "w4a8g64_sp": {"avx512": 0.68},
    "w8a8g64_24": {"avx512": 1.0, "avx2": 1.0},
    "w4a8g64_24": {"avx512": 1.0},
    "w8a8_b16x1": {"avx512": 0.88, "avx2": 0.65},
}


def dense_twin(kind: Format) -> Format | None:
    """The dense format of the same width, whose products with the same codes are the same; None
    for a dense format."""
    return FORMATS[kind.name.rpartition("_")[0]] if kind.sparse else None


def break_even(kind: Format, machine: str | None) -> float:
    """Share of non-zero weights below which `kind` is faster than its twin on a class of machines;
    1 for None, where only bytes count."""
    return 1.0 if machine is None else _BREAK_EVEN.get(kind.name, {}).get(machine, 0.0)


def pays(packed: PackedTensor, density: float, machine: str | None) -> bool:
    """Whether a sparse tensor with this share of non-zero weights is smaller and faster than its
    dense twin."""
    kind = get_format(packed.format)
    twin = dense_twin(kind)
    if twin is None:
        return True
    dense = sum(size or 0 for size in twin.expected_part_bytes(*packed.shape).values())
    return packed.nbytes < dense and density < break_even(kind, machine)

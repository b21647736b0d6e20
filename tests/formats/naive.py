"""The packed layouts and the oracle once more, by slow loops, straight from the words of the docs.

Nothing here is shared with `lacewing.formats`: a weight is looked up by `(output, input)`, one
byte is appended after the other.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np

from lacewing.formats import Codes, Format

f32 = np.float32


def random_codes(fmt: Format, n: int, k: int, seed: int = 0, density: float = 0.5) -> Codes:
    """Codes of every value, scales of either sign. Sparse: `density` of the weights are there."""
    rng = np.random.default_rng([seed, n, k])
    if fmt.group_size == 0:
        values = rng.standard_normal((n, k)).astype(np.float32)
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        if fmt.sparse:
            bits[rng.random((n, k)) >= density] = 0
        return Codes(bits)
    q = rng.integers(0, fmt.max_code + 1, (n, k)).astype(np.uint8)
    if fmt.name.endswith("_b16x1"):
        dropped = rng.random((math.ceil(n / 16), k)) >= density
        q[np.repeat(dropped, 16, axis=0)[:n]] = fmt.zero_point
    elif fmt.sparse:
        q[rng.random((n, k)) >= density] = fmt.zero_point
    if fmt.name.endswith("_24"):
        for row in q:
            for i in range(0, k, 4):
                there = np.flatnonzero(row[i : i + 4] != fmt.zero_point)
                row[i + rng.permutation(there)[2:]] = fmt.zero_point
    groups = math.ceil(k / fmt.group_size)
    scales = rng.standard_normal((n, groups)).astype(np.float16)
    mins = rng.standard_normal((n, groups)).astype(np.float16) if fmt.asymmetric else None
    return Codes(q, scales, mins)


class Lookup:
    """Codes by place, with the padding that the layout asks for."""

    def __init__(self, fmt: Format, codes: Codes) -> None:
        self.fmt, self.codes = fmt, codes
        self.n, self.k = codes.q.shape
        self.strips = math.ceil(self.n / 16)
        self.groups = math.ceil(self.k / (fmt.group_size or 2))
        own = {"bf16": 2, "bf16_sp": 64, "w8a8": 64, "w8a8_b16x1": 64, "w1.6a8": 320}
        multiple = own.get(fmt.name, fmt.group_size)
        self.k_pad = math.ceil(self.k / multiple) * multiple

    def code(self, o: int, i: int) -> int:
        inside = o < self.n and i < self.k
        padding = 0 if self.fmt.name == "w2a8g64" else self.fmt.zero_point
        return int(self.codes.q[o, i]) if inside else padding

    def f16(self, values: Any, o: int, j: int) -> bytes:
        return struct.pack("<e", values[o, j] if o < self.n else 0.0)


def parts(fmt: Format, codes: Codes) -> dict[str, bytes]:
    """The bytes of every part."""
    w = Lookup(fmt, codes)
    if fmt.name == "bf16":
        return {"values": bf16(w)}
    if fmt.name.endswith("_24"):
        return {"records": records_24(w)}
    if fmt.name.endswith("_b16x1"):
        return laid_out([strip_of_blocks(w, s) for s in range(w.strips)])
    if fmt.sparse:
        return stream(w)
    if fmt.name == "w1.6a8":
        return {"codes": trits(w), "scales": scales(w)}
    codes = {8: eight_bits, 4: four_bits, 5: five_bits, 3: three_bits, 2: two_bits}
    return {"codes": codes[fmt.weight_bits](w), "scales": scales(w)}


def bf16(w: Lookup) -> bytes:
    out = bytearray()
    for s in range(w.strips):
        for b in range(w.groups):
            for o in range(16):
                for i in range(2):
                    out += struct.pack("<H", w.code(16 * s + o, 2 * b + i))
    return bytes(out)


def eight_bits(w: Lookup) -> bytes:
    out = bytearray()
    for s in range(w.strips):
        for b in range(w.k_pad // 4):
            for o in range(16):
                for i in range(4):
                    out.append(w.code(16 * s + o, 4 * b + i))
    return bytes(out)


def nibble_block(w: Lookup, s: int, b: int) -> bytes:
    out = bytearray()
    for o in range(16):
        for i in range(4):
            low = w.code(16 * s + o, 8 * b + i) & 15
            high = w.code(16 * s + o, 8 * b + 4 + i) & 15
            out.append(low | high << 4)
    return bytes(out)


def four_bits(w: Lookup) -> bytes:
    blocks = w.k_pad // 8
    return b"".join(nibble_block(w, s, b) for s in range(w.strips) for b in range(blocks))


def five_bits(w: Lookup) -> bytes:
    out = bytearray()
    for s in range(w.strips):
        for g in range(w.groups):
            for b in range(8):
                word = 0
                for o in range(16):
                    for i in range(4):
                        fifth = w.code(16 * s + o, 32 * g + 4 * b + i) >> 4
                        word |= fifth << (4 * o + i)
                out += struct.pack("<Q", word)
            for b in range(4):
                out += nibble_block(w, s, 4 * g + b)
    return bytes(out)


def fields(w: Lookup, s: int, first: int, bits: int, shift: int) -> bytes:
    """64 bytes with some bits of the codes from input `first` on, 4 inputs per field."""
    out = bytearray()
    for o in range(16):
        for i in range(4):
            byte = 0
            for j in range(8 // bits):
                code = w.code(16 * s + o, first + 4 * j + i) >> shift
                byte |= (code & ((1 << bits) - 1)) << (bits * j)
            out.append(byte)
    return bytes(out)


def three_bits(w: Lookup) -> bytes:
    out = bytearray()
    for s in range(w.strips):
        for first in range(0, w.k_pad, 64):
            for v in range(2):
                out += fields(w, s, first + 32 * v, 1, 2)
            for v in range(4):
                out += fields(w, s, first + 16 * v, 2, 0)
    return bytes(out)


def two_bits(w: Lookup) -> bytes:
    firsts = range(0, w.k_pad, 16)
    return b"".join(fields(w, s, first, 2, 0) for s in range(w.strips) for first in firsts)


def trits(w: Lookup) -> bytes:
    out = bytearray()
    for s in range(w.strips):
        for first in range(0, w.k_pad, 20):
            for o in range(16):
                for i in range(4):
                    c = [w.code(16 * s + o, first + 4 * j + i) for j in range(5)]
                    value = 81 * c[0] + 27 * c[1] + 9 * c[2] + 3 * c[3] + c[4]
                    out.append(math.ceil(256 * value / 243))
    return bytes(out)


def scales(w: Lookup) -> bytes:
    out = bytearray()
    for s in range(w.strips):
        for j in range(w.groups):
            for o in range(16):
                out += w.f16(w.codes.scales, 16 * s + o, j)
            if w.fmt.asymmetric:
                for o in range(16):
                    out += w.f16(w.codes.mins, 16 * s + o, j)
    return bytes(out)


def stream(w: Lookup) -> dict[str, bytes]:
    one = record if w.fmt.group_size else bf16_record
    records = range(math.ceil(w.k / 64))
    return laid_out([b"".join(one(w, s, j) for j in records) for s in range(w.strips)])


def laid_out(strips: list[bytes]) -> dict[str, bytes]:
    out = bytearray()
    offsets = [0]
    for strip in strips:
        out += strip
        out += bytes(-len(out) % 64)
        offsets.append(len(out))
    out += bytes(64)
    return {"stream": bytes(out), "offsets": struct.pack(f"<{len(offsets)}q", *offsets)}


def record(w: Lookup, s: int, j: int) -> bytes:
    head = bytearray()
    for o in range(16):
        head += w.f16(w.codes.scales, 16 * s + o, j)
    values: tuple[list[int], list[int]] = ([], [])  # of the first and the second half of the blocks
    for b in range(16):
        word = 0
        for o in range(16):
            for i in range(4):
                code = w.code(16 * s + o, 64 * j + 4 * b + i)
                if code != w.fmt.zero_point:
                    word |= 1 << (4 * o + i)
                    values[b // 8].append(code)
        head += struct.pack("<Q", word)
    if w.fmt.weight_bits == 8:
        body = bytes(values[0] + values[1])
    else:
        length = max(len(values[0]), len(values[1]))
        low, high = (v + [0] * (length - len(v)) for v in values)
        body = bytes(a | b << 4 for a, b in zip(low, high, strict=True))
    return bytes(head) + body + bytes(len(body) % 2)


def bf16_record(w: Lookup, s: int, j: int) -> bytes:
    head, values = bytearray(), bytearray()
    for b in range(32):
        word = 0
        for o in range(16):
            for i in range(2):
                value = w.code(16 * s + o, 64 * j + 2 * b + i)
                if value != 0:
                    word |= 1 << (2 * o + i)
                    values += struct.pack("<H", value)
        head += struct.pack("<I", word)
    return bytes(head + values)


def strip_of_blocks(w: Lookup, s: int) -> bytes:
    zero, outputs = w.fmt.zero_point, range(16 * s, 16 * s + 16)
    kept = [i for i in range(w.k) if any(w.code(o, i) != zero for o in outputs)]
    out = bytearray()
    for o in outputs:
        out += w.f16(w.codes.scales, o, 0)
    for first in range(0, w.k_pad, 8):
        out.append(sum(1 << (i - first) for i in kept if first <= i < first + 8))
    out += bytes(-len(out) % 64)
    for b in range(0, len(kept), 4):
        for o in outputs:
            four = [w.code(o, i) for i in kept[b : b + 4]]
            out += bytes(four + [zero] * (4 - len(four)))
    return bytes(out)


def records_24(w: Lookup) -> bytes:
    out = bytearray()
    for s in range(w.strips):
        for j in range(w.groups):
            out += record_24(w, s, j)
    return bytes(out)


def record_24(w: Lookup, s: int, j: int) -> bytes:
    zero = w.fmt.zero_point
    bitmaps, codes = bytearray(), []
    for b in range(16):
        word = 0
        for o in range(16):
            four = [w.code(16 * s + o, 64 * j + 4 * b + i) for i in range(4)]
            stored = [i for i in range(4) if four[i] != zero]
            absent = [i for i in range(4) if four[i] == zero]
            stored = sorted(stored + absent[: 2 - len(stored)])
            assert len(stored) == 2
            for i in stored:
                word |= 1 << (4 * o + i)
                codes.append(four[i])
        bitmaps += struct.pack("<Q", word)
    if w.fmt.weight_bits == 4:
        codes = [low | high << 4 for low, high in zip(codes[:256], codes[256:], strict=True)]
    scales = b"".join(w.f16(w.codes.scales, 16 * s + o, j) for o in range(16))
    return bytes(codes) + bytes(bitmaps) + scales


def quantize_group(x: list[np.float32]) -> tuple[list[int], np.float32, int]:
    """One group of activations, one operation after the other."""
    amax = f32(max(abs(v) for v in x))
    with np.errstate(over="ignore", divide="ignore"):
        inv = f32(127) / amax if amax > 0 else f32(0)
    if np.isinf(inv):
        return [0] * len(x), f32(0), 0
    q = [min(127, max(-127, round(float(f32(v * inv))))) for v in x]  # round() is half to even
    return q, f32(amax / f32(127)), sum(q)


def linear(fmt: Format, x: Any, codes: Codes, bias: Any = None) -> Any:
    """The integer oracle for `x` `[m, k]`, one operation after the other."""
    n, k = codes.q.shape
    y = np.zeros((len(x), n), np.float32)
    for r in range(len(x)):
        for o in range(n):
            y[r, o] = output(fmt, x[r], codes, o, k)
            if bias is not None:
                y[r, o] = f32(y[r, o] + f32(bias[o]))
    return y


def output(fmt: Format, row: Any, codes: Codes, o: int, k: int) -> np.float32:
    acc = f32(0)
    for j, begin in enumerate(range(0, k, fmt.group_size)):
        end = min(begin + fmt.group_size, k)
        q, sx, sumx = quantize_group(list(row[begin:end]))
        sw = f32(codes.scales[o, j])  # type: ignore[index]
        step = 2 if fmt.name == "w2a8g64" else 1
        code = [step * int(c) - fmt.zero_point for c in codes.q[o, begin:end]]
        dot = sum(a * b for a, b in zip(code, q, strict=True))
        assert abs(dot) < 1 << (24 if fmt.group_size <= 128 else 31)
        term = f32(f32(dot) * f32(sw * sx))
        if fmt.asymmetric:
            mw = f32(codes.mins[o, j])  # type: ignore[index]
            term = f32(term + f32(f32(sumx) * f32(mw * sx)))
        acc = f32(acc + term)
    return acc

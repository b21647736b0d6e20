"""What the native model is given: flat arrays, a cache that fits into memory, the spec."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacewing.engine.runner import (
    Runner,
    available_memory,
    choose_context,
    choose_stores,
    native_spec,
)
from lacewing.engine.sampling import SamplingParams
from lacewing.engine.scheduler import Chunk
from lacewing.engine.sequence import Sequence
from lacewing.errors import RequestError
from lacewing.kv.blocks import Store
from lacewing.kv.choice import block_bytes, parse_kv
from lacewing.kv.layout import lay_out
from lacewing.models import get_spec

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


class Recorder:
    def __init__(self) -> None:
        self.call: list[Any] = []

    def step(self, *arrays: Any) -> Any:
        self.call = [each.tolist() for each in arrays]
        assert all(each.dtype == np.int32 and each.flags.c_contiguous for each in arrays)
        return np.zeros((len(arrays[5]), 64), np.float32)


def sequence(tokens: list[int], table: list[int]) -> Sequence:
    made = Sequence.start(tokens, SamplingParams(), None, 1000)
    made.tables.tables = [array("i", table)]
    return made


def test_one_decoding_sequence() -> None:
    model = Recorder()
    chunk = Chunk(sequence(list(range(20)), [5, 3]), 19, 1, True)
    Runner(model, 64, 128, [Store(8)]).step([chunk])
    assert model.call == [[19], [19], [19], [[[5, 3]]], [0, 1], [0]]


def test_a_prompt_beside_a_decoding_sequence() -> None:
    model = Recorder()
    prompt = Chunk(sequence([7, 8, 9, 10], [2]), 1, 2, False)
    decoding = Chunk(sequence(list(range(40, 58)), [6, 1]), 17, 1, True)
    rest = Chunk(sequence([1, 2], [0]), 0, 2, True)
    Runner(model, 64, 128, [Store(8)]).step([decoding, prompt, rest])
    tokens, positions, cached, tables, bounds, rows = model.call
    assert tokens == [57, 8, 9, 1, 2]
    assert positions == [17, 1, 2, 0, 1]
    assert cached == [17, 1, 0]
    assert tables == [[[6, 1], [2, 0], [0, 0]]]
    assert bounds == [0, 1, 3, 5]
    assert rows == [0, 4]


def test_a_prompt_that_is_merged() -> None:
    model = Recorder()
    shrunk = sequence(list(range(100)), [6, 1, 4])
    shrunk.merged = 60
    ends = sequence([1] * 64, [0, 2, 3, 5])
    ends.keep, ends.tables.merged = 40, array("i", [7, 9, 8])
    chunks = [Chunk(shrunk, 99, 1, True), Chunk(ends, 32, 32, True)]
    Runner(model, 64, 128, [Store(10)]).step(chunks)
    *_, cached, tables, _, rows, keep, merged = model.call
    assert model.call[1][:2] == [99, 32]
    assert (cached, tables, rows) == ([39, 32], [[[6, 1, 4, 0], [0, 2, 3, 5]]], [0, 32])
    assert (keep, merged) == ([0, 40], [[0, 0, 0], [7, 9, 8]])
    chunks[1].count = 31
    Runner(model, 64, 128, [Store(10)]).step(chunks)
    assert len(model.call) == 6, "it is not complete"


def test_every_row() -> None:
    model = Recorder()
    Runner(model, 64, 128, [Store(8)]).step(
        [Chunk(sequence([1, 2, 3], [0]), 0, 3, False)], every_row=True
    )
    assert model.call[-1] == [0, 1, 2]


def test_the_context() -> None:
    assert choose_context(2048, None) == 2048
    assert choose_context(131072, None) == 4096
    assert choose_context(131072, 100_000) == 100_000
    assert choose_context(2048, np.int64(64)) == 64
    with pytest.raises(RequestError, match="at most the model's 2048 tokens, got 2049"):
        choose_context(2048, 2049)
    for bad in (0, 1, -5, 1.5, True, "8"):
        with pytest.raises(RequestError, match="`max_context` must be an integer >= 2"):
            choose_context(2048, bad)


def test_the_cache_takes_what_memory_allows() -> None:
    spec, mib = get_spec(CONFIG), 2**20
    layout = lay_out(spec, parse_kv("f16"), None, 160)
    (plan,) = layout.stores
    layout.head_dim, layout.stores[plan] = 64, 256  # a mebibyte for 16 tokens of all heads
    one = layout.bytes(layout.sizes(1, 160, 160))
    assert 9.9 * mib < one < 10.1 * mib

    def blocks(available: int | None) -> int:
        (store,) = choose_stores(layout, 160, 160, available)
        return store.total

    assert blocks(None) == 40  # four sequences where nothing is known
    assert blocks(100 * one) == 40
    assert blocks(10 * one) == 25  # a quarter of the memory
    assert blocks(one) == 10  # one sequence at least
    with pytest.raises(RequestError, match="needs 10 MiB, only 9 MiB are available") as error:
        blocks(9 * mib)
    assert error.value.hint == "ask for less: `max_context=72`"
    with pytest.raises(RequestError) as error:
        blocks(0)
    assert error.value.hint == "free some memory"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_available_memory_is_the_least_of_all_limits(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    write(tmp_path / "proc/meminfo", "MemTotal: 900 kB\nMemAvailable:  500 kB\n")
    assert available_memory(tmp_path) == 500 * 1024
    write(tmp_path / "sys/fs/cgroup/memory.max", "max\n")
    write(tmp_path / "sys/fs/cgroup/memory.current", "1000\n")
    assert available_memory(tmp_path) == 500 * 1024
    write(tmp_path / "sys/fs/cgroup/memory.max", "301000\n")
    assert available_memory(tmp_path) == 300_000
    write(tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes", "5000")
    write(tmp_path / "sys/fs/cgroup/memory/memory.usage_in_bytes", "6000")
    assert available_memory(tmp_path) == 0


def test_this_machine_says_what_it_has() -> None:
    found = available_memory()
    assert found is None or found > 0


def test_the_native_spec_has_what_the_contract_says() -> None:
    spec = get_spec(CONFIG)
    native = native_spec(spec, 40)
    assert native["layers"] == [(0, 0)] * 3
    cos, sin = native["ropes"][0]
    assert cos.shape == sin.shape == (40, spec.head_dim // 2)
    assert cos.dtype == sin.dtype == np.float32
    assert native["attention_scale"] == pytest.approx(spec.head_dim**-0.5)
    assert {"vocab_size", "qk_norm", "sandwich_norm", "embedding_scale"} < set(native)


@pytest.mark.parametrize("kv", ["f16", "bf16", "f32", "int8"])
def test_bytes_of_the_cache(kv: str) -> None:
    spec = get_spec(CONFIG)
    layout = lay_out(spec, parse_kv(kv), None, 64)
    assert layout.bytes(layout.sizes(1, 64, 64)) == 4 * block_bytes(kv, spec.head_dim) * 3 * 2

"""`lacewing compress` and `lacewing info`: what is written, refused and told."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from lacewing.formats import FORMATS
from tests.checkpoint import build
from tests.cli.conftest import Call, spawn


def test_it_packs_on_the_files_own_grid(call: Call, tiny_gguf: Path, tmp_path: Path) -> None:
    status, out, err = call("compress", tiny_gguf, tmp_path / "packed")
    assert status == 0
    assert "Q4_1" in out
    assert "w4a8g32z" in out
    assert "exact" in out
    assert f"lacewing run {tmp_path / 'packed'}" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed"]


def test_json_goes_to_stdout_alone(call: Call, tiny_hub: Path, tmp_path: Path) -> None:
    status, out, _ = call("compress", tiny_hub, tmp_path / "p", "--format", "w4a8g32", "--json")
    assert status == 0
    rows = {row["format"]: row for row in json.loads(out)["formats"]}
    assert set(rows) == {"w4a8g32", "w8a8g32", "f32"}
    assert 0 < rows["w8a8g32"]["error"] < rows["w4a8g32"]["error"] < 0.2
    assert rows["w4a8g32"]["bits_per_weight"] == pytest.approx(4.5)
    assert rows["f32"]["exact"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_packs_and_is_told(
    call: Call, tiny_hub: Path, tmp_path: Path, name: str
) -> None:
    kind = FORMATS[name]
    pruned = ["--sparsity", "0.7"] if kind.sparse and not kind.fixed_sparsity else []
    pruned += ["--machine", "avx512"]
    status, _, err = call("compress", tiny_hub, tmp_path / "p", "--format", name, *pruned)
    assert status == 0, err
    status, out, _ = call("info", tmp_path / "p", "--json")
    assert status == 0
    assert name in {row["format"] for row in json.loads(out)["formats"]}


def test_the_heads_format_can_be_named(call: Call, tiny_hub: Path, tmp_path: Path) -> None:
    options = ("--format", "w4a8g32", "--head-format", "bf16", "--json")
    status, out, _ = call("compress", tiny_hub, tmp_path / "p", *options)
    assert status == 0
    assert {row["format"] for row in json.loads(out)["formats"]} == {"w4a8g32", "bf16", "f32"}


def test_it_replaces_only_by_force(call: Call, tiny_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    assert call("compress", tiny_gguf, out).status == 0
    before = (out / "model.safetensors").read_bytes()
    status, _, err = call("compress", tiny_gguf, out, "--format", "w8a8g32")
    assert status == 1
    assert "error:" in err
    assert "--force" in err
    assert (out / "model.safetensors").read_bytes() == before
    assert call("compress", tiny_gguf, out, "--format", "w8a8g32", "--force").status == 0
    assert (out / "model.safetensors").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed"]


def test_force_does_not_replace_what_is_no_packed_model(
    call: Call, tiny_gguf: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter.txt").write_text("years of work")
    assert call("compress", tiny_gguf, precious, "--force").status == 1
    assert (precious / "chapter.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--format", "w4a8g23"), "did you mean"),
        (("--format", "w4a8g32z", "--sparsity", "0.5"), "symmetric"),
        (("--format", "w8a8g64_sp", "--sparsity", "1.5"), "[0, 1)"),
        (("--head-format", "w9"), "formats:"),
    ],
)
def test_a_wrong_format_leaves_nothing(
    call: Call, tiny_hub: Path, tmp_path: Path, options: tuple[str, ...], says: str
) -> None:
    status, out, err = call("compress", tiny_hub, tmp_path / "packed", *options)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert says in err
    assert not list(tmp_path.iterdir())


def test_as_compressed_tensors(call: Call, tiny_hub: Path, tmp_path: Path) -> None:
    options = ("--format", "w4a8g64", "--as", "compressed-tensors")
    status, out, err = call("compress", tiny_hub, tmp_path / "out", *options)
    assert status == 0
    assert "w4a8g64" in out
    assert "compressed-tensors" in err
    status, out, err = call("info", tmp_path / "out")
    assert (status, err) == (0, "")
    assert "pack-quantized int4 g64" in out
    assert "huggingface" in out
    status, out, _ = call("compress", tmp_path / "out", tmp_path / "packed", "--json")
    assert status == 0
    rows = {row["format"]: row for row in json.loads(out)["formats"]}
    assert rows["w4a8g64"]["exact"]


def test_what_a_checkpoint_wants_otherwise_is_told(
    call: Call, tiny_hub: Path, tmp_path: Path
) -> None:
    options = ("--format", "w8a8", "--as", "compressed-tensors")
    assert call("compress", tiny_hub, tmp_path / "out", *options).status == 0
    status, out, err = call("info", tmp_path / "out")
    assert status == 0
    assert "activations" in err
    assert "int-quantized int8 channel" in out


@pytest.mark.parametrize(
    "options", [("--as", "gptq"), ("--as", "compressed-tensors", "--head-format", "bf16")]
)
def test_another_kind_of_output_is_misuse(
    call: Call, tiny_hub: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    status, out, err = call("compress", tiny_hub, tmp_path / "out", *options)
    assert (status, out) == (2, "")
    assert options[-2] in err
    assert not list(tmp_path.iterdir())


def test_zeros_are_told(call: Call, tmp_path: Path) -> None:
    tiny = build.config("llama")
    weights = build.random_weights(tiny)
    for name, weight in weights.items():
        if weight.ndim == 2 and "embed" not in name:
            fours = weight.reshape(len(weight), -1, 4)
            fours[::2, :, :2] = fours[1::2, :, 2:] = 0
    source = build.write_hub(tmp_path / "source", tiny, weights)
    options = (tmp_path / "out", "--machine", "avx512")
    status, _, err = call("compress", source, *options)
    assert status == 0
    assert "14 tensors have zeros in them and are w8a8g64_24: 50% zeros, 2:4" in " ".join(
        err.split()
    )
    status, out, _ = call("compress", source, *options, "--force", "--json")
    assert status == 0
    (row,) = json.loads(out)["found_zeros"]
    assert (row["format"], row["tensors"], row["density"]) == ("w8a8g64_24", 14, 0.5)


def test_an_output_below_a_file_is_an_error(call: Call, tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, _, err = call("compress", tiny_gguf, tmp_path / "file" / "packed")
    assert status == 1
    assert err.startswith("error: ")
    assert "Traceback" not in err


def test_a_truncated_file_leaves_nothing(call: Call, tiny_gguf: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(tiny_gguf.read_bytes()[:-1000])
    status, _, err = call("compress", short, tmp_path / "packed")
    assert status == 1
    assert err.startswith("error: ")
    assert str(short) in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short.gguf"]


def test_an_interrupted_compression_leaves_nothing(smollm2_gguf: Path, tmp_path: Path) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = spawn("compress", smollm2_gguf, tmp_path / "packed", "--format", "w4a8g64", **pipes)
    while not list(tmp_path.iterdir()) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out, error) == (130, "", "")
    assert not list(tmp_path.iterdir())


def test_info_of_a_gguf(call: Call, tiny_gguf: Path) -> None:
    status, out, err = call("info", tiny_gguf)
    assert (status, err) == (0, "")
    for word in ("gguf", "llama", "Q4_1", "bits per weight", "hidden_size", "256"):
        assert word in out
    assert all(line == line.rstrip() for line in out.splitlines())


def test_info_lists_tensors(call: Call, tiny_gguf: Path) -> None:
    status, out, _ = call("info", tiny_gguf, "--tensors")
    assert status == 0
    assert "blk.1.ffn_down.weight" in out
    assert "256x256" in out


def test_info_tells_of_an_architecture_that_does_not_run(
    call: Call, tiny_gguf: Path, tmp_path: Path
) -> None:
    raw = tiny_gguf.read_bytes()
    other = tmp_path / "other.gguf"
    other.write_bytes(raw.replace(b"llama", b"lemur"))
    status, out, _ = call("info", other)
    assert status == 0
    assert "lemur" in out
    assert "no: " in out


@pytest.mark.parametrize("content", [b"", b"GGUF", b"hello, world" * 10, bytes(64)])
def test_info_of_no_model(call: Call, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    status, out, err = call("info", tmp_path / "x.gguf")
    assert (status, out) == (1, "")
    assert err.startswith("error: ")


def test_says_where_dense_is_faster(call: Call, tiny_hub: Path, tmp_path: Path) -> None:
    options = ("--format", "w4a8g64_sp", "--sparsity", "0.5", "--machine", "avx2")
    status, out, err = call("compress", tiny_hub, tmp_path / "a", *options, "--json")
    assert status == 0, err
    (row,) = json.loads(out)["dense_instead"]
    assert (row["format"], row["instead_of"]) == ("w4a8g64", "w4a8g64_sp")
    assert 0.4 < row["density"] <= 0.51
    status, _, err = call("compress", tiny_hub, tmp_path / "b", *options)
    assert "w4a8g64 instead of w4a8g64_sp" in err
    assert "avx2" in err
    status, _, err = call("compress", tiny_hub, tmp_path / "c", "--machine", "neon")
    assert status == 1
    assert "avx512, avx2, scalar" in err

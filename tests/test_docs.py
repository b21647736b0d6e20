"""What the documents say works: links lead somewhere, Python runs, options exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lacewing.cli.__main__ import main
from tests.checkpoint import build

REPO = Path(__file__).resolve().parents[1]
PAGES = sorted([*REPO.glob("*.md"), *(REPO / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(REPO)) for page in PAGES]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as forges make them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(page.read_text()) if kind == language]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


PROGRAMS = [
    pytest.param(body, id=f"{name}-{number}")
    for page, name in zip(PAGES, NAMES, strict=True)
    for number, body in enumerate(blocks(page, "python"))
]


@pytest.mark.parametrize("body", PROGRAMS)
def test_python_runs(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "import torch" in body or "from torch" in body:
        pytest.importorskip("torch", reason="the example needs PyTorch")
    if "from transformers import" in body:
        pytest.importorskip("torch", reason="the example needs PyTorch")
        pytest.importorskip("transformers", "5.0", reason="the example needs transformers 5")
    monkeypatch.chdir(tmp_path)
    build.tiny_gguf("Q4_1").write(tmp_path / "model.gguf")
    exec(compile(body, "example", "exec"), {})


COMMANDS = sorted(
    {
        line.split("#")[0].split(" > ")[0].strip()
        for page in PAGES
        for body in blocks(page, "")
        for line in body.splitlines()
        if line.startswith("lacewing ") and "[" not in line
    }
)


@pytest.mark.parametrize("line", COMMANDS)
def test_options_exist(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line)[1:]
    verb = words[: 2 if words[0] == "bench" else 1]
    with pytest.raises(SystemExit) as exit:
        main([*verb, "--help"])
    assert exit.value.code == 0
    options = set(re.findall(r"(?<!\w)--?[a-z][\w-]*", capsys.readouterr().out))
    for word in words:
        if word.startswith("-"):
            assert word in options

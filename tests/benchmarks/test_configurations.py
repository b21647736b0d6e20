"""The table of configurations that the quality benchmark compares."""

from __future__ import annotations

import json
from pathlib import Path

import configurations
import picture
import pytest
from configurations import Configuration

from lacewing.compress import Recipe
from lacewing.formats import FORMATS

STEMS = [*configurations.OWN, "another-model"]


@pytest.mark.parametrize("stem", STEMS)
def test_every_configuration_can_be_made_in_one_way(stem: str) -> None:
    for one in configurations.for_model(stem):
        ways = [one.format, one.recipe, one.preset, one.kind, one.directory]
        assert sum(map(bool, ways)) == 1, one
        assert one.family in picture.FAMILIES
        assert not one.format or one.format in {*FORMATS, "auto"}


@pytest.mark.parametrize("stem", STEMS)
def test_no_two_share_a_file(stem: str) -> None:
    slugs = [one.slug for one in configurations.for_model(stem)]
    assert len(set(slugs)) == len(slugs)


@pytest.mark.parametrize("stem", STEMS)
def test_every_dense_format_is_in_the_table(stem: str) -> None:
    found = configurations.for_model(stem)
    rules = [rule["format"] for one in found if one.recipe for rule in one.recipe["rules"]]
    dense = {name for name, kind in FORMATS.items() if not kind.sparse}
    assert {one.format for one in found} | set(rules) >= dense


@pytest.mark.parametrize("stem", STEMS)
def test_every_recipe_is_one(stem: str) -> None:
    for one in configurations.for_model(stem):
        if one.recipe:
            Recipe.from_dict({"name": one.name, **one.recipe})
        if one.preset:
            Recipe.preset(one.preset)


def test_a_digest_is_of_all_that_decides() -> None:
    one = Configuration("a", "sparse", format="w8a8g64_sp", sparsity=0.5)
    other = Configuration("a", "sparse", format="w8a8g64_sp", sparsity=0.6)
    assert one.digest("m") == one.digest("m")
    assert len({one.digest("m"), other.digest("m"), one.digest("n"), one.digest("m", "c4")}) == 4


@pytest.mark.parametrize("name", ["../../etc", "a/b", "..", "", "\x00", "Ä"])
def test_a_slug_is_a_file_name(name: str) -> None:
    slug = Configuration(name, "healed", directory="/somewhere").slug
    assert slug and "/" not in slug and not slug.startswith(".") and slug.isascii()


@pytest.mark.parametrize(
    ("format", "more", "family"),
    [
        ("w4a8g32", {}, "nearest"),
        ("w4a8g32", {"recipe": {"recipe": {}}}, "calibrated"),
        ("w8a8g64_sp", {"recipe": {"recipe": {}}}, "sparse"),
        ("w8a8_b16x1", {}, "sparse"),
        ("w8a8g64_sp", {"recipe": {"recipe": {}}, "healed": {"seed": 0}}, "healed"),
    ],
)
def test_a_directory_says_its_family(
    format: str, more: dict[str, object], family: str, tmp_path: Path
) -> None:
    tensors = {"norm": {"format": "f32"}, "q": {"format": format}, "k": {"format": "w8a8g64"}}
    (tmp_path / "lacewing.json").write_text(json.dumps({"tensors": tensors, **more}))
    assert configurations.made_elsewhere(f"it={tmp_path}").family == family


def test_directories_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    one = configurations.made_elsewhere("w4 healed=/a=b", "healed")
    assert (one.name, one.directory, one.family) == ("w4 healed", "/a=b", "healed")
    for wrong in ("/a", "=/a", "a="):
        with pytest.raises(SystemExit, match="needs NAME=DIRECTORY"):
            configurations.made_elsewhere(wrong, "healed")

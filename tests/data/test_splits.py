"""Validation records held out of training records: by image, over all sources."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from PIL import Image

from data.records import load_records
from data.splits import hold_out


def records_of(folder: Path, name: str, images: list[str]) -> datasets.Dataset:
    """Two records about each image."""
    lines = [{"image": image, "prefix": f"{name} {i}", "suffix": "x"} for image in images for i in range(2)]
    for image in images:
        Image.new("RGB", (8, 8)).save(folder / image)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load_records(jsonl=folder / f"{name}.jsonl", cache_dir=folder / "cache")


def images_of(records: datasets.Dataset) -> set[str]:
    return set(records["image_id"][:])


def test_a_tenth_of_the_images_is_held_out_with_all_that_is_about_them(tmp_path: Path) -> None:
    """Both sources are about some of the same images: what is held out of one is in no record of the other."""
    shared = [f"{i}.png" for i in range(30)]
    first = records_of(tmp_path, "first", shared)
    second = records_of(tmp_path, "second", [*shared[:20], *(f"{i}.png" for i in range(30, 50))])
    found = hold_out({"first": first, "second": second}, seed=0)
    held = images_of(found["first"].validation) | images_of(found["second"].validation)
    kept = images_of(found["first"].train) | images_of(found["second"].train)
    for records in (first, second):  # a tenth of each: 3 of 30 and 4 of 40, which may be the same images
        assert len(held & images_of(records)) >= round(0.1 * len(images_of(records)))
    assert 4 <= len(held) <= 7
    assert not held & kept
    assert len(held | kept) == 50
    for name, records in (("first", first), ("second", second)):
        assert len(found[name].train) + len(found[name].validation) == len(records)
        assert sorted([*found[name].train["id"], *found[name].validation["id"]]) == sorted(records["id"])


@pytest.mark.parametrize("seed", range(8))
def test_a_small_source_beside_a_large_one_is_validated_too(tmp_path: Path, seed: int) -> None:
    """A tenth of all images would often be none of the small one's."""
    large = records_of(tmp_path, "large", [f"{i}.png" for i in range(40)])
    small = records_of(tmp_path, "small", ["a.png", "b.png"])
    found = hold_out({"large": large, "small": small}, seed)
    assert len(images_of(found["large"].validation)) == 4
    assert len(images_of(found["small"].validation)) == len(images_of(found["small"].train)) == 1


def test_which_images_depends_on_the_seed_and_their_names_alone(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(40)]
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    here = hold_out({"a": records_of(tmp_path / "here", "a", names)}, seed=3)["a"].validation
    there = hold_out({"b": records_of(tmp_path / "there", "b", names[::-1])}, seed=3)["b"].validation
    other = hold_out({"a": records_of(tmp_path / "here", "a", names)}, seed=4)["a"].validation
    assert images_of(here) == images_of(there) != images_of(other)


def test_too_few_images_to_hold_any_out_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds out whole images, and data\.train has 1; expected two or more"):
        hold_out({"a": records_of(tmp_path, "a", ["1.png"])}, seed=0)
    sources = {"many": records_of(tmp_path, "many", [f"{i}.png" for i in range(20)])}
    sources["one"] = records_of(tmp_path, "one", ["lonely.png"])
    with pytest.raises(
        ValueError, match=r"would hold out all 1 images of one, and leave none .*: give data\.validation"
    ):
        hold_out(sources, seed=0)

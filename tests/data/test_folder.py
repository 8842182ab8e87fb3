"""A folder of images with metadata, or with a folder for each class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.invalid import SkippedRecords
from data.records import load_records
from tests.images import IMAGE


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(IMAGE)
    return folder


def load(folder: Path, **options: Any) -> list[dict[str, Any]]:
    cache = folder.parent / "cache"
    rows: list[dict[str, Any]] = load_records(folder=folder, cache_dir=cache, **options).to_list()
    return rows


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_says_what_the_examples_are(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "in", "a.jpg", "cats/b.jpg", "dogs/c.jpg")
    rows = [("a.jpg", "caption en", "a logo", "1"), ("cats/b.jpg", "caption en", "a cat", "2")]
    keys = ("file_name", "prefix", "text", "more")
    lines = [json.dumps(dict(zip(keys, row, strict=True))) for row in rows]
    if name == "metadata.csv":
        lines = [",".join(keys), *map(",".join, rows)]
    (folder / name).write_text("\n".join(lines))
    records = load(folder, columns={"suffix": "text"})
    assert [(one["image"]["path"], one["answer"], one["extra"]) for one in records] == [
        (str(folder / "a.jpg"), "a logo", '{"more": "1"}'),
        (str(folder / "cats/b.jpg"), "a cat", '{"more": "2"}'),
    ]
    (folder / name).write_text("\n".join(lines[:-1]))
    assert len(load(folder, columns={"suffix": "text"})) == 1


def test_what_is_wrong_with_metadata_is_said_with_its_line(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", "a.jpg")
    good = {"file_name": "a.jpg", "prefix": "x", "suffix": "y"}
    lines = [good, {"prefix": "x", "suffix": "y"}, good | {"image": "a.jpg"}, good | {"file_name": "../a.jpg"}]
    (folder / "metadata.jsonl").write_text("\n".join([*map(json.dumps, lines), "{"]))
    skipped = SkippedRecords(share=0.9)
    assert len(load(folder, skipped=skipped)) == 1
    assert ["metadata.jsonl, line" in id for id in skipped.reasons] == [True] * 4
    reasons = list(skipped.reasons.values())
    assert "it has no image; expected" in reasons[0]
    assert "it has file_name and image; expected one" in reasons[1]
    assert "is no plain path" in reasons[2]
    (folder / "metadata.csv").write_text("file_name,prefix,suffix\n")
    with pytest.raises(ValueError, match=r"has metadata\.jsonl and metadata\.csv; expected one of them"):
        load(folder)


def test_a_class_is_the_answer(tmp_path: Path) -> None:
    folder = make(
        tmp_path / "in", "cats/b.JPG", "cats/a.jpg", "big dogs/c.png", ".hidden/d.jpg", "cats/.e.jpg", ".f.jpg"
    )
    (folder / "cats/notes.txt").touch()
    (folder / "notes.txt").touch()
    records = load(folder, prompt="answer en {question}")
    assert [(one["id"], one["answers"]) for one in records] == [
        ("big dogs/c.png", ["big dogs"]),
        ("cats/a.jpg", ["cats"]),
        ("cats/b.JPG", ["cats"]),
    ]
    assert {one["prefix"] for one in records} == {"answer en what is this?"}
    assert records[0]["image"]["path"] == str(folder / "big dogs/c.png")


def test_a_new_image_and_a_renamed_class_are_noticed(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", "cats/a.jpg", "dogs/c.jpg")
    assert len(load(folder)) == 2
    make(folder, "cats/b.jpg")
    assert len(load(folder)) == 3
    (folder / "cats").rename(folder / "tigers")
    assert [one["answer"] for one in load(folder)] == ["dogs", "tigers", "tigers"]
    (folder / "dogs/c.jpg").rename(folder / "dogs/d.jpg")
    assert load(folder)[0]["id"] == "dogs/d.jpg"


def test_an_image_beside_the_classes_is_no_example(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", "cats/a.jpg", "dogs/c.jpg", "stray.jpg")
    with pytest.raises(ValueError, match=r"image 1: stray\.jpg lies in no folder of a class; move it into one"):
        load(folder)
    skipped = SkippedRecords(share=0.5)
    assert len(load(folder, skipped=skipped)) == 2
    assert list(skipped.reasons) == [f"{folder}, image 1"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.jpg"], r"in has neither metadata\.jsonl or metadata\.csv nor a folder for each class"),
        (["cats/a.jpg"], "in has one folder, cats, so that every answer would be that"),
        (["cats/a.jpg", "dogs/c.txt"], "the folder .*dogs has no image"),
        (
            ["train/cats/a.jpg", "val/cats/b.jpg"],
            r"in/train has folders .*; read it with train: \{folder: .*in/train\}",
        ),
        (["train/metadata.csv", "val/metadata.csv"], r"read it with train: \{folder: .*in/train\}"),
        (["cats/a.jpg", "cats/old/x.txt", "dogs/b.jpg"], "in/cats has folders or metadata; .* class alone$"),
        (["metadata.parquet", "a.jpg"], r"is read with train: \{parquet: .*, columns: \{image: file_name\}\}"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_folder_that_is_laid_out_otherwise(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(make(tmp_path / "in", *names))


def test_what_is_given_must_be_a_folder_that_holds_its_images(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", "cats/a.jpg", "dogs/c.jpg")
    with pytest.raises(ValueError, match=r"gone does not exist; expected a folder of images"):
        load(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"leave images \(.*in\) out"):
        load(folder, images=folder)
    (folder / "metadata.csv").write_text("file_name,prefix,suffix\n")
    with pytest.raises(
        ValueError, match=r"is a file; expected a folder of images; read it with train: \{folder: .*in\}"
    ):
        load(folder / "metadata.csv")
    (folder / "x.jsonl").write_text('{"image": "a.jpg", "prefix": "x", "suffix": "y"}')
    with pytest.raises(ValueError, match=r"is a file; .*read it with train: \{jsonl: .*x\.jsonl\}"):
        load(folder / "x.jsonl")
    with pytest.raises(ValueError, match=r"a\.jpg is a file; expected a folder of images$"):
        load(folder / "cats/a.jpg")

"""A person's lines become records; what is wrong with a line is said with file and line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from data.invalid import SkippedRecords
from data.records import FEATURES, load_records
from tests.images import IMAGE


def write(folder: Path, *lines: Mapping[str, Any] | str | bytes, images: tuple[str, ...] = ("a.jpg", "b.jpg")) -> Path:
    for name in images:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(IMAGE)
    file = folder / "train.jsonl"
    raw = [json.dumps(line, ensure_ascii=False) if isinstance(line, Mapping) else line for line in lines]
    file.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in raw))
    return file


def line(**changes: Any) -> dict[str, Any]:
    return {"image": "a.jpg", "prefix": "caption en", "suffix": "a logo", **changes}


def test_every_column_is_what_the_line_says(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        line(suffix="Caffé 猫"),
        "",
        line(image="./b.jpg", prefix="two\nlines", suffix=["x", "y", "y"], id="mine"),
        line(image="sub/c.jpg", prefix="", id=7),
        images=("a.jpg", "b.jpg", "sub/c.jpg"),
    )
    records = load_records(jsonl=file, cache_dir=tmp_path / "cache")
    assert records.features == FEATURES
    shared = {"rejected": "", "answer_type": "", "question_type": "", "extra": ""}
    assert records.to_list() == [
        {
            "id": "1",
            "image": {"path": str(tmp_path / "a.jpg"), "bytes": None},
            "image_id": "a.jpg",
            "question": "caption en",
            "prefix": "caption en",
            "answers": ["Caffé 猫"],
            "equally_right": True,
            "answer": "Caffé 猫",
            **shared,
        },
        {
            "id": "mine",
            "image": {"path": str(tmp_path / "b.jpg"), "bytes": None},
            "image_id": "b.jpg",
            "question": "two\nlines",
            "prefix": "two lines",
            "answers": ["x", "y", "y"],
            "equally_right": True,
            "answer": "y",
            **shared,
        },
        {
            "id": "7",
            "image": {"path": str(tmp_path / "sub" / "c.jpg"), "bytes": None},
            "image_id": "sub/c.jpg",
            "question": "",
            "prefix": "",
            "answers": ["a logo"],
            "equally_right": True,
            "answer": "a logo",
            **shared,
        },
    ]


def test_images_may_lie_elsewhere(tmp_path: Path) -> None:
    file = write(tmp_path, line(), images=("images/a.jpg",))
    record = load_records(jsonl=file, images=tmp_path / "images", cache_dir=tmp_path)[0]
    assert record["image"]["path"] == str(tmp_path / "images" / "a.jpg")
    with pytest.raises(ValueError, match=r"1 of 1 records cannot be used.*\n  1: image .*a\.jpg does not exist"):
        load_records(jsonl=file, cache_dir=tmp_path)


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    file = write(tmp_path, b"\xef\xbb\xbf" + json.dumps(line()).encode() + b"\r", line())
    assert load_records(jsonl=file, cache_dir=tmp_path)["id"] == ["1", "2"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "not valid JSON: Expecting property name .* at character 2; expected one object a line$"),
        (b'{"image": "\xff"}', "not valid UTF-8: invalid start byte at byte 12; save the file as UTF-8$"),
        ("[" * 100_000, "not valid JSON: it is nested too deeply$"),
        ("9" * 5_000, "not valid JSON: Exceeds the limit"),
        ("[]", r'expected \{"image"'),
        (
            {"image": "a.jpg", "prefix": "x"},
            r"no suffix; expected image, prefix \(or question\) and suffix, got nothing else",
        ),
        (
            {"image": "a.jpg", "prefix": "x", "sufix": "y", "more": 1},
            r"it has no suffix; .*, got sufix, more; name them with columns: \{suffix: sufix\}",
        ),
        (
            {"file": "a.jpg", "text": "x"},
            r"it has no image, question, suffix; .*\{image: \.\.\., question: \.\.\.",
        ),
        (line(suffix=3.5), "expected texts or whole numbers, of which prefix and suffix may be empty, got"),
        (line(suffix=True), "expected texts or whole numbers, of which"),
        ({"image": "a.jpg", "question": " ", "suffix": "x"}, "expected a text as question"),
        (line(suffix=[]), "of which prefix and suffix may be empty"),
        (line(suffix=["x", " "]), 'expected a suffix that is a text, or "" for an empty answer'),
        (line(prefix=None), "expected texts"),
        (line(image=""), "expected a path as image, got ''"),
        (line(image=None), "expected a path as image, got None"),
        (line(id=1.5), "a text or a whole number as id"),
        (line(id="1"), "id '1' is that of line 1 too"),
        (line(image="../a.jpg"), r"'\.\./a\.jpg' is no plain path; give one within .*, without '\.\.'"),
        (line(image="sub/../a.jpg"), "is no plain path"),
        (line(image="a\0.jpg"), "is no plain path"),
        (line(image="https://x.org/a.jpg"), "is an address: nothing is downloaded here; save it and give its path$"),
        (line(image="s3://mine/a.jpg"), "is an address"),
        (line(image="data:image/png;base64,AAAA"), "is an address"),
        (
            line(image="/etc/passwd"),
            "is an absolute path; give one relative to .*, or allow all with images: /",
        ),
    ],
    ids=repr,
)
def test_a_line_that_is_no_example_is_named(tmp_path: Path, bad: Any, message: str) -> None:
    file = write(tmp_path, line(), "", bad)
    with pytest.raises(ValueError, match=rf"(?s)train\.jsonl, line 3: .*({message})"):
        load_records(jsonl=file, cache_dir=tmp_path / "cache")
    skipped = SkippedRecords(share=0.5)
    assert load_records(jsonl=file, cache_dir=tmp_path / "cache", skipped=skipped)["id"] == ["1"]
    assert list(skipped.reasons) == [f"{file}, line 3"]
    assert "line 3" not in skipped.reasons[f"{file}, line 3"]  # the place is named once


def test_a_link_out_of_the_folder_and_an_absolute_path_are_refused(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    file = write(inside, line(image="link/a.jpg"))
    write(outside, line())
    (inside / "link").symlink_to(outside)
    with pytest.raises(ValueError, match=r"1: image .*link/a\.jpg leads out of its folder by a link"):
        load_records(jsonl=file, cache_dir=tmp_path)
    absolute = write(inside, line(image=str(outside / "a.jpg")))
    with pytest.raises(ValueError, match=r"line 1: image .* is an absolute path; give one relative to"):
        load_records(jsonl=absolute, cache_dir=tmp_path)
    assert load_records(jsonl=absolute, images="/", cache_dir=tmp_path)[0]["image"]["path"] == str(outside / "a.jpg")
    (tmp_path / "alias").symlink_to(inside)  # the folder itself may be reached by a link
    write(inside, line())
    assert len(load_records(jsonl=tmp_path / "alias" / "train.jsonl", cache_dir=tmp_path)) == 1


def test_missing_files_and_empty_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.jsonl does not exist; correct its path"):
        load_records(jsonl=tmp_path / "gone.jsonl", cache_dir=tmp_path)
    (tmp_path / "none.jsonl").touch()
    with pytest.raises(ValueError, match=r"none\.jsonl is empty"):
        load_records(jsonl=tmp_path / "none.jsonl", cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r" is a folder; expected a file"):
        load_records(jsonl=tmp_path, cache_dir=tmp_path)
    file = write(tmp_path, line())
    for images, said in ((tmp_path / "gone", "does not exist"), (file, "is a file")):
        with pytest.raises(ValueError, match=f"{images} {said}; expected the folder of the images"):
            load_records(jsonl=file, images=images, cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"train\.jsonl holds no examples"):
        load_records(jsonl=write(tmp_path, "", " ", ""), cache_dir=tmp_path)


def test_examples_are_drawn_by_image_or_singly(tmp_path: Path) -> None:
    names = tuple(f"{k}.jpg" for k in range(20))
    file = write(tmp_path, *[line(image=name) for name in names for _ in range(3)], images=names)
    whole = load_records(jsonl=file, fraction=0.2, cache_dir=tmp_path)
    assert (len(whole), len(set(whole["image_id"]))) == (12, 4)
    assert whole["id"] == sorted(whole["id"], key=int)
    spread = load_records(jsonl=file, fraction=0.2, sample_by="question", cache_dir=tmp_path)
    assert len(spread) == 12
    assert len(set(spread["image_id"])) > 6
    chosen = [tuple(load_records(jsonl=file, count=7, seed=seed, cache_dir=tmp_path)["id"]) for seed in (3, 3, 4)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(chosen[0]) == 7


def test_a_second_load_reads_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, line())
    first = load_records(jsonl=file, cache_dir=tmp_path / "cache")
    monkeypatch.setattr("data.sources.rows._examples", lambda *_: pytest.fail("read again"))
    assert load_records(jsonl=file, cache_dir=tmp_path / "cache").to_list() == first.to_list()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"PAR1\x15\x04\x84", "a Parquet file"),
        (b"PK\x03\x04\x00", "a zip archive"),
        (b"\x1f\x8b\x08\x00", "compressed by gzip"),
        ("{}".encode("utf-16"), "a text in UTF-16"),
        (b'[\n {"image": "a.jpg"}]', "one JSON list"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "a binary file"),
    ],
    ids=lambda value: str(value)[:14],
)
def test_a_file_of_another_kind_is_told_what_it_is(tmp_path: Path, content: bytes, kind: str) -> None:
    (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"train\.jsonl is {kind}.*; expected JSON lines"):
        load_records(jsonl=tmp_path / "train.jsonl", cache_dir=tmp_path)

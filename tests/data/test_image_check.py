"""Images are looked at before training: headers only, once, and none outside of its folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import data.image_check
from data.image_check import unusable
from data.invalid import SkippedRecords
from data.records import decodable, load_records
from tests.images import IMAGE, encoded

TRUNCATED = encoded(Image.effect_noise((64, 64), 60), "JPEG")[:-400]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four valid images, one that is truncated, one that is nothing, one that is missing."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in "abcd":
        (folder / f"{name}.png").write_bytes(IMAGE)
    (folder / "truncated.jpg").write_bytes(TRUNCATED)
    (folder / "nothing.jpg").write_bytes(b"")
    return folder


def paths(folder: Path) -> list[str]:
    return [
        str(folder / name) for name in ("a.png", "b.png", "c.png", "d.png", "truncated.jpg", "nothing.jpg", "no.jpg")
    ]


def names(reasons: dict[str, str]) -> list[str]:
    return [os.path.basename(path) for path in reasons]


def test_headers_find_what_they_tell_and_decoding_the_rest(folder: Path, tmp_path: Path) -> None:
    by_header = unusable(paths(folder), tmp_path, folder)
    assert names(by_header) == ["nothing.jpg", "no.jpg"]
    assert "cannot identify" in by_header[str(folder / "nothing.jpg")]
    assert "does not exist" in by_header[str(folder / "no.jpg")]
    assert names(unusable(paths(folder), tmp_path, folder, decode=True)) == ["truncated.jpg", "nothing.jpg", "no.jpg"]


def test_an_image_is_looked_at_again_only_when_it_changed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def watch(name: str) -> None:
        plain = getattr(data.image_check, name)

        def look(path: str) -> None:
            opened.append(path)
            plain(path)

        monkeypatch.setattr(data.image_check, name, look)

    watch("check_header")
    watch("open_image")
    valid = paths(folder)[:4]

    def looked_at(**options: Any) -> list[str]:
        opened.clear()
        assert not unusable(valid, tmp_path, folder, **options)
        return names(dict.fromkeys(opened, ""))

    assert looked_at() == ["a.png", "b.png", "c.png", "d.png"]
    assert looked_at() == []
    os.utime(folder / "b.png", (1, 1))
    (folder / "c.png").write_bytes(IMAGE + b"tail")
    assert looked_at() == ["b.png", "c.png"]
    assert looked_at(decode=True) == ["a.png", "b.png", "c.png", "d.png"]
    assert looked_at(decode=True) == looked_at() == []


def test_no_image_lies_outside_of_its_folder(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copy(folder / "a.png", outside / "a.png")
    (folder / "out.png").symlink_to(outside / "a.png")
    (folder / "in.png").symlink_to(folder / "a.png")
    (folder / "sub").symlink_to(outside)
    asked = [str(folder / name) for name in ("out.png", "in.png", "sub/a.png")]
    reasons = unusable(asked, tmp_path, folder)
    assert sorted(os.path.relpath(path, folder) for path in reasons) == ["out.png", "sub/a.png"]
    assert all("leads out of its folder by a link" in reason for reason in reasons.values())
    (tmp_path / "alias").symlink_to(folder)  # the folder itself may be reached by a link
    assert not unusable([str(tmp_path / "alias" / "a.png")], tmp_path, tmp_path / "alias")


def test_records_of_broken_images_are_skipped_up_to_a_share(folder: Path, tmp_path: Path) -> None:
    """They keep their places until an evaluation asks for those that can be decoded."""
    file = tmp_path / "examples.jsonl"
    lines = [{"image": Path(path).name, "prefix": "caption en", "suffix": "x"} for path in paths(folder)]
    file.write_text("\n".join(map(json.dumps, lines)))
    source: dict[str, Any] = {"jsonl": file, "images": folder, "cache_dir": tmp_path / "cache"}
    with pytest.raises(ValueError, match=r"(?s)2 of 7 records .*\n  6: image .*nothing.*\n  7: image .*no\.jpg"):
        load_records(**source)
    skipped = SkippedRecords(tmp_path / "skipped.jsonl", share=0.5)
    records = load_records(**source, skipped=skipped)
    assert len(records) == 7
    assert list(skipped.reasons) == ["6", "7"]
    assert decodable(records, skipped, tmp_path / "cache")["id"] == ["1", "2", "3", "4"]
    assert list(skipped.reasons) == ["6", "7", "5"]
    with pytest.raises(ValueError, match="3 of 7 records"):
        decodable(records, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("missing", "meant"),
    [
        ("A.png", "a.png"),
        ("a.PNG", "a.png"),
        ("b", "b.png"),
        ("B", "b.png"),
        ("TRUNCATED", "truncated.jpg"),
        ("Sub/x.png", "sub/x.png"),
        ("SUB/deep/X", "sub/Deep/x.png"),
        ("../IMAGES/a.png", "a.png"),
        ("z.png", None),
        ("none/a.png", None),
        ("link.png", None),
    ],
)
def test_the_file_that_was_probably_meant_is_named(
    folder: Path, tmp_path: Path, missing: str, meant: str | None
) -> None:
    (folder / "sub/Deep").mkdir(parents=True)
    for name in ("sub/x.png", "sub/Deep/x.png"):
        (folder / name).write_bytes(IMAGE)
    (folder / "link.png").symlink_to(folder / "gone.png")
    asked = os.path.normpath(folder / missing)
    (reason,) = unusable([asked], tmp_path, folder.parent).values()
    said = f"; did you mean {folder / meant}?" if meant else ""
    assert reason == f"image {asked} does not exist{said}"


def test_a_folder_is_listed_once_for_all_that_is_missing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[str] = []
    plain = os.listdir

    def listing(path: str) -> list[str]:
        listed.append(path)
        return plain(path)

    monkeypatch.setattr(os, "listdir", listing)
    asked = [str(folder / name) for name in ("A.png", "B.png", "z.png", *(f"GONE{k}/a.png" for k in range(5)))]
    reasons = unusable(asked, tmp_path, folder)
    assert sum("did you mean" in reason for reason in reasons.values()) == 2
    assert listed == [str(folder)]

"""A file that is evidently of another kind is told by which key it is read, and one that may be right is left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.records import load_records
from tests.images import IMAGE

COLUMNS = json.dumps({"image": "a.jpg", "prefix": "x", "suffix": "y"})
CHAT = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]


def load(key: str, path: Path) -> None:
    source: dict[str, Any] = {key: path, "cache_dir": path.parent}
    load_records(**source)


@pytest.mark.parametrize(
    ("key", "content", "right"),
    [
        ("jsonl", "image,prefix,suffix\na.jpg,x,y\n", "csv"),
        ("jsonl", '\ufeff"image","prefix","suffix"\n', "csv"),
        ("jsonl", "image\tprefix\tsuffix\n", "tsv"),
        ("jsonl", json.dumps({"messages": CHAT, "images": ["a.jpg"]}), "messages"),
        ("jsonl", json.dumps({"conversations": [], "images": ["a.jpg"]}), "messages"),
        ("jsonl", json.dumps({"prompt": CHAT[:1], "completion": CHAT[1:], "image": "a.jpg"}), "messages"),
        ("messages", COLUMNS, "jsonl"),
        ("messages", "image,prefix,suffix\n", "csv"),
        ("csv", COLUMNS, "jsonl"),
        ("tsv", json.dumps({"messages": CHAT}), "messages"),
    ],
)
def test_the_line_that_reads_it_is_named(tmp_path: Path, key: str, content: str, right: str) -> None:
    file = tmp_path / "examples"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"examples looks like .*; read it with train: \{{{right}: {file}\}}$"):
        load(key, file)


@pytest.mark.parametrize("key", ["jsonl", "messages", "csv"])
def test_a_folder_of_images_is_told_so(tmp_path: Path, key: str) -> None:
    for name in ("cats/a.jpg", "dogs/b.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        (tmp_path / "in" / name).write_bytes(IMAGE)
    with pytest.raises(ValueError, match=r"is a folder; expected a file; read it with train: \{folder: .*in\}"):
        load(key, tmp_path / "in")
    (tmp_path / "in/cats/metadata.csv").touch()
    with pytest.raises(ValueError, match=r"read it with train: \{folder: .*cats\}"):
        load(key, tmp_path / "in/cats")


@pytest.mark.parametrize(
    ("line", "columns"),
    [
        ({"image": "a.jpg", "prompt": "x", "completion": "y"}, {"prefix": "prompt", "suffix": "completion"}),
        ({"image": "a.jpg", "prefix": "x", "suffix": "y", "messages": CHAT}, None),
    ],
)
def test_lines_that_columns_make_right_are_read(tmp_path: Path, line: dict[str, Any], columns: Any) -> None:
    (tmp_path / "a.jpg").write_bytes(IMAGE)
    (tmp_path / "examples").write_text(json.dumps(line))
    records = load_records(jsonl=tmp_path / "examples", columns=columns, cache_dir=tmp_path)
    assert (records["prefix"][:], records["answer"][:]) == (["x"], ["y"])

"""CSV and TSV: rows become records, cells stay texts; what is wrong is said with the line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.invalid import SkippedRecords
from data.records import load_records
from data.sources.delimited import COMMAS
from tests.images import IMAGE

HEADER = "image,prefix,suffix"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(IMAGE)
    return tmp_path


def write(folder: Path, *lines: str | bytes, name: str = "train.csv", end: bytes = b"\n") -> Path:
    raw = [line.encode() if isinstance(line, str) else line for line in lines]
    (folder / name).write_bytes(b"".join(line + end for line in raw))
    return folder / name


def load(file: Path, **options: Any) -> list[dict[str, Any]]:
    source: dict[str, Any] = {file.suffix[1:]: file, "cache_dir": file.parent / "cache"}
    rows: list[dict[str, Any]] = load_records(**source, **options).to_list()
    return rows


def test_cells_are_texts_as_they_are_written(folder: Path) -> None:
    rows = ['a.jpg,caption en,"one, and ""two"""', "", 'b.jpg,"two\nlines",007', "a.jpg,,", 'b.jpg,x,"[""y"", ""z""]"']
    records = load(write(folder, HEADER, *rows))
    assert [(one["id"], one["image_id"], one["prefix"], one["answers"]) for one in records] == [
        ("2", "a.jpg", "caption en", ['one, and "two"']),
        ("4", "b.jpg", "two lines", ["007"]),  # begins in line 4, for line 3 is empty
        ("6", "a.jpg", "", [""]),
        ("7", "b.jpg", "x", ['["y", "z"]']),
    ]


@pytest.mark.parametrize("begin", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["unix", "windows"])
def test_byte_order_mark_and_line_ends(folder: Path, begin: bytes, end: bytes) -> None:
    file = write(folder, begin + HEADER.encode(), "a.jpg,caption en,Caffé 猫", end=end)
    assert load(file)[0]["answer"] == "Caffé 猫"


def test_tabs(folder: Path) -> None:
    file = write(folder, HEADER.replace(",", "\t"), "a.jpg\tis it, or not?\ta, b", name="train.tsv")
    assert (load(file)[0]["prefix"], load(file)[0]["answer"]) == ("is it, or not?", "a, b")


def test_columns_of_other_names_ids_and_what_else_there_is(folder: Path) -> None:
    file = write(folder, "path,query,label,key,more", "a.jpg,what is this?,x,k1,1.50", "b.jpg,what?,y,,")
    columns = {"image": "path", "question": "query", "suffix": "label", "id": "key"}
    records = load(file, columns=columns, prompt="answer en {question}")
    assert [one["id"] for one in records] == ["k1", "3"]  # an empty id is none
    assert (records[0]["prefix"], records[0]["extra"]) == ("answer en what is this?", '{"more": "1.50"}')


def test_a_row_with_another_number_of_fields_is_no_example(folder: Path) -> None:
    file = write(folder, HEADER, "a.jpg,x,y", "a.jpg,x", "a.jpg,x,y,z")
    message = (
        r"(?s)line 3: it has 2 fields, and the first line names 3 columns; a field with commas.*line 4: .* 4 fields"
    )
    with pytest.raises(ValueError, match=message):
        load(file)
    skipped = SkippedRecords(share=0.9)
    assert [one["id"] for one in load(file, skipped=skipped)] == ["2"]
    assert list(skipped.reasons) == [f"{file}, line 3", f"{file}, line 4"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([HEADER, "a.jpg,x,y", 'a.jpg,"x,y', "b.jpg,x,y"], r"lines 3 to 4: a quote is opened and not closed"),
        ([HEADER, 'a.jpg,"x,y', *["b.jpg,x,y"] * 20000], r"lines 2 to \d+: a quote is opened and not closed"),
        ([HEADER, 'a.jpg,"x" y,z'], r"line 2: .*must end at its quote; write a quote within it twice"),
        ([HEADER, 'a.jpg,"x,y', 'b.jpg,"x",y'], r"lines 2 to 3: .*must end at its quote"),
        ([HEADER, "a.jpg,x,y", b"a.jpg,caf\xe9,y"], r"line 3: .*can't decode.*; save it as UTF-8"),
        ([HEADER, *["a.jpg,x,y"] * 900, "a.jpg,x\0,y"], r"line 902: it has a NUL byte"),
        ([HEADER + "\ra.jpg,x,y"], r"line 1: a line ends with \\r alone"),
        (["image,prefix,prefix,suffix"], r"expected a name of its own for every column .*'prefix', 'prefix'"),
        (["image,prefix,suffix,"], r"a name of its own for every column .*'suffix', ''"),
        (["a.jpg,caption en,a logo"], r"the first line is 'a\.jpg', .*; put one before it that names the columns"),
        (["image,prefix,sufix", "a.jpg,x,y"], r"it has no suffix; .*columns: \{suffix: sufix\}"),
        ([HEADER], r"holds no examples; expected one a line"),
        ([HEADER.replace(",", "\t")], r"looks like tab-separated columns; .*read it with train: \{tsv: .*\.csv\}"),
        (["path\tlabel"], r"is separated by tabs; read it with train: \{tsv: .*\.csv\}"),
        ([HEADER.replace(",", ";")], r"is separated by semicolons; write it with commas: python -c .*"),
        (['{"image": "a.jpg", "suffix": "x"}'], r"looks like JSON lines with columns; .*train: \{jsonl: "),
        (['{"messages": []}'], r"looks like JSON lines with chats; .*train: \{messages: "),
        ([b"PK\x03\x04"], r"is a zip archive, as spreadsheets are too; expected columns separated by commas"),
    ],
    ids=lambda value: str(value)[-40:],
)
def test_what_is_wrong_with_a_file_as_a_whole(folder: Path, lines: list[str | bytes], message: str) -> None:
    file = write(folder, *lines)
    with pytest.raises(ValueError, match=rf"train\.csv.*{message}"):
        load(file, skipped=SkippedRecords(share=0.99))


@pytest.mark.parametrize("header", ["image,prefix,suffix", "path,label"])
def test_commas_in_a_tsv(folder: Path, header: str) -> None:
    with pytest.raises(ValueError, match=r"train\.tsv .*separated.*train: \{csv: .*train\.tsv\}"):
        load(write(folder, header, "a.jpg,x,y", name="train.tsv"))


def test_the_command_that_is_named_for_semicolons(folder: Path) -> None:
    command = COMMAS.replace("python ", f"{sys.executable} ", 1)
    given = 'image;prefix;suffix\na.jpg;"x; y";1,5\n'
    made = subprocess.run(command, shell=True, input=given, text=True, capture_output=True, check=True)
    (folder / "train.csv").write_text(made.stdout)
    assert [(one["prefix"], one["answer"]) for one in load(folder / "train.csv")] == [("x; y", "1,5")]


def test_missing_empty_and_a_folder(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.csv does not exist"):
        load(folder / "gone.csv")
    with pytest.raises(ValueError, match=r"train\.csv is empty"):
        load(write(folder))
    with pytest.raises(ValueError, match=r"holds no examples; expected a first line that names"):
        load(write(folder, "", ""))
    with pytest.raises(ValueError, match=r" is a folder; expected a file$"):
        load_records(csv=folder, cache_dir=folder)

"""CSV and TSV: a first line that names the columns (rows.py says which), then one row an example, in UTF-8.

    image,prefix,suffix
    a.jpg,caption en,"a red circle, and a square"

Quoting is that of RFC 4180: a field with the delimiter, a quote or a line end stands in quotes, and a quote within is
written twice. A cell is one text, as it is written: 007 stays 007, and ["a", "b"] is no list of answers. Several
answers that are equally right need JSON lines (json_lines.py).
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.images import is_image_name
from data.sources.kinds import read_with, require_kind
from data.sources.rows import Table

COMMAS = """python -c 'import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, delimiter=";"))'"""


def csv_file(file: Path, folder: Path | None) -> Table:
    """Rows of a file separated by commas. folder: of their images, by default its own."""
    return delimited(file, folder, "csv", ",")


def tsv_file(file: Path, folder: Path | None) -> Table:
    """Rows of a file separated by tabs. folder: of their images, by default its own."""
    return delimited(file, folder, "tsv", "\t")


def delimited(file: Path, folder: Path | None, key: str, delimiter: str) -> Table:
    """Rows of a file. A row's number is the line in which it begins.

    Raises:
        ValueError: it is of another kind, or its first line names no columns; while it is read: a line is no UTF-8, or
            a quote is not closed, so that it is not known where the next row begins.
    """
    separated = {"csv": "commas", "tsv": "tabs"}[key]
    require_kind(file, key, f"columns separated by {separated}, in UTF-8, whose first line names them")
    names = next((fields for _, fields in _rows(file, delimiter)), [])
    _require_names(file, key, names)

    def rows() -> Iterator[tuple[int, Any | ValueError]]:
        found = _rows(file, delimiter)
        next(found)
        for number, fields in found:
            if len(fields) == len(names):
                yield number, dict(zip(names, fields, strict=True))
            else:
                said = f"it has {len(fields)} fields, and the first line names {len(names)} columns"
                yield number, ValueError(f"{said}; a field with {separated} in it must stand in quotes")

    return Table(str(file), "line", rows, [file], folder or file.parent.absolute(), columns=names)


def _rows(file: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not empty, with the line in which each begins."""
    reader = csv.reader(_lines(file), delimiter=delimiter, strict=True)
    begin = 1
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{file}, {_between(begin, reader.line_num)}: {_said(error)}") from error
        if fields:
            yield begin, fields
        begin = reader.line_num + 1


def _lines(file: Path) -> Iterator[str]:
    with file.open("rb") as content:
        for number, line in enumerate(content, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}, line {number}: {error}; save it as UTF-8") from error
            if "\0" in text:
                raise ValueError(f"{file}, line {number}: it has a NUL byte, which no text has; save it as UTF-8 again")
            yield text


def _between(begin: int, end: int) -> str:
    return f"line {begin}" if begin >= end else f"lines {begin} to {end}"


def _said(error: csv.Error) -> str:
    """What the csv module means, and what to do."""
    if "new-line" in str(error):
        return "a line ends with \\r alone; save the file with \\n or \\r\\n as line ends"
    if "field larger" in str(error) or "unexpected end" in str(error):
        return "a quote is opened and not closed; close it, or put the field in quotes and write the quote twice"
    return f"{error}: a quoted field must end at its quote; write a quote within it twice"


def _require_names(file: Path, key: str, names: list[str]) -> None:
    """ValueError where the first line names no columns."""
    if not names:
        raise ValueError(f"{file} holds no examples; expected a first line that names the columns")
    other = {"csv": "tsv", "tsv": "csv"}[key]
    only = names[0] if len(names) == 1 else ""
    if only and {"tsv": "\t", "csv": ","}[other] in only:
        raise ValueError(f"{file} is separated by {'tabs' if other == 'tsv' else 'commas'}{read_with(other, file)}")
    if ";" in only:
        raise ValueError(
            f"{file} is separated by semicolons; write it with commas: {COMMAS} < {file.name} > commas.csv, and read "
            "that with csv"
        )
    found = ", ".join(map(repr, names))
    if any(map(is_image_name, names)):
        raise ValueError(
            f"{file}: the first line is {found:.200}, an example; put one before it that names the columns"
        )
    if not all(name.strip() for name in names) or len(set(names)) < len(names):
        raise ValueError(f"{file}: expected a name of its own for every column in the first line, got {found:.200}")

"""JSON lines, one object with named columns a line (rows.py says which): a person's own examples."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.files import require_file
from data.sources.rows import Table

MAGIC = {
    b"PAR1": "a Parquet file: read it with parquet instead of jsonl",
    b"ARROW1": "an Arrow file: read the folder that datasets' save_to_disk wrote with disk instead of jsonl",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "compressed by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"BZh": "compressed by bzip2",
    b"SQLite format 3": "an SQLite database",
    codecs.BOM_UTF16_LE: "a text in UTF-16",
    codecs.BOM_UTF16_BE: "a text in UTF-16",
}


def json_lines(file: Path, folder: Path | None) -> Table:
    """The lines of a file. folder: of their images, by default its own. ValueError if it is of another kind."""
    require_file(file)
    if kind := other_kind(file):
        raise ValueError(f"{file} is {kind}; expected JSON lines: one object a line, in UTF-8")

    def rows() -> Iterator[tuple[int, Any | ValueError]]:
        with file.open("rb") as content:
            for number, line in enumerate(content, start=1):
                if line.strip():
                    yield number, parsed(line)

    return Table(str(file), "line", rows, [file], folder or file.parent.absolute())


def parsed(line: bytes) -> Any | ValueError:
    """The value of a line, or what is wrong with it."""
    try:
        return json.loads(line)
    except RecursionError as error:
        return ValueError(str(error))
    except ValueError as error:
        return error


def other_kind(file: Path) -> str | None:
    """What a file is by its first bytes, where it is something else than lines of text."""
    with file.open("rb") as content:
        begin = content.read(1 << 12)
    for magic, kind in MAGIC.items():
        if begin.startswith(magic):
            return kind
    if b"\0" in begin:
        return "a binary file"
    text = begin.removeprefix(codecs.BOM_UTF8).lstrip()
    if text.startswith(b"[") and text[1:].lstrip().startswith(b"{"):
        return f"one JSON list (`jq -c '.[]' {file.name}` prints its objects line by line)"
    return None

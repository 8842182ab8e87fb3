"""A person's own examples, one JSON object a line -> records (data/records.py).

    {"image": "scene.jpg", "prefix": "caption en", "suffix": "a red circle"}

`suffix` may be empty, where the right answer is to say nothing, or a list of answers that are equally right. `id` may
name the example, else its line's number does.
"""

import codecs
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data.invalid import InvalidRecord
from data.processor import single_line

MAGIC = {
    b"PAR1": "a Parquet file (datasets.Dataset.from_parquet(...).to_json(...) writes its rows as lines)",
    b"ARROW1": "an Arrow file",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "compressed by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"BZh": "compressed by bzip2",
    b"SQLite format 3": "an SQLite database",
    codecs.BOM_UTF16_LE: "a text in UTF-16",
    codecs.BOM_UTF16_BE: "a text in UTF-16",
}


def read_jsonl(
    file: Path, folder: Path, choose: Callable[[Sequence[str]], list[int]]
) -> Iterator[dict[str, Any] | InvalidRecord]:
    """Records of the lines at the positions that `choose` takes from all good lines' image ids, in the order of the
    file, and every line that is no example: broken, with an id that occurred before, or with an image that leads out
    of the folder by its path.

    ValueError if there are no lines, or if the file is of another kind.
    """
    if kind := other_kind(file):
        raise ValueError(f"{file} is {kind}; expected JSON lines: one object a line, in UTF-8")
    image_ids = [line["image_id"] for line in _lines(file, folder) if isinstance(line, dict)]
    chosen = set(choose(image_ids)) if image_ids else set()
    position, found = 0, False
    for line in _lines(file, folder):
        found = True
        if isinstance(line, InvalidRecord) or position in chosen:
            yield line
        position += isinstance(line, dict)
    if not found:
        raise ValueError(f"{file} holds no examples; expected one JSON object a line")


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


def _lines(file: Path, folder: Path) -> Iterator[dict[str, Any] | InvalidRecord]:
    lines: dict[str, int] = {}
    with file.open("rb") as content:
        for number, line in enumerate(content, start=1):
            if not line.strip():
                continue
            try:
                example = _example(json.loads(line), number, folder)
                first = lines.setdefault(example["id"], number)
                if first != number:
                    raise ValueError(f"id {example['id']!r} is that of line {first} too; give each line its own")
            except (ValueError, RecursionError) as error:
                yield InvalidRecord(f"line {number}", f"{file}, line {number}: {error}")
            else:
                yield example


def _example(line: Any, number: int, folder: Path) -> dict[str, Any]:
    if not isinstance(line, dict) or set(line) - {"id"} != {"image", "prefix", "suffix"}:
        raise ValueError(f'expected {{"image": ..., "prefix": ..., "suffix": ...}} and perhaps "id", got {line!r:.200}')
    answers = line["suffix"] if isinstance(line["suffix"], list) else [line["suffix"]]
    texts = (line["prefix"], line["image"], *answers)
    if not answers or not all(isinstance(text, str) for text in texts) or not line["image"].strip():
        raise ValueError(f"expected texts, of which prefix and suffix may be empty, got {line!r:.200}")
    if any(answer and not answer.strip() for answer in answers):
        raise ValueError(f'expected a suffix that is a text, or "" for an empty answer, got {line!r:.200}')
    if not isinstance(line.get("id", ""), str | int):
        raise ValueError(f"expected a text or a whole number as id, got {line['id']!r}")
    image = Path(line["image"])
    if image.is_absolute():
        raise ValueError(f"image {line['image']!r} is an absolute path; give one relative to {folder}")
    if ".." in image.parts or "\0" in line["image"]:
        raise ValueError(f"image {line['image']!r} is no plain path; give one within {folder}, without '..'")
    return {
        "id": str(line.get("id", number)),
        "image": str(folder / image),
        "image_id": image.as_posix(),
        "question": line["prefix"],
        "prefix": single_line(line["prefix"]),
        "answers": answers,
        "equally_right": True,
    }

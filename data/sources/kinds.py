"""What a file is by its beginning, for a person who gave it as a source of another kind: the key that reads it.

Not here: what is wrong within a file of the right kind (the readers beside this one).
"""

import codecs
import glob
import json
from collections.abc import Sequence
from pathlib import Path

from data.files import require_file
from data.images import images_in

MAGIC = {
    b"PAR1": "a Parquet file: read it with parquet",
    b"ARROW1": "an Arrow file: read the folder that datasets' save_to_disk wrote with disk",
    b"PK\x03\x04": "a zip archive, as spreadsheets are too",
    b"\x1f\x8b": "compressed by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"BZh": "compressed by bzip2",
    b"SQLite format 3": "an SQLite database",
    codecs.BOM_UTF16_LE: "a text in UTF-16",
    codecs.BOM_UTF16_BE: "a text in UTF-16",
}
METADATA = ("metadata.jsonl", "metadata.csv")  # in a folder of images
SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk of datasets writes into a folder
NAMES = {"image", "file_name", "prefix", "question", "suffix", "chosen"}  # by which a first line of columns is known
BEGINNING = 1 << 16  # bytes in which the first line is looked for
LOOKS = {
    "jsonl": "JSON lines with columns",
    "messages": "JSON lines with chats",
    "csv": "comma-separated columns",
    "tsv": "tab-separated columns",
    "folder": "a folder of images",
}


def require_kind(path: Path, key: str, expected: str) -> None:
    """A file that the source `key` may read.

    Raises:
        ValueError: it is missing, empty, or evidently of another kind; says which, and how to read it.
    """
    if path.is_dir() and is_image_folder(path):
        raise ValueError(f"{path} is a folder; expected a file{read_with('folder', path)}")
    require_file(path)
    if kind := other_kind(path):
        raise ValueError(f"{path} is {kind}; expected {expected}")
    if (keys := readers(path)) and key not in keys:
        raise ValueError(f"{path} looks like {LOOKS[keys[0]]}; expected {expected}{read_with(keys[0], path)}")


def read_with(key: str, path: Path) -> str:
    """The line of a configuration that reads it, for the end of a message."""
    return f"; read it with train: {{{key}: {path}}}"


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


def readers(file: Path) -> Sequence[str]:
    """Keys of the sources that read a file, by its first line; none where that does not tell."""
    with file.open("rb") as content:
        begin = content.read(BEGINNING).removeprefix(codecs.BOM_UTF8).lstrip()
    line = begin.splitlines()[0].decode(errors="replace") if begin else ""
    if not line.startswith("{"):
        tables = {"csv": line.split(","), "tsv": line.split("\t")}
        key = max(tables, key=lambda key: len(tables[key]))
        found = {name.strip(' "') for name in tables[key]}
        return (key,) if len(tables[key]) > 1 and found & NAMES else ()
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return ()
    if "suffix" in values:
        return ("jsonl",)
    if "chosen" in values:
        return ("jsonl", "messages")
    if any(isinstance(values.get(name), list) for name in ("messages", "conversations", "prompt")):
        return ("messages",)
    return ("jsonl", "messages")


def kind_of(path: Path) -> str:
    """The key of the source that reads what is at a path.

    Raises:
        ValueError: there is nothing, or that cannot be told; says what to give instead.
    """
    if path.is_dir():
        if any((path / name).is_file() for name in SAVED):
            return "disk"
        if is_image_folder(path):
            return "folder"
        if any(path.glob("*.parquet")):
            return "parquet"
        raise ValueError(f"it cannot be told what {path} is: expected images, *.parquet, or what save_to_disk wrote")
    if not path.exists() and glob.has_magic(str(path)):
        return "parquet"
    require_file(path)
    with path.open("rb") as content:
        begin = content.readline(BEGINNING)
    if begin.startswith(b"PAR1"):
        return "parquet"
    if path.suffix == ".json" and (key := _kind_of_json(path)):
        return key
    if kind := other_kind(path):
        raise ValueError(f"{path} is {kind}; expected a source of examples")
    keys = readers(path)
    by_name = path.suffix.removeprefix(".")
    key = by_name if by_name in ("csv", "tsv") and not keys else next(iter(keys), None)
    if key is None:
        raise ValueError(f"it cannot be told what {path} is: name its kind, such as --csv {path} or --jsonl {path}")
    return "messages" if len(keys) > 1 and b'"completion"' in begin else key


def _kind_of_json(path: Path) -> str | None:
    """Of a file that is one JSON object; None where it is none."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    if "questions" in content or ("annotations" in content and "images" not in content):
        raise ValueError(f"{path} is one of the official VQA files: give --questions, --annotations and --images")
    return "coco" if {"images", "annotations"} <= content.keys() else None


def is_image_folder(folder: Path) -> bool:
    """Whether it has metadata or folders with images."""
    if any((folder / name).is_file() for name in METADATA):
        return True
    for within in folders_in(folder):
        try:
            images_in(within)
        except ValueError:
            continue
        return True
    return False


def folders_in(folder: Path) -> list[Path]:
    """The folders within, by name, without hidden ones."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))

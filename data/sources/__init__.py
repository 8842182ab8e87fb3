"""Readers of examples, one file a source: each yields records (data/records.py) in the order of its files.

The official VQA files have a reader of their own (vqa_files.py). All others are tables: rows with named columns
(rows.py), and a function of this mapping makes a `Table` of what a configuration says.
"""

import contextlib
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from data.sources.coco import coco
from data.sources.delimited import csv_file, tsv_file
from data.sources.folder import image_folder
from data.sources.hub import hub_dataset
from data.sources.json_lines import json_lines
from data.sources.messages import messages
from data.sources.parquet import parquet
from data.sources.rows import Table
from data.sources.saved_dataset import saved_dataset

TABLES: dict[str, Callable[[Path, Path | None], Table]] = {
    "jsonl": json_lines,
    "csv": csv_file,
    "tsv": tsv_file,
    "messages": messages,
    "folder": image_folder,
    "coco": coco,
    "parquet": parquet,
    "disk": saved_dataset,
}
"""Key of a source -> what opens it: the path that is given, and the folder of the images, if that is given."""
HUB = "hub"  # key of the source that is no path
KEYS = (*TABLES, HUB)


def open_table(
    key: str,
    given: str | PathLike[str],
    folder: Path | None,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
) -> Table:
    """The table that one of `KEYS` names.

    Args:
        given: a path, or the id of a data set on the Hub.
        folder: of the images, if that is given.
        split: of a data set with several. subset, revision: of one on the Hub.

    Raises:
        ValueError: it cannot be opened.
    """
    if key == HUB:
        return hub_dataset(str(given), folder, split, subset, revision)
    if key == "disk":
        return saved_dataset(Path(given), folder, split)
    return TABLES[key](Path(given), folder)


def source_contents(source: Mapping[str, Any]) -> dict[str, tuple[list[Path], str]]:
    """What the rows of a source come from, by its keys: files, and what they depend on beside those (`Table.about`).

    The content of images that are files of their own is not included. Nothing of a file that is not there or not what
    it should be: whoever reads it says so. Nothing of a data set on the Hub, which is what it is by its revision.

    source: the arguments of `load_records`.
    """
    official = {key: Path(source[key]) for key in ("questions", "annotations") if source.get(key)}
    found = {key: ([path], "") for key, path in official.items() if path.is_file()}
    for key in TABLES:
        if source.get(key):
            with contextlib.suppress(ValueError):
                folder = Path(source["images"]) if source.get("images") else None
                table = open_table(key, source[key], folder, source.get("split"))
                found[key] = table.files, table.about
    return found

"""A folder that `save_to_disk` of `datasets` wrote, memory-mapped: a Dataset, or a DatasetDict with its splits."""

import json
from pathlib import Path
from typing import Any

import datasets

from data.sources.columns import BATCH, numbered_rows
from data.sources.rows import Table

DATASET, SPLITS = "state.json", "dataset_dict.json"  # files that say which of the two a folder is


def saved_dataset(path: Path, folder: Path | None, split: str | None = None) -> Table:
    """The rows of a data set, or of one of its splits.

    Args:
        folder: of the images that are paths; `save_to_disk` itself puts images into its files as bytes.
        split: such as "train"; needed where there are several.

    Raises:
        ValueError: the folder is not there or is something else, or there is no such split.
    """
    if not path.is_dir():
        said = "is a file" if path.exists() else "does not exist"
        raise ValueError(f"{path} {said}; expected the folder that save_to_disk wrote")
    part = path
    if (path / SPLITS).is_file():
        part = path / one_split(read_json(path / SPLITS).get("splits", []), split, str(path))
    elif (path / DATASET).is_file() and split is not None:
        raise ValueError(f"split is {split!r}, and {path} is one data set without splits: leave split out")
    if not (part / DATASET).is_file():
        raise ValueError(
            f"{part} has no {DATASET}; expected a folder that save_to_disk wrote (parquet reads files *.parquet)"
        )
    state, dataset = read_json(part / DATASET), opened(part)
    files = [part / DATASET, part / "dataset_info.json", *(part / one["filename"] for one in state["_data_files"])]
    return table_of(dataset, str(part), files, folder)


def one_split(splits: list[str], split: str | None, name: str) -> str:
    """The split that is asked for, or the only one. ValueError names those that there are."""
    if split is None and len(splits) == 1:
        return splits[0]
    if split not in splits:
        wanted = "none was named" if split is None else f"there is no split {split!r}"
        raise ValueError(f"{name} has the splits {', '.join(splits) or '(none)'}, and {wanted}: give one with split")
    return split


def table_of(dataset: datasets.Dataset, name: str, files: list[Path], folder: Path | None) -> Table:
    """The rows of an open data set."""
    plain = dataset.with_format("arrow")
    return Table(name, "row", lambda: numbered_rows(plain.iter(BATCH), dataset.features), files, folder)


def opened(folder: Path) -> datasets.Dataset:
    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} cannot be opened: {error}; save the data set again with save_to_disk") from error


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}; save the data set again with save_to_disk") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} cannot be read: expected an object, got {content!r:.100}")
    return content

"""A folder of images, as `imagefolder` of datasets has it: with metadata, or with a folder for each class.

    metadata.csv or metadata.jsonl   columns as in rows.py, file_name instead of image: its path within the folder
    CLASS/NAME.jpg                   the suffix is CLASS; the question is QUESTION, put into the prompt

Where there is metadata, it alone says what the examples are, and an image that it does not name is none. Where there is
none, images lie in the folders of their classes: files with another suffix and hidden ones are left out; an image
beside the folders is no example; a folder without an image, and folders within a class, are an error. Not here:
archives, and splits by the names of folders: each split is a source of its own.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data.files import require_folder
from data.images import images_in, is_image_name
from data.sources.delimited import csv_file
from data.sources.json_lines import json_lines
from data.sources.kinds import METADATA, folders_in, is_image_folder, read_with, readers
from data.sources.rows import Table

QUESTION = "what is this?"  # about an image of a class
READ_METADATA: dict[str, Callable[[Path, Path | None], Table]] = dict(
    zip(METADATA, (json_lines, csv_file), strict=True)
)


def image_folder(path: Path, images: Path | None) -> Table:
    """The examples of a folder, which holds its images itself.

    Raises:
        ValueError: there is no such folder, it has neither metadata nor classes, or `images` are given.
    """
    if path.is_file():
        key = "folder" if path.name in METADATA else next(iter(readers(path)), "")
        advice = read_with(key, path.parent if key == "folder" else path) if key else ""
        raise ValueError(f"{path} is a file; expected a folder of images{advice}")
    folder = require_folder(path, "a folder of images")
    if images is not None:
        raise ValueError(f"{path} holds its images itself; leave images ({images}) out")
    found = [name for name in METADATA if (folder / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{path} has {' and '.join(found)}; expected one of them: delete or rename the other")
    if found:
        return with_metadata(READ_METADATA[found[0]](folder / found[0], folder))
    if (folder / "metadata.parquet").is_file():
        file = path / "metadata.parquet"
        advice = f"train: {{parquet: {file}, images: {path}, columns: {{image: file_name}}}}"
        raise ValueError(f"{path} has {file.name}, which is read with {advice}")
    return with_classes(path, folder)


def with_metadata(table: Table) -> Table:
    """A table whose column file_name names the image."""

    def rows() -> Iterator[tuple[int, Any | ValueError]]:
        for number, values in table.rows():
            if not isinstance(values, dict) or "file_name" not in values:
                yield number, values
            elif "image" in values:
                yield number, ValueError("it has file_name and image; expected one of them")
            else:
                yield number, {"image" if name == "file_name" else name: value for name, value in values.items()}

    columns = table.columns and ["image" if name == "file_name" else name for name in table.columns]
    return dataclasses.replace(table, rows=rows, columns=columns)


def with_classes(path: Path, folder: Path) -> Table:
    """The images in the folders of their classes, class by class. path: how a person wrote `folder`."""
    classes = folders_in(folder)
    if not classes:
        raise ValueError(
            f"{path} has neither {' or '.join(METADATA)} nor a folder for each class; write metadata.csv with the "
            "columns file_name, prefix and suffix"
        )
    for one in classes:
        if folders_in(one) or is_image_folder(one):
            within = path / one.name
            advice = read_with("folder", within) if is_image_folder(one) else ""
            raise ValueError(f"{within} has folders or metadata; expected the images of a class alone{advice}")
    if len(classes) == 1:
        raise ValueError(
            f"{path} has one folder, {classes[0].name}, so that every answer would be that; expected a folder for each "
            f"class, or {' or '.join(METADATA)}"
        )

    def images() -> Iterator[tuple[str, str | None]]:
        for file in sorted(file.name for file in folder.iterdir() if file.is_file()):
            if is_image_name(file) and not file.startswith("."):
                yield file, None
        for one in classes:
            for image in images_in(one):
                yield f"{one.name}/{image.name}", one.name

    def rows() -> Iterator[tuple[int, Any | ValueError]]:
        for number, (image, name) in enumerate(images(), start=1):
            if name is None:
                yield number, ValueError(f"{image} lies in no folder of a class; move it into one")
            else:
                yield number, {"id": image, "image": image, "question": QUESTION, "suffix": name}

    listed = hashlib.sha256()
    for image, _ in images():
        listed.update(image.encode(errors="surrogateescape") + b"\0")
    columns = ["id", "image", "question", "suffix"]
    return Table(str(path), "image", rows, [], folder, about=listed.hexdigest(), columns=columns)

"""Parquet files: one, all of a folder, or those that a pattern such as `mine/data/train-*.parquet` matches.

Rows are read batch by batch, from files of any size. Images are bytes, as `datasets` writes them ({"bytes", "path"}) or
bare, or paths. Files in folders within a folder are not looked for: give a pattern.
"""

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from data.files import require_file
from data.sources.columns import BATCH, numbered_rows
from data.sources.rows import Table

BUFFER = 1 << 20  # bytes of a column that are read at once


def parquet(path: Path, folder: Path | None) -> Table:
    """The rows of the files, one file after the other in the order of their names.

    Args:
        path: of a file or a folder, or a pattern.
        folder: of the images that are paths, by default that of the files.

    Raises:
        ValueError: there are no such files, or one of them is not Parquet.
    """
    files = parquet_files(path)
    for file in files:
        require_file(file)
        opened(file).close()

    def rows() -> Iterator[tuple[int, Any | ValueError]]:
        count = 0
        for file in files:
            with opened(file) as content:
                try:
                    yield from numbered_rows(content.iter_batches(BATCH), features_of(content.schema_arrow), count + 1)
                except (pa.ArrowException, OSError) as error:
                    raise ValueError(
                        f"{file} cannot be read: {' '.join(str(error).split())}; copy or write it again"
                    ) from error
                count += content.metadata.num_rows

    return Table(str(path), "row", rows, files, folder or files[0].parent.absolute())


def parquet_files(path: Path) -> list[Path]:
    """The files that a path stands for, sorted by name. ValueError where a folder or a pattern has none."""
    if path.is_dir():
        found = [file for file in sorted(path.glob("*.parquet")) if not file.name.startswith(".")]
        if not found:
            raise ValueError(
                f"the folder {path} has no file *.parquet; give one that has some, or a pattern such as "
                f"{path}/*/train-*.parquet"
            )
        return found
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    if matched := sorted(glob.glob(str(path), recursive=True)):
        return [Path(file) for file in matched]
    raise ValueError(f"no file matches {path}; correct the pattern")


def opened(file: Path) -> pq.ParquetFile:
    """An open file whose columns are read piece by piece. ValueError if it is of another kind."""
    try:
        return pq.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False)
    except pa.ArrowException as error:
        raise ValueError(f"{file} is not a Parquet file, or not a whole one ({error})") from error


def features_of(schema: pa.Schema) -> datasets.Features | None:
    """The types that `datasets` noted in a file; None in a file of other origin."""
    noted = b"huggingface" in (schema.metadata or {})
    return datasets.Features.from_arrow_schema(schema) if noted else None

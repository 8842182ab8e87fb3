"""Batches of Arrow columns, as Parquet and `datasets` store them -> numbered rows of Python values.

An image column holds {"bytes", "path"} for each image, encoded as its file was; nothing is decoded here. A number that
stands for the name of a class becomes that name, where the columns say so (`datasets.ClassLabel`).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import datasets
import pyarrow as pa

BATCH = 32  # rows that are in memory at once


def numbered_rows(
    batches: Iterable[pa.RecordBatch | pa.Table], features: datasets.Features | None, first: int = 1
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of all batches, numbered from `first`. features: types of the columns, where they are known."""
    names = {column: of for column, feature in (features or {}).items() if (of := class_names(feature))}
    number = first
    for batch in batches:
        for row in batch.to_pylist():
            yield number, row | {column: of(row[column]) for column, of in names.items()}
            number += 1


def class_names(feature: Any) -> Callable[[Any], Any] | None:
    """What turns the classes of a column, or of lists of them, into their names; None for a column of other values."""
    if isinstance(feature, datasets.List) and (one := class_names(feature.feature)):
        return lambda values: None if values is None else [one(value) for value in values]
    if not isinstance(feature, datasets.ClassLabel) or not feature.names:
        return None
    names = feature.names
    return lambda value: names[value] if isinstance(value, int) and 0 <= value < len(names) else None

"""A data set on the Hugging Face Hub, by its id: downloaded into the cache of `datasets`, then memory-mapped.

A branch or tag moves, a commit does not: `commit_of` says at which one a data set is, so that a run can stay with it.
Nothing is streamed, and no code of a data set is run: one that is a script is refused.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import datasets
import huggingface_hub

from data.sources.rows import Table
from data.sources.saved_dataset import one_split, table_of

COMMIT = re.compile("[0-9a-f]{40}")
EXPORT = "refs/convert/parquet"  # the branch in which the Hub keeps what it converted to Parquet
Given = TypeVar("Given")


def hub_dataset(
    id: str,
    folder: Path | None,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
) -> Table:
    """The rows of one split of a data set.

    Args:
        id: such as "owner/name".
        folder: of the images that are paths, where the data set has those.
        split: such as "train"; needed where there are several.
        subset: name of a configuration of the data set; needed where there are several.
        revision: branch, tag or commit.

    Raises:
        ValueError: there is no such data set, subset, revision or split; it cannot be reached, is not permitted, or
            is a script.
    """
    builder = builder_of(id, subset, revision)
    if revision and COMMIT.fullmatch(revision) and builder.hash != revision:
        raise ValueError(
            f"{id} is needed at commit {revision}, the Hub cannot be reached, and the cache holds commit "
            f"{builder.hash}: try again with a connection"
        )
    explained(id, builder.download_and_prepare)
    name = one_split(list(builder.info.splits or ()), split, id)
    dataset = explained(id, lambda: builder.as_dataset(split=name))
    table = table_of(dataset, f"{id}, split {name}", [Path(one["filename"]) for one in dataset.cache_files], folder)
    images = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]

    def rows() -> Iterator[tuple[int, Any | ValueError]]:
        for number, values in table.rows():
            assert isinstance(values, dict), "columns have no invalid rows"
            yield number, values | {column: with_bytes(values[column]) for column in images}

    return dataclasses.replace(table, rows=rows)


def with_bytes(image: dict[str, Any] | None) -> dict[str, Any] | None:
    """An image that was downloaded as a file of its own, with the bytes of that file; another one as it is."""
    if not image or image["bytes"] is not None or not image["path"]:
        return image
    file = Path(os.path.realpath(image["path"]))
    caches = (datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE)
    if not any(file.is_relative_to(os.path.realpath(cache)) for cache in caches) or not file.is_file():
        return image
    return image | {"bytes": file.read_bytes()}


def commit_of(id: str, subset: str | None, revision: str | None) -> str:
    """The commit that a branch or tag of a data set is at; by default its main branch. ValueError as `hub_dataset`."""
    if revision and COMMIT.fullmatch(revision):
        return revision
    commit = builder_of(id, subset, revision).hash
    assert commit is not None, "a data set of the Hub has the hash of its commit"
    return commit


def builder_of(id: str, subset: str | None, revision: str | None) -> datasets.DatasetBuilder:
    if Path(id).exists():
        raise ValueError(f"hub is {id!r}, which is a path here; read a file or folder of your own with parquet or disk")
    return explained(id, lambda: datasets.load_dataset_builder(id, name=subset, revision=revision))


def explained(id: str, call: Callable[[], Given]) -> Given:
    """What a call to `datasets` gives; what went wrong there as one kind of error, with what to do."""
    try:
        return call()
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise ValueError(
            f"{id} is a script, and no code of a data set is run; most such data sets are there as Parquet too: "
            f"give revision: {EXPORT}"
        ) from error
    except ConnectionError as error:
        raise ValueError(f"{id} cannot be reached ({error}): try again with a connection to the Hub") from error
    except FileNotFoundError as error:
        raise ValueError(
            f"{error}\ncorrect hub or revision; for one that asks for access, accept its terms on the Hub and run "
            "`hf auth login`"
        ) from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        advice = "; name one of them with subset" if "config" in str(error).lower() else ""
        raise ValueError(f"{id} cannot be loaded: {error}{advice}") from error

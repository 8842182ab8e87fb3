"""Validation records that are held out of training records, by image: what is asked about was never trained on."""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import datasets

from data.records import image_names, image_places

SHARE = 0.1  # of the images


class Split(NamedTuple):
    """The records of a source to train on, and those to validate on."""

    train: datasets.Dataset
    validation: datasets.Dataset


def hold_out(sources: Mapping[str, datasets.Dataset], seed: int, share: float = SHARE) -> dict[str, Split]:
    """Of each source what is trained on and what is held out: a share of its images, and with an image all records
    about it, of whichever source.

    An image is told by its path, or the digest of its bytes; a row of text alone counts as an image. Which ones are
    drawn depends on the seed and on their `image_id`s alone, so that the folder may lie elsewhere. All sources draw in
    one order: those with the same images hold out the same ones.

    Raises:
        ValueError: there are fewer than two images, or all those of a source would be held out.
    """
    names = {name: names_of(records) for name, records in sources.items()}
    drawn_by: dict[str, str] = {}
    for name, records in sources.items():
        for image, image_id in zip(names[name], records["image_id"][:], strict=True):
            drawn_by.setdefault(image, hashlib.sha256(f"{seed}/{image_id}".encode()).hexdigest())
    if len(drawn_by) < 2:
        raise ValueError(
            f"data.validation: auto holds out whole images, and data.train has {len(drawn_by)}; expected two or more: "
            "give data.validation examples of its own"
        )
    held: set[str] = set()
    for images in map(set, names.values()):
        order = sorted(images, key=lambda image: (drawn_by[image], image))
        held.update(order[: max(1, round(share * len(order)))])
    found: dict[str, Split] = {}
    for name, records in sources.items():
        positions: tuple[list[int], list[int]] = ([], [])
        for position, image in enumerate(names[name]):
            positions[image in held].append(position)
        if not positions[False]:
            raise ValueError(
                f"data.validation: auto would hold out all {len(set(names[name])):,} images of {name}, and leave none "
                "to train on: give data.validation examples of its own"
            )
        found[name] = Split(*map(records.select, positions))
    return found


def names_of(records: datasets.Dataset) -> list[str]:
    """What each record is held out by: its image, or itself where it has none."""
    pairs = zip(image_names(image_places(records)), records["image_id"][:], strict=True)
    return [image_id if name is None else name for name, image_id in pairs]

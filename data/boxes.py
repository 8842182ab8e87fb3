"""Boxes in an image <-> the text that PaliGemma writes for them (arXiv 2407.07726, section 3.2).

    <loc0123><loc0045><loc0678><loc0890> cat ; <loc0200><loc0300><loc0400><loc0500> red circle

A box is four of 1024 locations, in the order top, left, bottom, right, followed by its label. Boxes are separated by
" ; ". A coordinate c, as a share of the image's height or width from 0 to 1, is location round(1023 c), and location k
is coordinate k / 1023. So does big_vision, the code of the authors, when it trains (`refcoco_mask2str` in
big_vision/pp/proj/paligemma/segmentation.py) and when it scores (evaluators/proj/paligemma/transfers/segmentation.py).
Demos of the published checkpoints divide by 1024, which moves no corner by more than a thousandth of the side.

Locations in the files of a source are those of the image as it is. A network that pads its images to a square
(`aspect` pad) sees locations of that square: `in_square` converts a text, with an error of at most one location, and
`boxes_in` takes an answer back to the image. Not here: the masks of `<segNNN>` tokens, which need a decoder of their
own; scores (finetune/evaluation/detection.py).
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

LOCATIONS = 1024  # of an image's height and width
LAST = LOCATIONS - 1
_LOCATION = r"<loc(?:0\d{3}|10[01]\d|102[0-3])>"
_LOCATIONS = re.compile(rf"{_LOCATION}(?:\s*{_LOCATION})*")  # all that are in a row
_LABELLED = re.compile(rf"({_LOCATIONS.pattern})\s*(?:<seg\d{{3}}>\s*)*([^<;]*)")


class Box(NamedTuple):
    """What is there, in pixels of the image."""

    label: str
    left: float
    top: float
    right: float
    bottom: float


class Corners(NamedTuple):
    """A box as a text has it: locations from 0 to 1023."""

    top: int
    left: int
    bottom: int
    right: int


class WrittenBox(NamedTuple):
    """A box of a text. label: "" where the text names none. start, end: where it stands in the text."""

    label: str
    corners: Corners
    start: int
    end: int


class Reading(NamedTuple):
    """The boxes of a text, in its order, and how many runs of locations are no box.

    incomplete: with more or fewer than four locations. empty: inside out, or without area.
    """

    boxes: list[WrittenBox]
    incomplete: int
    empty: int


def read_boxes(text: str) -> Reading:
    """The boxes of a text that a network wrote. A box without a label is kept; any other text is passed over."""
    boxes, incomplete, empty = [], 0, 0
    for run in _LABELLED.finditer(text):
        locations = [int(location) for location in re.findall(r"\d{4}", run[1])]
        if len(locations) != 4:
            incomplete += 1
            continue
        corners = Corners(*locations)
        if corners.bottom <= corners.top or corners.right <= corners.left:
            empty += 1
            continue
        boxes.append(WrittenBox(run[2].strip(), corners, run.start(), run.start() + len(run[0].rstrip())))
    return Reading(boxes, incomplete, empty)


def boxes_in(text: str, size: tuple[int, int], aspect: str = "squash") -> list[Box]:
    """The boxes that an answer names, in the pixels of an image of this size (width, height).

    Args:
        aspect: as the network's processor has it. With "pad" the locations are those of the square around the image.
    """
    across, down, left, top = _frame(size, aspect)
    return [
        Box(
            label,
            corners.left / LAST * across - left,
            corners.top / LAST * down - top,
            corners.right / LAST * across - left,
            corners.bottom / LAST * down - top,
        )
        for label, corners, *_ in read_boxes(text).boxes
    ]


def boxes_text(boxes: Iterable[Box], size: tuple[int, int], labels: Sequence[str] = (), aspect: str = "squash") -> str:
    """The text of boxes in an image of this size (width, height): first in the order of `labels`, which a prompt asks
    for, then from top to bottom, from left to right; labels that are not asked for come last, by the alphabet.

    Raises:
        ValueError: a label would not be read back as it is; a box has no area, or none of it is in the image.
    """
    order = {label: place for place, label in enumerate(labels)}
    written = sorted((order.get(box.label, len(order)), box.label, corners_of(box, size, aspect)) for box in boxes)
    return " ; ".join(f"{_written(corners)} {require_label(label)}" for _, label, corners in written)


def corners_of(box: Box, size: tuple[int, int], aspect: str = "squash") -> Corners:
    """The locations of a box; what is outside of the image is cut off. They are at least one apart, so that a thin box
    is read back. ValueError where the box has no area, or none of it is in the image.
    """
    width, height = size
    left, right = max(box.left, 0), min(box.right, width)
    top, bottom = max(box.top, 0), min(box.bottom, height)
    if not (left < right and top < bottom):
        raise ValueError(f"{box} has no area within an image of {width} x {height} pixels; correct it, or remove it")
    across, down, before, above = _frame(size, aspect)
    first, last = _apart(_location((top + above) / down), _location((bottom + above) / down))
    begin, end = _apart(_location((left + before) / across), _location((right + before) / across))
    return Corners(first, begin, last, end)


def in_square(text: str, size: tuple[int, int]) -> str:
    """A text about an image of this size (width, height), with the locations of the square around it: what a network
    that pads its images is trained with. Only what is four locations in a row is changed.
    """
    across, down, left, top = _frame(size, "pad")
    width, height = size

    def moved(match: re.Match[str]) -> str:
        locations = [int(location) / LAST for location in re.findall(r"\d{4}", match[0])]
        if len(locations) != 4:
            return match[0]
        y0, x0, y1, x1 = locations
        rows = [_location((y * height + top) / down) for y in (y0, y1)]
        columns = [_location((x * width + left) / across) for x in (x0, x1)]
        if y0 < y1 and x0 < x1:  # a box, and still one where it is thin
            rows, columns = _apart(*rows), _apart(*columns)
        return _written(Corners(rows[0], columns[0], rows[1], columns[1]))

    return _LOCATIONS.sub(moved, text) if width != height else text


def require_label(label: str) -> str:
    """The label; ValueError where it would not be read back from a text as it is."""
    if not label or label != label.strip() or re.search(r"[;<\n\r]", label):
        raise ValueError(f"{label!r} cannot label a box; expected a text without ';', '<', line ends and outer spaces")
    return label


def _frame(size: tuple[int, int], aspect: str) -> tuple[int, int, int, int]:
    """Width and height in pixels of what locations are of, and where the image begins in it: left and top."""
    width, height = size
    if aspect != "pad":
        return width, height, 0, 0
    side = max(size)
    return side, side, (side - width) // 2, (side - height) // 2


def _location(share: float) -> int:
    return min(max(round(LAST * share), 0), LAST)


def _apart(begin: int, end: int) -> list[int]:
    """Two locations of one axis, at least one apart."""
    begin = min(begin, LAST - 1)
    return [begin, max(end, begin + 1)]


def _written(corners: Corners) -> str:
    return "".join(f"<loc{location:04d}>" for location in corners)

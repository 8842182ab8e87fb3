"""Boxes become the text that PaliGemma writes for them, and are read back from what a network writes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.boxes import Box, Corners, boxes_in, boxes_text, corners_of, in_square, read_boxes

SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000))
SHARES = st.floats(0, 1, width=32)


def text_of(*corners: int) -> str:
    return "".join(f"<loc{corner:04d}>" for corner in corners)


@given(SIZES, SHARES, SHARES, SHARES, SHARES)
def test_locations_are_those_of_big_vision(size: tuple[int, int], x0: float, y0: float, x1: float, y1: float) -> None:
    """`clip(round(1023 * bbox), 0, 1023)`, with bbox (y0, x0, y1, x1) from 0 to 1."""
    (x0, x1), (y0, y1) = sorted((x0, x1)), sorted((y0, y1))
    width, height = size
    box = Box("cat", x0 * width, y0 * height, x1 * width, y1 * height)
    shares = np.array([box.top / height, box.left / width, box.bottom / height, box.right / width])
    top, left, bottom, right = np.clip(np.round(shares * 1023).astype(int), 0, 1023).tolist()
    if top < bottom and left < right:
        assert corners_of(box, size) == (top, left, bottom, right)


def test_a_text_is_what_is_documented() -> None:
    boxes = [Box("red circle", 300, 200, 500, 400), Box("cat", 45, 123, 890, 678)]
    text = "<loc0123><loc0045><loc0678><loc0890> cat ; <loc0200><loc0300><loc0400><loc0500> red circle"
    assert boxes_text(boxes, (1023, 1023)) == text
    assert boxes_in(text, (1023, 1023)) == boxes[::-1]
    assert boxes_text([], (10, 10)) == ""


def test_boxes_are_in_the_order_of_the_prompt_then_from_top_to_bottom_and_left_to_right() -> None:
    places = [(500, 10), (10, 500), (10, 10), (10, 10)]
    boxes = [Box(label, x, y, x + 50, y + 50) for label in "bac" for x, y in places]
    text = boxes_text(boxes, (1000, 1000), ["c", "b"])
    read = [(box.label, round(box.top), round(box.left)) for box in boxes_in(text, (1000, 1000))]
    order = [(10, 10), (10, 10), (10, 500), (500, 10)]
    assert read == [(label, *place) for label in "cba" for place in order]
    assert boxes_text(boxes[::-1], (1000, 1000), ["c", "b"]) == text


@given(SIZES, *4 * [st.integers(0, 1023)])
def test_what_is_read_is_written_again_as_it_was(size: tuple[int, int], a: int, b: int, c: int, d: int) -> None:
    text = f"{text_of(a, b, c, d)} cat"
    if a < c and b < d:
        assert boxes_text(boxes_in(text, size), size) == text
    else:
        assert boxes_in(text, size) == []


@given(SIZES, SHARES, SHARES, SHARES, SHARES)
def test_padded_locations_are_those_of_the_square(
    size: tuple[int, int], x0: float, y0: float, x1: float, y1: float
) -> None:
    """Against the plain formula, and against a text that was written before the square was known."""
    (width, height), side = size, max(size)
    (x0, x1), (y0, y1) = sorted((x0, x1)), sorted((y0, y1))
    box = Box("cat", x0 * width, y0 * height, x1 * width, y1 * height)
    if box.left >= box.right or box.top >= box.bottom:
        return
    left, top = (side - width) // 2, (side - height) // 2
    y0, x0, y1, x1 = (
        round(1023 * at / side) for at in (box.top + top, box.left + left, box.bottom + top, box.right + left)
    )
    padded = corners_of(box, size, "pad")
    if y0 < y1 and x0 < x1:
        assert padded == (y0, x0, y1, x1)
    (moved,) = read_boxes(in_square(f"{text_of(*corners_of(box, size))} cat", size)).boxes
    assert (
        max(abs(a - b) for a, b in zip(moved.corners, padded, strict=True)) <= 2
    )  # rounded twice, and a thin box is widened
    (back,) = boxes_in(f"{text_of(*padded)} cat", size, "pad")
    assert max(abs(a - b) for a, b in zip(back[1:], box[1:], strict=True)) <= 1.51 * side / 1023


def test_a_text_moves_into_the_square_by_its_boxes_alone() -> None:
    size = (2046, 1023)  # 511 pixels above
    assert in_square("<loc0000><loc0000><loc1023><loc1023> cat ; <loc0000> 5", size) == (
        f"{text_of(256, 0, 767, 1023)} cat ; <loc0000> 5"
    )
    assert in_square("describe <loc0000> <loc0000><loc1023><loc1023>", size) == f"describe {text_of(256, 0, 767, 1023)}"
    for unchanged in ("", "no box", text_of(1, 2, 3), text_of(1, 2, 3, 4, 5)):
        assert in_square(unchanged, size) == unchanged
    assert in_square(text_of(1, 2, 3, 4), (50, 50)) == text_of(1, 2, 3, 4)


def test_boxes_are_in_the_pixels_of_the_image() -> None:
    text = "<loc0256><loc0512><loc0768><loc1023> red circle ; <loc0000><loc0000><loc0512><loc0512> cat"
    boxes = boxes_in(text, (2046, 1023))
    assert boxes == [Box("red circle", 1024, 256, 2046, 768), Box("cat", 0, 0, 1024, 512)]
    # The same in a square that was padded above and below: 511 and 512 pixels.
    assert boxes_in(text, (2046, 1023), "pad")[0] == Box("red circle", 1024, 512 - 511, 2046, 1536 - 511)
    assert boxes_in(text, (1023, 2046), "pad")[0] == Box("red circle", 1024 - 511, 512, 2046 - 511, 1536)


@pytest.mark.parametrize(
    ("text", "labels", "incomplete", "empty"),
    [
        ("", [], 0, 0),
        ("cat", [], 0, 0),
        ("<loc1><loc2><loc3><loc4> cat", [], 0, 0),
        ("<loc1024><loc2000><loc3000><loc4000> cat", [], 0, 0),
        (f"{text_of(1, 2, 3)} cat", [], 1, 0),
        (f"{text_of(1, 2, 3, 4, 5)} cat", [], 1, 0),
        (f"{text_of(1, 2, 3, 4)} cat ; {text_of(5, 6)}", ["cat"], 1, 0),  # cut off
        (f"{text_of(1, 2, 3, 4)} cat ; <loc0005", ["cat"], 0, 0),
        (f"{text_of(1, 2, 3, 4)}", [""], 0, 0),
        (f"{text_of(1, 2, 3, 4)} ; {text_of(5, 6, 7, 8)} dog", ["", "dog"], 0, 0),
        (f"{text_of(1, 2, 3, 4)} cat {text_of(5, 6, 7, 8)} dog", ["cat", "dog"], 0, 0),  # no separator
        (f"here: {text_of(1, 2, 3, 4)}cat;{text_of(5, 6, 7, 8)}  red  dog ;", ["cat", "red  dog"], 0, 0),
        ("<loc0001> <loc0002> <loc0003> <loc0004> cat", ["cat"], 0, 0),
        (f"{text_of(3, 2, 1, 4)} cat ; {text_of(1, 4, 3, 2)} dog", [], 0, 2),  # inside out
        (f"{text_of(1, 2, 1, 4)} cat ; {text_of(1, 2, 3, 2)} dog", [], 0, 2),  # without area
        (f"{text_of(1, 2, 3, 4)}{'<seg003>' * 16} dog", ["dog"], 0, 0),
    ],
    ids=repr,
)
def test_what_a_network_writes_is_read_as_far_as_it_is_a_box(
    text: str, labels: list[str], incomplete: int, empty: int
) -> None:
    reading = read_boxes(text)
    assert [box.label for box in reading.boxes] == labels
    assert (reading.incomplete, reading.empty) == (incomplete, empty)
    for box in reading.boxes:
        assert text[box.start : box.end].startswith(f"<loc{box.corners.top:04d}>")
        assert box.label in text[box.start : box.end]


@given(st.text("<loc>0123 ;cat"))
def test_any_text_is_read(text: str) -> None:
    read_boxes(text)
    in_square(text, (7, 5))


def test_a_thin_box_is_read_back_and_a_large_one_is_cut() -> None:
    assert corners_of(Box("x", 4000, 0, 4001, 9999), (10_000, 9999)) == Corners(0, 409, 1023, 410)
    assert corners_of(Box("x", 9999.9, 0, 10_000, 1), (10_000, 10_000)) == Corners(0, 1022, 1, 1023)
    assert corners_of(Box("x", -5, -5, 15, 15), (10, 10)) == Corners(0, 0, 1023, 1023)
    assert corners_of(Box("x", -5, -5, 15, 15), (10, 5), "pad") == Corners(205, 0, 716, 1023)  # rows 2 to 7 of 10


@pytest.mark.parametrize(
    "box", [(3, 1, 3, 5), (5, 1, 3, 5), (-3, 1, 0, 5), (10, 1, 12, 5), (1, 3, 5, 3), (1, 10, 5, 12), (1, 1, 5, np.nan)]
)
def test_a_box_without_area_in_the_image_is_refused(box: tuple[float, float, float, float]) -> None:
    with pytest.raises(ValueError, match=r"has no area within an image of 10 x 10 pixels; correct it"):
        boxes_text([Box("cat", *box)], (10, 10))


@pytest.mark.parametrize("label", ["", " cat", "a;b", "a<b", "a\nb"])
def test_a_label_that_would_not_be_read_back_is_refused(label: str) -> None:
    with pytest.raises(ValueError, match="cannot label a box; expected a text without ';'"):
        boxes_text([Box(label, 1, 1, 5, 5)], (10, 10))

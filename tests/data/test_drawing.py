"""Boxes on an image."""

from __future__ import annotations

from PIL import Image

from data.boxes import Box
from data.drawing import draw_boxes


def test_a_box_is_drawn_where_it_is_and_the_image_stays() -> None:
    image = Image.new("RGB", (1000, 500), "white")
    drawn = draw_boxes(image, [Box("", 100, 200, 300, 400)])
    assert drawn.size == image.size
    assert drawn.getpixel((200, 200)) != (255, 255, 255)
    assert drawn.getpixel((100, 300)) != (255, 255, 255)
    assert drawn.getpixel((200, 300)) == (255, 255, 255)
    assert drawn.getpixel((50, 300)) == (255, 255, 255)
    assert image.getcolors() == [(500_000, (255, 255, 255))]
    # Corners the wrong way round are the same box; a small image is enlarged.
    assert draw_boxes(image, [Box("", 300, 400, 100, 200)]).tobytes() == drawn.tobytes()
    small = draw_boxes(Image.new("RGB", (100, 50), "white"), [Box("x", 10, 20, 30, 40)])
    assert small.size == (500, 250)
    assert small.getpixel((100, 198)) == (255, 255, 255) != small.getpixel((100, 200))

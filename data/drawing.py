"""Boxes drawn on an image, with their labels. Not here: reading them from a text (boxes.py)."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from data.boxes import Box
from data.images import ImageSource, open_image

SIDE = 448  # pixels that the longer side of what is drawn on has at least
COLORS = ("#2f7de1", "#e08a1e", "#3aa76d", "#b0569c", "#d1495b", "#7a5cd1")


def draw_boxes(image: ImageSource, boxes: Sequence[Box]) -> Image.Image:
    """The image with the boxes and their labels on it."""
    opened = open_image(image)
    drawn = large_enough(opened)
    scale = drawn.width / opened.width
    pen, line = ImageDraw.Draw(drawn), max(2, max(drawn.size) // 200)
    font = ImageFont.load_default(max(10, max(drawn.size) // 30))
    for number, box in enumerate(boxes):
        color = COLORS[number % len(COLORS)]
        left, right = sorted((scale * box.left, scale * box.right))
        top, bottom = sorted((scale * box.top, scale * box.bottom))
        pen.rectangle((left, top, right, bottom), outline=color, width=line)
        if box.label:
            pen.text(
                (left + line + 1, top + line), box.label, fill="white", font=font, stroke_width=2, stroke_fill=color
            )
    return drawn


def large_enough(image: Image.Image) -> Image.Image:
    """The image, enlarged where it is too small to draw on."""
    scale = -(-SIDE // max(image.size))
    return image if scale <= 1 else image.resize((scale * image.width, scale * image.height), Image.Resampling.BICUBIC)

"""Plain figures on a light, noisy ground: what generated scenes consist of, and how one becomes an image.

Axes: none; coordinates are pixels of the canvas, from its upper left corner.
"""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw

CELL = 28  # pixels a side: a cell holds one figure, and fills one 14-pixel patch when the canvas is halved
COLORS = {"red": (214, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 214), "yellow": (240, 205, 30)}
CORNERS = {"circle": (32, 1.0, 0.0), "square": (4, 1.2, math.tau / 8), "triangle": (3, 1.1, -math.tau / 4)}
SHAPES = tuple(CORNERS)


class Figure(NamedTuple):
    """Centre and radius in pixels of the canvas (a figure keeps within 1.1 radii of its centre), angle in radians."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[int, int, int]


Scene = tuple[Figure, ...]


class Question(NamedTuple):
    """A question with its true answer; the two types are VQAv2's."""

    text: str
    answer: str
    answer_type: str
    question_type: str


def rng_of(split: str, seed: int, index: int, purpose: str) -> random.Random:
    """The random numbers for one purpose in a scene; seeding with a string is the same on every platform."""
    return random.Random(f"{split}/{seed}/{index}/{purpose}")


def draw_figure(
    others: Sequence[Figure], place: int, grid: int, radii: tuple[float, float], rng: random.Random
) -> Figure:
    """A figure in a cell, numbered row by row, of a raster of grid x grid cells; its radius is between `radii`."""
    # Figures after the first often repeat a shape or a color: else counts above one would be rare.
    shape = rng.choice([f.shape for f in others] if others and rng.random() < 0.4 else SHAPES)
    color = rng.choice([f.color for f in others] if others and rng.random() < 0.4 else list(COLORS))
    red, green, blue = (min(255, max(0, level + rng.randint(-20, 20))) for level in COLORS[color])
    radius = rng.uniform(*radii)
    reach = CELL / 2 - 1.1 * radius
    x = (place % grid + 0.5) * CELL + rng.uniform(-reach, reach)
    y = (place // grid + 0.5) * CELL + rng.uniform(-reach, reach)
    return Figure(shape, color, x, y, radius, rng.uniform(-0.2, 0.2), (red, green, blue))


def outline(figure: Figure) -> list[tuple[float, float]]:
    """The figure's corners in canvas pixels: how many, how many radii out, angle of the first one."""
    corners, reach, first = CORNERS[figure.shape]
    angles = [first + i * math.tau / corners + figure.angle for i in range(corners)]
    r = reach * figure.radius
    return [(figure.x + r * math.cos(a), figure.y + r * math.sin(a)) for a in angles]


def render(scene: Scene, rng: random.Random, canvas: int) -> Image.Image:
    """The scene as an RGB image of canvas x canvas pixels, on a light ground, with noise over everything."""
    sharpness = 4  # drawn this much larger and shrunk: smooth edges
    image = Image.new("RGB", (canvas * sharpness, canvas * sharpness), tuple(rng.randint(215, 250) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for figure in scene:
        draw.polygon([(x * sharpness, y * sharpness) for x, y in outline(figure)], fill=figure.rgb)
    image = image.resize((canvas, canvas), Image.Resampling.BOX)
    noise = Image.frombytes("RGB", image.size, rng.randbytes(canvas * canvas * 3))
    return Image.blend(image, noise, 0.08)

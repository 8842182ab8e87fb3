"""One question asked of one network: the answer, each token's probability, and the boxes that it names.

PaliGemma writes a box as four of 1024 locations, `<locYYYY>` each, in the order top, left, bottom, right, followed by
what is in it; boxes are separated by " ; " (arXiv 2407.07726, section 3.2). Not here: the masks of `<segNNN>` tokens,
which need a decoder of their own.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from data.images import ImageSource, open_image
from finetune.demo.networks import Network

LOCATIONS = 1024  # bins of the image's height and width
BOX = re.compile(r"<loc(\d{4})>" + 3 * r"\s*<loc(\d{4})>" + r"(?:\s*<seg\d{3}>)*([^<;]*)")
SIDE = 448  # pixels that the longer side of what is drawn on has at least
COLORS = ("#2f7de1", "#e08a1e", "#3aa76d", "#b0569c", "#d1495b", "#7a5cd1")


class Token(NamedTuple):
    """A token as text, and the probability that the network gave it, at temperature 1."""

    text: str
    probability: float


class Box(NamedTuple):
    """What a network says is there, in pixels of the image."""

    label: str
    left: float
    top: float
    right: float
    bottom: float


@dataclasses.dataclass(frozen=True)
class Answered:
    """An answer; `ids` and `tokens` hold `<eos>` too, unless it was cut off (`finished` is False)."""

    text: str
    ids: list[int]
    tokens: list[Token]
    finished: bool


def ask(
    network: Network,
    image: ImageSource,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Answered:
    """The answer to a whole prompt, such as `answer en what is this?`; sampling as in `PaliGemma.generate_scored`.

    Raises:
        ValueError: the image cannot be used, the prompt is too long or holds a special token, or a sampling setting is
            outside its range.
    """
    processor = network.processor
    inputs: dict[str, Any] = {
        name: tensor.to(network.model.device) for name, tensor in processor([image], [prompt]).items()
    }
    new = network.model.generate_scored(
        **inputs, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    ((ids, log_probs),) = new.rows(processor.eos_id)
    tokens = [Token(token_text(network, i), math.exp(p)) for i, p in zip(ids, log_probs, strict=True)]
    return Answered(processor.decode(ids), ids, tokens, ids[-1] == processor.eos_id)


def token_text(network: Network, token: int) -> str:
    """A token as the vocabulary has it, with a space where that writes one."""
    text: str | None = network.processor.tokenizer.id_to_token(token)
    return f"<{token}>" if text is None else text.replace("▁", " ")


def boxes_in(text: str, size: tuple[int, int], aspect: str = "squash") -> list[Box]:
    """The boxes that an answer names, in the pixels of an image of this size (width, height).

    Args:
        aspect: as the network's processor has it. With "pad" the locations are those of the square around the image.
    """
    width, height = size
    across, down = (max(size), max(size)) if aspect == "pad" else size
    left, top = (across - width) // 2, (down - height) // 2
    found = []
    for *locations, label in BOX.findall(text):
        y0, x0, y1, x1 = (int(location) / LOCATIONS for location in locations)
        corners = (x0 * across - left, y0 * down - top, x1 * across - left, y1 * down - top)
        found.append(Box(label.strip(), *corners))
    return found


def draw_boxes(image: ImageSource, boxes: list[Box]) -> Image.Image:
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

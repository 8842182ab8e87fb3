"""Held-out images with their questions, what was expected and what each network answered, small enough for one page.
Boxes that a text names are drawn over the image; the text itself is shown with its locations as numbers.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image

from data.boxes import boxes_in
from data.images import open_image
from finetune.report.embedded import data_uri
from finetune.report.run_data import Arm

SIDE, QUALITY = 224, 72  # pixels of the longer side, JPEG
MOST_IMAGES, MOST_BYTES = 500, 3_600_000  # of one page, which stays below 5 MB
WIDTH = 300  # of an image in the units of its layer of boxes: about the pixels that it has on a screen
EXPECTED = "expected"
LOCATIONS = re.compile(r"(?:<loc\d{4}>)+")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question: what was expected, with how often each answer was given, and each arm's line of answers.jsonl."""

    question: str
    answer_type: str
    expected: list[tuple[str, int]]
    answers: dict[str, dict[str, Any]]
    outcome: str
    """Of the last arm: "right" from a score of 50 on, else "wrong"."""
    is_changed: bool
    """Whether the first and the last arm answer differently."""


@dataclasses.dataclass(frozen=True)
class DrawnBox:
    """A box in the units of its layer; whose: EXPECTED, or the name of an arm."""

    whose: str
    label: str
    left: float
    top: float
    width: float
    height: float


@dataclasses.dataclass(frozen=True)
class Card:
    """An image as a data URI, its height where its width is WIDTH, its questions, and the boxes of each of them. A row
    of text alone has no image.
    """

    image: str | None
    height: float
    questions: list[Asked]
    boxes: list[list[DrawnBox]]

    @property
    def has_boxes(self) -> bool:
        return any(self.boxes)


def cards_of(
    arms: Mapping[str, Arm], images: Mapping[str, Any], aspects: Mapping[str, str] | None = None, seed: int = 0
) -> list[Card]:
    """Images drawn at random, those with a wrong answer first, then those with a changed one, until a page is full.
    An image that can no longer be opened is left out.

    Args:
        arms: in the order in which they are shown, the last one is what the page is about.
        images: by image id, in any form that `open_image` takes; None of a row of text alone.
        aspects: how the network of an arm makes images square, "squash" by default. What is expected is written for the
            first one.
    """
    *_, last = arms.values()
    questions: dict[str, list[Asked]] = {}
    for name, line in last.answers.items():
        answers = {arm: found.answers[name] for arm, found in arms.items() if name in found.answers}
        questions.setdefault(line["image_id"], []).append(asked(line, answers))
    order = sorted(name for name in questions if name in images)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda name: interest(questions[name]))
    cards: list[Card] = []
    size = 0
    for name in order[:MOST_IMAGES]:
        if (given := images[name]) is None:
            cards.append(Card(None, 0, questions[name], [[] for _ in questions[name]]))
            continue
        try:
            image = open_image(given)
        except ValueError:
            continue
        uri = thumbnail(image)
        if (size := size + len(uri)) > MOST_BYTES:
            break
        boxes = [list(boxes_of(one, image.size, aspects or {})) for one in questions[name]]
        cards.append(Card(uri, round(WIDTH * image.height / image.width, 1), questions[name], boxes))
    return cards


def interest(questions: list[Asked]) -> int:
    """0 with a wrong answer among them, 1 with a changed one, 2 with neither."""
    if any(one.outcome == "wrong" for one in questions):
        return 0
    return 2 - any(one.is_changed for one in questions)


def asked(line: dict[str, Any], answers: dict[str, dict[str, Any]]) -> Asked:
    texts = [answer["answer"] for answer in answers.values()]
    outcome = "right" if line["score"] >= 50 else "wrong"
    expected = Counter(line["expected"]).most_common()
    return Asked(line["question"], line["answer_type"], expected, answers, outcome, texts[0] != texts[-1])


def boxes_of(one: Asked, size: tuple[int, int], aspects: Mapping[str, str]) -> Iterator[DrawnBox]:
    """The boxes that are expected and those of each arm, in an image of this size (width, height in pixels)."""
    first = next(iter(one.answers))
    texts = [(EXPECTED, text, aspects.get(first)) for text, _ in one.expected]
    texts += [(arm, line["answer"], aspects.get(arm)) for arm, line in one.answers.items()]
    scale = WIDTH / size[0]
    for whose, text, aspect in texts:
        for label, *corners in boxes_in(text, size, aspect or "squash"):
            left, top, right, bottom = (scale * corner for corner in corners)
            yield DrawnBox(whose, label, *(round(place, 1) for place in (left, top, right - left, bottom - top)))


def names_of_boxes(cards: list[Card]) -> list[str]:
    """Whose boxes may be on the images, expected ones first; nobody's where no image has any."""
    arms = dict.fromkeys(arm for card in cards for one in card.questions for arm in one.answers)
    return [EXPECTED, *arms] if any(card.has_boxes for card in cards) else []


def short(text: str) -> str:
    """A text to be shown, with locations as numbers: "<loc0010><loc0200> x" becomes "[10 200] x"."""
    return LOCATIONS.sub(lambda run: f"[{' '.join(str(int(at)) for at in re.findall('[0-9]{4}', run[0]))}]", text)


def thumbnail(source: Any) -> str:
    """A small JPEG as a data URI."""
    image = open_image(source)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return data_uri(image, "JPEG", QUALITY)

"""Held-out images with their questions, what was expected and what each network answered, small enough for one page."""

from __future__ import annotations

import base64
import dataclasses
import io
import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

from PIL import Image

from data.images import open_image
from finetune.report.run_data import Arm

SIDE, QUALITY = 224, 72  # pixels of the longer side, JPEG
MOST_IMAGES, MOST_BYTES = 500, 3_600_000  # of one page, which stays below 5 MB


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question: what was expected, with how often each answer was given, and each arm's line of answers.jsonl."""

    question: str
    answer_type: str
    expected: list[tuple[str, int]]
    answers: dict[str, dict[str, Any]]
    outcome: str
    """Of the last arm: "right" from a score of 50 percent on, else "wrong"."""
    is_changed: bool
    """Whether the first and the last arm answer differently."""


@dataclasses.dataclass(frozen=True)
class Card:
    """An image as a data URI, and its questions."""

    image: str
    questions: list[Asked]


def cards_of(arms: Mapping[str, Arm], images: Mapping[str, Any], seed: int = 0) -> list[Card]:
    """Images drawn at random, those with a wrong answer first, then those with a changed one, until a page is full.
    An image that can no longer be opened is left out.

    Args:
        arms: in the order in which they are shown, the last one is what the page is about.
        images: by image id, in any form that `open_image` takes.
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
        try:
            image = thumbnail(images[name])
        except ValueError:
            continue
        if (size := size + len(image)) > MOST_BYTES:
            break
        cards.append(Card(image, questions[name]))
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


def thumbnail(source: Any) -> str:
    """A small JPEG as a data URI."""
    image = open_image(source)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()

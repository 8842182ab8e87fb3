"""How good the boxes are that a network writes: COCO's mean average precision, and precision, recall and F1.

Average precision is computed by pycocotools, the evaluation program of COCO (arXiv 1405.0312): the mean over ten IoU
thresholds from 0.5 to 0.95, or at 0.5 alone, over the categories that are expected somewhere, of at most 100 boxes of a
category in an image, of any size. It ranks boxes by a score: the geometric mean of the probabilities of a box's own
tokens where these are known, else of all tokens of its answer.

Precision, recall and F1 are those of all boxes together that a network writes, whatever their score: a box is right
where pycocotools matches it at IoU 0.5 to an expected box of the same label in the same image, each to one. A box whose
label is expected nowhere, or that has none, is wrong here, and no part of the average precision.

IoU is taken between locations, without the size of the image: a scale of its own for each axis leaves it as it is. Not
here: reading boxes from a text (data/boxes.py), producing answers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data.boxes import WrittenBox, read_boxes

if TYPE_CHECKING:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

MOST = 100  # boxes of a category in an image that count, those with the highest scores: COCO's own limit
AT_50 = 0  # of the ten thresholds, 0.5


class AnsweredBoxes(NamedTuple):
    """A text that a network wrote, with the mean log-probability of its tokens, `<eos>` included.

    tokens: each one's text and log-probability, where known; joined they are the text, and may end in `<eos>`.
    """

    text: str
    log_prob: float
    tokens: Sequence[tuple[str, float]] | None = None


class ScoredBox(NamedTuple):
    """A box that a network wrote, and its score from 0 to 1."""

    box: WrittenBox
    score: float


@dataclasses.dataclass(frozen=True)
class DetectionScore:
    """Figures in percent, unrounded; None where nothing is expected, or nothing found, that they could be about."""

    map: float | None
    """Mean average precision at IoU 0.5 to 0.95."""
    map_50: float | None
    """Mean average precision at IoU 0.5."""
    precision: float | None
    """Share of the answered boxes that are right, at IoU 0.5."""
    recall: float | None
    """Share of the expected boxes that are found, at IoU 0.5."""
    f1: float | None
    by_category: dict[str, float]
    """Average precision at IoU 0.5 to 0.95 of each label."""
    images: int
    expected: int
    """Boxes that are expected."""
    answered: int
    """Boxes that the network wrote."""
    incomplete: int
    """Runs of more or fewer than four locations in the answers: no boxes."""
    empty: int
    """Boxes inside out or without area in the answers, which count for nothing either."""


def score_boxes(expected: Mapping[str, str], answered: Mapping[str, AnsweredBoxes]) -> DetectionScore:
    """Score what a network wrote about each image against the text that is right, by the id of a record.

    Raises:
        ValueError: the ids differ; an expected text has locations that are no box; pycocotools is missing.
    """
    if expected.keys() != answered.keys():
        missing, surplus = expected.keys() - answered.keys(), answered.keys() - expected.keys()
        named = ", ".join(map(repr, sorted(missing | surplus)[:3]))
        raise ValueError(f"{len(missing)} ids were not answered and {len(surplus)} not expected, such as {named}")
    right = {id: _expected(id, text) for id, text in expected.items()}
    written = {id: scored_boxes(answer) for id, answer in answered.items()}
    readings = [read_boxes(answer.text) for answer in answered.values()]
    evaluator, labels = _evaluated(right, written)
    count, found = (sum(map(len, boxes.values())) for boxes in (right, written))
    matched = sum(int(np.count_nonzero(image["dtMatches"][AT_50])) for image in evaluator.evalImgs if image)
    precision = evaluator.eval["precision"][:, :, :, 0, 0] if labels else np.zeros((1, 1, 1))  # [IoU, recall, category]
    return DetectionScore(
        map=_percent(precision.mean(), len(labels)),
        map_50=_percent(precision[AT_50].mean(), len(labels)),
        precision=_percent(matched / max(found, 1), found),
        recall=_percent(matched / max(count, 1), count),
        f1=_percent(2 * matched / max(found + count, 1), found + count),
        by_category={label: 100 * float(precision[:, :, k].mean()) for k, label in enumerate(labels)},
        images=len(expected),
        expected=count,
        answered=found,
        incomplete=sum(reading.incomplete for reading in readings),
        empty=sum(reading.empty for reading in readings),
    )


def scored_boxes(answer: AnsweredBoxes) -> list[ScoredBox]:
    """The boxes of an answer, each with its score."""
    boxes = read_boxes(answer.text).boxes
    scores = [math.exp(answer.log_prob)] * len(boxes)
    if answer.tokens:
        joined = read_boxes("".join(text for text, _ in answer.tokens)).boxes
        if len(joined) == len(boxes):  # else the tokens are of another text
            scores = [math.exp(statistics.fmean(_log_probs(box, answer.tokens))) for box in joined]
    return [ScoredBox(box, score) for box, score in zip(boxes, scores, strict=True)]


def _log_probs(box: WrittenBox, tokens: Sequence[tuple[str, float]]) -> Iterator[float]:
    """Of the tokens of which some part stands in the box."""
    for (text, log_prob), end in zip(tokens, accumulate(len(text) for text, _ in tokens), strict=True):
        if end > box.start and end - len(text) < box.end:
            yield log_prob


def _expected(id: str, text: str) -> list[WrittenBox]:
    boxes, incomplete, empty = read_boxes(text)
    if incomplete or empty or not all(box.label for box in boxes):
        raise ValueError(f"the expected text of {id!r} has a box that is none, or has no label: {text!r:.200}; fix it")
    return boxes


def _evaluated(
    expected: Mapping[str, Sequence[WrittenBox]], answered: Mapping[str, Sequence[ScoredBox]]
) -> tuple[COCOeval, list[str]]:
    """COCO's evaluation program after its work, and the labels in the order of its categories."""
    try:
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ValueError(
            "scoring boxes needs pycocotools: pip install 'pycocotools>=2.0.8,<3', or pip install --editable "
            "'.[detection]' in the checkout"
        ) from error
    labels = sorted({box.label for boxes in expected.values() for box in boxes})
    category = {label: k for k, label in enumerate(labels, start=1)}
    right = [(i, box, 1.0) for i, boxes in enumerate(expected.values(), start=1) for box in boxes]
    written = [(i, *scored) for i, id in enumerate(expected, start=1) for scored in answered[id]]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        evaluator = COCOeval(_coco(len(expected), right, category), _coco(len(expected), written, category), "bbox")
        evaluator.params.maxDets = [MOST]
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, math.inf]], ["all"]
        if labels:
            evaluator.evaluate()
            evaluator.accumulate()
    return evaluator, labels


def _coco(images: int, boxes: Sequence[tuple[int, WrittenBox, float]], category: Mapping[str, int]) -> COCO:
    """Boxes, each with the number of its image and a score, as pycocotools holds them. All numbers begin with 1: it
    takes a match with number 0 for none.
    """
    from pycocotools.coco import COCO

    annotations: list[dict[str, Any]] = []
    for image, box, score in boxes:
        if box.label not in category:
            continue
        top, left, bottom, right = box.corners
        height, width = bottom - top, right - left
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": image,
                "category_id": category[box.label],
                "bbox": [left, top, width, height],
                "area": width * height,
                "iscrowd": 0,
                "score": score,
            }
        )
    held = COCO()
    held.dataset = {
        "images": [{"id": number} for number in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": number, "name": label} for label, number in category.items()],
    }
    held.createIndex()
    return held


def _percent(share: float, of: int) -> float | None:
    return 100 * float(share) if of else None

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
from collections.abc import Hashable, Iterator, Mapping, Sequence
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
    f1_by_id: dict[str, float]
    """F1 of the boxes of each answer, at IoU 0.5, by the id of its record; 100 where none is expected nor given."""
    interval: tuple[float, float] | None
    """95% confidence interval of `map`; None where it is None, or was not asked for."""


def score_boxes(
    expected: Mapping[str, str],
    answered: Mapping[str, AnsweredBoxes],
    images: Mapping[str, Hashable] | None = None,
    resamples: int = 0,
) -> DetectionScore:
    """Score what a network wrote about each image against the text that is right, by the id of a record.

    The interval is by bootstrap: images are drawn with replacement, as many as there are, by a fixed seed; its bounds
    are the percentiles 2.5 and 97.5 of the mean average precision of so many draws. Boxes are matched once, so a draw
    of 500 images takes about 5 ms with five labels, 70 ms with 80. How much a single image varies is not known: 0 to
    100.
    Where all images are answered alike, as where no box is right, nothing varies, and the interval has no width.

    Args:
        images: of each record by its id, where several may be about one image; these are drawn together.
        resamples: draws for the interval; 0: none.

    Raises:
        ValueError: the ids differ; an expected text has locations that are no box; pycocotools is missing.
    """
    if expected.keys() != answered.keys():
        missing, surplus = expected.keys() - answered.keys(), answered.keys() - expected.keys()
        named = ", ".join(map(repr, sorted(missing | surplus)[:3]))
        raise ValueError(f"{len(missing)} ids were not answered and {len(surplus)} not expected, such as {named}")
    right = {id: expected_boxes(id, text) for id, text in expected.items()}
    written = {id: scored_boxes(answer) for id, answer in answered.items()}
    readings = [read_boxes(answer.text) for answer in answered.values()]
    evaluator, labels = _evaluated(right, written)
    count, found = (sum(map(len, boxes.values())) for boxes in (right, written))
    matches = _matches(evaluator, len(expected))
    precision = evaluator.eval["precision"][:, :, :, 0, 0] if labels else np.zeros((1, 1, 1))  # [IoU, recall, category]
    matched = sum(matches)
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
        f1_by_id={
            id: 200 * hits / total if (total := len(right[id]) + len(written[id])) else 100.0
            for id, hits in zip(expected, matches, strict=True)
        },
        interval=_interval(evaluator, [(images or {}).get(id, id) for id in expected], resamples) if labels else None,
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


def expected_boxes(id: str, text: str) -> list[WrittenBox]:
    """The boxes of a right answer. ValueError where it has locations that are no box, or a box without a label."""
    boxes, incomplete, empty = read_boxes(text)
    if incomplete or empty or not all(box.label for box in boxes):
        raise ValueError(f"the expected text of {id!r} has a box that is none, or has no label: {text!r:.200}; fix it")
    return boxes


def _evaluated(
    expected: Mapping[str, Sequence[WrittenBox]], answered: Mapping[str, Sequence[ScoredBox]]
) -> tuple[COCOeval, list[str]]:
    """COCO's evaluation program after its work, and the labels in the order of its categories."""
    labels = sorted({box.label for boxes in expected.values() for box in boxes})
    category = {label: k for k, label in enumerate(labels, start=1)}
    right = [(i, box, 1.0) for i, boxes in enumerate(expected.values(), start=1) for box in boxes]
    written = [(i, *scored) for i, id in enumerate(expected, start=1) for scored in answered[id]]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        evaluator = program()(_coco(len(expected), right, category), _coco(len(expected), written, category), "bbox")
        evaluator.params.maxDets = [MOST]
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, math.inf]], ["all"]
        if labels:
            evaluator.evaluate()
            evaluator.accumulate()
    return evaluator, labels


def program() -> type[COCOeval]:
    """COCO's evaluation program. ValueError where it is not installed."""
    try:
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ValueError(
            "scoring boxes needs pycocotools: pip install 'pycocotools>=2.0.8,<3', or pip install --editable "
            "'.[detection]' in the checkout; or judge answers by another task (data.validation.task)"
        ) from error
    return COCOeval


def _matches(evaluator: COCOeval, records: int) -> list[int]:
    """How many boxes of each answer are right at IoU 0.5. The program has what it matched by category, then record."""
    hits = [0] * records
    for place, matched in enumerate(evaluator.evalImgs):
        if matched:
            hits[place % records] += int(np.count_nonzero(matched["dtMatches"][AT_50]))
    return hits


def _interval(evaluator: COCOeval, images: Sequence[Hashable], resamples: int) -> tuple[float, float] | None:
    """See `score_boxes`. images: of each record, in the program's order.

    The program reads what it matched by position, and how many records there are from its list of their numbers, so it
    accumulates whatever stands there; a category that is expected nowhere in a draw is no part of its mean.
    """
    records: dict[Hashable, list[int]] = {}
    for position, image in enumerate(images):
        records.setdefault(image, []).append(position)
    if resamples == 0:
        return None
    if len(records) == 1:
        return 0.0, 100.0
    groups, matched, draw = list(records.values()), evaluator.evalImgs, np.random.default_rng(0)
    means = []
    for _ in range(resamples):
        drawn = [position for group in draw.integers(len(groups), size=len(groups)) for position in groups[group]]
        firsts = range(0, len(matched), len(images))  # of the categories
        evaluator.evalImgs = [matched[first + position] for first in firsts for position in drawn]
        evaluator.params.imgIds = evaluator._paramsEval.imgIds = list(range(len(drawn)))
        with contextlib.redirect_stdout(io.StringIO()):
            evaluator.accumulate()
        precision = evaluator.eval["precision"]
        if (is_expected := precision > -1).any():
            means.append(100 * float(precision[is_expected].mean()))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


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

"""The task detect: boxes with labels, judged by COCO's mean average precision (detection.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from finetune.evaluation.answer import Answer
from finetune.evaluation.detection import AnsweredBoxes, expected_boxes, program, score_boxes
from finetune.evaluation.score import PERCENT, Score, cluster_of, count_images, require_answered

RESAMPLES = 300  # of the images, for the interval


@dataclasses.dataclass(frozen=True)
class DetectTask:
    """Boxes in images. The right answer of a record is the text of all its boxes; each record is an image of its own to
    COCO's program, also where several ask about one image.
    """

    name: str = "detect"
    key: str = "map"
    metric: str = "mAP at IoU 0.5:0.95"
    unit: str = PERCENT

    def require(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        """See `Task.require`: pycocotools, and one readable text a record, some of them with boxes."""
        program()
        boxes = [len(expected_boxes(record["id"], right_text(record))) for record in records]
        if boxes and not any(boxes):
            raise ValueError(
                f"none of the {len(boxes):,} records to be scored has a box in its right answer, such as "
                "<loc0256><loc0256><loc0768><loc0768> cat: judge them by another task (data.validation.task, --task), "
                "or evaluate on images with boxes"
            )

    def value(self, answer: str, record: Mapping[str, Any]) -> float:
        """F1 of the boxes of one answer at IoU 0.5, 0 to 1; 1 where none is expected nor given."""
        id = record["id"]
        found = score_boxes({id: right_text(record)}, {id: AnsweredBoxes(answer, 0.0)})
        return found.f1_by_id[id] / 100

    def score(self, answers: Mapping[str, Answer], records: Iterable[Mapping[str, Any]]) -> Score:
        """See `Task.score`. The value of an answer is the F1 of its boxes at IoU 0.5. The interval is by bootstrap
        (`score_boxes`): images are drawn again, the network's answers stay. Types of answers are not told apart.
        """
        records = list(records)
        require_answered(answers, records)
        self.require(records)
        written = {
            id: AnsweredBoxes(answer.text, answer.log_prob, answer.tokens or None) for id, answer in answers.items()
        }
        images = {record["id"]: cluster_of(record) for record in records}
        found = score_boxes({record["id"]: right_text(record) for record in records}, written, images, RESAMPLES)
        assert found.map is not None, "`require` has found boxes"
        assert found.interval is not None, "there are resamples"
        figures = {
            "mAP at 0.5": found.map_50,
            "precision": found.precision,
            "recall": found.recall,
            "F1": found.f1,
        }
        return Score(
            metric=self.metric,
            overall=found.map,
            interval=found.interval,
            questions=len(records),
            images=count_images(images.values()),
            by_answer_type={},
            by_question_type={},
            counts={"answer_type": {}, "question_type": {}},
            others={name: value for name, value in figures.items() if value is not None},
            by_label=found.by_category,
            label_metric="average precision",
            values=found.f1_by_id,
        )


def right_text(record: Mapping[str, Any]) -> str:
    """The text of a record's boxes. ValueError where it has several that differ."""
    texts = list(dict.fromkeys(record["answers"]))
    if len(texts) != 1:
        raise ValueError(
            f"the record {record['id']!r} has {len(texts)} different right answers, and boxes are scored against one: "
            "write all boxes of an image into one suffix"
        )
    return str(texts[0])

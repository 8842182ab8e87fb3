"""The task detect: figures of the scored boxes, values of single answers, and what is refused."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest

from finetune.evaluation import detection_task
from finetune.evaluation.answer import Answer, texts_alone
from finetune.evaluation.detection import AnsweredBoxes, score_boxes
from finetune.evaluation.detection_task import DetectTask

TASK = DetectTask()
CAT, OTHER_CAT = "<loc0000><loc0000><loc0100><loc0100> cat", "<loc0000><loc0500><loc0100><loc0600> cat"
DOG = "<loc0500><loc0000><loc0600><loc0100> dog"


def record(id: str, *answers: str, image: str = "") -> dict[str, Any]:
    return {"id": id, "answers": answers, "image_id": image or id, "answer_type": "", "question_type": ""}


def test_an_answer_is_worth_the_f1_of_its_boxes() -> None:
    right = {"3": "", "1": f"{CAT} ; {OTHER_CAT}", "2": DOG, "4": "", "5": DOG}
    texts = {"1": CAT, "2": f"{CAT} ; {DOG}", "3": "", "4": "<loc0000><loc0000><loc0100><loc0100> cow", "5": "nothing"}
    found = TASK.score(texts_alone(texts), [record(id, text) for id, text in right.items()])
    assert found.values == pytest.approx({"1": 200 / 3, "2": 200 / 3, "3": 100, "4": 0, "5": 0})
    alone = {id: 100 * TASK.value(text, record(id, right[id])) for id, text in texts.items()}
    assert alone == pytest.approx(found.values), "by itself as among others"
    whole = score_boxes(right, {id: AnsweredBoxes(text, 0.0) for id, text in texts.items()})
    assert found.overall == whole.map
    assert found.by_label == whole.by_category
    assert found.label_metric == "average precision"
    assert found.others == {
        "mAP at 0.5": whole.map_50,
        "precision": whole.precision,
        "recall": whole.recall,
        "F1": whole.f1,
    }
    assert found.others["precision"] == pytest.approx(50)  # cat, dog; a second cat, and a cow
    assert (found.questions, found.images, found.unit) == (5, 5, "percent")


def test_where_nothing_is_answered_there_is_no_precision() -> None:
    found = TASK.score(texts_alone({"1": "", "2": ""}), [record("1", CAT), record("2", DOG)])
    assert found.overall == 0
    assert list(found.others) == ["mAP at 0.5", "recall", "F1"]


def test_boxes_are_ranked_by_their_own_tokens() -> None:
    """The surer of two boxes is wrong, which costs precision; by the tokens of the whole answer both were as sure."""
    text = f"{CAT} ; {OTHER_CAT}"
    pieces = tuple(
        (piece, -3.0 if k < 5 else -0.1) for k, piece in enumerate(re.findall(r"<loc\d{4}>| [a-z]+| ;|.", text))
    )
    assert "".join(piece for piece, _ in pieces) == text
    right = [record("1", CAT), record("2", "")]
    sure = TASK.score({"1": Answer(text, True, -1.5, pieces), "2": Answer("", True, 0.0)}, right)
    assert sure.others["mAP at 0.5"] == pytest.approx(50)
    assert TASK.score(texts_alone({"1": text, "2": ""}), right).others["mAP at 0.5"] == pytest.approx(100)


def test_the_interval_draws_whole_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of one image stay together: with two images of many records each, half of the draws have one of them."""
    monkeypatch.setattr(detection_task, "RESAMPLES", 200)
    right = [record(str(k), CAT, image="ab"[k % 2]) for k in range(20)]
    texts = {str(k): CAT if k % 2 else "" for k in range(20)}  # all of image b, none of a
    together = TASK.score(texts_alone(texts), right)
    assert together.images == 2
    assert together.interval == pytest.approx((0, 100))
    apart = TASK.score(texts_alone(texts), [one | {"image_id": one["id"]} for one in right])
    assert 20 < apart.interval[0] < together.overall < apart.interval[1] < 80
    assert apart.interval == TASK.score(texts_alone(texts), [one | {"image_id": one["id"]} for one in right]).interval


def test_what_cannot_be_scored_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="none of the 2 records to be scored has a box in its right answer, such as"):
        TASK.require([record("1", "a dog"), record("2", "")])
    with pytest.raises(ValueError, match=r"record '1' has 2 different right answers.*write all boxes of an image"):
        TASK.require([record("1", CAT, DOG)])
    with pytest.raises(ValueError, match="the expected text of '2' has a box that is none, or has no label"):
        TASK.require([record("1", CAT), record("2", "<loc0001> cat")])
    with pytest.raises(ValueError, match="question '1' has no annotated answers"):
        TASK.score(texts_alone({"1": CAT}), [record("1")])
    TASK.require()
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    with pytest.raises(ValueError, match=r"needs pycocotools: pip install .*\[detection\].*data\.validation\.task"):
        TASK.require()

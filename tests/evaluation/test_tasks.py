"""Each task's metric against a literal restatement, or figures worked out by hand."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

import evaluate
from finetune.config.source import Source
from finetune.evaluation.answer import texts_alone
from finetune.evaluation.task_choice import task_of_source
from finetune.evaluation.tasks import TASKS, anls, edits, f1_by_label, is_about_right, task_named


def record(*answers: str, id: str = "1", equally_right: bool = True) -> dict[str, Any]:
    return {"id": id, "answers": answers, "equally_right": equally_right, "answer_type": "", "question_type": ""}


@pytest.mark.parametrize(
    ("answer", "answers", "right", "exact"),
    [
        ("a red circle", ["Red circle."], 1, 0),
        ("Two", ["2"], 1, 0),
        ("2", ["digit seven", "2"], 1, 1),
        (" 2\n", ["2"], 1, 1),
        ("3", ["2"], 0, 0),
        ("", [""], 1, 1),
    ],
)
def test_an_answer_is_right_by_vqas_text_rules_and_exact_by_its_characters(
    answer: str, answers: list[str], right: int, exact: int
) -> None:
    found = TASKS["answer"].score(texts_alone({"1": answer}), [record(*answers)])
    assert (found.overall, found.others) == (100 * right, {"exact match": 100 * exact})
    assert found.metric == "accuracy"


def test_official_files_are_scored_as_vqa_is_and_all_others_by_right_and_wrong() -> None:
    assert task_named("auto", official=True) is TASKS["vqa"]
    assert task_named("auto", official=False) is TASKS["answer"]
    assert task_named("document", official=True) is TASKS["document"]


@pytest.mark.parametrize(("key", "value", "task"), [("bbox", [0, 0, 2, 2], "detect"), ("caption", "a dog", "caption")])
def test_cocos_boxes_and_captions_are_judged_as_such(tmp_path: Path, key: str, value: object, task: str) -> None:
    file = tmp_path / "coco.json"
    file.write_text(json.dumps({"images": [{"id": 1}], "annotations": [{"image_id": 1, key: value}]}))
    assert task_of_source(Source(coco=str(file))) is TASKS[task]
    assert task_of_source(Source(coco=str(file), task="answer")) is TASKS["answer"]
    assert task_of_source(Source(jsonl=str(file))) is TASKS["answer"]


def test_a_configuration_and_evaluate_py_name_every_task() -> None:
    named = {"auto", *TASKS}
    assert set(get_args(Source.model_fields["task"].annotation)) == set(evaluate.TASKS) == named


def distance(one: str, other: str) -> int:
    """Levenshtein's distance as it is defined."""

    @cache
    def upto(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        replaced = upto(i - 1, j - 1) + (one[i - 1] != other[j - 1])
        return min(upto(i - 1, j) + 1, upto(i, j - 1) + 1, replaced)

    return upto(len(one), len(other))


@given(st.text("abc", max_size=8), st.text("abc", max_size=8))
def test_edits_are_levenshteins(one: str, other: str) -> None:
    assert edits(one, other) == distance(one, other)


@pytest.mark.parametrize(
    ("answer", "answers", "value"),
    [
        ("Invoice 12", ["invoice 12"], 1.0),
        ("invoice 13", ["invoice 12"], 0.9),
        ("invoice 13", ["bill", "Invoice  12"], 0.9),  # the nearest counts
        ("abcd", ["abxy"], 0.0),  # half of it differs
        ("abcde", ["abcxy"], 0.6),
        ("", ["x"], 0.0),
        ("", [""], 1.0),
    ],
)
def test_anls(answer: str, answers: list[str], value: float) -> None:
    assert anls(answer, record(*answers)) == pytest.approx(value)


@pytest.mark.parametrize(
    ("answer", "answers", "right"),
    [
        ("105", ["100"], True),
        ("94.9", ["100"], False),
        ("-95", ["-100"], True),
        ("12%", ["0.12"], True),
        ("12", ["12%"], False),
        ("0.0", ["0"], False),  # by text where the right one is zero
        ("Blue", ["blue"], True),
        ("1.2.3", ["1.2.3"], True),
        ("about 100", ["100"], False),
        ("7", ["red", "7.2"], True),
    ],
)
def test_relaxed_accuracy(answer: str, answers: list[str], right: bool) -> None:
    assert is_about_right(answer, record(*answers)) == right


def test_f1_by_label_and_their_mean() -> None:
    """Against precision and recall, label by label."""
    rng, labels = random.Random(0), ["cat", "dog", "cow"]
    expected = [rng.choice(labels) for _ in range(200)]
    answers = [rng.choice([*labels, "no idea", right, right]) for right in expected]
    scores = {}
    for label in labels:
        both = sum(answer == right == label for answer, right in zip(answers, expected, strict=True))
        precision, recall = both / answers.count(label), both / expected.count(label)
        scores[label] = 2 * precision * recall / (precision + recall)
    assert f1_by_label(answers, [record(right) for right in expected]) == pytest.approx(scores)
    assert f1_by_label(["x"], [record("cat")]) == {"cat": 0}
    records = [record(right, id=str(number)) for number, right in enumerate(expected)]
    found = TASKS["classify"].score(texts_alone({str(k): text for k, text in enumerate(answers)}), records)
    assert found.by_label == pytest.approx({label: 100 * value for label, value in scores.items()})
    assert found.others["macro F1"] == pytest.approx(100 * sum(scores.values()) / 3)
    assert found.to_dict()["by_label"] == {label: round(100 * value, 2) for label, value in scores.items()}


def test_every_task_scores_a_data_set_and_says_by_what() -> None:
    records = [record("12", id=str(number)) | {"answer_type": "number"} for number in range(4)]
    answers = texts_alone({"0": "12", "1": "12.", "2": "12.3", "3": "red"})
    of_texts = {name: task for name, task in TASKS.items() if name not in ("detect", "caption")}
    found = {name: task.score(answers, records) for name, task in of_texts.items()}
    assert {name: score.overall for name, score in found.items()} == {
        "vqa": 25.0,
        "answer": 50.0,
        "classify": 50.0,
        "document": pytest.approx(100 * (1 + 2 / 3 + 0) / 4),
        "chart": 75.0,
    }
    for name, score in found.items():
        assert score.by_answer_type == {"number": score.overall}
        figures = score.to_dict()
        assert (figures["metric"], figures["unit"], "values" in figures) == (TASKS[name].metric, "percent", False)
        assert score.values.keys() == answers.keys()
    assert found["document"].values == pytest.approx({"0": 100, "1": 200 / 3, "2": 0, "3": 0}, abs=34)

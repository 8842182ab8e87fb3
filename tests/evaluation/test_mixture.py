"""A mixture is judged source by source, each by its own task."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from finetune.evaluation.answer import texts_alone
from finetune.evaluation.mixture import MixtureTask, figures, geometric_mean
from finetune.evaluation.table import score_table
from finetune.evaluation.tasks import TASKS

MIXTURE = MixtureTask({"ask": TASKS["answer"], "read": TASKS["document"]})


def record(id: str, right: str, answer_type: str = "") -> dict[str, Any]:
    return {"id": id, "answers": [right], "image_id": id, "answer_type": answer_type, "question_type": ""}


RECORDS = [
    record("ask/1", "yes", "yes/no"),
    record("read/1", "abcd"),
    record("ask/2", "no", "yes/no"),
    record("read/2", "efgh"),
]
ANSWERS = texts_alone({"ask/1": "Yes.", "ask/2": "maybe", "read/1": "abcx", "read/2": "efgh"})


def test_each_source_is_scored_by_its_task_and_the_metric_is_their_geometric_mean() -> None:
    score = MIXTURE.score(ANSWERS, RECORDS)
    ask, read = score.by_source["ask"], score.by_source["read"]
    assert (ask.metric, ask.overall) == ("accuracy", 50.0)
    assert (read.metric, read.overall) == ("ANLS", 87.5)
    assert score.overall == pytest.approx((50.0 * 87.5) ** 0.5)
    assert score.metric == "geometric mean of accuracy (ask) and ANLS (read)"
    assert (score.questions, score.images) == (4, 4)
    assert score.values == {"ask/1": 100.0, "ask/2": 0.0, "read/1": 75.0, "read/2": 100.0}
    alone = TASKS["answer"].score({id: ANSWERS[id] for id in ("ask/1", "ask/2")}, [RECORDS[0], RECORDS[2]])
    assert ask == alone


def test_its_interval_is_that_of_a_mean_of_independent_figures() -> None:
    score = MIXTURE.score(ANSWERS, RECORDS)
    halves = [(of.interval[1] - of.interval[0]) / 2 / of.overall for of in score.by_source.values()]
    half = score.overall * (halves[0] ** 2 + halves[1] ** 2) ** 0.5 / 2
    assert score.interval == pytest.approx((score.overall - half, score.overall + half))


def test_units_do_not_decide_which_step_is_better() -> None:
    """A tenth more of captions and a fifth less of questions is worse, though the captions' figures are larger."""

    def mean_of(*overalls: float) -> float:
        alone = MIXTURE.score(ANSWERS, RECORDS).by_source["ask"]
        mean, _ = geometric_mean([dataclasses.replace(alone, overall=value) for value in overalls])
        return mean

    assert mean_of(50.0, 800.0) > mean_of(40.0, 880.0)
    assert (50.0 + 800.0) / 2 < (40.0 + 880.0) / 2
    assert mean_of(0.0, 880.0) == 0.0


def test_metrics_name_every_source_with_its_own_key() -> None:
    found = figures(MIXTURE, MIXTURE.score(ANSWERS, RECORDS))
    assert found == {
        "mean_of_sources": pytest.approx((50.0 * 87.5) ** 0.5),
        "ask_accuracy": 50.0,
        "ask_accuracy_yes/no": 50.0,
        "read_anls": 87.5,
    }
    assert figures(TASKS["answer"], MIXTURE.score(ANSWERS, RECORDS).by_source["ask"]) == {
        "accuracy": 50.0,
        "accuracy_yes/no": 50.0,
    }


def test_a_source_without_a_question_among_those_asked_is_left_out() -> None:
    some = {id: answer for id, answer in ANSWERS.items() if id.startswith("ask")}
    score = MIXTURE.score(some, [RECORDS[0], RECORDS[2]])
    assert list(score.by_source) == ["ask"]
    assert score.overall == 50.0


def test_figures_of_all_sources_are_written_and_shown() -> None:
    score = MIXTURE.score(ANSWERS, RECORDS)
    written = score.to_dict()["by_source"]
    assert written["read"]["overall"] == 87.5
    assert "values" not in written["read"]
    columns = [str(column.header) for column in score_table({"adapter": score}).columns]
    assert {"ask: accuracy", "read: ANLS"} <= set(columns)


def test_answers_and_records_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"record 'tell/1' is of no source; expected one of ask, read"):
        MIXTURE.by_source([record("tell/1", "x")])
    with pytest.raises(ValueError, match=r"1 predicted but not asked \('ask/9'\)"):
        MIXTURE.score(ANSWERS | texts_alone({"ask/9": "x"}), RECORDS)
    without = {id: answer for id, answer in ANSWERS.items() if id != "read/2"}
    with pytest.raises(ValueError, match=r"expected one prediction for each of 4 questions: 1 without a prediction"):
        MIXTURE.score(without, RECORDS)

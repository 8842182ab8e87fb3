"""Expected calibration error against its definition, written down literally, and on numbers worked out by hand."""

from __future__ import annotations

import random

import pytest

from finetune.evaluation.answer import Answer, texts_alone
from finetune.evaluation.calibration import BINS, ECE, calibration_bins, expected_calibration_error
from finetune.evaluation.tasks import TASKS


def literal(confidences: list[float], values: list[float]) -> float:
    """Guo et al., section 2: sum over m of |B_m| / n * |acc(B_m) - conf(B_m)|, B_m holding ((m - 1) / M, m / M]."""
    n, error = len(confidences), 0.0
    for m in range(1, 16):
        members = [i for i in range(n) if (m - 1) / 15 < confidences[i] <= m / 15]
        if members:
            accuracy = sum(values[i] for i in members) / len(members)
            confidence = sum(confidences[i] for i in members) / len(members)
            error += len(members) / n * abs(accuracy - confidence)
    return error


def test_it_is_as_defined() -> None:
    rng = random.Random(0)
    confidences = [rng.random() for _ in range(300)] + [m / BINS for m in range(1, BINS + 1)]
    values = [rng.choice([0, 0.3, 0.6, 1]) for _ in confidences]
    found = expected_calibration_error(confidences, values)
    assert found == pytest.approx(literal(confidences, values), abs=1e-12)
    assert found > 0.05


def test_numbers_worked_out_by_hand() -> None:
    """Two answers in one bin, one right: accuracy 0.5, confidence 0.95; one in another: 0, 0.3."""
    assert expected_calibration_error([0.94, 0.96, 0.3], [1, 0, 0]) == pytest.approx((2 * 0.45 + 1 * 0.3) / 3)
    assert expected_calibration_error([1.0, 0.0], [1, 0]) == 0
    assert [tuple(of) for of in calibration_bins([0.2, 0.0, 0.19], [1, 0, 0])] == [(1, 0.0, 0.0), (2, 0.195, 0.5)]


def test_a_score_has_it_where_answers_have_a_confidence() -> None:
    records = [{"id": str(k), "answers": ["yes"], "answer_type": "", "question_type": ""} for k in range(2)]
    chosen = {
        "0": Answer("yes", True, -9.0, candidates=(("yes", 0.9), ("no", 0.1))),
        "1": Answer("no", True, -9.0, candidates=(("no", 0.7), ("yes", 0.3))),
    }
    for task in ("vqa", "answer", "classify", "document", "chart"):
        score = TASKS[task].score
        assert score(chosen, records).others[ECE] == pytest.approx(100 * ((1 - 0.9) + 0.7) / 2), task
        assert ECE not in score(texts_alone({"0": "yes", "1": "no"}), records).others, task

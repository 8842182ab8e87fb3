"""Which label was answered instead of which, and figures by label."""

from __future__ import annotations

from typing import Any

from finetune.report.labels import MOST_LABELS, confusion_matrix, figures_by_label
from finetune.report.run_data import Arm


def arm(*pairs: tuple[str, str], task: str = "classify", **metrics: Any) -> Arm:
    """Answered were pairs of what is right and what was answered."""
    answers = {str(k): {"expected": [right], "answer": given} for k, (right, given) in enumerate(pairs)}
    return Arm("adapter", {"task": task, **metrics}, answers)


def test_rows_are_right_labels_and_columns_answers_by_the_text_rules_of_the_metric() -> None:
    found = confusion_matrix(arm(("cat", "Cat."), ("cat", "a dog"), ("dog", "dog"), ("cat", "cat"), ("dog", "???")))
    assert found is not None
    assert found.columns == ["cat", "dog", "other"]
    assert [(row.label, row.total) for row in found.rows] == [("cat", 3), ("dog", 2)]
    assert [row.cells for row in found.rows] == [[(2, 2 / 3), (1, 1 / 3), (0, 0)], [(0, 0), (1, 1 / 2), (1, 1 / 2)]]
    assert found.left_out == 0


def test_rare_labels_are_one_row_and_in_the_last_column() -> None:
    """Every answer is in the matrix once."""
    pairs = [(f"label {k}", f"label {k + 1}") for k in range(MOST_LABELS + 3) for _ in range(40 - k)]
    found = confusion_matrix(arm(*pairs))
    assert found is not None
    assert found.columns == [*(f"label {k}" for k in range(MOST_LABELS)), "other"]
    assert found.left_out == 3
    assert sum(count for row in found.rows for count, _ in row.cells) == len(pairs)
    last, others = found.rows[MOST_LABELS - 1], found.rows[MOST_LABELS]
    assert (last.label, last.cells[-1]) == (f"label {MOST_LABELS - 1}", (41 - MOST_LABELS, 1.0))
    assert (others.label, others.total) == ("other", sum(40 - k for k in range(MOST_LABELS, MOST_LABELS + 3)))


def test_other_tasks_and_answers_that_are_gone_have_no_matrix() -> None:
    assert confusion_matrix(arm(("cat", "cat"), task="answer")) is None
    assert confusion_matrix(arm()) is None


def test_figures_by_label_begin_with_the_lowest_of_the_last_arm() -> None:
    arms = {"base": arm(by_label={"cat": 1.0, "cow": 2.0}), "adapter": arm(by_label={"dog": 90.0, "cat": 30.0})}
    assert figures_by_label(arms) == [("cat", {"base": 1.0, "adapter": 30.0}), ("dog", {"adapter": 90.0})]
    assert figures_by_label({}) == []

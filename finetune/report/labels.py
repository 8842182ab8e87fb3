"""How well each label is answered: a metric of each, and which label was answered instead of which."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

from finetune.evaluation.vqa_accuracy import normalize_answer
from finetune.report.run_data import Arm

MOST_LABELS = 20  # of the matrix
MOST_FIGURES = 100  # of the table with a figure for each label
OTHER = "other"


@dataclasses.dataclass(frozen=True)
class ConfusionRow:
    """An expected label, how often it was expected, and for each column how often that was answered, and as a share."""

    label: str
    total: int
    cells: list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class ConfusionMatrix:
    """Rows are what was expected, columns what was answered, by the same labels, the most frequent first.

    Labels beyond MOST_LABELS are one row, and one column together with answers that are no label; `left_out` says how
    many labels those are.
    """

    columns: list[str]
    rows: list[ConfusionRow]
    left_out: int


def confusion_matrix(arm: Arm) -> ConfusionMatrix | None:
    """Of the answers of an arm, by VQA's text rules, as they are judged; None where there are none, or where they are
    no labels.
    """
    if arm.task != "classify" or not arm.answers:
        return None
    pairs = Counter(
        (normalize_answer(line["expected"][0]), normalize_answer(line["answer"])) for line in arm.answers.values()
    )
    expected: Counter[str] = Counter()
    for (label, _), count in pairs.items():
        expected[label] += count
    labels = [label for label, _ in expected.most_common(MOST_LABELS)]
    counts: Counter[tuple[int, int]] = Counter()
    place = {label: k for k, label in enumerate(labels)}
    last = len(labels)  # of what is none of them
    for (label, answer), count in pairs.items():
        counts[place.get(label, last), place.get(answer, last)] += count
    rows = []
    for k, label in enumerate([*labels, OTHER]):
        found = [counts[k, column] for column in range(last + 1)]
        if total := sum(found):
            rows.append(ConfusionRow(label, total, [(count, count / total) for count in found]))
    return ConfusionMatrix([*labels, OTHER], rows, len(expected) - len(labels))


def figures_by_label(arms: Mapping[str, Arm]) -> list[tuple[str, dict[str, float]]]:
    """Each label with its figure by arm, in percent; the last arm's labels, the lowest figure first."""
    if not arms:
        return []
    *_, last = arms.values()
    labels = sorted(last.by_label, key=lambda label: (last.by_label[label], label))
    return [
        (label, {name: arm.by_label[label] for name, arm in arms.items() if label in arm.by_label}) for label in labels
    ]

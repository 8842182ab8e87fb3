"""What answers are judged by: a task has one metric, by which steps of a run are compared, and perhaps others too.

A configuration names the task of its validation examples (`data.validation.task`); by default official VQA files are
scored as VQA is, COCO's boxes and captions as such, everything else by whether the answer is right (`answer`). Here are
the metrics of answers that are right or wrong, or nearly right; not here: the official VQA accuracy (vqa_accuracy.py),
boxes (detection_task.py), captions (captions.py).
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

from finetune.evaluation.answer import Answer
from finetune.evaluation.calibration import ECE, expected_calibration_error
from finetune.evaluation.captions import CaptionTask
from finetune.evaluation.detection_task import DetectTask
from finetune.evaluation.score import PERCENT, Score, mean_score, require_answered
from finetune.evaluation.vqa_accuracy import normalize_answer, strip_answer, vqa_accuracy

Record = Mapping[str, Any]
Value = Callable[[str, Record], float]  # (answer, record) -> how good it is, 0 to 1


class Task(Protocol):
    """One way of judging answers. More is better."""

    @property
    def name(self) -> str:
        """In a configuration."""

    @property
    def key(self) -> str:
        """Of its metric, in metrics.jsonl and result.json."""

    @property
    def metric(self) -> str:
        """In words."""

    @property
    def unit(self) -> str:
        """Of the metric, such as percent."""

    @property
    def value(self) -> Value | None:
        """Of one answer by itself, 0 to 1; None where an answer is worth something among others alone."""

    def require(self, records: Iterable[Record] = ()) -> None:
        """Look, before any answer is made, whether answers to these records can be scored.

        Raises:
            ValueError: a package is missing; or a record has nothing that this task can compare an answer with.
        """

    def score(self, answers: Mapping[str, Answer], records: Iterable[Record]) -> Score:
        """Of one answer per record, by id.

        Raises:
            ValueError: as `require`; the ids of answers and records differ; or there is nothing to score.
        """


@dataclasses.dataclass(frozen=True)
class MeanTask:
    """A task whose metric is the mean of what each answer is worth, 0 to 1. Where answers have a confidence, its
    expected calibration error is among the further metrics.

    Attributes:
        value: of one answer.
        others: further metrics by name: of one answer each, to be averaged.
        labels: F1 of each label, of all answers at once, where answers are labels.
    """

    name: str
    key: str
    metric: str
    value: Value
    others: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    labels: Callable[[Sequence[str], Sequence[Record]], dict[str, float]] | None = None
    unit: str = PERCENT

    def require(self, records: Iterable[Record] = ()) -> None:
        """Nothing: every text can be compared with another one."""

    def score(self, answers: Mapping[str, Answer], records: Iterable[Record]) -> Score:
        """See `Task.score`."""
        records = list(records)
        require_answered(answers, records)
        given = [answers[record["id"]] for record in records]
        texts = [answer.text for answer in given]

        def values(of: Value) -> dict[str, float]:
            return {record["id"]: of(text, record) for text, record in zip(texts, records, strict=True)}

        worth = values(self.value)
        found = mean_score(self.metric, worth, records)
        others = {name: mean_score(name, values(of), records).overall for name, of in self.others.items()}
        if self.labels is not None:
            by_label = {label: 100 * value for label, value in self.labels(texts, records).items()}
            others |= {"macro F1": sum(by_label.values()) / len(by_label)}
            found = dataclasses.replace(found, by_label=by_label, label_metric="F1")
        if all(answer.has_confidence for answer in given):
            confidences = [answer.confidence for answer in given]
            others |= {ECE: 100 * expected_calibration_error(confidences, list(worth.values()))}
        return dataclasses.replace(found, others=others)


def is_vqa_right(answer: str, record: Record) -> float:
    """The official accuracy against annotators' answers; answers that are equally right count 1 each."""
    if record.get("equally_right"):
        return is_exact(answer, record)
    return vqa_accuracy(answer, record["answers"])


def is_exact(answer: str, record: Record) -> float:
    """1 where it is one of the right answers, character by character but for outer spaces."""
    return float(strip_answer(answer) in map(strip_answer, record["answers"]))


def is_right(answer: str, record: Record) -> float:
    """1 where it is one of the right answers after VQA's text rules: case, articles, punctuation, number words."""
    return float(normalize_answer(answer) in map(normalize_answer, record["answers"]))


def anls(answer: str, record: Record) -> float:
    """Average normalised Levenshtein similarity (ST-VQA, arXiv 1905.13648, section 4): 1 minus the edits that turn the
    answer into the nearest right one as a share of the longer text, case apart; 0 where half of it or more differs.
    """
    best = 0.0
    for right in record["answers"]:
        texts = [" ".join(text.lower().split()) for text in (answer, right)]
        longest = max(map(len, texts))
        best = max(best, 1 - edits(*texts) / longest if longest else 1.0)
    return best if best > 0.5 else 0.0


def edits(one: str, other: str) -> int:
    """Levenshtein's distance: how many characters are inserted, deleted or replaced, at least."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, start=1):
        before, row[0] = row[0], i
        for j, right in enumerate(other, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


def is_about_right(answer: str, record: Record) -> float:
    """1 by relaxed accuracy (ChartQA, arXiv 2203.10244, section 5.1): a number may be off by 5%, a text must be equal
    but for case.
    """
    return float(any(about_equal(answer, right) for right in record["answers"]))


def about_equal(answer: str, right: str) -> bool:
    found, wanted = number_in(answer), number_in(right)
    if found is not None and wanted:
        return abs(found - wanted) / abs(wanted) <= 0.05
    return strip_answer(answer).lower() == strip_answer(right).lower()


def number_in(text: str) -> float | None:
    """A text that is a number, perhaps in percent; 12% is 0.12, as in the program that the metric is known by."""
    match = re.fullmatch(r"\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*(%?)\s*", text)
    try:
        return None if match is None else float(match[1]) / (100 if match[2] else 1)
    except ValueError:
        return None


def f1_by_label(answers: Sequence[str], records: Sequence[Record]) -> dict[str, float]:
    """F1 of each label, 2 right / (answered + expected), 0 to 1. Labels are the right answers that occur, by VQA's text
    rules; an answer that is none of them is a miss for its own. Their mean is macro F1.
    """
    right: Counter[str] = Counter()
    answered: Counter[str] = Counter()
    expected: Counter[str] = Counter()
    for answer, record in zip(answers, records, strict=True):
        given, wanted = normalize_answer(answer), normalize_answer(record["answers"][0])
        answered[given] += 1
        expected[wanted] += 1
        right[wanted] += given == wanted
    return {label: 2 * right[label] / (answered[label] + expected[label]) for label in expected}


CLASSIFY = MeanTask("classify", "accuracy", "accuracy", is_right, {"exact match": is_exact}, f1_by_label)
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        MeanTask("vqa", "accuracy", "VQA accuracy", is_vqa_right),
        MeanTask("answer", "accuracy", "accuracy", is_right, {"exact match": is_exact}),
        CLASSIFY,
        MeanTask("document", "anls", "ANLS", anls, {"accuracy": is_right}),
        MeanTask("chart", "accuracy", "relaxed accuracy", is_about_right, {"exact match": is_exact}),
        DetectTask(),
        CaptionTask(),
    )
}


def task_named(name: str, official: bool, contents: Literal["boxes", "captions"] | None = None) -> Task:
    """The task of a configuration's `task`.

    Args:
        official: whether the examples are official VQA files.
        contents: of COCO's JSON, where the examples are that.
    """
    if name == "auto":
        name = "vqa" if official else {"boxes": "detect", "captions": "caption", None: "answer"}[contents]
    return TASKS[name]

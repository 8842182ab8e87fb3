"""What answers are judged by: a task has one metric, by which steps of a run are compared, and perhaps others too.

A configuration names the task of its validation examples (`data.validation.task`); by default official VQA files are
scored as VQA is, everything else by whether the answer is right (`answer`).
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from finetune.evaluation.score import Score, mean_score
from finetune.evaluation.vqa_accuracy import normalize_answer, strip_answer, vqa_accuracy

Record = Mapping[str, Any]
Value = Callable[[str, Record], float]  # (answer, record) -> how good it is, 0 to 1


@dataclasses.dataclass(frozen=True)
class Task:
    """One way of judging answers.

    Attributes:
        name: in a configuration.
        key: of its metric, in metrics.jsonl and result.json.
        metric: in words.
        value: of one answer.
        others: further metrics by name: of one answer each, to be averaged.
        corpus: further metrics by name: of all answers at once.
    """

    name: str
    key: str
    metric: str
    value: Value
    others: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    corpus: Mapping[str, Callable[[Sequence[str], Sequence[Record]], float]] = dataclasses.field(default_factory=dict)

    def score(self, predictions: Mapping[str, str], records: Iterable[Record]) -> Score:
        """Of one prediction per record, by id; raises ValueError as `mean_score` does."""
        records = list(records)
        found = mean_score(self.metric, self.value, predictions, records)
        texts = [predictions[record["id"]] for record in records]
        means = {name: mean_score(name, value, predictions, records).overall for name, value in self.others.items()}
        of_all = {name: 100 * value(texts, records) for name, value in self.corpus.items()}
        return dataclasses.replace(found, others=means | of_all)


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


def macro_f1(answers: Sequence[str], records: Sequence[Record]) -> float:
    """The mean over labels of F1, which takes 2 right / (answered + expected); labels are the right answers that occur,
    and an answer that is none of them is a miss for its own.
    """
    right: Counter[str] = Counter()
    answered: Counter[str] = Counter()
    expected: Counter[str] = Counter()
    for answer, record in zip(answers, records, strict=True):
        given, wanted = normalize_answer(answer), normalize_answer(record["answers"][0])
        answered[given] += 1
        expected[wanted] += 1
        right[wanted] += given == wanted
    return sum(2 * right[label] / (answered[label] + expected[label]) for label in expected) / len(expected)


TASKS = {
    task.name: task
    for task in (
        Task("vqa", "accuracy", "VQA accuracy", is_vqa_right),
        Task("answer", "accuracy", "accuracy", is_right, {"exact match": is_exact}),
        Task("classify", "accuracy", "accuracy", is_right, {"exact match": is_exact}, {"macro F1": macro_f1}),
        Task("document", "anls", "ANLS", anls, {"accuracy": is_right}),
        Task("chart", "accuracy", "relaxed accuracy", is_about_right, {"exact match": is_exact}),
    )
}


def task_named(name: str, official: bool) -> Task:
    """The task of a configuration's `task`. official: whether the examples are official VQA files."""
    return TASKS[("vqa" if official else "answer") if name == "auto" else name]

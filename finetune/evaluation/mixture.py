"""Answers to several sources of examples, each judged by a task of its own: what was gained beside what was kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from finetune.evaluation.answer import Answer
from finetune.evaluation.score import Score, cluster_of, count_images, require_answered
from finetune.evaluation.tasks import Task, Value

Record = Mapping[str, Any]
SEPARATOR = "/"  # between the name of a source and the id that a record has in it


def figures(task: Task, score: Score) -> dict[str, float]:
    """What metrics.jsonl says of a score: the metric under its key, and what it is made of."""
    found = {task.key: score.overall}
    found |= {f"{task.key}_{name}": value for name, value in score.by_answer_type.items()}
    if isinstance(task, MixtureTask):
        for name, of_source in score.by_source.items():
            found |= {f"{name}_{key}": value for key, value in figures(task.tasks[name], of_source).items()}
    return found


@dataclasses.dataclass(frozen=True)
class MixtureTask:
    """Judges the answers to each source by its own task; the metric is the geometric mean over the sources.

    It is for the comparison of a run's steps alone: what it is made of stands in `Score.by_source`. With the arithmetic
    mean the source with the largest figures would decide, and CIDEr-D goes to 1000; here a tenth more of one metric
    makes up for a tenth less of another one, whatever their units. It is 0 where one of them is.

    Attributes:
        tasks: by the names of the sources, with which the ids of their records begin.
    """

    tasks: Mapping[str, Task]
    name: str = "mixture"
    key: str = "mean_of_sources"

    @property
    def metric(self) -> str:
        """Such as: geometric mean of VQA accuracy (questions) and CIDEr-D (captions)."""
        return "geometric mean of " + " and ".join(f"{task.metric} ({name})" for name, task in self.tasks.items())

    @property
    def unit(self) -> str:
        """That of the sources, where they have one in common."""
        units = {task.unit for task in self.tasks.values()}
        return units.pop() if len(units) == 1 else "of different units"

    @property
    def value(self) -> Value | None:
        """That of a record's source; None where the task of one of them has none."""
        values = {name: task.value for name, task in self.tasks.items() if task.value is not None}
        if len(values) < len(self.tasks):
            return None
        return lambda answer, record: values[self.source_of(record)](answer, record)

    def require(self, records: Iterable[Record] = ()) -> None:
        """See `Task.require`."""
        by_source = self.by_source(records)
        for name, task in self.tasks.items():
            task.require(by_source[name])

    def score(self, answers: Mapping[str, Answer], records: Iterable[Record]) -> Score:
        """See `Task.score`. The interval takes the sources to be independent of each other (the delta method); a source
        without any of these records is left out.
        """
        records = list(records)
        require_answered(answers, records)
        scores = {
            name: self.tasks[name].score({record["id"]: answers[record["id"]] for record in some}, some)
            for name, some in self.by_source(records).items()
            if some
        }
        overall, interval = geometric_mean(list(scores.values()))
        return Score(
            metric=self.metric,
            overall=overall,
            interval=interval,
            questions=len(records),
            images=count_images(map(cluster_of, records)),
            by_answer_type={},
            by_question_type={},
            counts={"answer_type": {}, "question_type": {}},
            others={},
            unit=self.unit,
            values={id: value for score in scores.values() for id, value in score.values.items()},
            by_source=scores,
        )

    def by_source(self, records: Iterable[Record]) -> dict[str, list[Record]]:
        """The records of each source, told by their ids.

        Raises:
            ValueError: an id begins with the name of no source.
        """
        found: dict[str, list[Record]] = {name: [] for name in self.tasks}
        for record in records:
            found[self.source_of(record)].append(record)
        return found

    def source_of(self, record: Record) -> str:
        """The name of a record's source, as `by_source` tells it."""
        name: str = record["id"].partition(SEPARATOR)[0]
        if name not in self.tasks:
            raise ValueError(f"record {record['id']!r} is of no source; expected one of {', '.join(self.tasks)}")
        return name


def geometric_mean(scores: Sequence[Score]) -> tuple[float, tuple[float, float]]:
    """Of the overall figures, with a 95% interval."""
    count = len(scores)
    mean = math.prod(score.overall for score in scores) ** (1 / count)
    if not mean:
        return mean, (0.0, math.prod(score.interval[1] for score in scores) ** (1 / count))
    widths = [(score.interval[1] - score.interval[0]) / 2 / score.overall for score in scores]
    half = mean * math.hypot(*widths) / count
    return mean, (max(0.0, mean - half), mean + half)

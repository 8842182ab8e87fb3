"""The score of many answers: the mean of a value for each, with a confidence interval, also by type of question.

Not here: what an answer is worth (vqa_accuracy.py, tasks.py), figures that are no means (detection.py).
"""

import dataclasses
import math
import reprlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from data.text_rows import names_image

PERCENT = "percent"
Record = Mapping[str, Any]
Interval = Callable[[Sequence[float], Sequence[Hashable]], tuple[float, float]]
"""(values, the cluster of each) -> 95% confidence interval of their mean, times 100."""


@dataclasses.dataclass(frozen=True)
class Score:
    """How good answers are by one metric, unrounded. Questions without a type are in `overall` alone."""

    metric: str
    """In words, such as VQA accuracy."""
    overall: float
    interval: tuple[float, float]
    """95% confidence interval of `overall`; questions of one image may go right or wrong together."""
    questions: int
    images: int
    """Images, where the records name them, else questions: the independent units of the interval. Rows of text alone
    are such units too, and not counted here.
    """
    by_answer_type: dict[str, float]
    by_question_type: dict[str, float]
    counts: dict[str, dict[str, int]]
    """Questions per answer type and per question type, under the keys "answer_type" and "question_type"."""
    others: dict[str, float]
    """Further metrics of the same answers, by name, in percent; one that they do not determine is not in it."""
    unit: str = PERCENT
    """Of `overall`, its interval and the figures by type."""
    by_label: dict[str, float] = dataclasses.field(default_factory=dict)
    """A further metric of each label, in percent, where answers are labels or boxes with labels."""
    label_metric: str = ""
    """Which metric that is, in words."""
    by_source: dict[str, "Score"] = dataclasses.field(default_factory=dict)
    """Of each source, where the records are of several."""
    values: dict[str, float] = dataclasses.field(default_factory=dict, repr=False)
    """What each answer is worth by itself, by the id of its record, times 100; `overall` need not be their mean."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields by name without `values`, figures with the official two decimals."""
        rounded = {"overall": round(self.overall, 2), "interval": [round(bound, 2) for bound in self.interval]}
        for kind in ("by_answer_type", "by_question_type", "others", "by_label"):
            rounded[kind] = {name: round(value, 2) for name, value in getattr(self, kind).items()}
        rounded["by_source"] = {name: score.to_dict() for name, score in self.by_source.items()}
        names = [field.name for field in dataclasses.fields(self) if field.name != "values"]
        return {name: getattr(self, name) for name in names} | rounded

    def with_other(self, name: str, value: float, source: str = "") -> "Score":
        """The score with a further metric, in percent: its own, or where a source is named that source's."""
        if source:
            of_source = self.by_source[source].with_other(name, value)
            return dataclasses.replace(self, by_source=self.by_source | {source: of_source})
        return dataclasses.replace(self, others=self.others | {name: value})


def require_answered(answers: Mapping[str, object], records: Iterable[Record]) -> None:
    """One answer for every record, by id, and something to compare it with; a record has `id` and `answers`.

    Raises:
        ValueError: ids are missing, surplus or repeated, a record has no answers, or there is nothing to score.
    """
    seen: Counter[str] = Counter()
    unknown = None
    for record in records:
        seen[record["id"]] += 1
        if not record["answers"] and record["id"] in answers and unknown is None:
            unknown = record["id"]
    if unknown is not None:
        raise ValueError(f"question {unknown!r} has no annotated answers: only annotated questions can be scored")
    _check_ids(seen, answers)


def cluster_of(record: Record) -> Hashable:
    """What a record's answer may depend on: its image; the record itself where it names none."""
    return record.get("image_id") or ("question", record["id"])


def count_images(clusters: Iterable[Hashable]) -> int:
    """How many images the clusters are: that of a row of text alone is none."""
    return sum(not isinstance(cluster, str) or names_image(cluster) for cluster in set(clusters))


def mean_score(
    metric: str,
    values: Mapping[str, float],
    records: Iterable[Record],
    unit: str = PERCENT,
    interval: Interval | None = None,
) -> Score:
    """The mean of what each answer is worth, times 100; the two sets of ids agree exactly (`require_answered`).

    A record has `id`, `answer_type`, `question_type`; and for the interval perhaps `image_id`.

    Args:
        values: by the id of a record; 0 to 1 for the default interval.
        interval: of the mean; by default `wilson_interval`.
    """
    ordered: list[float] = []
    clusters: list[Hashable] = []
    groups: dict[str, dict[str, list[float]]] = {"answer_type": {}, "question_type": {}}
    for record in records:
        ordered.append(values[record["id"]])
        clusters.append(cluster_of(record))
        for kind, group in groups.items():
            if record[kind]:
                group.setdefault(record[kind], []).append(ordered[-1])
    return Score(
        metric=metric,
        overall=_percent(ordered),
        interval=(interval or wilson_interval)(ordered, clusters),
        questions=len(ordered),
        images=count_images(clusters),
        by_answer_type={name: _percent(group) for name, group in groups["answer_type"].items()},
        by_question_type={name: _percent(group) for name, group in groups["question_type"].items()},
        counts={kind: {name: len(group) for name, group in named.items()} for kind, named in groups.items()},
        others={},
        unit=unit,
        values={name: 100 * value for name, value in values.items()},
    )


def _percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)


def _check_ids(seen: Counter[str], answers: Mapping[str, object]) -> None:
    """Every question once, with one prediction, and no prediction beside them."""
    faults = {
        "without a prediction": [name for name in seen if name not in answers],
        "predicted but not asked": [name for name in answers if name not in seen],
        "asked more than once": [name for name, times in seen.items() if times > 1],
    }
    listed = [f"{len(ids)} {fault} ({reprlib.repr(ids)[1:-1]})" for fault, ids in faults.items() if ids]
    if listed or not seen:
        problem = "; ".join(listed) or "nothing to score"
        raise ValueError(f"expected one prediction for each of {len(seen)} questions: {problem}")


def wilson_interval(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, float]:
    """95% interval, in percent, of the mean of values in [0, 1] that may depend on each other within a cluster.

    Wilson's interval for as many independent questions as would tell as much: p(1 - p) / variance, the variance of
    the mean being estimated between clusters; at most all questions, and one per cluster where nothing varies.
    """
    total, mean = len(values), sum(values) / len(values)
    variance, images = _variance(values, clusters)
    effective = float(images)
    if variance > 1e-12 and images > 1:
        effective = min(float(total), mean * (1 - mean) / variance)
    shrink = 1.96**2 / effective
    half = math.sqrt(shrink * mean * (1 - mean) + shrink**2 / 4)
    low, high = ((mean + shrink / 2 + side) / (1 + shrink) for side in (-half, half))
    return max(0.0, 100 * low), min(100.0, 100 * high)


def normal_interval(highest: float) -> Interval:
    """95% intervals, times 100, of means of values from 0 to `highest` that may depend on each other within a cluster:
    the normal approximation, with the variance estimated between clusters, within what is possible. Of one cluster
    nothing is known of the variance, and the interval is all that is possible.
    """

    def interval(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, float]:
        mean = sum(values) / len(values)
        variance, images = _variance(values, clusters)
        half = 1.96 * math.sqrt(variance) if images > 1 else math.inf
        return 100 * max(0.0, mean - half), 100 * min(highest, mean + half)

    return interval


def _variance(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, int]:
    """Of the mean, estimated between clusters (0 where there is one); and how many clusters there are."""
    total, mean = len(values), sum(values) / len(values)
    residuals: defaultdict[Hashable, float] = defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        residuals[cluster] += value - mean
    count = len(residuals)
    variance = sum(residual**2 for residual in residuals.values()) / total**2
    return (variance * count / (count - 1) if count > 1 else 0.0), count

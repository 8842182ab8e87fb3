"""The score of many answers: the mean of a value for each, with a confidence interval, also by type of question.

Not here: what an answer is worth (vqa_accuracy.py, tasks.py).
"""

import math
import reprlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """How good answers are by one metric, in percent, unrounded. Questions without a type are in `overall` alone."""

    metric: str
    """In words, such as VQA accuracy."""
    overall: float
    interval: tuple[float, float]
    """95% confidence interval of `overall`, in percent; questions of one image may go right or wrong together."""
    questions: int
    images: int
    """Images, where the records name them, else questions: the independent units of the interval."""
    by_answer_type: dict[str, float]
    by_question_type: dict[str, float]
    counts: dict[str, dict[str, int]]
    """Questions per answer type and per question type, under the keys "answer_type" and "question_type"."""
    others: dict[str, float]
    """Further metrics of the same answers, by name, in percent."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields by name, percentages with the official two decimals."""
        rounded = {"overall": round(self.overall, 2), "interval": [round(bound, 2) for bound in self.interval]}
        for kind in ("by_answer_type", "by_question_type", "others"):
            rounded[kind] = {name: round(value, 2) for name, value in getattr(self, kind).items()}
        return asdict(self) | rounded


def mean_score(
    metric: str,
    value: Callable[[str, Mapping[str, Any]], float],
    predictions: Mapping[str, str],
    records: Iterable[Mapping[str, Any]],
) -> Score:
    """Score one prediction per record, by id; the two sets of ids must agree exactly.

    A record has `id`, `answers`, `answer_type`, `question_type`; and for the interval perhaps `image_id`.

    Args:
        value: of a prediction for a record, 0 to 1.

    Raises:
        ValueError: ids are missing, surplus or repeated, a record has no answers, or there is nothing to score.
    """
    seen: Counter[str] = Counter()
    values: list[float] = []
    images: list[Hashable] = []
    groups: dict[str, dict[str, list[float]]] = {"answer_type": {}, "question_type": {}}
    for record in records:
        name = record["id"]
        seen[name] += 1
        if name not in predictions:
            continue
        if not record["answers"]:
            raise ValueError(f"question {name!r} has no annotated answers: only annotated questions can be scored")
        values.append(value(predictions[name], record))
        images.append(record.get("image_id") or ("question", name))
        for kind, group in groups.items():
            if record[kind]:
                group.setdefault(record[kind], []).append(values[-1])
    _check_ids(seen, predictions)
    return Score(
        metric=metric,
        overall=_percent(values),
        interval=_confidence_interval(values, images),
        questions=len(values),
        images=len(set(images)),
        by_answer_type={name: _percent(group) for name, group in groups["answer_type"].items()},
        by_question_type={name: _percent(group) for name, group in groups["question_type"].items()},
        counts={kind: {name: len(group) for name, group in named.items()} for kind, named in groups.items()},
        others={},
    )


def _percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)


def _check_ids(seen: Counter[str], predictions: Mapping[str, str]) -> None:
    """Every question once, with one prediction, and no prediction beside them."""
    faults = {
        "without a prediction": [name for name in seen if name not in predictions],
        "predicted but not asked": [name for name in predictions if name not in seen],
        "asked more than once": [name for name, times in seen.items() if times > 1],
    }
    listed = [f"{len(ids)} {fault} ({reprlib.repr(ids)[1:-1]})" for fault, ids in faults.items() if ids]
    if listed or not seen:
        problem = "; ".join(listed) or "nothing to score"
        raise ValueError(f"expected one prediction for each of {len(seen)} questions: {problem}")


def _confidence_interval(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, float]:
    """95% interval, in percent, of the mean of values in [0, 1] that may depend on each other within a cluster.

    Wilson's interval for as many independent questions as would tell as much: p(1 - p) / variance, the variance of
    the mean being estimated between clusters; at most all questions, and one per cluster where nothing varies.
    """
    total, mean = len(values), sum(values) / len(values)
    residuals: defaultdict[Hashable, float] = defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        residuals[cluster] += value - mean
    effective = float(len(residuals))
    variance = sum(residual**2 for residual in residuals.values()) / total**2
    if variance > 1e-12 and len(residuals) > 1:
        variance *= len(residuals) / (len(residuals) - 1)
        effective = min(float(total), mean * (1 - mean) / variance)
    shrink = 1.96**2 / effective
    half = math.sqrt(shrink * mean * (1 - mean) + shrink**2 / 4)
    low, high = ((mean + shrink / 2 + side) / (1 + shrink) for side in (-half, half))
    return max(0.0, 100 * low), min(100.0, 100 * high)

"""Calibration: whether answers of a confidence are right as often as it says (Guo et al. 2017, arXiv 1706.04599).

Not here: what confidence an answer has (answer.py), and the chart of the bins (finetune/report/charts.py).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

ECE = "expected calibration error"  # its name among the further metrics of a score
BINS = 15


class Bin(NamedTuple):
    """Answers of similar confidence: how many, the mean of their confidences, and the mean of what they are worth."""

    answers: int
    confidence: float
    accuracy: float


def calibration_bins(confidences: Sequence[float], values: Sequence[float]) -> list[Bin]:
    """The bins that are not empty, of BINS equal ones: bin m holds the confidences in ((m - 1) / BINS, m / BINS], the
    first one 0 too.

    Args:
        confidences: of each answer, 0 to 1.
        values: what each answer is worth, 0 to 1.
    """
    upper = [m / BINS for m in range(1, BINS)]
    members: list[list[int]] = [[] for _ in range(BINS)]
    for i, confidence in enumerate(confidences):
        members[bisect_left(upper, confidence)].append(i)
    return [
        Bin(len(some), fmean(confidences[i] for i in some), fmean(values[i] for i in some)) for some in members if some
    ]


def expected_calibration_error(confidences: Sequence[float], values: Sequence[float]) -> float:
    """The mean over all answers, at least one, of the distance between confidence and accuracy in their bin, 0 to 1
    (section 2, equation 3).
    """
    bins = calibration_bins(confidences, values)
    return sum(of.answers * abs(of.accuracy - of.confidence) for of in bins) / len(confidences)

"""Answers that are allowed: the candidates of a file, or the labels of a data set, and the most likely one of them.

Not here: scoring them behind prompts (model/score.py), and going through a data set (`choose_answers` in evaluate.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.compute as pc
from torch import Tensor

from finetune.evaluation.answer import Answer

if TYPE_CHECKING:
    from datasets import Dataset

MOST_LABELS = 200  # that are scored without being asked for
LEFT_OUT = "accuracy among labels is left out"
LISTED = 3  # candidates that an answer names


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The answers that are scored.

    Attributes:
        answers: the answer to each record is the most likely of these; without any, answers are generated.
        labels: beside the generated answer, the most likely of these is looked at; by the name of a source whose
            answers are labels, "" where all records are of one.
    """

    answers: Sequence[str] = ()
    labels: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    @property
    def texts(self) -> Iterator[str]:
        """All of them."""
        return chain(self.answers, *self.labels.values())


GENERATED = Candidates()  # answers are generated, and nothing else is asked


def read_candidates(file: Path) -> list[str]:
    """The candidates of a text file in UTF-8, one a line, without outer spaces.

    Raises:
        ValueError: the file cannot be read; a line is empty, or repeats another; there are fewer than two.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")  # str.splitlines splits at U+2028
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}); expected a file with one answer a line") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not valid UTF-8 ({error.reason}); save the file as UTF-8") from error
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            raise ValueError(f"{file}, line {number}, is empty; expected one answer a line: delete that line")
        if text in seen:
            raise ValueError(
                f"{file}, line {number}, is {text!r:.100}, as line {seen[text]} is; expected each answer once: delete "
                "one of the lines"
            )
        seen[text] = number
    if len(seen) < 2:
        raise ValueError(f"{file} has the one answer {lines[0]!r:.100}; expected at least two, one a line")
    return list(seen)


def labels_of(*records: Dataset) -> list[str]:
    """The distinct right answers of records, of each its most frequent one, in the order in which they occur.

    Raises:
        ValueError: there are more than MOST_LABELS.
    """
    labels: dict[str, None] = {}
    for some in records:
        table = some.select_columns(["answer", "answers"]).with_format("arrow")[:]
        answered = table.filter(pc.greater(pc.list_value_length(table.column("answers")), 0))
        labels |= dict.fromkeys(pc.unique(answered.column("answer")).to_pylist())
    if len(labels) > MOST_LABELS:
        raise ValueError(
            f"{len(labels):,} distinct right answers; at most {MOST_LABELS} are scored beside what is generated: "
            "--candidates FILE, with one answer a line, names those to choose among"
        )
    return list(labels)


def most_likely(candidates: Sequence[str], log_probs: Tensor, tokens: Tensor) -> Answer:
    """The candidate with the largest sum of log-probabilities f32 [K], of so many tokens i64 [K], as an answer; the
    first one of several that are equally likely.
    """
    shares = log_probs.double().softmax(dim=0)  # (K,)
    ranked = log_probs.argsort(descending=True, stable=True).tolist()
    best = ranked[0]
    listed = tuple((candidates[k], float(shares[k])) for k in ranked[:LISTED])
    return Answer(candidates[best], True, float(log_probs[best]) / int(tokens[best]), candidates=listed)

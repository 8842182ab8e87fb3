"""What a network answered to one record, as a task scores it. Not here: producing answers (evaluate.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple


class Answer(NamedTuple):
    """A generated text, whether it ended in `<eos>` (otherwise `max_new_tokens` cut it off), and the mean
    log-probability of its tokens, `<eos>` included.

    tokens: of each its text and its log-probability (natural logarithm), `<eos>` included; joined they are `text` but
        for outer spaces and `<eos>`. Empty where the text alone is known.
    """

    text: str
    finished: bool
    log_prob: float
    tokens: tuple[tuple[str, float], ...] = ()

    @property
    def confidence(self) -> float:
        """The geometric mean of the tokens' probabilities."""
        return math.exp(self.log_prob)


def texts_alone(texts: Mapping[str, str]) -> dict[str, Answer]:
    """Answers, by id, of which nothing but the text is known, such as those of a results file: all are taken to be
    finished and equally sure.
    """
    return {id: Answer(text, True, 0.0) for id, text in texts.items()}

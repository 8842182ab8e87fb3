"""What a network answered to one record, as a task scores it. Not here: producing answers (evaluate.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple


class Answer(NamedTuple):
    """A text that was generated, or chosen among candidates, whether it ended in `<eos>` (otherwise `max_new_tokens`
    cut it off), and the mean log-probability of its tokens, `<eos>` included.

    tokens: of each its text and its log-probability (natural logarithm), `<eos>` included; joined they are `text` but
        for outer spaces and `<eos>`. Empty where the text was chosen, or it alone is known.
    candidates: the most likely ones, at most three, the chosen one first, each with its share of the probability that
        all candidates have together. Empty where the text was not chosen.
    """

    text: str
    finished: bool
    log_prob: float
    tokens: tuple[tuple[str, float], ...] = ()
    candidates: tuple[tuple[str, float], ...] = ()

    @property
    def confidence(self) -> float:
        """Of a chosen text its share among the candidates, else the geometric mean of the tokens' probabilities."""
        return self.candidates[0][1] if self.candidates else math.exp(self.log_prob)

    @property
    def has_confidence(self) -> bool:
        """Whether more than its text is known."""
        return bool(self.tokens or self.candidates)

    @property
    def listed(self) -> list[dict[str, str | float]]:
        """Its candidates, for JSON."""
        return [{"answer": text, "probability": round(share, 4)} for text, share in self.candidates]


def texts_alone(texts: Mapping[str, str]) -> dict[str, Answer]:
    """Answers, by id, of which nothing but the text is known, such as those of a results file: all are taken to be
    finished and equally sure.
    """
    return {id: Answer(text, True, 0.0) for id, text in texts.items()}

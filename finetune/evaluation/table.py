"""Scores as a table: one row for each evaluated model, one column for each answer type and each further metric."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from finetune.evaluation.score import Score
from finetune.system.console import new_table


def score_table(scores: Mapping[str, Score]) -> Table:
    """Scores by one metric, of the same questions."""
    first = next(iter(scores.values()))
    types = sorted({name for score in scores.values() for name in score.by_answer_type})
    title = f"{first.metric}, percent"
    table = new_table("", "overall", "95%", *types, *first.others, "questions", title=title)
    for name, score in scores.items():
        low, high = score.interval
        by_type = (f"{score.by_answer_type[kind]:.2f}" if kind in score.by_answer_type else "" for kind in types)
        others = (f"{value:.2f}" for value in score.others.values())
        overall = f"{score.overall:.2f}", f"{low:.2f} to {high:.2f}"
        table.add_row(name, *overall, *by_type, *others, f"{score.questions:,}")
    return table

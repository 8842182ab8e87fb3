"""Scores as a table: one row for each evaluated model, one column for each answer type and each further metric."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from finetune.evaluation.calibration import ECE
from finetune.evaluation.score import PERCENT, Score
from finetune.system.console import new_table


def score_table(scores: Mapping[str, Score]) -> Table:
    """Scores by one metric, of the same questions."""
    first = next(iter(scores.values()))
    types = sorted({name for score in scores.values() for name in score.by_answer_type})
    most_first = sorted(scores.values(), key=lambda score: -len(score.others))
    names = list(dict.fromkeys(name for score in most_first for name in score.others))
    short = ["ECE" if name == ECE else name for name in names]  # its whole name would take the room of three columns
    headed = short if first.unit == PERCENT else [f"{name}, percent" for name in short]
    title = f"{first.metric}, {first.unit}"
    sources = {name: score.metric for name, score in first.by_source.items()}
    of_sources = [f"{name}: {metric}" for name, metric in sources.items()]
    table = new_table("", "overall", "95%", *of_sources, *types, *headed, "questions", title=title)
    table.columns[0].no_wrap = True  # the figures stand under a short name
    for name, score in scores.items():
        low, high = score.interval
        by_type = (f"{score.by_answer_type[kind]:.2f}" if kind in score.by_answer_type else "" for kind in types)
        others = (f"{score.others[name]:.2f}" if name in score.others else "" for name in names)
        overall = f"{score.overall:.2f}", f"{low:.2f} to {high:.2f}"
        by_source = (
            f"{score.by_source[source].overall:.2f}" if source in score.by_source else "" for source in sources
        )
        table.add_row(name, *overall, *by_source, *by_type, *others, f"{score.questions:,}")
    return table

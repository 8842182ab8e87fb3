"""VQA accuracies as a table: one row for each evaluated model, one column for each answer type."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from finetune.evaluation.vqa_accuracy import VQAScore
from finetune.system.console import new_table


def accuracy_table(scores: Mapping[str, VQAScore]) -> Table:
    types = sorted({name for score in scores.values() for name in score.by_answer_type})
    table = new_table("", "overall", "95%", *types, "questions", title="VQA accuracy, percent")
    for name, score in scores.items():
        low, high = score.interval
        by_type = (f"{score.by_answer_type[kind]:.2f}" if kind in score.by_answer_type else "" for kind in types)
        table.add_row(name, f"{score.overall:.2f}", f"{low:.2f} to {high:.2f}", *by_type, f"{score.questions:,}")
    return table

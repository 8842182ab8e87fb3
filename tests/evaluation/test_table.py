"""Accuracies as a table."""

from __future__ import annotations

import dataclasses

from rich.console import Console
from rich.table import Table

from finetune.evaluation.answer import texts_alone
from finetune.evaluation.table import score_table
from finetune.evaluation.tasks import TASKS


def cells_of(table: Table) -> list[list[str]]:
    """What is shown, line by line."""
    console = Console(width=120, color_system=None)
    with console.capture() as captured:
        console.print(table)
    lines = captured.get().splitlines()
    return [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines]


def test_every_answer_type_has_a_column_and_every_model_a_row() -> None:
    """A model without questions of a type has an empty cell there."""
    records = [
        {"id": "1", "answers": ["yes"], "answer_type": "yes/no", "question_type": ""},
        {"id": "2", "answers": ["2"], "answer_type": "number", "question_type": ""},
    ]
    answers = texts_alone({"1": "yes", "2": "3"})
    score = TASKS["vqa"].score
    scores = {"base": score(texts_alone({"1": "no"}), records[:1]), "adapter": score(answers, records)}
    cells = cells_of(score_table(scores))
    assert ["", "overall", "95%", "number", "yes/no", "questions"] in cells
    rows = {row[0]: row for row in cells if row[0] in scores}
    assert (rows["base"][1], rows["base"][3:]) == ("0.00", ["", "0.00", "1"])
    assert (rows["adapter"][1], rows["adapter"][3:]) == ("50.00", ["0.00", "100.00", "2"])


def test_a_metric_that_one_model_has_not_is_empty_there_and_a_unit_is_said() -> None:
    records = [{"id": "1", "answers": ["a dog"], "answer_type": "", "question_type": ""}]
    whole = TASKS["answer"].score(texts_alone({"1": "a dog"}), records)
    base = dataclasses.replace(whole, overall=120.5, unit="times 100", others={"recall": 0.0})
    adapter = dataclasses.replace(base, others={"precision": 12.5, "recall": 25.0})
    cells = cells_of(score_table({"base": base, "adapter": adapter}))
    assert ["accuracy, times 100"] in cells
    assert ["", "overall", "95%", "precision, percent", "recall, percent", "questions"] in cells
    adapter_alone = score_table({"adapter": dataclasses.replace(whole, others={"expected calibration error": 3.0})})
    assert ["", "overall", "95%", "ECE", "questions"] in cells_of(adapter_alone)
    rows = {row[0]: row for row in cells if row[0] in ("base", "adapter")}
    assert rows["base"][3:] == ["", "0.00", "1"]
    assert rows["adapter"][3:] == ["12.50", "25.00", "1"]

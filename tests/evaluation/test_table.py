"""Accuracies as a table."""

from __future__ import annotations

from rich.console import Console

from finetune.evaluation.answer import texts_alone
from finetune.evaluation.table import score_table
from finetune.evaluation.tasks import TASKS


def test_every_answer_type_has_a_column_and_every_model_a_row() -> None:
    """A model without questions of a type has an empty cell there."""
    records = [
        {"id": "1", "answers": ["yes"], "answer_type": "yes/no", "question_type": ""},
        {"id": "2", "answers": ["2"], "answer_type": "number", "question_type": ""},
    ]
    answers = texts_alone({"1": "yes", "2": "3"})
    score = TASKS["vqa"].score
    scores = {"base": score(texts_alone({"1": "no"}), records[:1]), "adapter": score(answers, records)}
    console = Console(width=120, color_system=None)
    with console.capture() as captured:
        console.print(score_table(scores))
    cells = [
        [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in captured.get().splitlines()
    ]
    assert ["", "overall", "95%", "number", "yes/no", "questions"] in cells
    rows = {row[0]: row for row in cells if row[0] in scores}
    assert (rows["base"][1], rows["base"][3:]) == ("0.00", ["", "0.00", "1"])
    assert (rows["adapter"][1], rows["adapter"][3:]) == ("50.00", ["0.00", "100.00", "2"])

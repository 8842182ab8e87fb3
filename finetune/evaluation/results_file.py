"""Score an official results file: answers that exist already, from this toolkit or from any other."""

from __future__ import annotations

from pathlib import Path

from data.records import load_records
from finetune.evaluation.answer import texts_alone
from finetune.evaluation.evaluate import write_metrics
from finetune.evaluation.inputs import INPUTS_KEY, file_digests, first, require_same_inputs
from finetune.evaluation.score import Score
from finetune.evaluation.tasks import TASKS
from finetune.evaluation.vqa_accuracy import read_results
from finetune.system.console import show


def score_results(
    results: str, questions: str, annotations: str, limit: int | None = None, output: Path | None = None
) -> Score:
    """The accuracy of the answers in `results`.

    Args:
        limit: score the answers to the first questions only.
        output: directory to write metrics.json to; by default nothing is written.

    Raises:
        ValueError: a file cannot be read, ids differ, or `output` holds figures of other inputs.
    """
    files = file_digests(results=results, questions=questions, annotations=annotations)
    inputs = files | {"limit": limit}
    if output:
        require_same_inputs(output, inputs)
    records = load_records(questions=questions, annotations=annotations)
    answers = read_results(results)
    if limit is not None:
        excluded = set(records["id"][limit:])
        answers = {name: text for name, text in answers.items() if name not in excluded}
    scored = TASKS["vqa"].score(texts_alone(answers), first(records, limit))
    if output:
        write_metrics(output, scored, results=results, **{INPUTS_KEY: inputs})
    show(f"results: {results}")
    return scored

"""The first sentences of a report: what was trained on what, and what came of it."""

from __future__ import annotations

from finetune.evaluation.score import PERCENT
from finetune.report.result_page import public
from finetune.report.run_data import Arm, RunData


def summary(run: RunData) -> str:
    """What was trained on what, and what came of it, in a sentence."""
    model = public(run.config)["model"]["path"]
    how = {"dpo": "on preference pairs of ", "reward": "by rewards for its own answers to "}
    said = f"{model} was trained {how.get(run.config.train.objective, 'on ')}{run.config.data.title('train')}"
    arm = run.trained
    if arm is None and run.config.data.validation is None:
        return f"{said}. The run has no data.validation, and so nothing to evaluate on."
    if arm is None:
        return f"{said}. It has not been evaluated yet: evaluate.py does that, and writes this page again."
    base, by_source = run.base_beside(arm), arm.by_source or {"": arm}
    of_base = (base.by_source or {"": base}) if base else {}
    found = (came_of_it(of, of_base.get(name), name) for name, of in by_source.items())
    said = " ".join([f"{said}.", *found])
    if run.is_outdated(arm):
        said += " The weights were written after that: evaluate.py measures them as they are now."
    return said


def came_of_it(arm: Arm, base: Arm | None, source: str) -> str:
    """The score of what was trained, and of the base, in a sentence. source: of the questions; "" for the only one."""
    questions = " ".join(filter(None, (f"{arm.metrics['questions']:,} validation questions", source and f"({source})")))
    interval = f"(95% confidence: {arm.interval[0]:.2f} to {arm.interval[1]:.2f})"
    if arm.metric.endswith("accuracy"):
        said = f"Of {questions} it answers {arm.metrics['overall']:.2f}% rightly {interval}"
        return said + (f"; the base answers {base.metrics['overall']:.2f}%." if base else ".")
    unit = "%" if arm.unit == PERCENT else f", {arm.unit}"
    said = f"Its answers to {questions} have {arm.metric} of {arm.metrics['overall']:.2f}{unit} {interval}"
    return said + (f"; those of the base {base.metrics['overall']:.2f}{unit}." if base else ".")

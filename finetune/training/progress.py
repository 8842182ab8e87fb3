"""How far a run is: a progress bar where a person looks on, elsewhere a line now and then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.system.console import show
from finetune.system.progress import progress_bar
from finetune.training.metrics_file import MetricsFile

BAR = "{desc} {n_fmt}/{total_fmt} {bar} {remaining} left, {rate_fmt}{postfix}"
PARTS = 10  # of a run: at the end of each a line


def figures_of(logs: Mapping[str, float] | None, metric: str) -> dict[str, str]:
    """What a log or an evaluation found of the losses and of the metric, in words."""
    figures = {"loss": ("loss", 4), "eval_loss": ("val loss", 4), f"eval_{metric}": (metric, 2)}  # label, digits
    return {key: f"{label} {logs[key]:.{digits}f}" for key, (label, digits) in figures.items() if logs and key in logs}


class ProgressBar(TrainerCallback):
    """Steps done and left, with the remaining time, the rate, the last loss and the last value of the metric."""

    def __init__(self, metric: str = "accuracy") -> None:
        self.metric = metric
        self.bar: tqdm[Any] | None = None
        self.figures: dict[str, str] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        done, steps = state.global_step, state.max_steps
        self.bar = progress_bar("training", "step", total=steps, initial=done, leave=True, delay=0, bar_format=BAR)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        self.figures |= figures_of(logs, self.metric)
        if self.bar is not None:
            self.bar.set_postfix_str(self.beside_the_bar())

    def beside_the_bar(self) -> str:
        """What fits into 80 columns."""
        return ", ".join(self.figures[key] for key in ("loss", f"eval_{self.metric}") if key in self.figures)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


class ProgressLines(TrainerCallback):
    """A line at each tenth of a run and after each evaluation: step, time trained, and the figures that are new."""

    def __init__(self, metrics: MetricsFile, metric: str = "accuracy") -> None:
        self.metrics, self.metric = metrics, metric
        self.figures: dict[str, str] = {}
        self.said = 0  # at which step

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.said = state.global_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        self.figures |= figures_of(logs, self.metric)
        step, total = state.global_step, state.max_steps
        if "eval_loss" in self.figures or step * PARTS // total > self.said * PARTS // total:
            minutes, figures = self.metrics.line["seconds"] / 60, ", ".join(self.figures.values())
            show(f"step {step:,} of {total:,}, {minutes:,.1f} minutes" + (f": {figures}" if figures else ""))
            self.figures, self.said = {}, step
